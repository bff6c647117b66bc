"""Who watches a file is told that it grew."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from pathlib import Path

import pytest

from qmpd.filewatch import FileWatch, watching
from tests.process.emulator import descriptors

PATIENCE_S = 20.0


def append(path: Path, data: bytes = b"x") -> None:
    with path.open("ab") as file:
        file.write(data)


def queued_at_most() -> int:
    """Events the kernel keeps for somebody who does not read them."""
    return int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())


async def told(event: asyncio.Event) -> bool:
    """Waits for an event and takes it."""
    async with asyncio.timeout(PATIENCE_S):
        await event.wait()
    event.clear()
    return True


async def turns() -> None:
    """The loop looks at all that is ready, a few times."""
    for _ in range(5):
        await asyncio.sleep(0.001)


async def test_each_is_told_of_the_own_file_and_of_no_other(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    append(one)
    append(other)
    mine, others = asyncio.Event(), asyncio.Event()
    with watching() as watch, watch.told(str(one), mine.set):
        with watch.told(str(other), others.set):
            append(one)
            assert await told(mine)
            assert not others.is_set()
            append(other)
            assert await told(others)
        append(other)
        await turns()
        assert not others.is_set()
        assert not mine.is_set()
        append(one)
        assert await told(mine)


async def test_a_file_is_watched_through_links_and_after_its_name_is_gone(tmp_path: Path) -> None:
    piece, link = tmp_path / "piece", tmp_path / "link"
    append(piece)
    link.symlink_to(piece)
    grew = asyncio.Event()
    with watching() as watch, watch.told(str(link), grew.set), piece.open("ab", buffering=0) as file:
        piece.unlink()
        file.write(b"x")
        assert await told(grew)


async def test_a_file_that_is_not_there_cannot_be_watched(tmp_path: Path) -> None:
    with watching() as watch, pytest.raises(FileNotFoundError), watch.told(str(tmp_path / "nothing"), lambda: None):
        pass


async def test_more_writes_than_can_be_told_are_told_as_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    limit = queued_at_most()
    one, other, quiet = (tmp_path / name for name in ("one", "other", "quiet"))
    events = {path: asyncio.Event() for path in (one, other, quiet)}
    with ExitStack() as stack:
        watch = stack.enter_context(watching())
        for path, event in events.items():
            append(path)
            stack.enter_context(watch.told(str(path), event.set))
        with one.open("ab", buffering=0) as first, other.open("ab", buffering=0) as second:
            for _ in range(limit):  # two of the same file in a row count as one
                first.write(b"x")
                second.write(b"x")
        for event in events.values():
            assert await told(event)
    assert "more writes than can be told one by one" in caplog.text


async def test_nothing_to_tell_is_no_error_and_nothing_is_left_open() -> None:
    before = descriptors()
    with watching() as watch:
        assert isinstance(watch, FileWatch)
        watch.read()
    assert descriptors() == before
