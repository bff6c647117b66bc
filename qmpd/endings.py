"""How a QEMU ended: judged, and kept for the next daemon."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Final

import msgspec

from qmpd.failpoint import failpoint
from qmpd.process import ExitStatus
from qmpd.views import ExitView

ENDING_NAME: Final = "last-exit.msgpack"
#: Reasons of SHUTDOWN (QAPI `ShutdownCause`) that are failures of the guest or of the host, and one that QEMU has no word for.
BAD_REASONS: Final = frozenset({"guest-panic", "host-error", "watchdog"})
#: What is known of a process that nobody watched.
UNSEEN: Final = "ended while no daemon ran"
REBOOTED: Final = "the host was restarted"

_log = logging.getLogger(__name__)


def is_clean(status: ExitStatus, reason: str | None) -> bool:
    """Whether QEMU ended in order. The status of a process that is not our child cannot be seen: then its last words count."""
    if status.signal is not None or reason in BAD_REASONS:
        return False
    return status.code == 0 if status.code is not None else reason is not None


def judged(status: ExitStatus, reason: str | None, stderr_tail: str, at: str) -> ExitView:
    """How it ended, as it is shown and kept."""
    return ExitView(code=status.code, signal=status.signal, reason=reason, clean=is_clean(status, reason), at=at, stderr_tail=stderr_tail)


def keep(state_dir: str, ending: ExitView) -> None:
    """Writes the ending down; it is for people, so a disk that is full loses it and nothing else. Blocks."""
    target = Path(state_dir) / ENDING_NAME
    temporary = target.with_suffix(".new")
    try:
        failpoint("exit-keep")
        temporary.write_bytes(msgspec.msgpack.encode(ending))
        failpoint("exit-kept")
        # To put a file in the place of another one makes ext4 write the new one to the disk at once, and somebody waits for this. The
        # old one says nothing of the process that ended now: without either, the launch record tells that nobody saw its end.
        target.unlink(missing_ok=True)
        temporary.rename(target)
    except OSError as error:
        _log.warning("ending was not kept", extra={"path": str(target), "error": str(error)})


def last(state_dir: str) -> ExitView | None:
    """How the machine's last QEMU ended, if that was kept. Blocks."""
    try:
        return msgspec.msgpack.decode((Path(state_dir) / ENDING_NAME).read_bytes(), type=ExitView)
    except (OSError, msgspec.DecodeError, msgspec.ValidationError):
        return None
