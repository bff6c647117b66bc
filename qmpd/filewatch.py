"""Being told when files grow: inotify(7), one instance for all files of a daemon."""

from __future__ import annotations

import asyncio
import ctypes
import logging
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

#: <sys/inotify.h>
IN_MODIFY: Final = 0x00000002
IN_Q_OVERFLOW: Final = 0x00004000
_EVENT: Final = struct.Struct("iIII")
#: Room for many events at once; ours carry no names.
_BUFFER: Final = 64 * 1024

_libc: Final = ctypes.CDLL(None, use_errno=True)
_log = logging.getLogger(__name__)


class FileWatch:
    """Calls back when a file is written to. Made by `watching`."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._callbacks: dict[int, Callable[[], None]] = {}

    @contextmanager
    def told(self, path: str, changed: Callable[[], None]) -> Iterator[None]:
        """Calls `changed` after each write to the file (several may count as one), as long as the block lasts.

        Raises:
            OSError: there is no such file, or the user has no watches left (fs.inotify.max_user_watches).
        """
        number = _libc.inotify_add_watch(self._descriptor, os.fsencode(path), IN_MODIFY)
        if number < 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), path)
        self._callbacks[number] = changed
        try:
            yield
        finally:
            del self._callbacks[number]
            _libc.inotify_rm_watch(self._descriptor, number)

    def read(self) -> None:
        """Takes what the kernel has to tell, and calls back."""
        try:
            data = os.read(self._descriptor, _BUFFER)
        except BlockingIOError:
            return
        written: set[int] = set()
        position = 0
        while position < len(data):
            number, mask, _cookie, length = _EVENT.unpack_from(data, position)
            position += _EVENT.size + length
            if mask & IN_Q_OVERFLOW:
                _log.info("more writes than can be told one by one")
                written |= self._callbacks.keys()
            elif mask & IN_MODIFY:
                written.add(number)
        for number in written & self._callbacks.keys():
            self._callbacks[number]()


@contextmanager
def watching() -> Iterator[FileWatch]:
    """A watch in the running event loop. Raises OSError when the user has no instances left (fs.inotify.max_user_instances)."""
    descriptor = _libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    if descriptor < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), "inotify")
    loop = asyncio.get_running_loop()
    watch = FileWatch(descriptor)
    loop.add_reader(descriptor, watch.read)
    try:
        yield watch
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)
