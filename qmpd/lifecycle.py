"""The states of a machine and every transition between them, as one table.

Theory: a *command* never changes state by itself. It causes something (a process starts, QEMU emits an event, a process
exits) and that *happening* moves the table. What the table does not list is illegal: it raises and changes nothing.

Rules:

* `starting` begins with the durable record of the intent to launch, before any process exists.
* `unresponsive` (the monitor is silent) and `unreachable` (there is no monitor) are states of a process that lives. Only an
  observed exit leaves them for `stopped` or `crashed`; no timer ever does.
* A machine is `found` when a process of an earlier daemon is taken over: from rest, or when a process that could not be told from
  others is identified after all. It is `unreachable` until its monitor answers and has proven whose it is.
* `incoming` is a QEMU that takes in, or has taken in, a machine that another host owns (`qmpd.migration`): it is halted, and leaves that
  state when it ends, or when this host has become the owner.
* `stopping` means that somebody asked QEMU to end; a guest that was asked over ACPI stays `running` until it obeys.

The diagram in docs/lifecycle.md is generated from this table.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final


class State(StrEnum):
    """What is known about a machine; the API's word for it."""

    STOPPED = "stopped"
    STARTING = "starting"
    RUNNING = "running"
    PAUSED = "paused"
    STOPPING = "stopping"
    CRASHED = "crashed"
    UNRESPONSIVE = "unresponsive"
    UNREACHABLE = "unreachable"
    INCOMING = "incoming"


class Happening(StrEnum):
    """What can happen to a machine."""

    LAUNCH = "launch"
    LAUNCH_FAILED = "launch-failed"
    RAN = "ran"
    HALTED = "halted"
    AWAITED = "awaited"
    QUIT = "quit"
    EXITED = "exited"
    DIED = "died"
    SILENT = "silent"
    DISCONNECTED = "disconnected"
    FOUND = "found"


class IllegalTransition(Exception):
    """The table has no such transition; nothing changed."""


_S = State
_H = Happening

#: States in which a QEMU process exists.
ALIVE: Final = frozenset({_S.STARTING, _S.RUNNING, _S.PAUSED, _S.STOPPING, _S.UNRESPONSIVE, _S.UNREACHABLE, _S.INCOMING})
#: States in which QEMU answers its monitor.
ANSWERING: Final = frozenset({_S.RUNNING, _S.PAUSED})
#: States in which there is a reason why QEMU does not answer.
IN_TROUBLE: Final = frozenset({_S.UNRESPONSIVE, _S.UNREACHABLE})
#: States in which a definition may be replaced or deleted and a machine started.
AT_REST: Final = frozenset({_S.STOPPED, _S.CRASHED})

_ENDINGS: Final = {_H.EXITED: _S.STOPPED, _H.DIED: _S.CRASHED}
_MONITOR: Final = {_H.SILENT: _S.UNRESPONSIVE, _H.DISCONNECTED: _S.UNREACHABLE}
_RUN: Final = {_H.RAN: _S.RUNNING, _H.HALTED: _S.PAUSED}
_AWAITED: Final = {_H.AWAITED: _S.INCOMING}

TABLE: Final[dict[State, dict[Happening, State]]] = {
    # One that had come from another host died while it was made this one's own: it turns out later that this was its guest's end.
    _S.STOPPED: {_H.LAUNCH: _S.STARTING, _H.FOUND: _S.UNREACHABLE, _H.DIED: _S.CRASHED},
    _S.CRASHED: {_H.LAUNCH: _S.STARTING, _H.FOUND: _S.UNREACHABLE},
    _S.STARTING: {**_RUN, **_AWAITED, **_ENDINGS, **_MONITOR, _H.LAUNCH_FAILED: _S.STOPPED, _H.QUIT: _S.STOPPING},
    _S.RUNNING: {**_RUN, **_ENDINGS, **_MONITOR, _H.QUIT: _S.STOPPING},
    _S.PAUSED: {**_RUN, **_ENDINGS, **_MONITOR, _H.QUIT: _S.STOPPING},
    _S.STOPPING: {
        **_ENDINGS,
        **_MONITOR,
        _H.QUIT: _S.STOPPING,
        _H.RAN: _S.STOPPING,
        _H.HALTED: _S.STOPPING,
        _H.AWAITED: _S.STOPPING,
    },
    _S.UNRESPONSIVE: {**_RUN, **_AWAITED, **_ENDINGS, **_MONITOR, _H.QUIT: _S.STOPPING},
    _S.UNREACHABLE: {**_RUN, **_AWAITED, **_ENDINGS, **_MONITOR, _H.QUIT: _S.STOPPING, _H.FOUND: _S.UNREACHABLE},
    _S.INCOMING: {**_RUN, **_AWAITED, **_ENDINGS, **_MONITOR, _H.QUIT: _S.STOPPING},
}


def after(state: State, happening: Happening) -> State:
    """The state that follows; raises IllegalTransition where the table has none."""
    try:
        return TABLE[state][happening]
    except KeyError:
        raise IllegalTransition(f"{happening} cannot happen to a machine that is {state}") from None


def diagram() -> str:
    """The table as a Mermaid state diagram, one arrow per transition that changes the state."""
    lines = ["stateDiagram-v2", "    [*] --> stopped"]
    for state, row in TABLE.items():
        for happening, target in row.items():
            if target is not state:
                lines.append(f"    {state} --> {target}: {happening}")
    return "\n".join(lines) + "\n"
