"""Machines start with the daemon in the order that their definitions give, and one that fails keeps nobody else from it."""

from __future__ import annotations

import asyncio
from random import Random

from hypothesis import given
from hypothesis import strategies as st

from qmpd.autostart import start_in_order, waves
from qmpd.spec import MachineSpec


def spec(name: str, order: int = 0, delay_s: float = 0.0) -> MachineSpec:
    return MachineSpec(name=name, board="toy", autostart=True, autostart_order=order, autostart_delay_s=delay_s)


SPECS = st.lists(
    st.builds(spec, st.from_regex(r"[a-z]{1,4}", fullmatch=True), st.integers(-3, 3), st.floats(0, 100)),
    max_size=12,
    unique_by=lambda one: one.name,
)


@given(SPECS)
def test_every_machine_is_in_one_wave_and_no_wave_comes_before_a_lower_order(specs: list[MachineSpec]) -> None:
    found = waves(specs)
    orders = [wave.order for wave in found]
    assert orders == sorted(set(orders))
    assert {name: wave.order for wave in found for name in wave.names} == {one.name: one.autostart_order for one in specs}
    assert sum(len(wave.names) for wave in found) == len(specs)


@given(SPECS)
def test_the_longest_delay_of_a_wave_counts(specs: list[MachineSpec]) -> None:
    for wave in waves(specs):
        assert wave.delay_s == max(one.autostart_delay_s for one in specs if one.autostart_order == wave.order)


@given(SPECS, st.randoms())
def test_the_waves_do_not_depend_on_how_the_machines_are_listed(specs: list[MachineSpec], random: Random) -> None:
    shuffled = list(specs)
    random.shuffle(shuffled)
    assert waves(shuffled) == waves(specs)


class Starter:
    """Starts nothing; remembers who was under way when somebody was started."""

    def __init__(self, failing: frozenset[str] = frozenset(), mistaken: frozenset[str] = frozenset()) -> None:
        self.failing = failing
        self.mistaken = mistaken
        self.started: list[str] = []
        self.under_way: set[str] = set()
        self.together: set[frozenset[str]] = set()

    async def __call__(self, name: str) -> bool:
        self.under_way.add(name)
        await asyncio.sleep(0)
        self.together.add(frozenset(self.under_way))
        self.under_way.discard(name)
        self.started.append(name)
        if name in self.mistaken:
            raise RuntimeError(name)
        return name not in self.failing


async def test_those_of_one_order_start_together_and_the_next_after_them() -> None:
    starter = Starter()
    await start_in_order([spec("c", 1), spec("b"), spec("a"), spec("d", -1)], starter, lambda: True)
    assert starter.started == ["d", "a", "b", "c"]
    assert frozenset({"a", "b"}) in starter.together
    assert not any({"d", "c"} & group and len(group) > 1 for group in starter.together)


async def test_one_that_fails_does_not_stop_the_rest() -> None:
    starter = Starter(failing=frozenset({"a"}), mistaken=frozenset({"b"}))
    await start_in_order([spec("a"), spec("b"), spec("c"), spec("d", 1)], starter, lambda: True)
    assert starter.started == ["a", "b", "c", "d"]


async def test_nothing_more_starts_once_it_is_not_wanted() -> None:
    starter = Starter()
    await start_in_order([spec("a"), spec("b", 1)], starter, lambda: not starter.started)
    assert starter.started == ["a"]
