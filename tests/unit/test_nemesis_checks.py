"""The checks of a whole nemesis run let pass what may be, and find what may not."""

from __future__ import annotations

import pytest

from qmpd.views import Event
from scripts.lib.nemesis_checks import misprinted, numbered, told, unaccounted
from scripts.lib.nemesis_history import OK, REFUSED, UNKNOWN, Entry, Life
from scripts.lib.nemesis_operations import compared
from tests.guests.trace import stream

GUEST = "x86_64-microvm"
BANNER = f"BM-OK {GUEST}\r\n".encode()


def entry(kind: str, begin: float, end: float | None, outcome: str = OK) -> Entry:
    return Entry(number=int(begin), who="a", kind=kind, machine="n00", begin=begin, end=end, outcome=outcome)


def life(first: float, last: float, gone: float | None) -> Life:
    return Life(machine="n00", pid=42, started=1, first=first, last=last, gone=gone, absent=first - 0.1)


def broken(entries: list[Entry], *lives: Life) -> list[str]:
    return [violation.what for violation in unaccounted(entries, lives)]


def test_a_process_that_was_started_and_ended_is_accounted_for() -> None:
    assert not broken([entry("start", 9, 10), entry("stop", 20, 21)], life(10, 20, 20.5))
    assert not broken([entry("start", 9, None, UNKNOWN), entry("fault-kill", 20, 20.4)], life(14, 20, 20.5))
    assert not broken([entry("create", 9, 10, "launch_failed")], life(9.5, 9.8, 9.9))
    assert not broken([entry("start", 9, 10)], life(10, 50, None))


@pytest.mark.parametrize(
    ("entries", "what"),
    [
        ([], "nobody started pid 42"),
        ([entry("start", 1, 2)], "nobody started pid 42"),
        ([entry("start", 9, 10, REFUSED)], "nobody started pid 42"),
        ([entry("start", 9, 10)], "nobody ended pid 42"),
        ([entry("start", 9, 10), entry("stop", 2, 3)], "nobody ended pid 42"),
        ([entry("start", 9, 10), entry("stop", 30, 31)], "nobody ended pid 42"),
        ([entry("start", 9, 10), entry("pause", 19, 21)], "nobody ended pid 42"),
    ],
)
def test_a_process_that_came_or_went_by_itself_is_found(entries: list[Entry], what: str) -> None:
    assert any(what in one for one in broken(entries, life(10, 20, 20.5)))


def test_a_process_that_outlives_an_acknowledged_end_is_found() -> None:
    asked = [entry("start", 9, 10), entry("stop", 15, 16), entry("kill", 19, 21)]
    assert any("outlived an acknowledged stop" in one for one in broken(asked, life(10, 20, 20.5)))


def state(number: int, previous: str, new: str) -> Event:
    return Event(number=number, at=f"at {number}", kind="machine.state", machine="n00", data={"previous": previous, "state": new})


LIFE = [state(1, "stopped", "starting"), state(2, "starting", "running"), state(3, "running", "crashed")]


def test_numbers_that_rise_by_one_and_mean_the_same_to_all_are_right() -> None:
    assert not numbered({"one": LIFE, "other": LIFE[1:]}, LIFE)


def test_a_gap_a_repetition_and_a_number_with_two_meanings_are_found() -> None:
    other = state(2, "starting", "paused")
    assert numbered({"one": [LIFE[0], LIFE[2]]}, LIFE)
    assert numbered({"one": [LIFE[0], LIFE[0]]}, LIFE)
    assert numbered({"one": [LIFE[0], other]}, LIFE)
    assert numbered({"one": [LIFE[0], other], "two": LIFE}, [])
    assert numbered({}, [LIFE[0], LIFE[2]])


def test_a_life_that_was_told_is_right() -> None:
    assert told(LIFE, 0) == ([], 0)


def test_a_new_daemon_finds_what_it_had_not_seen() -> None:
    found = [*LIFE[:2], state(3, "stopped", "unreachable"), state(4, "unreachable", "running"), state(5, "running", "stopped")]
    assert told(found, 1) == ([], 0)
    assert told(found, 0)[0]


def test_an_end_that_was_not_told_counts_once_for_each_restart() -> None:
    untold = [*LIFE[:2], state(3, "stopped", "starting"), state(4, "starting", "running")]
    assert told(untold, 1) == ([], 1)
    assert told(untold, 0)[0]


def test_an_end_that_is_told_twice_and_a_change_that_cannot_be_are_found() -> None:
    assert told([*LIFE, state(4, "running", "crashed")], 5)[0]
    assert told([state(1, "stopped", "running")], 5)[0]


def test_what_the_journal_says_it_lost_is_not_held_against_it() -> None:
    lost = Event(number=2, at="", kind="events-lost", data={"count": 3})
    late = state(3, "running", "stopped")
    assert told([LIFE[0], lost, late], 0) == ([], 0)
    assert told([LIFE[0], late], 0)[0]
    assert told([LIFE[0], lost, late, state(4, "paused", "running")], 0)[0]


def test_a_console_holds_what_its_guest_printed_even_when_it_was_cut_off() -> None:
    lines = stream(0, 500)
    assert misprinted(b"", GUEST, lines) is None
    assert misprinted(BANNER + lines, GUEST, lines) is None
    assert misprinted(BANNER + lines[:77] + b"BM-O" + BANNER[:3] + BANNER + lines[:100], GUEST, lines) is None


@pytest.mark.parametrize(
    "log",
    [
        b"x" + BANNER,
        BANNER + stream(1, 100),
        BANNER + stream(0, 50) + stream(51, 50),
        BANNER + stream(0, 50) + stream(49, 50),
        BANNER + BANNER[1:],
    ],
)
def test_a_console_that_lost_or_doubled_a_byte_is_found(log: bytes) -> None:
    assert misprinted(log, GUEST, stream(0, 500)) is not None


def test_what_was_read_of_a_console_once_is_read_again() -> None:
    known = bytearray(b"abc")
    assert compared(known, 1, b"bcdef") is None
    assert known == b"abcdef"
    assert compared(known, 2, b"cd") is None
    assert compared(known, 2, b"xd") is not None
    assert known == b"abcdef"
