r"""Checks the disk and the output of the block-writing guest (variant `blocks`).

It writes block 1, 2, 3, ... to the sectors of a ring, one after the other; a sector is 32 times `BLOCK <number>\r\n`. It prints the same 16
bytes once the disk has taken the block and flushed its cache, so a number that was read is on the disk, unless the ring has come round to
its sector again. It prints `!` each time the disk fails a block, and tries it again.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

SECTOR_BYTES = 512
RING_START = 1024
RING_SECTORS = 1024

_RECORD = re.compile(rb"BLOCK ([0-9]{8})\r\n")
_RECORDS_PER_SECTOR = 32
_BANNER = re.compile(rb"BM-OK [a-z0-9_-]+\r\n")


@dataclass(frozen=True, kw_only=True, slots=True)
class Ring:
    """What is on the disk: the number in each sector of the ring that was written, and the sectors that are not one whole block."""

    numbers: dict[int, int]
    torn: tuple[int, ...]

    @property
    def newest(self) -> int:
        """The highest block number on the disk, 0 if none was written."""
        return max(self.numbers.values(), default=0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Acknowledged:
    """What the guest printed since its last banner: the last block it saw written, blocks out of order, and errors of the disk."""

    last: int
    gaps: tuple[int, ...]
    errors: int


def sector_of(number: int) -> int:
    """The sector block `number` goes to."""
    return RING_START + (number - 1) % RING_SECTORS


def read_ring(disk: Path) -> Ring:
    """The ring on a raw disk image."""
    with disk.open("rb") as image:
        image.seek(RING_START * SECTOR_BYTES)
        area = image.read(RING_SECTORS * SECTOR_BYTES)
    numbers: dict[int, int] = {}
    torn: list[int] = []
    for index in range(len(area) // SECTOR_BYTES):
        content = area[index * SECTOR_BYTES : (index + 1) * SECTOR_BYTES]
        record = _RECORD.match(content)
        if record and content == record[0] * _RECORDS_PER_SECTOR and sector_of(int(record[1])) == RING_START + index:
            numbers[RING_START + index] = int(record[1])
        elif any(content):
            torn.append(RING_START + index)
    return Ring(numbers=numbers, torn=tuple(torn))


def acknowledged(output: bytes) -> Acknowledged:
    """What the output of the guest, from its last banner on, says was written. `gaps` are the numbers that do not follow the one before."""
    banners = list(_BANNER.finditer(output))
    since = output[banners[-1].end() :] if banners else output
    numbers = [int(record[1]) for record in _RECORD.finditer(since)]
    follows = [0, *numbers] if banners else numbers
    gaps = tuple(number for before, number in pairwise(follows) if number != before + 1)
    return Acknowledged(last=numbers[-1] if numbers else 0, gaps=gaps, errors=since.count(b"!"))


def missing(ring: Ring, last: int) -> tuple[int, ...]:
    """The blocks up to `last`, not yet overwritten by newer ones, that are not on the disk: what was promised and lost.

    For the first boot on a disk: a guest that boots again begins again with 1.
    """
    oldest = max(1, last - RING_SECTORS + 1)
    return tuple(number for number in range(oldest, last + 1) if ring.numbers.get(sector_of(number), 0) < number)
