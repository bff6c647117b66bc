"""A log in pieces reads like one, whoever wrote it and whatever of it is gone."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qmpd import segments
from qmpd.capture import trim

PAGE = 4096


@pytest.fixture
def stem(tmp_path: Path) -> str:
    return str(tmp_path / "serial0.log")


def write(stem: str, data: bytes, *, cap_bytes: int = 1 << 20) -> Path:
    """Another QEMU writes to the log."""
    piece = segments.begin(stem, cap_bytes)
    with piece.open("ab") as file:
        file.write(data)
    return piece


def whole(stem: str, offset: int = 0, *, limit: int = 1 << 20) -> tuple[list[int], bytes]:
    """All that is kept from an offset on, and where its pieces begin."""
    begins: list[int] = []
    data = b""
    while True:
        begin, more = segments.read(stem, offset, limit)
        if not more:
            return begins, data
        begins.append(begin)
        data += more
        offset = begin + len(more)


def test_a_log_that_is_not_there_is_empty(stem: str, tmp_path: Path) -> None:
    for one in (stem, str(tmp_path / "nowhere" / "log")):
        assert (segments.pieces(one), segments.size_and_tail(one, 10), segments.first(one)) == ([], (0, b""), 0)
        assert segments.read(one, 7, 10) == (7, b"")


def test_a_log_goes_on_with_every_writer(stem: str) -> None:
    first, second = write(stem, b"first "), write(stem, b"second")
    assert [path for _, path in segments.pieces(stem)] == [first, second]
    assert whole(stem) == ([0, 6], b"first second")
    assert whole(stem, 3, limit=2) == ([3, 5, 6, 8, 10], b"st second")
    assert segments.size_and_tail(stem, 3) == (12, b"ond")
    assert first.stat().st_mode & 0o777 == 0o600


def test_a_writer_that_wrote_nothing_leaves_its_piece_to_the_next(stem: str) -> None:
    assert segments.begin(stem, 10) == segments.begin(stem, 10)
    write(stem, b"x" * 5)
    empty = segments.begin(stem, 10)
    assert empty == segments.begin(stem, 10)
    assert segments.size_and_tail(stem, 3) == (5, b"xxx")
    assert segments.read(stem, 5, 10) == (5, b"")
    assert segments.first(stem) == 0


def test_only_pieces_of_the_log_are_its_pieces(stem: str, tmp_path: Path) -> None:
    write(stem, b"mine")
    for name in ("serial0.log", "serial0.log.1", "serial0.log." + "x" * 20, "serial0.log2." + "0" * 20, "serial0.log." + "0" * 21):
        (tmp_path / name).write_bytes(b"not mine")
    assert whole(stem) == ([0], b"mine")


def test_old_pieces_go_and_what_remains_keeps_its_numbers(stem: str) -> None:
    for count in range(6):
        write(stem, bytes([65 + count]) * 100, cap_bytes=150)
    kept = [base for base, _ in segments.pieces(stem)]
    assert kept[-1] == 500
    assert kept[0] > 0
    assert segments.first(stem) == kept[0]
    assert segments.read(stem, 0, 5)[0] == kept[0]
    assert segments.read(stem, 450, 5) == (450, b"EEEEE")
    assert sum(path.stat().st_size for _, path in segments.pieces(stem)) <= 150 + 2 * 100


async def test_a_hole_is_skipped_to_where_bytes_are_kept(stem: str) -> None:
    data = os.urandom(4 * PAGE)
    piece = write(stem, data)
    kept = await trim(str(piece), PAGE)
    assert segments.first(stem) == kept == 3 * PAGE
    assert segments.read(stem, PAGE, 3) == (kept, data[kept : kept + 3])
    await asyncio.to_thread(write, stem, b"more")
    assert whole(stem)[1] == data[kept:] + b"more"


def test_a_log_of_nothing_but_a_hole_ends_where_it_ends(stem: str) -> None:
    piece = write(stem, b"")
    os.truncate(piece, 3 * PAGE)
    assert segments.size_and_tail(stem, 4) == (3 * PAGE, bytes(4))
    assert segments.read(stem, PAGE, 10) == (PAGE, b"")


@pytest.mark.parametrize("offset", [2**31, 2**63 - 1, 2**63, 2**64, 2**100])
def test_no_offset_is_too_large_to_be_asked_for(stem: str, offset: int) -> None:
    write(stem, b"small")
    assert segments.read(stem, offset, 10) == (offset, b"")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50, deadline=None)
@given(st.lists(st.binary(min_size=1, max_size=50), max_size=6), st.integers(0, 320), st.integers(1, 60))
def test_any_pieces_read_like_one(tmp_path: Path, texts: list[bytes], offset: int, limit: int) -> None:
    for path in tmp_path.iterdir():
        path.unlink()
    stem = str(tmp_path / "log")
    for text in texts:
        write(stem, text)
    assert whole(stem, offset, limit=limit)[1] == b"".join(texts)[offset:]
    assert segments.size_and_tail(stem, 0)[0] == len(b"".join(texts))


def test_a_piece_that_was_begun_beside_a_log_follows_it(tmp_path: Path) -> None:
    stem = str(tmp_path / "log")
    segments.begin(stem, 100).write_bytes(b"one")
    piece = segments.beside(stem)
    assert [base for base, _ in segments.pieces(stem)] == [0]
    segments.named(stem, 0).write_bytes(b"one two")  # who wrote before goes on until the last moment
    own = segments.joined(stem)
    assert own == segments.named(stem, 7)
    assert not piece.exists()
    own.write_bytes(b"three")
    assert (segments.read(stem, 0, 100), segments.read(stem, 7, 100)) == ((0, b"one two"), (7, b"three"))
    assert segments.joined(stem) == own


def test_a_piece_that_was_begun_beside_an_empty_one_takes_its_place(tmp_path: Path) -> None:
    stem = str(tmp_path / "log")
    segments.begin(stem, 100).write_bytes(b"one")
    assert segments.begin(stem, 100) == segments.named(stem, 3)
    segments.beside(stem).write_bytes(b"")
    assert segments.joined(stem) == segments.named(stem, 3)
    assert [base for base, _ in segments.pieces(stem)] == [0, 3]
