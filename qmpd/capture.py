"""Files that QEMU appends to and qmpd keeps small: its standard error, and the logs of its consoles.

QEMU writes them itself, so that a daemon that is slow, stopped or being replaced never stops a guest. They are kept below a cap
by punching holes at their head: an offset in the file means the same byte for ever, and the writer notices nothing.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import logging
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from typing import Final

#: Bytes of standard error that are shown: QEMU says what is wrong in its last line.
TAIL_BYTES: Final = 4096
#: Seconds between two looks at the files: a file may exceed its cap by what QEMU writes meanwhile.
TRIM_EVERY_S: Final = 1.0

_PUNCH_HOLE: Final = 0x01 | 0x02  # FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE
#: Holes are made of whole pages: less would be zeroed instead of freed, and bytes that are kept must not change.
_PAGE: Final = 4096

_log = logging.getLogger(__name__)


async def stderr_tail(path: str, *, start: int = 0) -> str:
    """The last 4 KiB of the file, from `start` on at the earliest, as text that can be shown: bytes that are not UTF-8 become
    U+FFFD, control characters other than newline and tab are escaped. Empty if there is no file."""
    return await asyncio.to_thread(tail_of, path, start)


async def kept_from(path: str) -> int:
    """The offset of the oldest byte that was not trimmed away; the file's size if there is none, 0 if there is no file."""
    return await asyncio.to_thread(_kept_from, path)


async def trim(path: str, cap_bytes: int) -> int:
    """Free the head of the file so that at most `cap_bytes` (in whole pages, at least one) remain. Returns `kept_from`.

    Does nothing where the file system cannot punch holes.
    """
    return await asyncio.to_thread(trim_now, path, cap_bytes)


async def keep_trimmed(files: Callable[[], Mapping[str, int]]) -> None:
    """For ever: `trim` each of `files()` (path to cap in bytes), every TRIM_EVERY_S seconds. One task serves all machines."""
    while True:
        await asyncio.to_thread(_trim_all, files())
        await asyncio.sleep(TRIM_EVERY_S)


def open_appending(path: str) -> int:
    """A descriptor that appends to the file, which only we may read; made if need be, never followed if it is a link."""
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


def tail_of(path: str, start: int) -> str:
    """The same as `stderr_tail`, for a thread: blocks."""
    with suppress(FileNotFoundError):
        if os.lstat(path).st_size <= start:
            return ""  # the usual case, without opening it: QEMU said nothing
    with ExitStack() as opened:
        file = _opened(path, os.O_RDONLY, opened)
        if file is None:
            return ""
        begin = max(start, os.fstat(file).st_size - TAIL_BYTES)
        data = os.pread(file, TAIL_BYTES, begin)
    return "".join(_visible(character) for character in data.decode("utf-8", "replace"))


def _visible(character: str) -> str:
    return character if character.isprintable() or character in "\n\t" else character.encode("unicode_escape").decode("ascii")


def _kept_from(path: str) -> int:
    with ExitStack() as opened:
        file = _opened(path, os.O_RDONLY, opened)
        return 0 if file is None else _first_data(file)


def _first_data(file: int) -> int:
    try:
        return os.lseek(file, 0, os.SEEK_DATA)
    except OSError as error:
        if error.errno != errno.ENXIO:  # no data at all
            raise
        return os.fstat(file).st_size


def trim_now(path: str, cap_bytes: int) -> int:
    """The same as `trim`, for a thread: blocks."""
    with ExitStack() as opened:
        file = _opened(path, os.O_RDWR, opened)
        if file is None:
            return 0
        begin = _first_data(file)
        keep_from = (os.fstat(file).st_size - max(cap_bytes, _PAGE)) // _PAGE * _PAGE
        if keep_from <= begin:
            return begin
        return keep_from if _punch(file, begin, keep_from - begin) else begin


def _trim_all(files: Mapping[str, int]) -> None:
    for path, cap_bytes in files.items():
        try:
            trim_now(path, cap_bytes)
        except OSError as error:  # one bad file must not stop the others from being kept small
            _log.warning("file not trimmed", extra={"path": path, "error": error.strerror})


def _opened(path: str, flags: int, opened: ExitStack) -> int | None:
    try:
        file = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    opened.callback(os.close, file)
    return file


_libc: Final = ctypes.CDLL(None, use_errno=True)
_fallocate: Final = getattr(_libc, "fallocate64", None) or _libc.fallocate  # glibc has both, musl the second, with 64 bits
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def _punch(file: int, begin: int, size: int) -> bool:
    if _fallocate(file, _PUNCH_HOLE, begin, size) == 0:
        return True
    code = ctypes.get_errno()
    if code in {errno.EOPNOTSUPP, errno.ENOSYS}:
        return False
    raise OSError(code, os.strerror(code))
