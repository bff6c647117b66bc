"""A log in pieces: one file for each QEMU that wrote to it, named after the offset of its first byte in the whole.

So a byte's offset is its number for ever, whoever writes: QEMU needs an empty file to begin with, and begins at its own zero.
Old bytes go by punching holes into a piece, or by removing it whole; what remains keeps its numbers. All of this blocks.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final

#: Digits of an offset in a name, so that names sort like numbers.
DIGITS: Final = 20
#: What a piece is called that will be the next one.
NEXT: Final = ".next"


def pieces(stem: str, suffix: str = "") -> list[tuple[int, Path]]:
    """The pieces of the log `stem`, oldest first, each with the offset at which it begins. Those with a suffix are not part of it yet."""
    parent, name = os.path.split(stem)
    form = re.compile(rf"{re.escape(name)}\.([0-9]{{{DIGITS}}}){re.escape(suffix)}")
    try:
        found = [(match[1], entry) for entry in Path(parent).iterdir() if (match := form.fullmatch(entry.name))]
    except FileNotFoundError:
        return []
    return sorted((int(base), entry) for base, entry in found)


def named(stem: str, base: int, suffix: str = "") -> Path:
    """The piece of the log `stem` that begins at `base`, whether or not it is there."""
    return Path(f"{stem}.{base:0{DIGITS}}{suffix}")


def begin(stem: str, cap_bytes: int) -> Path:
    """An empty piece for the next writer. Pieces that are older than the newest `cap_bytes` are removed."""
    known = pieces(stem)
    base = 0
    kept = 0
    for offset, path in reversed(known):
        size = path.stat().st_size
        if path is known[-1][1]:
            base = offset + size
            if size == 0:
                return path
        if kept > cap_bytes:
            path.unlink()
        kept += size
    piece = named(stem, base)
    piece.touch(mode=0o600)
    return piece


def beside(stem: str) -> Path:
    """An empty piece for a writer that will go on where another one still writes: no part of the log before `joined`."""
    piece = Path(f"{stem}{NEXT}")
    piece.unlink(missing_ok=True)
    piece.touch(mode=0o600)
    return piece


def joined(stem: str) -> Path:
    """The newest piece of the log, once the one that was begun beside it, if there is any, has become that. Nobody writes meanwhile."""
    piece = Path(f"{stem}{NEXT}")
    if piece.exists():
        piece.rename(named(stem, size_and_tail(stem, 0)[0]))  # in place of the writer's before only if that is empty
    return pieces(stem)[-1][1]


def size_and_tail(stem: str, limit: int) -> tuple[int, bytes]:
    """The offset behind the last byte, and up to `limit` of the last bytes, of the newest piece that has any."""
    tail = b""
    end = 0
    for base, path in reversed(pieces(stem)):
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            end = end or base + size
            tail = os.pread(file.fileno(), limit, max(0, size - limit))
        if tail:
            break
    return end, tail


def tail(piece: str, limit: int) -> tuple[int, bytes]:
    """The same for one piece alone, which may have none."""
    descriptor = os.open(piece, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.fstat(descriptor).st_size
        return int(piece[-DIGITS:]) + size, os.pread(descriptor, limit, max(0, size - limit)) if size else b""
    finally:
        os.close(descriptor)


def first(stem: str) -> int:
    """The offset of the oldest byte that is kept."""
    for base, path in pieces(stem):
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size:
                return base + _data_from(file.fileno(), 0, size)
    return size_and_tail(stem, 0)[0]


def read(stem: str, offset: int, limit: int) -> tuple[int, bytes]:
    """Up to `limit` bytes of one piece from `offset` on, and where they really begin: later than `offset` where bytes are gone."""
    for base, path in pieces(stem):
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if offset >= base + size:
                continue
            begin_at = _data_from(file.fileno(), max(0, offset - base), size)
            if begin_at < size:
                return base + begin_at, os.pread(file.fileno(), limit, begin_at)
    return offset, b""


def _data_from(descriptor: int, offset: int, size: int) -> int:
    try:
        return os.lseek(descriptor, offset, os.SEEK_DATA)
    except OSError:
        return size if offset else offset  # only a hole is left, or a file system that knows none
