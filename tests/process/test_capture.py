from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from qmpd import capture
from qmpd.capture import TAIL_BYTES, keep_trimmed, kept_from, open_appending, stderr_tail, trim
from tests.process.emulator import content, held, size

CAP = 64 * 1024


def numbered(count: int) -> bytes:
    """So many 16-byte lines, each holding its offset."""
    return b"".join(b"%015d\n" % (16 * number) for number in range(count))


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "log"
    path.write_bytes(numbered(100_000))
    return path


async def test_trimming_frees_the_head_and_changes_no_offset(log: Path) -> None:
    start = await trim(str(log), CAP)
    assert start == await kept_from(str(log)) == (1_600_000 - CAP) // 4096 * 4096
    assert size(log) == 1_600_000
    assert held(log) <= CAP + 2 * 4096
    assert content(log)[start:] == numbered(100_000)[start:]


async def test_trimming_again_frees_only_what_was_written_since(log: Path) -> None:
    first = await trim(str(log), CAP)
    assert await trim(str(log), CAP) == first
    with log.open("ab") as writer:
        writer.write(bytes(8192))
    assert await trim(str(log), CAP) == first + 8192


async def test_a_writer_notices_nothing(log: Path) -> None:
    file = open_appending(str(log))
    try:
        await trim(str(log), CAP)
        os.write(file, b"end\n")
    finally:
        os.close(file)
    assert content(log)[1_600_000:] == b"end\n"


@pytest.mark.parametrize("cap", [0, 1, 4095])
async def test_at_least_a_page_is_kept(log: Path, cap: int) -> None:
    await trim(str(log), cap)
    assert held(log) <= 2 * 4096
    assert await stderr_tail(str(log)) == numbered(100_000)[-TAIL_BYTES:].decode()


async def test_a_file_below_its_cap_is_left_alone(log: Path) -> None:
    assert await trim(str(log), 2_000_000) == 0
    assert content(log) == numbered(100_000)


async def test_a_file_that_is_not_there_or_empty_is_no_trouble(tmp_path: Path) -> None:
    absent, empty = str(tmp_path / "absent"), tmp_path / "empty"
    empty.touch()
    assert (await trim(absent, CAP), await kept_from(absent), await stderr_tail(absent)) == (0, 0, "")
    assert (await trim(str(empty), CAP), await kept_from(str(empty)), await stderr_tail(str(empty))) == (0, 0, "")


async def test_a_file_that_is_all_hole_keeps_nothing(tmp_path: Path) -> None:
    hole = tmp_path / "hole"
    with hole.open("wb") as file:
        file.truncate(1_000_000)
    assert await kept_from(str(hole)) == 1_000_000


async def test_a_file_system_without_holes_keeps_everything(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "_punch", lambda *_: False)
    assert await trim(str(log), CAP) == 0
    assert content(log) == numbered(100_000)


async def test_the_kernels_refusal_to_punch_is_an_error(log: Path) -> None:
    file = os.open(log, os.O_RDONLY)
    try:
        with pytest.raises(OSError, match="Bad file descriptor"):
            capture._punch(file, 0, 4096)
    finally:
        os.close(file)


async def test_the_tail_is_short_text_that_can_be_shown(tmp_path: Path) -> None:
    path = tmp_path / "stderr"
    path.write_bytes(b"x" * 10_000 + b"\x1b[31mred\x00\xff\x9b\r\n\t\xc3\xa4\xe2\x80\xae end\n")
    tail = await stderr_tail(str(path))
    assert tail.endswith("x\\x1b[31mred\\x00\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}\\r\n\tä\\u202e end\n")
    assert len(tail) < TAIL_BYTES + 32


async def test_a_tail_can_begin_where_a_start_began(tmp_path: Path) -> None:
    path = tmp_path / "stderr"
    path.write_text("before\nafter\n")
    assert await stderr_tail(str(path), start=7) == "after\n"
    assert await stderr_tail(str(path), start=1000) == ""


async def test_one_task_keeps_all_files_small_and_a_bad_one_stops_nothing(
    log: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(capture, "TRIM_EVERY_S", 0.0)
    looked = asyncio.Semaphore(0)

    def files() -> dict[str, int]:
        looked.release()
        return {str(log.parent): CAP, str(log): CAP}

    keeper = asyncio.create_task(keep_trimmed(files), name="keeper")
    for _ in range(3):  # by the third look the first is over
        await looked.acquire()
    keeper.cancel()
    with pytest.raises(asyncio.CancelledError):
        await keeper
    assert held(log) <= CAP + 2 * 4096
    assert caplog.records[0].message == "file not trimmed"


async def test_appended_files_are_private(tmp_path: Path) -> None:
    os.close(open_appending(str(tmp_path / "stderr")))
    assert (tmp_path / "stderr").stat().st_mode & 0o777 == 0o600
