"""The lock that a machine's QEMU holds as long as it lives.

It lies in the machine's state directory, and the open file is inherited by QEMU. So whatever becomes of daemons, run directories
and launch records, nobody launches a second QEMU of a machine, changes its definition or deletes its disks while one is alive.

There are two such files, for the one moment at which a machine has two QEMUs: when one takes the place of the other
(`qmpd.migration.succession`). A lock belongs to an open file, which only its owner could pass on, and the owner is a QEMU that knows
nothing of it. So the successor holds the one that is free, and the machine is alive as long as either is held. They say that there are
processes; which of two may run the guest is said by the launch record alone.
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
LOCK_NAMES: Final = (LOCK_NAME, "running-2.lock")
#: To look is to lock for a moment, and nobody of this daemon must take that for a QEMU.
_one_at_a_time: Final = threading.Lock()


@contextlib.contextmanager
def taken(state_dir: str, *, beside: bool = False) -> Iterator[int]:
    """The locked file's descriptor, for a process to inherit; closing it frees the lock only when nobody inherited it. Blocks shortly.

    With `beside` it is for a QEMU that is to take the place of one that lives.

    Raises:
        Held: a QEMU of this machine is alive; with `beside`, two are.
        OSError: the lock cannot be made.
    """
    with contextlib.ExitStack() as stack:
        found = [_opened(stack, state_dir, name, make=beside or name == LOCK_NAME) for name in LOCK_NAMES]
        descriptors = [descriptor for descriptor in found if descriptor is not None]
        with _one_at_a_time:
            free = [descriptor for descriptor in descriptors if _locked(descriptor, fcntl.LOCK_EX)]
            # Said, not left to the closing: a child that is being started may have a descriptor for a moment longer.
            wanted = free[:1] if beside or len(free) == len(descriptors) else []
            for descriptor in free:
                if descriptor not in wanted:
                    fcntl.flock(descriptor, fcntl.LOCK_UN)
        if not wanted:
            message = f"a QEMU of this machine is alive, although this daemon does not know it: it holds a lock in {state_dir}"
            raise Held(message, holder="a running QEMU")
        yield wanted[0]


def is_taken(state_dir: str) -> bool:
    """Whether a QEMU of the machine is alive. Blocks shortly."""
    with contextlib.ExitStack() as stack:
        descriptors = [_opened(stack, state_dir, name, make=False) for name in LOCK_NAMES]
        with _one_at_a_time:
            for descriptor in descriptors:
                if descriptor is None:
                    continue
                if not _locked(descriptor, fcntl.LOCK_SH):
                    return True
                fcntl.flock(descriptor, fcntl.LOCK_UN)
    return False


def lock_paths(state_dir: str) -> list[str]:
    """Where the locks of a machine are, whether or not they are there."""
    return [str(Path(state_dir) / name) for name in LOCK_NAMES]


def _locked(descriptor: int, how: int) -> bool:
    try:
        fcntl.flock(descriptor, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _opened(stack: contextlib.ExitStack, state_dir: str, name: str, *, make: bool) -> int | None:
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_CREAT if make else 0)
    try:
        descriptor = os.open(Path(state_dir) / name, flags, 0o600)
    except FileNotFoundError:
        if make:
            raise
        return None
    stack.callback(os.close, descriptor)
    return descriptor
