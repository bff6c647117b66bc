"""How a QEMU ended: judged, and kept for the next daemon."""

from __future__ import annotations

import errno
import logging
import os
from contextlib import suppress
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
    """Writes the ending down; it is for people, so a disk that is full loses it and nothing else. Blocks.

    Over the old one, without a new file and a change of names, which take several times as long: somebody waits for this. What is torn
    because the daemon was killed does not decode, and then the launch record, which is still there, tells that nobody saw its end.
    """
    document = msgspec.msgpack.encode(ending)
    target = Path(state_dir) / ENDING_NAME
    try:
        failpoint("exit-keep")
        _write_over(target, document)
    except OSError as error:
        _log.warning("ending was not kept", extra={"path": str(target), "error": str(error)})
        with suppress(OSError):
            os.truncate(target, 0)  # what is there is not how this process ended


def _write_over(target: Path, document: bytes) -> None:
    with os.fdopen(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600), "wb", buffering=0) as file:
        if file.write(document) < len(document):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        failpoint("exit-kept")
        file.truncate()


def last(state_dir: str) -> ExitView | None:
    """How the machine's last QEMU ended, if that was kept. Blocks."""
    try:
        return msgspec.msgpack.decode((Path(state_dir) / ENDING_NAME).read_bytes(), type=ExitView)
    except (OSError, msgspec.DecodeError, msgspec.ValidationError):
        return None
