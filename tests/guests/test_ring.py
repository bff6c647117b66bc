"""The checker of the block writer's disk sees what is missing."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.guests.ring import RING_SECTORS, RING_START, SECTOR_BYTES, Acknowledged, acknowledged, missing, read_ring, sector_of


def block(number: int) -> bytes:
    return b"BLOCK %08d\r\n" % number * 32


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A disk with the last blocks of 1500 on it: the ring has come round once."""
    area = bytearray(RING_SECTORS * SECTOR_BYTES)
    for number in range(1, 1501):
        at = (sector_of(number) - RING_START) * SECTOR_BYTES
        area[at : at + SECTOR_BYTES] = block(number)
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(RING_START * SECTOR_BYTES) + area)
    return path


def put(disk: Path, sector: int, content: bytes) -> None:
    with disk.open("r+b") as image:
        image.seek(sector * SECTOR_BYTES)
        image.write(content)


def test_a_disk_with_every_promised_block_misses_none(disk: Path) -> None:
    ring = read_ring(disk)
    assert (ring.newest, ring.torn) == (1500, ())
    assert missing(ring, 1500) == ()
    assert missing(ring, 1400) == ()


def test_a_block_older_than_promised_is_missing(disk: Path) -> None:
    put(disk, sector_of(1300), block(1300 - RING_SECTORS))
    assert missing(read_ring(disk), 1500) == (1300,)


def test_half_a_block_is_torn_and_missing(disk: Path) -> None:
    put(disk, sector_of(1450), block(1450)[:256] + block(426)[256:])
    ring = read_ring(disk)
    assert ring.torn == (sector_of(1450),)
    assert missing(ring, 1500) == (1450,)


def test_a_block_in_the_wrong_sector_is_torn(disk: Path) -> None:
    put(disk, sector_of(1450), block(1449))
    assert read_ring(disk).torn == (sector_of(1450),)


def test_output_is_read_from_the_last_banner() -> None:
    output = b"BM-OK x\r\n" + block(1)[:16] + block(2)[:16] + b"BM-OK x\r\n" + block(1)[:16] + b"!!" + block(3)[:16] + b"BLOCK 000"
    assert acknowledged(output) == Acknowledged(last=3, gaps=(3,), errors=2)


def test_a_first_block_that_is_not_the_first_is_a_gap() -> None:
    assert acknowledged(b"BM-OK x\r\n" + block(2)[:16]).gaps == (2,)
    assert acknowledged(block(2)[:16]).gaps == ()
