"""Machines that ended by themselves start again, as often and as late as their definitions say."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpd import power
from qmpd.lifecycle import Happening
from qmpd.machine import Machine
from qmpd.record import Definition
from qmpd.restarting import HEALTHY_S, LONGEST_BACKOFF_S, Restarts, delay_before_restart
from qmpd.spec import MachineSpec, RestartPolicy
from qmpd.tasks import background
from qmpd.views import ExitView

PATIENCE_S = 20.0
#: The shortest there is.
BACKOFF_S = 0.1


def machine(**policy: object) -> Machine:
    """A machine that was launched a moment ago and runs."""
    restart = RestartPolicy(**{"when": "always", "backoff_s": BACKOFF_S, **policy})  # type: ignore[arg-type]  # as a test says
    spec = MachineSpec(name="one", board="toy", restart=restart)
    made = Machine(Definition(spec=spec, uuid="u", created_at="", changed_at=""), 1, lambda *_: None)
    made._began = asyncio.get_running_loop().time()
    made.happen(Happening.LAUNCH)
    made.happen(Happening.RAN)
    return made


def end(ended: Machine, *, clean: bool = False) -> Machine:
    ended.exit = ExitView(clean=clean)
    ended.happen(Happening.EXITED if clean else Happening.DIED)
    return ended


class Starter:
    """Starts nothing, says what it was told to say, and remembers."""

    def __init__(self, answers: list[bool]) -> None:
        self.answers = answers
        self.started: asyncio.Queue[str] = asyncio.Queue()

    async def __call__(self, name: str) -> bool:
        self.started.put_nowait(name)
        return self.answers.pop(0) if self.answers else True

    async def count(self, expected: int) -> int:
        """How often something was started, once that is as often as expected, or can never be."""
        async with asyncio.timeout(PATIENCE_S):
            for _ in range(expected):
                await self.started.get()
            while others := [task for task in asyncio.all_tasks() if task.get_name().startswith("restart:")]:
                await asyncio.wait(others)
        return expected + self.started.qsize()


@asynccontextmanager
async def restarts(*answers: bool) -> AsyncIterator[tuple[Restarts, Starter]]:
    starter = Starter(list(answers))
    async with background() as tasks:
        yield Restarts(tasks, starter), starter


@pytest.mark.parametrize(
    ("when", "failed", "again"),
    [("never", True, False), ("on-failure", True, True), ("on-failure", False, False), ("always", True, True), ("always", False, True)],
)
def test_the_policy_says_whether(when: str, failed: bool, again: bool) -> None:
    policy = RestartPolicy(when=when)  # type: ignore[arg-type]  # one of them
    assert (delay_before_restart(policy, failed=failed, attempts=0) is not None) is again


@given(st.integers(1, 1000), st.floats(0.1, 3600), st.integers(0, 1100))
def test_the_back_off_doubles_up_to_a_limit_and_stops(limit: int, backoff_s: float, attempts: int) -> None:
    delay = delay_before_restart(RestartPolicy(when="always", limit=limit, backoff_s=backoff_s), failed=True, attempts=attempts)
    if attempts >= limit:
        assert delay is None
    else:
        assert delay == min(backoff_s * 2**attempts, LONGEST_BACKOFF_S)


async def test_a_machine_that_ended_by_itself_is_started_again() -> None:
    async with restarts() as (watcher, starter):
        watcher.ended(end(machine()))
        assert await starter.count(1) == 1


async def test_a_start_that_fails_is_tried_again_until_the_limit() -> None:
    async with restarts(False, False, False) as (watcher, starter):
        watcher.ended(end(machine(limit=2)))
        assert await starter.count(2) == 2


async def test_a_clean_end_is_no_failure() -> None:
    async with restarts() as (watcher, starter):
        watcher.ended(end(machine(when="on-failure"), clean=True))
        assert await starter.count(0) == 0


async def test_a_machine_that_was_asked_to_end_stays_ended_and_begins_anew() -> None:
    async with restarts() as (watcher, starter):
        one = end(machine(limit=1))
        watcher.ended(one)
        assert await starter.count(1) == 1
        watcher.ended(one)
        assert await starter.count(0) == 0
        one.asked_to_end = True
        watcher.ended(one)
        assert await starter.count(0) == 0
        one.asked_to_end = False
        watcher.ended(one)
        assert await starter.count(1) == 1


async def test_a_healthy_run_makes_earlier_failures_count_no_more() -> None:
    async with restarts() as (watcher, starter):
        one = end(machine(limit=1))
        watcher.ended(one)
        assert await starter.count(1) == 1
        one._began -= HEALTHY_S + 1
        watcher.ended(one)
        assert await starter.count(1) == 1


async def test_a_machine_that_is_stopped_while_it_waits_stays_stopped() -> None:
    async with restarts() as (watcher, starter):
        one = end(machine())
        watcher.ended(one)
        assert (await power.stop(one)).method == "already-stopped"
        assert await starter.count(0) == 0


async def test_a_machine_that_somebody_started_meanwhile_is_left_alone() -> None:
    async with restarts() as (watcher, starter):
        one = end(machine())
        watcher.ended(one)
        one.happen(Happening.LAUNCH)
        assert await starter.count(0) == 0


async def test_a_machine_that_shall_never_start_again_any_more_does_not() -> None:
    async with restarts() as (watcher, starter):
        one = end(machine())
        watcher.ended(one)
        one.definition = machine(when="never").definition
        assert await starter.count(0) == 0


async def test_a_machine_that_is_killed_while_it_starts_again_is_left_alone() -> None:
    async with background() as tasks:
        starts: list[str] = []

        async def start(name: str) -> bool:
            starts.append(name)
            one.asked_to_end = True
            return False

        one = end(machine())
        Restarts(tasks, start).ended(one)
        async with asyncio.timeout(PATIENCE_S):
            while others := [task for task in asyncio.all_tasks() if task.get_name().startswith("restart:")]:
                await asyncio.wait(others)
        assert starts == ["one"]


async def test_while_no_machine_may_start_none_is_started_again() -> None:
    starter = Starter([])
    async with background() as tasks:
        Restarts(tasks, starter, lambda: False).ended(end(machine()))
        assert await starter.count(0) == 0


async def test_a_machine_that_is_held_is_started_when_it_is_let_go() -> None:
    async with restarts() as (watching, starter):
        ended = end(machine())
        with ended.holding("migrate"):
            watching.ended(ended)
            await asyncio.sleep(3 * BACKOFF_S)
            assert starter.started.empty()
        assert await starter.count(1) == 1
        assert watching._attempts == {"one": 1}


async def test_a_machine_that_is_held_and_was_ended_meanwhile_is_not_started() -> None:
    async with restarts() as (watching, starter):
        ended = end(machine())
        with ended.holding("migrate"):
            watching.ended(ended)
            await asyncio.sleep(0)
            ended.asked_to_end = True
        assert await starter.count(0) == 0
