"""Every byte of a serial port reaches everybody who looks, once and in order, and what is typed reaches the guest."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from qmpd import segments
from qmpd.capture import trim
from qmpd.console import Console, port_of
from qmpd.errors import MonitorUnavailable, NotFound
from qmpd.filewatch import FileWatch, watching
from tests.unit.serialport import Port, ready

PATIENCE_S = 20.0


@pytest.fixture
def port(tmp_path: Path) -> Iterator[Port]:
    with ready(tmp_path) as made:
        yield made


@pytest.fixture
async def watch() -> AsyncIterator[FileWatch]:
    with watching() as made:
        yield made


@pytest.fixture
def console(port: Port, watch: FileWatch) -> Console:
    return Console(port.stem, watch)


class Viewer:
    """Somebody who follows, in a task of its own."""

    def __init__(self, console: Console, offset: int) -> None:
        self.seen = b""
        self.offsets: list[int] = []
        self._more = asyncio.Event()
        self.task = asyncio.create_task(self._follow(console, offset), name="viewer")

    async def _follow(self, console: Console, offset: int) -> None:
        async for begin, data in console.follow(offset):
            self.offsets.append(begin)
            self.seen += data
            self._more.set()

    async def until(self, length: int) -> bytes:
        """What was seen, once it is so much."""
        async with asyncio.timeout(PATIENCE_S):
            while len(self.seen) < length:
                self._more.clear()
                await self._more.wait()
        return self.seen

    async def end(self) -> bytes:
        """What was seen, once there is no more."""
        async with asyncio.timeout(PATIENCE_S):
            await self.task
        return self.seen


View = Callable[[Console, int], Viewer]


@pytest.fixture
async def view() -> AsyncIterator[View]:
    made: list[Viewer] = []

    def follow(console: Console, offset: int) -> Viewer:
        made.append(Viewer(console, offset))
        return made[-1]

    yield follow
    for viewer in made:
        viewer.task.cancel()
        await asyncio.wait([viewer.task])


async def test_a_console_without_a_log_is_empty(console: Console, view: View) -> None:
    await console.load()
    assert (console.end, console.last_line(), await console.start(), console.attached) == (0, "", 0, False)
    assert await console.read(0, 100) == (0, b"")
    assert await console.read(2**70, 100) == (2**70, b"")
    assert await view(console, 0).end() == b""


async def test_everything_is_seen_by_everybody_from_where_they_want(console: Console, port: Port, view: View) -> None:
    async with console.connected(port.pipe):
        first, second, later = (view(console, offset) for offset in (0, 5, 1000))
        port.prints(b"hello ")
        await first.until(6)
        port.prints(b"world")
        assert await first.until(11) == b"hello world"
        assert await second.until(6) == b" world"
        assert (first.offsets[0], second.offsets[0]) == (0, 5)
        assert later.seen == b""
        assert console.end == 11


async def test_followers_see_the_end_and_all_that_came_before_it(console: Console, port: Port, view: View) -> None:
    async with console.connected(port.pipe):
        made = [view(console, 0) for _ in range(3)]
        port.prints(b"last words")
    assert [await viewer.end() for viewer in made] == [b"last words"] * 3
    await console.load()
    assert (console.end, console.last_line()) == (10, "last words")


async def test_nothing_is_lost_or_doubled_however_it_comes(console: Console, port: Port, view: View) -> None:
    chance = random.Random(7)
    printed = b""
    made: list[Viewer] = []
    async with console.connected(port.pipe):
        for _ in range(150):
            piece = chance.randbytes(chance.choice((1, 2, 100, 5000)))
            printed += piece
            port.prints(piece)
            if chance.random() < 0.1:
                made.append(view(console, chance.randrange(len(printed) + 1)))
            if chance.random() < 0.5:
                await asyncio.sleep(0)
    assert made
    for viewer in made:
        seen = await viewer.end()
        assert printed.endswith(seen)
        assert not seen or viewer.offsets[0] == len(printed) - len(seen)


async def test_the_size_is_known_shortly_after_somebody_printed(console: Console, port: Port) -> None:
    async with console.connected(port.pipe):
        for count in range(1, 4):
            port.prints(b"line\n")
            async with asyncio.timeout(PATIENCE_S):
                while console.end < 5 * count:
                    await asyncio.sleep(0.005)
            assert console.end == 5 * count


async def test_a_log_goes_on_where_the_last_machine_stopped(console: Console, port: Port, view: View) -> None:
    async with console.connected(port.pipe):
        port.prints(b"first run\n")
    port.begin()
    async with console.connected(port.pipe):
        port.prints(b"second run\n")
        assert await view(console, 0).until(21) == b"first run\nsecond run\n"
    assert await console.read(10, 6) == (10, b"second")
    assert console.end == 21


async def test_a_daemon_that_comes_later_knows_what_was_printed(port: Port, watch: FileWatch) -> None:
    port.prints(b"booting\n\x1b[1mlogin: \xff\n\n  \n")
    console = Console(port.stem, watch)
    await console.load()
    assert console.end == 25
    assert console.last_line() == "\N{MIDDLE DOT}[1mlogin: \ufffd"


async def test_bytes_that_were_dropped_are_skipped_with_their_offset(console: Console, port: Port, view: View) -> None:
    data = os.urandom(64 * 1024)
    port.prints(data)
    assert console.piece is None
    async with console.connected(port.pipe):
        assert console.piece is not None
        kept = await trim(console.piece, 4096)
    assert kept == await console.start() == len(data) - 4096
    assert await console.read(0, 10) == (kept, data[kept : kept + 10])
    viewer = view(console, 0)
    assert await viewer.end() == data[kept:]
    assert viewer.offsets[0] == kept


async def test_a_log_that_cannot_be_looked_at_now_is_looked_at_later(
    port: Port, watch: FileWatch, caplog: pytest.LogCaptureFixture
) -> None:
    console = Console(port.stem, watch)
    (piece,) = (path for _, path in segments.pieces(port.stem))
    piece.unlink()
    piece.mkdir()
    await console.load()
    assert "console log cannot be looked at" in caplog.text
    assert console.end == 0


async def test_what_is_typed_reaches_the_guest(console: Console, port: Port) -> None:
    with pytest.raises(MonitorUnavailable, match="does not run"):
        await console.write(b"x")
    async with console.connected(port.pipe):
        await console.write(b"")
        await console.write(b"hello")
        assert port.reads() == b"hello"
    with pytest.raises(MonitorUnavailable):
        await console.write(b"x")


async def test_a_slow_uart_gets_its_bytes_one_by_one(port: Port, watch: FileWatch) -> None:
    console = Console(port.stem, watch, input_delay_s=0.001)
    async with console.connected(port.pipe):
        typing = asyncio.create_task(console.write(b"abc"), name="typing")
        got: list[bytes] = []
        async with asyncio.timeout(PATIENCE_S):
            while sum(map(len, got)) < 3:
                got.append(port.reads())
                await asyncio.sleep(0)
        await typing
    assert b"".join(got) == b"abc"


async def test_typists_do_not_mix_and_wait_for_a_guest_that_is_slow(console: Console, port: Port) -> None:
    texts = [bytes([letter]) * 50_000 for letter in b"abc"]
    got = b""
    async with console.connected(port.pipe):
        typing = [asyncio.create_task(console.write(text), name="typing") for text in texts]
        async with asyncio.timeout(PATIENCE_S):
            while len(got) < 150_000:
                got += port.reads(4096)
                await asyncio.sleep(0)
            await asyncio.gather(*typing)
    assert got == b"".join(texts)


async def test_a_typist_is_told_when_the_machine_ends_and_nobody_waits_in_vain(console: Console, port: Port) -> None:
    async with asyncio.timeout(PATIENCE_S / 4), console.connected(port.pipe):
        typing = [asyncio.create_task(console.write(b"x" * 200_000), name="typing") for _ in range(2)]
        while not port.reads(1):
            await asyncio.sleep(0)
    for task in typing:
        with pytest.raises(MonitorUnavailable):
            await task


async def test_a_port_whose_files_are_gone_is_not_attached(console: Console, port: Port, view: View) -> None:
    port.breaks()
    with pytest.raises(FileNotFoundError):
        async with console.connected(port.pipe):
            pass
    assert not console.attached
    assert await view(console, 0).end() == b""


def test_a_port_is_found_by_its_number_or_is_the_console(console: Console) -> None:
    consoles = {0: console, 2: console}
    assert port_of(consoles, 2, 0, "one") is port_of(consoles, None, 0, "one") is console
    for wanted, default, kept, message in (
        (1, 0, consoles, r"keeps no serial port 1 \(kept ports: 0, 2\)"),
        (None, None, {}, r"keeps no serial port  \(kept ports: none\)"),
        (None, 1, consoles, r"kept ports: 0, 2"),
    ):
        with pytest.raises(NotFound, match=message):
            port_of(kept, wanted, default, "one")
