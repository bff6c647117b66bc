"""Two QEMUs write to one console's log, one after the other, while it is copied: the guest's trace has no break, there and back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from qmpd import segments
from qmpd.capture import trim_now
from qmpd.console import Console
from qmpd.filewatch import FileWatch, watching
from qmpd.launching import make_pipe
from qmpd.migration.consolelogs import ArrivingLog, LogSender, settle_numbering
from qmpd.monitor import Monitor
from qmpd.plan import SerialPipe
from tests.guests.build import Guest
from tests.guests.trace import check_trace
from tests.process.emulator import Emulators, emulators_in

pytestmark = pytest.mark.qemu

CAP = 1 << 20
PATIENCE_S = 120.0
#: So little goes with the last message that there is something left for afterwards.
INLINE = 100


class Host:
    """One end: a QEMU of the guest, its log, and its console as a daemon has it."""

    def __init__(self, directory: Path, watch: FileWatch, cap_bytes: int) -> None:
        directory.mkdir()
        self.cap_bytes = cap_bytes
        self.pipe = SerialPipe(id="serial0", path=str(directory / "serial0"), log=str(directory / "serial0.log"))
        self.console = Console(self.pipe.log, watch)
        self.monitor: Monitor

    async def launch(self, emulators: Emulators, guest: Guest, owned: AsyncExitStack, *, incoming: bool) -> None:
        make_pipe(self.pipe, self.cap_bytes)
        started = await emulators.start(
            *("-m", "64", "-chardev", f"pipe,id=serial0,path={self.pipe.path}", "-serial", "chardev:serial0"),
            *("-drive", f"file={guest.file},format=raw,if=none,id=d0,read-only=on", "-device", "virtio-blk-pci,drive=d0"),
            *(("-incoming", "defer") if incoming else ()),
            machine="q35",
        )
        self.monitor = await owned.enter_async_context(started.session())
        await owned.enter_async_context(self.console.connected(self.pipe.path))

    async def ask(self, command: str, **arguments: object) -> dict[str, object]:
        answer = await self.monitor.execute(command, arguments)
        assert isinstance(answer, dict)
        return answer


@pytest.fixture
async def world(short_directory: Path) -> AsyncIterator[tuple[Emulators, FileWatch, AsyncExitStack, Path]]:
    async with AsyncExitStack() as owned:
        emulators = await owned.enter_async_context(emulators_in(short_directory))
        yield emulators, owned.enter_context(watching()), owned, short_directory


async def grown(console: Console, end: int) -> None:
    """Returns when the log is so long."""
    async with asyncio.timeout(PATIENCE_S):
        while console.end < end:
            await asyncio.sleep(0.02)


async def move(source: Host, destination: Host, socket: Path) -> int:
    """Moves the guest and its log; returns where the log of the source ended."""
    arriving = ArrivingLog(destination.pipe.log, destination.cap_bytes)

    async def send(offset: int, data: bytes) -> None:
        await asyncio.to_thread(arriving.write, offset, data)

    sender = LogSender(0, source.console, send)
    following = asyncio.create_task(sender.keep_up(), name="logs")
    await destination.ask("migrate-incoming", uri=f"unix:{socket}")
    await source.ask("migrate", uri=f"unix:{socket}")
    async with asyncio.timeout(PATIENCE_S):
        while (await source.ask("query-migrate")).get("status") != "completed":
            await asyncio.sleep(0.05)
    following.cancel()
    await asyncio.wait([following])
    tail = await sender.tail(INLINE)
    received = await asyncio.to_thread(settle_numbering, [destination.pipe], [tail], destination.cap_bytes)
    await destination.console.moved(destination.pipe.path)
    await destination.ask("cont")
    arriving = ArrivingLog(destination.pipe.log, destination.cap_bytes, end=tail.end)
    await sender.finish(received[0], tail.end)
    return tail.end


def whole(stem: str) -> tuple[int, bytes]:
    """All that is kept, which must be one run; of a guest that prints on at least what there was."""
    end, _ = segments.size_and_tail(stem, 0)
    begin, data = segments.read(stem, 0, CAP)
    while begin + len(data) < end:
        at, more = segments.read(stem, begin + len(data), CAP)
        assert at == begin + len(data)
        assert more
        data += more
    return begin, data


@pytest.mark.parametrize("name", ["x86_64-q35", "x86_64-q35-flood"])
async def test_no_byte_is_lost_or_doubled_there_and_back(
    world: tuple[Emulators, FileWatch, AsyncExitStack, Path], guests: dict[str, Guest], name: str
) -> None:
    emulators, watch, owned, directory = world
    data = b""
    here = Host(directory / "0", watch, 64 * CAP)
    await here.launch(emulators, guests[name], owned, incoming=False)
    await here.ask("cont")
    await grown(here.console, 500)
    for number in (1, 2):
        there = Host(directory / str(number), watch, 64 * CAP)
        await there.launch(emulators, guests[name], owned, incoming=True)
        end = await move(here, there, directory / f"migration{number}")
        old = whole(here.pipe.log)
        assert end == old[0] + len(old[1])
        await grown(there.console, end + 100)
        assert there.console.piece == str(segments.named(there.pipe.log, end))
        start, data = whole(there.pipe.log)
        assert (start, data[:end]) == old
        here = there
    trace = check_trace(data)
    assert (trace.boots, trace.breaks) == (1, ())
    assert trace.characters > 600


async def test_caps_are_kept_and_what_is_kept_has_its_number(
    world: tuple[Emulators, FileWatch, AsyncExitStack, Path], guests: dict[str, Guest]
) -> None:
    emulators, watch, owned, directory = world
    cap = 16 * 1024
    here, there = (Host(directory / str(number), watch, cap) for number in range(2))
    await here.launch(emulators, guests["x86_64-q35-flood"], owned, incoming=False)
    await here.ask("cont")
    await grown(here.console, 8 * cap)
    assert here.console.piece is not None
    await asyncio.to_thread(trim_now, here.console.piece, cap)
    await there.launch(emulators, guests["x86_64-q35-flood"], owned, incoming=True)
    end = await move(here, there, directory / "migration")
    await grown(there.console, end + 100)
    old, (begin, data) = whole(here.pipe.log), whole(there.pipe.log)
    assert sum(path.stat().st_blocks * 512 for base, path in segments.pieces(there.pipe.log) if base < end) <= cap + 4096
    assert begin >= old[0]
    assert old[1].endswith(data[: end - begin])
    assert check_trace(data).breaks == ()
