"""Every error a caller of qmpd can act on.

The tree (a leaf is a meaning; its `code` is stable and part of the API)::

    QmpdError
    ├── Undecodable          bytes that are not a document
    ├── TooLarge             a document or value over a limit
    ├── UnsupportedMedia     a media type, charset or content encoding we do not speak
    ├── Misdirected          a Host header that is not ours
    ├── Unauthorized         unknown caller: no valid token or certificate
    ├── Forbidden            known caller, no permission
    ├── NotFound             no such thing
    ├── Conflict
    │   ├── AlreadyExists    the name, UUID or address is taken
    │   ├── WrongState       the machine's state does not allow it
    │   ├── Held             somebody else is doing something that excludes it
    │   ├── Protected        its definition says that it must not be deleted
    │   ├── GoingDown        all machines are being ended, because the host goes down
    │   ├── NotProven        whose the process is that is alive cannot be proven
    │   ├── NotAdoptable     the process is none that qmpd could take over
    │   ├── CannotMove       the machine cannot be moved to that host as things are
    │   ├── GivenAway        the machine was given to another host, which owns it
    │   └── EventsGone       events that were asked for are no longer kept
    ├── StaleRevision        the ETag given is not the current one
    ├── RevisionRequired     an ETag is needed and none was given
    ├── Invalid              decodable, but wrong: carries every problem with its path
    ├── Busy                 too many requests at once
    ├── QemuError
    │   ├── LaunchFailed     QEMU ended before it was ready
    │   ├── QemuRefused      QEMU answered a command with an error
    │   ├── QemuDied         QEMU ended while a command was under way
    │   ├── MonitorUnavailable  there is no monitor connection
    │   ├── QemuSilent       no answer within the deadline: the outcome is unknown
    │   └── MigrationFailed  the machine's state could not be moved; it stays where it was
    ├── PeerError
    │   ├── PeerUnavailable  no connection to another daemon could be made: nothing was asked of it
    │   ├── PeerRefused      another daemon answered with an error
    │   └── PeerSilent       no answer of another daemon: the outcome is unknown
    ├── HostError            this host lacks something, or its system refused it
    ├── NotYet               what was waited for did not happen in time
    └── NoSpace              the disk is full; nothing was changed
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import msgspec


class Problem(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that is wrong with a document: where (`$.disks[0].path`), and what, in a sentence."""

    path: str
    message: str


class QmpdError(Exception):
    """Base of everything here: a stable `code`, a sentence for people and details for programs."""

    code: ClassVar[str] = "internal"

    def __init__(self, message: str, **details: object) -> None:
        super().__init__(message)
        self.message = message
        self.details: dict[str, object] = details


class Undecodable(QmpdError):
    """The bytes are not a document of the declared media type, or not an allowed one."""

    code = "undecodable"


class TooLarge(QmpdError):
    """A document, value or answer is over a limit; details name the limit."""

    code = "too_large"


class UnsupportedMedia(QmpdError):
    """The media type, charset or content encoding is not one qmpd speaks."""

    code = "unsupported_media_type"


class Misdirected(QmpdError):
    """The Host header names somebody else."""

    code = "misdirected"


class Unauthorized(QmpdError):
    """The caller showed no token or certificate, or one that is not valid (any more)."""

    code = "unauthorized"


class Forbidden(QmpdError):
    """The caller is known and may not do this."""

    code = "forbidden"


class NotFound(QmpdError):
    """There is no such thing."""

    code = "not_found"


class Conflict(QmpdError):
    """The request contradicts what is there now."""

    code = "conflict"


class AlreadyExists(Conflict):
    """The name or UUID is taken."""

    code = "already_exists"


class WrongState(Conflict):
    """The machine's state does not allow the verb; details carry `state` and `allowed`."""

    code = "wrong_state"


class Held(Conflict):
    """Another operation holds the machine; details carry `holder`."""

    code = "held"


class NotProven(Conflict):
    """The process that is alive is not proven to be the machine's, so nothing is done to it."""

    code = "not_proven"


class NotAdoptable(Conflict):
    """The process cannot be taken over: it is no QEMU, or has no QMP monitor that qmpd could use."""

    code = "not_adoptable"


class CannotMove(Conflict):
    """The machine cannot be moved as things are; details carry `findings`, every obstacle with what would mend it."""

    code = "cannot_move"


class GivenAway(Conflict):
    """The machine was given to another host, and must not run here; details carry `peer` and `migration`."""

    code = "given_away"


class Protected(Conflict):
    """The machine must not be deleted; details carry `field`, what of the definition says so."""

    code = "protected"


class GoingDown(Conflict):
    """All machines of the host are being shut down; none starts until that is over."""

    code = "going_down"


class EventsGone(Conflict):
    """Events after the number asked for are not kept (any more); details carry `first` and `last`, the range that is."""

    code = "events_gone"


class StaleRevision(QmpdError):
    """The definition changed since the caller read it; details carry the current `revision`."""

    code = "stale_revision"


class RevisionRequired(QmpdError):
    """A replace or delete must say which revision it was made from."""

    code = "revision_required"


class Invalid(QmpdError):
    """A document decodes but cannot be right; details carry all `problems`."""

    code = "invalid"

    def __init__(self, message: str, problems: Sequence[Problem]) -> None:
        super().__init__(message, problems=[msgspec.to_builtins(problem) for problem in problems])
        self.problems = tuple(problems)


class Busy(QmpdError):
    """Too many requests at once; the same request may succeed later."""

    code = "too_many_requests"


class QemuError(QmpdError):
    """Something between qmpd and a QEMU process went wrong."""

    code = "qemu_error"


class LaunchFailed(QemuError):
    """QEMU ended before it was ready; details carry `exit` and the tail of `stderr`."""

    code = "launch_failed"


class QemuRefused(QemuError):
    """QEMU answered with an error; details carry its `class` and `desc`."""

    code = "qemu_refused"


class QemuDied(QemuError):
    """QEMU ended, or broke the monitor connection, while a command was under way."""

    code = "qemu_died"


class MonitorUnavailable(QemuError):
    """There is no monitor connection to the process; it may well be alive."""

    code = "monitor_unavailable"


class QemuSilent(QemuError):
    """QEMU did not answer within the deadline. A command that changes something may still take effect: ask again."""

    code = "qemu_silent"


class MigrationFailed(QemuError):
    """The machine's state could not be moved, with QEMU's words from either side; the machine is where it was, as it was."""

    code = "migration_failed"


class PeerError(QmpdError):
    """Something between this daemon and another one went wrong; details carry `peer`."""

    code = "peer_error"


class PeerUnavailable(PeerError):
    """No connection to the peer could be made, or it is not who it should be. Nothing was asked of it."""

    code = "peer_unavailable"


class PeerRefused(PeerError):
    """The peer answered with an error; details carry it as `error`."""

    code = "peer_refused"


class PeerSilent(PeerError):
    """The peer did not answer within the deadline, or the connection broke: what was asked may still take effect."""

    code = "peer_silent"


class HostError(QmpdError):
    """This host lacks something qmpd needs (a program, a right), or an operation of its system failed."""

    code = "host_error"


class NotYet(QmpdError):
    """What the caller waited for did not happen in the time it gave; nothing is wrong. Details carry what is the case instead."""

    code = "not_yet"


class NoSpace(QmpdError):
    """The file system is full, or out of inodes or quota; nothing was changed."""

    code = "no_space"


def invalid(problems: Sequence[Problem]) -> Invalid:
    """The error for a document with these problems (at least one); its message names the first."""
    first = problems[0]
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return Invalid(f"{first.path}: {first.message}{more}", problems)


def details_of(error: QmpdError) -> Mapping[str, object]:
    """What programs may read beside code and message."""
    return error.details
