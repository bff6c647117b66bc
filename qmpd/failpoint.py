"""Places where a test can make the daemon die, fail, hang or stand still: one at every durable write and every effect outside the process.

`QMPD_FAILPOINT=NAME:WHAT[@N][,NAME:WHAT...]` in the environment of `qmpd serve` arms them; nothing else does, the API least of all. WHAT is

* `kill`: the daemon kills itself with SIGKILL, before it goes on,
* `error`: the error that this place can meet in life is raised; `CATALOGUE` says which,
* `hang`: the thread waits for ever, or the task does where the place is on the event loop,
* `stop`: the whole daemon stands still there (SIGSTOP) until somebody sends SIGCONT, and then goes on: time to do something else
  to the world at that very instant.

With `@N` that happens at the N-th pass alone, without it at every pass. A daemon that was not armed pays one look at an empty dict.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import signal
import sqlite3
import threading
from collections.abc import Callable, Mapping
from typing import Final, Literal, get_args

import msgspec

from qmpd.errors import MonitorUnavailable, NoSpace, PeerUnavailable, QemuDied
from qmpd.migration.phases import Phase

VARIABLE: Final = "QMPD_FAILPOINT"

What = Literal["kill", "error", "hang", "stop"]

_log = logging.getLogger(__name__)


class Failpoint(msgspec.Struct, frozen=True, kw_only=True):
    """A place by what lies behind it, and the error it can meet there: None where there is none to meet."""

    before: str
    error: Callable[[], Exception] | None = None


def _refused(number: int) -> Callable[[], Exception]:
    return lambda: OSError(number, os.strerror(number))


def _sqlite(code: int) -> Callable[[], Exception]:
    def error() -> Exception:
        made = sqlite3.OperationalError("the failpoint's error")
        made.sqlite_errorcode = code
        return made

    return error


_FULL: Final = _refused(errno.ENOSPC)
_IO: Final = _refused(errno.EIO)


def _no_space() -> NoSpace:
    return NoSpace(os.strerror(errno.ENOSPC))


def _step(phase: Phase, written: bool) -> str:
    return f"the next step after phase `{phase}` was written" if written else f"phase `{phase}` of a migration being written"


#: Every failpoint. The names are part of no promise: they follow the code.
CATALOGUE: Final[Mapping[str, Failpoint]] = {
    # The database.
    "database-migrate": Failpoint(before="the commit of a schema version", error=_sqlite(sqlite3.SQLITE_FULL)),
    "database-named": Failpoint(before="a new database getting its name", error=_FULL),
    "database-commit": Failpoint(before="the commit of a transaction", error=_sqlite(sqlite3.SQLITE_FULL)),
    "database-committed": Failpoint(before="telling that a transaction is committed", error=_sqlite(sqlite3.SQLITE_IOERR)),
    "event-write": Failpoint(before="an event being written", error=_sqlite(sqlite3.SQLITE_FULL)),
    "job-create": Failpoint(before="a new job being written", error=_sqlite(sqlite3.SQLITE_FULL)),
    "job-change": Failpoint(before="a job's progress or ending being written", error=_sqlite(sqlite3.SQLITE_FULL)),
    "answer-keep": Failpoint(before="an answer being kept under its Idempotency-Key", error=_sqlite(sqlite3.SQLITE_FULL)),
    "audit-write": Failpoint(before="entries of the audit log being written", error=_FULL),
    # Definitions and the files that follow them.
    "definition-commit": Failpoint(before="a definition being stored, replaced or deleted", error=_no_space),
    "definition-committed": Failpoint(before="the memory following what was stored"),
    "creation-mark": Failpoint(before="a new machine's directory being made, marked as unfinished", error=_FULL),
    "creation-unmark": Failpoint(before="that mark being removed", error=_IO),
    "image-make": Failpoint(before="an image or a copy being made", error=_FULL),
    "image-made": Failpoint(before="it getting its name", error=_FULL),
    "image-named": Failpoint(before="the next step after it got its name", error=_IO),
    "files-remove": Failpoint(before="a machine's directory being removed", error=_IO),
    "files-removed": Failpoint(before="the next step after a machine's directory was removed"),
    # From a plan to a process.
    "run-directory": Failpoint(before="the directories of a machine that starts being made", error=_FULL),
    "log-piece": Failpoint(before="the piece of a console's log being made", error=_FULL),
    "fifo-make": Failpoint(before="the FIFO of a console being made", error=_FULL),
    "socket-bind": Failpoint(before="a listening socket being bound", error=_FULL),
    "gate-spawn": Failpoint(before="the gate process being made", error=_refused(errno.EAGAIN)),
    "record-write": Failpoint(before="the launch record being written", error=_FULL),
    "record-written": Failpoint(before="the launch record getting its name", error=_FULL),
    "record-named": Failpoint(before="the next step after the launch record got its name"),
    "gate-go": Failpoint(before="the gate being told to become QEMU", error=_refused(errno.EPIPE)),
    "tpm-go": Failpoint(before="the gate of its TPM being told to become swtpm", error=_refused(errno.EPIPE)),
    "gate-gone": Failpoint(before="connecting to the QEMU that the gate became"),
    "guest-cont": Failpoint(before="the guest being set going", error=lambda: QemuDied("the monitor ended")),
    "adopted-cont": Failpoint(
        before="a guest being set going that the daemon before did not come to", error=lambda: QemuDied("the monitor ended")
    ),
    "guest-going": Failpoint(before="telling that the guest was set going"),
    "begun-mark": Failpoint(before="the note that the guest was set going", error=_FULL),
    # A machine's end.
    "quit-send": Failpoint(before="QEMU being asked to quit", error=lambda: MonitorUnavailable("there is no monitor")),
    "signal-send": Failpoint(before="SIGTERM or SIGKILL being sent", error=_refused(errno.EPERM)),
    "exit-keep": Failpoint(before="how a machine ended being written", error=_FULL),
    "exit-kept": Failpoint(before="what is left of an older, longer one being cut off", error=_FULL),
    "record-remove": Failpoint(before="the launch record being removed", error=_refused(errno.EROFS)),
    # A migration: each side's steps, the two commits that move the ownership, and what follows them.
    **{
        f"migration-{phase}{written}": Failpoint(before=_step(phase, bool(written)), error=None if written else _no_space)
        for phase in Phase
        for written in ("", "-written")
    },
    "migration-settled": Failpoint(before="the note that nothing is left to be done for a migration", error=_no_space),
    "ownership-give": Failpoint(before="the commit that gives a machine away", error=_no_space),
    "ownership-given": Failpoint(before="the next step after a machine was given away"),
    "ownership-take": Failpoint(before="the commit that makes this host a machine's owner", error=_no_space),
    "ownership-taken": Failpoint(before="the next step after this host became the owner"),
    "ownership-return": Failpoint(before="the commit that takes a machine back that its destination never ran", error=_no_space),
    "peer-ask": Failpoint(before="a request to a peer", error=lambda: PeerUnavailable("the link is down")),
    "peer-answered": Failpoint(before="the answer of a peer being looked at", error=lambda: PeerUnavailable("the link is down")),
    # One QEMU taking the place of another.
    "succession-note": Failpoint(before="the note that a QEMU is to take the place of another being written", error=_FULL),
    "succession-move": Failpoint(before="the guest's state being moved to the new QEMU"),
    "succession-commit": Failpoint(before="the launch record that makes the new QEMU the machine's", error=_FULL),
    "succession-committed": Failpoint(before="the old QEMU being ended"),
    "succession-log": Failpoint(before="the new QEMU's piece of a console's log becoming a part of it", error=_IO),
    "succession-cont": Failpoint(before="the guest being set going in the new QEMU", error=lambda: QemuDied("the monitor ended")),
    "succession-settle": Failpoint(before="what is left of the old QEMU being removed", error=_IO),
    # The disks of one moment, of a machine that is copied while it lives.
    "still-make": Failpoint(before="the images for the disks of one moment being made", error=_no_space),
    "still-halt": Failpoint(before="the guest being halted for that moment", error=lambda: QemuDied("the monitor ended")),
    "still-halted": Failpoint(before="the images being completed, while the guest stands still"),
    "still-cont": Failpoint(before="the guest being set going again", error=lambda: MonitorUnavailable("there is no monitor")),
    "still-remove": Failpoint(before="those images being removed", error=_IO),
    # Another host's machine on its way here.
    "migration-trial": Failpoint(before="the questions to a QEMU that tries a machine for another host"),
    "migration-log-write": Failpoint(before="bytes of a console's log that arrive being written", error=_FULL),
    "migration-log-renumber": Failpoint(before="the piece of a log that QEMU writes to getting its number", error=_IO),
    "migration-log-relink": Failpoint(before="the link to that piece following", error=_FULL),
    "migration-log-place": Failpoint(before="what arrived of a log becoming a part of it", error=_IO),
    "migration-file-write": Failpoint(before="a piece of a file that arrives being written", error=_FULL),
    "migration-file-place": Failpoint(before="a file that arrived getting its name", error=_FULL),
    "migration-file-placed": Failpoint(before="the name it had on its way being removed", error=_IO),
    "migration-variables-write": Failpoint(before="firmware variables that arrive being written", error=_IO),
    # What can be found out again.
    "cache-write": Failpoint(before="a file of the cache getting its name", error=_FULL),
}


class _Charge:
    """What happens at one failpoint, and when."""

    def __init__(self, what: What, at: int | None) -> None:
        self.what = what
        self._at = at
        self._passes = 0
        self._counting = threading.Lock()

    def due(self) -> bool:
        with self._counting:
            self._passes += 1
            return self._at in (None, self._passes)


_armed: Final[dict[str, _Charge]] = {}


def arm(text: str) -> None:
    """Arms the failpoints that `text` names, and no others; the empty text disarms.

    Raises:
        ValueError: it names one that does not exist, or cannot be read; none is armed then.
    """
    charges = dict(_charge(item.strip()) for item in text.split(",")) if text.strip() else {}
    _armed.clear()
    _armed.update(charges)


def failpoint(name: str) -> None:
    """The failpoint `name`, for code that may block: with `hang` the thread never comes back."""
    if _armed and _due(name) == "hang":
        threading.Event().wait()


async def passing(name: str) -> None:
    """The failpoint `name` on the event loop: with `hang` the task waits until it is cancelled."""
    if _armed and _due(name) == "hang":
        await asyncio.Event().wait()


def _charge(item: str) -> tuple[str, _Charge]:
    name, _, rest = item.partition(":")
    what, _, at = rest.partition("@")
    if name not in CATALOGUE:
        raise ValueError(f"{VARIABLE}: there is no failpoint {name!r}; there are {', '.join(CATALOGUE)}")
    if what == "error" and CATALOGUE[name].error is None:
        raise ValueError(f"{VARIABLE}: no error can happen at {name}, only kill, hang and stop")
    if not at.isdecimal() and "@" in rest:
        raise ValueError(f"{VARIABLE}: {item!r} must end with the number of a pass, like {name}:kill@2")
    for known in get_args(What):
        if what == known:
            return name, _Charge(known, int(at) if at else None)
    raise ValueError(f"{VARIABLE}: {item!r} must be NAME:kill, NAME:error, NAME:hang or NAME:stop")


def _due(name: str) -> What | None:
    charge = _armed.get(name)
    if charge is None or not charge.due():
        return None
    _log.warning("failpoint passed", extra={"failpoint": name, "what": charge.what})
    if charge.what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if charge.what == "stop":
        # To this thread, which so stops before it goes on; the others stop with it. One that is sent to the process may be late.
        signal.raise_signal(signal.SIGSTOP)
    error = CATALOGUE[name].error
    if charge.what == "error" and error is not None:
        raise error()
    return charge.what
