"""The linear model of one machine, and the judge of a history: is there an order in which all that was answered can be true?

Theory: each operation takes effect at one instant between its begin and its end (Herlihy and Wing's linearizability). The judge reads a
history in the order of time and keeps every state the machine can be in, with the operations under way that have taken effect
already (Lowe's just-in-time linearization). When an operation ends and no state can explain its outcome, the history is wrong there.

Rules: an outcome that is unknown may take effect at any time until the next rest, or never. What was observed at a rest is exact. A
definition is known by the mark in its labels; its revision is known once somebody was told it.
What the daemon says of a machine's state in between follows reality by a moment and is not judged here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Final

import msgspec

from scripts.lib.nemesis_history import DOWN, PAUSED, REFUSED, RUNNING, UNKNOWN, Entry

#: More states than this are not followed: the history is undecided, not wrong.
MOST_CONFIGURATIONS: Final = 20_000
REST: Final = "rest"
#: Errors after which nothing was changed.
HARMLESS: Final = frozenset(
    {REFUSED, "invalid", "wrong_state", "held", "too_many_requests", "stale_revision", "already_exists", "not_found", "no_space",
     "forbidden", "revision_required", "not_yet", "qemu_refused", "undecodable"}
)  # fmt: skip
#: Outcomes that say whether there is a machine of that name.
ABSENT: Final = "not_found"
PRESENT: Final = frozenset({"wrong_state", "held", "stale_revision", "not_yet", "qemu_refused"})


class State(msgspec.Struct, frozen=True, kw_only=True):
    """A machine: its definition's mark (None: there is no machine), its revision if anybody knows it, and its QEMU."""

    mark: str | None = None
    revision: int | None = None
    run: str = DOWN


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """`wrong` is the entry that nothing can explain, None for a history that is right; `states` what was possible before it."""

    wrong: Entry | None = None
    states: tuple[State, ...] = ()
    decided: bool = True


Step = Callable[[State, Entry], tuple[State, ...]]


def _created(state: State, entry: Entry) -> tuple[State, ...]:
    if state.mark is not None:
        return ()
    return (State(mark=entry.mark, revision=entry.given, run=entry.run or DOWN),)


def _replaced(state: State, entry: Entry) -> tuple[State, ...]:
    if state.mark is None or state.run != DOWN or not _is_revision(state, entry):
        return ()
    return (State(mark=entry.mark, revision=entry.given),)


def _deleted(state: State, entry: Entry) -> tuple[State, ...]:
    if state.mark is None or state.run != DOWN or not _is_revision(state, entry):
        return ()
    return (State(),)


def _started(state: State, entry: Entry) -> tuple[State, ...]:
    return (_running_as(state, entry.run),) if state.mark is not None and state.run == DOWN else ()


def _halted(state: State, _entry: Entry) -> tuple[State, ...]:
    return (_running_as(state, PAUSED),) if state.run != DOWN else ()


def _resumed(state: State, _entry: Entry) -> tuple[State, ...]:
    return (_running_as(state, RUNNING),) if state.run != DOWN else ()


def _ended(state: State, _entry: Entry) -> tuple[State, ...]:
    return (_running_as(state, DOWN),) if state.mark is not None else ()


def _killed(state: State, _entry: Entry) -> tuple[State, ...]:
    return (_running_as(state, DOWN),)


def _read(state: State, entry: Entry) -> tuple[State, ...]:
    if state.mark != entry.mark or state.revision not in (None, entry.revision):
        return ()
    return (msgspec.structs.replace(state, revision=entry.revision),)


def _used(state: State, _entry: Entry) -> tuple[State, ...]:
    return (state,) if state.mark is not None else ()


def _observed(state: State, entry: Entry) -> tuple[State, ...]:
    if state.run != (entry.run or DOWN):
        return ()
    if not entry.mark:
        return (state,) if state.mark is None else ()
    return _read(state, entry)


#: What an operation that succeeded did.
EFFECTS: Final[dict[str, Step]] = {
    "create": _created, "replace": _replaced, "delete": _deleted, "start": _started, "pause": _halted, "resume": _resumed,
    "stop": _ended, "kill": _ended, "shutdown": _ended, "qmp-stop": _halted, "qmp-cont": _resumed, "qmp-quit": _ended,
    "fault-kill": _killed, "definition": _read, "list": _read, "view": _read, REST: _observed,
}  # fmt: skip
#: The ones whose order matters to others.
CHANGES: Final = frozenset(EFFECTS) - {"definition", "list", "view", REST}


def possible(state: State, entry: Entry, *, name_in_use: bool = False) -> tuple[State, ...]:
    """The states that can follow if `entry` takes effect now, in this state; none if its outcome cannot be explained here.

    `name_in_use`: somebody else is creating or deleting a machine of this name.
    """
    effect = EFFECTS.get(entry.kind, _used)
    if entry.kind == REST:
        return effect(state, entry)
    match entry.outcome:
        case "ok" | "unknown":
            return effect(state, entry)
        case "not_found":
            return (state,) if state.mark is None else ()
        case "already_exists":
            # The name of a machine that is being made, or whose files are being removed, is taken too.
            return (state,) if state.mark is not None or name_in_use else ()
        case "stale_revision":
            return (state,) if state.mark is not None and (state.revision is None or state.revision != entry.revision) else ()
    if entry.outcome in PRESENT and entry.kind != "create":
        return (state,) if state.mark is not None else ()
    if entry.outcome in HARMLESS:
        return (state,)
    return (state, *_half_done(state, entry, effect))


def _half_done(state: State, entry: Entry, effect: Step) -> tuple[State, ...]:
    """What an operation that failed on the way may have left: its effect, or a definition whose machine was not started."""
    done = effect(state, entry)
    if entry.kind == "create":
        return (*done, *effect(state, msgspec.structs.replace(entry, run=DOWN)))
    return done


def judge(entries: Iterable[Entry], initial: State | None = None) -> Verdict:
    """Whether these entries, all of one machine, have an order that explains every outcome. They begin in `initial`."""
    following = _Following(initial or State())
    moments: list[tuple[float, int, Entry]] = []
    for entry in entries:
        moments.append((entry.begin, 0, entry))
        if entry.end is not None and entry.outcome != UNKNOWN:
            moments.append((entry.end, 1, entry))
    # Of two things at the same moment the begin counts as earlier: then they overlap, and both orders are allowed.
    for _, ends, entry in sorted(moments, key=lambda moment: moment[:2]):
        if not ends:
            following.begin(entry)
            continue
        before = following.states()
        if not following.end(entry):
            return Verdict(wrong=entry, states=before)
        if following.too_many:
            return Verdict(decided=False)
    return Verdict()


class _Following:
    """Every configuration that explains what has ended so far: a state, and which operations under way have taken effect in it."""

    def __init__(self, initial: State) -> None:
        self._found: set[tuple[State, frozenset[int]]] = {(initial, frozenset())}
        self._pending: dict[int, Entry] = {}
        self.too_many = False

    def states(self) -> tuple[State, ...]:
        return tuple({state for state, _ in self._found})

    def begin(self, entry: Entry) -> None:
        if entry.outcome != UNKNOWN or entry.kind in CHANGES:
            self._pending[entry.number] = entry

    def end(self, entry: Entry) -> bool:
        """Keeps what explains that this entry has ended with its outcome; False if nothing does."""
        kept = self._explained(entry.number)
        del self._pending[entry.number]
        if entry.kind == REST:
            # What is unknown and had not taken effect by now never will.
            self._pending = {number: other for number, other in self._pending.items() if other.outcome != UNKNOWN}
            kept = {(state, done & set(self._pending)) for state, done in kept}
        self._found = {(state, done - {entry.number}) for state, done in kept}
        return bool(self._found)

    def _explained(self, number: int) -> set[tuple[State, frozenset[int]]]:
        kept: set[tuple[State, frozenset[int]]] = set()
        seen = set(self._found)
        left = list(self._found)
        while left:
            state, done = left.pop()
            if number in done:
                kept.add((state, done))
                continue
            for other, entry in self._pending.items():
                if other in done:
                    continue
                for after in possible(state, entry, name_in_use=self._name_in_use(other)):
                    found = (after, done | {other})
                    if found not in seen:
                        seen.add(found)
                        left.append(found)
            if len(seen) > MOST_CONFIGURATIONS:
                self.too_many = True
                return kept or seen
        return kept

    def _name_in_use(self, number: int) -> bool:
        return any(entry.kind in {"create", "delete"} for other, entry in self._pending.items() if other != number)


def shortest(entries: Sequence[Entry]) -> list[Entry]:
    """A history of one machine that is wrong, cut: it begins at the last rest from which it still is, and without what does not matter."""
    verdict = judge(entries)
    if verdict.wrong is None:
        return []
    wrong = verdict.wrong
    limit = wrong.end if wrong.end is not None else wrong.begin
    kept = [entry for entry in entries if entry.begin <= limit]
    kept = _from_last_rest(kept, wrong)
    for entry in list(kept):
        without = [other for other in kept if other is not entry]
        # An operation that changes something cannot be left out: what follows would be wrong for want of it.
        matters = entry is wrong or (entry.kind in CHANGES and entry.outcome not in HARMLESS) or entry.kind == REST
        if not matters and _is_wrong(without, wrong):
            kept = without
    return kept


def _from_last_rest(entries: list[Entry], wrong: Entry) -> list[Entry]:
    for index in range(len(entries) - 1, 0, -1):
        entry = entries[index]
        if entry.kind == REST and entry is not wrong and entry.end is not None and entry.end <= wrong.begin:
            tail = entries[index:]
            start = State(mark=entry.mark or None, revision=entry.revision, run=entry.run or DOWN)
            if judge(tail, start).wrong is wrong:
                return tail
    return entries


def _is_wrong(entries: Sequence[Entry], wrong: Entry) -> bool:
    first = entries[0]
    start = State(mark=first.mark or None, revision=first.revision, run=first.run or DOWN) if first.kind == REST else State()
    return judge(entries, start).wrong is wrong


def _is_revision(state: State, entry: Entry) -> bool:
    return entry.revision is None or state.revision in (None, entry.revision)


def _running_as(state: State, run: str) -> State:
    return msgspec.structs.replace(state, run=run)
