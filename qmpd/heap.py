"""The C library's heap: one for all threads."""

from __future__ import annotations

import ctypes
from typing import Final

#: malloc.h
_M_ARENA_MAX: Final = -8


def share_one_heap() -> bool:
    """Has all threads allocate from one heap; to be called before there are any. False where the C library has no such setting.

    glibc gives threads heaps of their own, and what one thread allocates and another frees leaves holes in them: the daemon, which hands
    everything to threads and back, grew by about 5 KiB with each start and stop of a machine. With one heap it stays as it is.
    """
    try:
        return bool(ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1))
    except AttributeError:
        return False
