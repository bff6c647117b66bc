"""The phases of a migration on either side, and every step between them, as two tables.

Theory: who may run the machine is said by its definition in the store and by nothing else (`record.Definition.given`). The source owns
it until it commits *give*; the destination owns it once it has committed *take*, which it does only after the source has given.
In between nobody may run it. The phases here are each side's own log of how far it got, written before the step they announce.

Rules:

* The source gives only after the destination has said that it holds the whole state (`loaded`). So whoever owns the machine can run it.
* Until it has given, the source may keep the machine for any reason; it never asks whether it may. Once it has given, it gets the
  machine back only from a destination that has discarded it for good, having never run it.
* A destination that has not taken may discard at any time, and never runs what it has not taken.
* A copy changes no owner: what is *released* is another machine, under an identity of its own, which the destination makes its own in the
  same steps. The source's definition is never touched, and says nothing of it.
* A phase that is over for one side (`ENDED`) never changes again: every verb of a peer may be repeated, and gets the same answer.

The diagrams in docs are generated from these tables. Known imperfection: where the source is lost for good after it gave and before the
destination heard of it, only a person can say so (`resolve`).
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final, Literal, TypeAlias

Role: TypeAlias = Literal["source", "destination"]


class Phase(StrEnum):
    """How far a side got. The first eight are the source's, the others the destination's."""

    BEGUN = "begun"
    PREPARED = "prepared"
    PERFORMING = "performing"
    GIVEN = "given"
    MOVED = "moved"
    KEPT = "kept"
    RELEASED = "released"
    COPIED = "copied"
    AWAITING = "awaiting"
    LOADED = "loaded"
    TAKEN = "taken"
    ARRIVED = "arrived"
    DISCARDED = "discarded"


class Step(StrEnum):
    """What a side does, or hears, that takes it to another phase."""

    ACCEPTED = "accepted"
    PERFORM = "perform"
    GIVE = "give"
    RELEASE = "release"
    CONFIRM = "confirm"
    KEEP = "keep"
    RETURNED = "returned"
    LOAD = "load"
    TAKE = "take"
    RUN = "run"
    DISCARD = "discard"


class IllegalStep(Exception):
    """The table has no such step; nothing changed."""


_P = Phase
_S = Step

TABLES: Final[dict[Role, dict[Phase, dict[Step, Phase]]]] = {
    "source": {
        _P.BEGUN: {_S.ACCEPTED: _P.PREPARED, _S.KEEP: _P.KEPT},
        _P.PREPARED: {_S.PERFORM: _P.PERFORMING, _S.KEEP: _P.KEPT},
        _P.PERFORMING: {_S.GIVE: _P.GIVEN, _S.RELEASE: _P.RELEASED, _S.KEEP: _P.KEPT},
        _P.GIVEN: {_S.CONFIRM: _P.MOVED, _S.RETURNED: _P.KEPT},
        _P.RELEASED: {_S.CONFIRM: _P.COPIED, _S.RETURNED: _P.KEPT},
        _P.MOVED: {},
        _P.KEPT: {},
        _P.COPIED: {},
    },
    "destination": {
        _P.AWAITING: {_S.LOAD: _P.LOADED, _S.DISCARD: _P.DISCARDED},
        _P.LOADED: {_S.TAKE: _P.TAKEN, _S.DISCARD: _P.DISCARDED},
        _P.TAKEN: {_S.RUN: _P.ARRIVED},
        _P.ARRIVED: {},
        _P.DISCARDED: {},
    },
}

#: How each side begins.
FIRST: Final[dict[Role, Phase]] = {"source": _P.BEGUN, "destination": _P.AWAITING}
#: Phases of the source in which it still owns the machine and may keep it.
KEEPABLE: Final = frozenset({_P.BEGUN, _P.PREPARED, _P.PERFORMING})
#: Phases of the source in which what it sent is for the destination to have.
HANDED_OVER: Final = frozenset({_P.GIVEN, _P.MOVED, _P.RELEASED, _P.COPIED})
#: Phases of the destination in which the machine is not its own.
UNOWNED: Final = frozenset({_P.AWAITING, _P.LOADED})
#: Phases of the destination in which it is.
OWNED: Final = frozenset({_P.TAKEN, _P.ARRIVED})
#: Phases in which a side has decided, once and for all.
ENDED: Final = frozenset({_P.MOVED, _P.KEPT, _P.COPIED, _P.ARRIVED, _P.DISCARDED})


def after(role: Role, phase: Phase, step: Step) -> Phase:
    """The phase that follows; raises IllegalStep where the table has none."""
    try:
        return TABLES[role][phase][step]
    except KeyError:
        raise IllegalStep(f"a {role} that is {phase} has no step {step!r}") from None


def diagram(role: Role) -> str:
    """One side's table as a Mermaid state diagram."""
    lines = ["stateDiagram-v2", f"    [*] --> {FIRST[role]}"]
    for phase, row in TABLES[role].items():
        lines += [f"    {phase} --> {target}: {step}" for step, target in row.items()]
        if phase in ENDED:
            lines.append(f"    {phase} --> [*]")
    return "\n".join(lines) + "\n"
