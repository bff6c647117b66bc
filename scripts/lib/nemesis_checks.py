"""What must hold of a whole run, beside the model of each machine: processes that are accounted for, and events without gap or doubt.

Everything here is pure: entries, lives and events in, broken promises out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Final

from qmpd.lifecycle import AT_REST, TABLE, State
from qmpd.views import Event
from scripts.lib.nemesis_history import OK, REFUSED, UNKNOWN, Entry, Life, Violation, of_machine

#: What ends a QEMU, and what starts one.
ENDING: Final = frozenset({"stop", "kill", "shutdown", "qmp-quit", "fault-kill"})
STARTING: Final = frozenset({"start", "create"})
#: A start that fails ends what it started.
FAILED_START: Final = frozenset({"launch_failed", "qemu_died", "qemu_silent", "host_error", "no_space", "monitor_unavailable", UNKNOWN})
#: What a journal says of events that it could not take.
EVENTS_LOST: Final = "events-lost"
LAST_EVENTS: Final = 12
#: The kernel and the watcher on a loaded host; the order of what lies closer together is not known.
SLACK_S: Final = 1.0


def unaccounted(entries: Sequence[Entry], lives: Iterable[Life]) -> list[Violation]:
    """QEMUs that came or went although nobody asked, and such that outlived an acknowledged end (I2: none without a reason)."""
    found = []
    for life in lives:
        own = of_machine(entries, life.machine)
        what = f"pid {life.pid} of machine {life.machine} outlived an acknowledged"
        found += [_violation("I3", f"{what} {entry.kind}", own, entry.begin) for entry in _acknowledged_ends(own, life)]
        if not any(_explains_start(entry, life) for entry in own):
            found.append(_violation("I2", f"nobody started pid {life.pid} of machine {life.machine}", own, life.first))
        if life.gone is not None and not any(_explains_end(entry, life) for entry in own):
            found.append(_violation("I2", f"nobody ended pid {life.pid} of machine {life.machine}", own, life.gone))
    return found


def _acknowledged_ends(own: Iterable[Entry], life: Life) -> list[Entry]:
    """Ends that were acknowledged, and began when this process was there, although it was seen later."""
    return [
        entry
        for entry in own
        if entry.kind in {"stop", "kill"}
        and entry.outcome == OK
        and entry.begin > life.first
        and entry.end is not None
        and life.last > entry.end + SLACK_S
    ]


def _explains_start(entry: Entry, life: Life) -> bool:
    if entry.kind not in STARTING or entry.outcome == REFUSED or entry.begin > life.first + SLACK_S:
        return False
    return entry.end is None or entry.end >= life.absent - SLACK_S


def _explains_end(entry: Entry, life: Life) -> bool:
    ends = entry.kind in ENDING or (entry.kind in STARTING and entry.outcome in FAILED_START)
    if not ends or entry.outcome == REFUSED or life.gone is None or entry.begin > life.gone + SLACK_S:
        return False
    # `quit` and a shutdown are answered before the process has ended.
    late = entry.kind in {"qmp-quit", "shutdown"}
    return entry.end is None or late or entry.end >= life.last - SLACK_S


def numbered(followed: Mapping[str, Sequence[Event]], kept: Sequence[Event]) -> list[Violation]:
    """Whether every follower saw every number once, in order, and the same under it as everybody else, and as what is kept."""
    found = _in_order("the journal", kept)
    truth = {event.number: event for event in kept}
    for who, events in followed.items():
        found += _in_order(who, events)
        for event in events:
            known = truth.setdefault(event.number, event)
            if known != event:
                found.append(Violation(invariant="events", what=f"number {event.number} is of two events: {known} and {event}"))
    return found


def _in_order(who: str, events: Sequence[Event]) -> list[Violation]:
    return [
        Violation(invariant="events", what=f"{who} has event {event.number} after {before.number}")
        for before, event in pairwise(events)
        if event.number != before.number + 1
    ]


def told(kept: Sequence[Event], restarts: int) -> tuple[list[Violation], int]:
    """Whether the events of each machine tell a possible life: every change follows from the one before, every end is told once.

    A new daemon begins with every machine at rest and then finds what lives. One that was killed may have had no time to tell what it saw:
    how many changes were not told comes second, and per machine there is at most one for each of `restarts`.
    """
    found: list[Violation] = []
    unseen: Counter[str] = Counter()
    untold: Counter[str] = Counter()
    states: dict[str, str] = {}
    first: str | None = str(State.STOPPED)
    for event in kept:
        name = event.machine or ""
        if event.kind == EVENTS_LOST:
            states, first = {}, None  # the disk was full, and the journal says so: anything may have happened
        if event.kind in {"machine.created", "machine.deleted"}:
            states[name] = str(State.STOPPED)
        if event.kind != "machine.state":
            continue
        previous, state = str(event.data.get("previous")), str(event.data.get("state"))
        if not _possible(previous, state):
            found.append(Violation(invariant="I4", what=f"event {event.number}: {previous} cannot become {state}", machine=name))
        last = states.get(name, first)
        if last not in (None, previous) and not (previous in AT_REST and last in AT_REST):
            if previous != State.STOPPED:
                what = f"event {event.number}: {name} was {last}, not {previous}"
                found.append(Violation(invariant="I4", what=what, machine=name, history=_of(kept, name, event.number)))
            (unseen if state == State.UNREACHABLE else untold)[name] += 1
        states[name] = state
    found += [
        Violation(invariant="I4", what=f"{name} changed {count} times untold, with {restarts} restarts of the daemon", machine=name)
        for name, count in [*unseen.items(), *untold.items()]
        if count > restarts
    ]
    return found, sum(untold.values())


def _of(kept: Sequence[Event], machine: str, number: int) -> tuple[str, ...]:
    """The last events of a machine up to a number, in words."""
    own = [event for event in kept if event.machine == machine and event.number <= number]
    return tuple(f"{event.number} {event.at} {event.kind} {event.data}"[:200] for event in own[-LAST_EVENTS:])


def _possible(previous: str, state: str) -> bool:
    return state in {str(after) for after in TABLE[State(previous)].values()}


def _violation(invariant: str, what: str, own: Sequence[Entry], moment: float) -> Violation:
    near = [entry for entry in own if entry.begin <= moment + SLACK_S and (entry.end is None or entry.end >= moment - 20)]
    return Violation(invariant=invariant, what=what, machine=own[0].machine if own else "", history=tuple(entry.line() for entry in near))


#: What a machine's console may hold: a boot begins with a capital that is nowhere else in what the guests print.
_BOOT: Final = b"B"


def misprinted(log: bytes, name: str, stream: bytes) -> str | None:
    """What is wrong with a console log of our guests: every boot prints its banner and stream from the beginning on, maybe cut off."""
    for number, boot in enumerate(log.split(_BOOT)):
        expected = (f"M-OK {name}\r\n".encode() + stream)[: len(boot)]
        if number == 0 and boot:
            return f"begins with {boot[:40]!r}"
        if number and boot != expected:
            at = next((at for at in range(min(len(boot), len(expected))) if boot[at] != expected[at]), len(expected))
            return f"boot {number} is wrong at byte {at}: {boot[max(0, at - 20) : at + 20]!r}"
    return None
