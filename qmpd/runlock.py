"""The lock that a machine's QEMU holds as long as it lives.

It lies in the machine's state directory, and the open file is inherited by QEMU. So whatever becomes of daemons, run directories
and launch records, nobody launches a second QEMU of a machine, changes its definition or deletes its disks while one is alive.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from qmpd.errors import Held

LOCK_NAME: Final = "running.lock"
#: To look is to lock for a moment, and nobody of this daemon must take that for a QEMU.
_one_at_a_time: Final = threading.Lock()


@contextlib.contextmanager
def taken(state_dir: str) -> Iterator[int]:
    """The locked file's descriptor, for a process to inherit; closing it frees the lock only when nobody inherited it. Blocks shortly.

    Raises:
        Held: a QEMU of this machine is alive.
        OSError: the lock cannot be made.
    """
    with _opened(state_dir) as descriptor:
        try:
            with _one_at_a_time:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            message = f"a QEMU of this machine is alive, although this daemon does not know it: it holds {state_dir}/{LOCK_NAME}"
            raise Held(message, holder="a running QEMU") from error
        yield descriptor


def is_taken(state_dir: str) -> bool:
    """Whether a QEMU of the machine is alive. Blocks shortly."""
    try:
        with _opened(state_dir) as descriptor, _one_at_a_time:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            # Said, not left to the closing: a child that is being started may have the descriptor for a moment longer.
            fcntl.flock(descriptor, fcntl.LOCK_UN)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    return False


@contextlib.contextmanager
def _opened(state_dir: str) -> Iterator[int]:
    descriptor = os.open(Path(state_dir) / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
