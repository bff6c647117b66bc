"""Files with holes: what is in them, and a digest that does not depend on where the holes are. Most of this blocks.

A block of zeros and a hole are the same to whoever reads the file, so neither is sent nor hashed, and both ends may keep them as they like.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import struct
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Final, Self

from qmpd.tasks import undivided

#: What is sent and hashed at once: no more than a request may have.
BLOCK: Final = 1024 * 1024
#: How much is hashed between two looks at whether somebody still wants to know: a fraction of a second.
STEP_BLOCKS: Final = 32
_ZEROS: Final = bytes(BLOCK)
_HEAD: Final = struct.Struct(">Q")


def blocks(descriptor: int, start: int) -> Iterator[tuple[int, bytes]]:
    """The blocks of an open file from `start` on that are not all zero, and their offsets: multiples of BLOCK, but for the first."""
    offset = start
    while True:
        try:
            offset = max(offset, os.lseek(descriptor, offset, os.SEEK_DATA) // BLOCK * BLOCK)
        except OSError:  # ENXIO: only a hole is left, or nothing
            return
        data = os.pread(descriptor, BLOCK - offset % BLOCK, offset)
        if not data:
            return
        if data != _ZEROS[: len(data)]:
            yield offset, data
        offset += len(data)


def allocated(path: str) -> int:
    """How much of the file system a file takes."""
    return Path(path).stat().st_blocks * 512


class Opened:
    """A file that is open for reading, and is no link; `size` is how long it was then."""

    def __init__(self, path: str) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        self.size = os.fstat(self.descriptor).st_size

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_details: object) -> None:
        os.close(self.descriptor)


class Fingerprint:
    """The digest of a file, in steps: a terabyte takes minutes, and nobody may want to wait for it any more."""

    def __init__(self, file: Opened) -> None:
        self._size = file.size
        self._hash = hashlib.sha256()
        self._blocks = blocks(file.descriptor, 0)

    def step(self) -> str | None:
        """Reads on; the digest once everything was read."""
        taken = list(islice(self._blocks, STEP_BLOCKS))
        for offset, data in taken:
            self._hash.update(_HEAD.pack(offset))
            self._hash.update(data)
        if len(taken) == STEP_BLOCKS:
            return None
        self._hash.update(_HEAD.pack(self._size))
        return f"sha256-blocks:{self._hash.hexdigest()}"


async def fingerprint(path: str) -> str:
    """The digest of a file; who is cancelled meanwhile leaves nothing running. Raises OSError."""
    with await asyncio.to_thread(Opened, path) as file:
        made = Fingerprint(file)
        # A thread must not read from a descriptor that is closed already, and may be another file's.
        while (digest := await undivided(asyncio.to_thread(made.step), f"fingerprint:{path}")) is None:
            pass
    return digest
