"""The onlooker sees two running copies when there are two, and none when there are not; the trace sees a byte that was lost."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.guests.build import Guest
from tests.guests.trace import check_trace
from tests.migration.byhand import Mover, Pair, credentials, move, plain_argv, uuid_of
from tests.migration.network import Network
from tests.migration.onlooker import Onlooker

pytestmark = pytest.mark.qemu

#: Generous: only a hang may fail.
PATIENCE_S = 120.0
LOOK_S = 0.02


def until(wanted: Callable[[], object]) -> None:
    """Returns when it is so."""
    end = time.monotonic() + PATIENCE_S
    while not wanted():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(LOOK_S)


def printed(*movers: Mover) -> bytes:
    """What the guest printed, wherever it was, in this order."""
    return b"".join(mover.console.read_bytes() for mover in movers)


def grown(mover: Mover, count: int) -> Callable[[], bool]:
    """Whether so many bytes more were printed."""
    size = mover.console.stat().st_size
    return lambda: mover.console.stat().st_size >= size + count


@pytest.fixture
def argv(guests: dict[str, Guest], onlooker: Onlooker) -> tuple[str, ...]:
    made = plain_argv(guests["aarch64-virt"])
    onlooker.mind(uuid_of(made))
    return made


@pytest.fixture
def pair(argv: tuple[str, ...], laid: Network, tmp_path: Path) -> Pair:
    return Pair(argv, laid, credentials(tmp_path, laid.stations))


def test_a_machine_that_is_moved_runs_once_and_loses_no_byte(pair: Pair, onlooker: Onlooker) -> None:
    with pair.source() as here:
        until(grown(here, 100))
        with pair.destination() as there:
            move(pair, here, there)
            until(grown(there, 100))
            assert [life.pid for life in onlooker.running(pair.uuid)] == [there.pid]
            assert onlooker.overlaps(pair.uuid) == []
            assert 0 < onlooker.gap(pair.uuid) < PATIENCE_S
            trace = check_trace(printed(here, there))
            assert (trace.boots, trace.breaks) == (1, ())
    assert onlooker.alive(pair.uuid) == []


def test_a_source_that_is_set_going_after_it_was_moved_is_seen(pair: Pair, onlooker: Onlooker) -> None:
    """The split brain of the books: `completed`, and then `cont` on both sides."""
    with pair.source() as here, pair.destination() as there:
        until(grown(here, 100))
        pair.send(here, pair.listen(there))
        there.call("cont")
        here.call("cont")
        until(lambda: {overlap.evidence for overlap in onlooker.overlaps(pair.uuid)} == {"what they said", "processors' time"})
        assert len(onlooker.running(pair.uuid)) == 2
        assert {pid for overlap in onlooker.overlaps(pair.uuid) for pid in overlap.pids} == {here.pid, there.pid}
        until(grown(here, 50))
        until(grown(there, 50))
        assert not check_trace(printed(here, there)).whole


def test_two_copies_that_say_nothing_are_seen_by_what_they_use(guests: dict[str, Guest], onlooker: Onlooker) -> None:
    """Each runs from its first moment on, before there is an event: its state at the beginning counts as well."""
    argv = plain_argv(guests["aarch64-virt"])
    onlooker.mind(uuid_of(argv))
    going = tuple(word for word in argv if word != "-S")
    with Mover(going), Mover(going):
        until(lambda: {overlap.evidence for overlap in onlooker.overlaps(uuid_of(argv))} == {"what they said", "processors' time"})


def test_a_copy_that_stands_still_is_not_mistaken_for_one_that_runs(argv: tuple[str, ...], onlooker: Onlooker) -> None:
    name = uuid_of(argv)
    with Mover(argv, halted=False) as one, Mover(argv) as other:
        until(grown(one, 100))
        assert [life.pid for life in onlooker.running(name)] == [one.pid]
        one.call("stop")
        other.call("cont")
        until(grown(other, 100))
        assert [life.pid for life in onlooker.running(name)] == [other.pid]
        assert onlooker.overlaps(name) == []
        assert len(onlooker.alive(name)) == 2


def test_a_copy_that_was_killed_does_not_run_on(argv: tuple[str, ...], onlooker: Onlooker) -> None:
    name = uuid_of(argv)
    with Mover(argv, halted=False) as one:
        until(grown(one, 100))
        assert onlooker.running(name)
    until(lambda: not onlooker.alive(name))
    with Mover(argv, halted=False) as other:
        until(grown(other, 100))
        assert onlooker.overlaps(name) == []


@pytest.mark.parametrize("lost", [1, 37, 200])
def test_a_byte_that_was_lost_on_the_way_is_seen(pair: Pair, lost: int) -> None:
    with pair.source() as here, pair.destination() as there:
        until(grown(here, 300))
        move(pair, here, there)
        until(grown(there, 100))
        whole, rest = printed(here), printed(there)
        assert check_trace(whole + rest).whole
        (broken,) = check_trace(whole[:-lost] + rest).breaks
        assert broken.lost == lost
        (doubled,) = check_trace(whole + whole[-lost:] + rest).breaks
        assert doubled.lost is not None
        assert doubled.lost + doubled.skipped == 0 or doubled.lost < 0
