"""A serial port: the log that keeps every byte, the viewers, and what they type.

QEMU itself writes each byte to a file, so nothing is lost while no daemon runs, and neither a viewer that stalls nor a daemon that
is stopped can stop the guest. Typing goes through a FIFO that QEMU keeps open. A character device that is a socket would do neither
well: when its reader is slow, QEMU holds the guest's UART back, and writes bytes that it has to send again to its log twice.
The offset of a byte in the log is its number for ever (`qmpd.segments`).
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from functools import partial
from typing import Final

from qmpd import segments
from qmpd.errors import Busy, MonitorUnavailable, NotFound
from qmpd.filewatch import FileWatch
from qmpd.tasks import Tasks, background

#: Between two looks at a log that grows all the time: short enough for somebody who types.
LOOK_S: Final = 0.02
#: How long a viewer's input may wait for a guest that does not read its port.
INPUT_DEADLINE_S: Final = 10.0
#: How much of the last output is kept in memory, for the last line.
TAIL_BYTES: Final = 512

_logger = logging.getLogger(__name__)


class Console:
    """One serial port of one machine. Reading works whether or not the machine runs; writing needs it to run."""

    def __init__(self, log: str, watch: FileWatch, *, input_delay_s: float = 0.0) -> None:
        self._log = log
        self._watch = watch
        self._input_delay_s = input_delay_s
        self._tail = b""
        self._seen = 0
        self._grew = False
        self._looking = False
        self._changed = asyncio.Event()
        self._input: int | None = None
        self._typing = asyncio.Lock()
        self._room = asyncio.Event()
        self.piece: str | None = None
        self.end = 0

    @property
    def attached(self) -> bool:
        """Whether a QEMU writes to the log, and one can type."""
        return self._input is not None

    def last_line(self) -> str:
        """The last line with something in it, with control characters made visible."""
        lines = [line for line in self._tail.decode("utf-8", "replace").splitlines() if line.strip()]
        return "".join(char if char.isprintable() else "\N{MIDDLE DOT}" for char in lines[-1].strip()) if lines else ""

    async def load(self) -> None:
        """Looks at the log: how long it is now, and its last bytes. Followers hear of what is new."""
        self.note(await asyncio.to_thread(self.look))

    def look(self) -> tuple[int, bytes] | None:
        """How long the log is and its last bytes, for `note`; None when it cannot be looked at. Blocks."""
        try:
            piece = self.piece
            seen = None if piece is None else segments.tail(piece, TAIL_BYTES)
            return seen if seen is not None and seen[1] else segments.size_and_tail(self._log, TAIL_BYTES)
        except (OSError, ValueError) as error:
            _logger.warning("console log cannot be looked at", extra={"path": self._log, "error": str(error)})
            return None

    def note(self, seen: tuple[int, bytes] | None) -> None:
        """Takes what `look` saw; on the loop's side."""
        if seen is None:
            return
        size, self._tail = seen
        self.end = size
        if size != self._seen:
            self._seen = size
            self._announce()

    async def moved(self, pipe: str) -> None:
        """The pieces of the log have other names: looks where QEMU's own is, and how long the log is now."""
        if self.attached:
            self.piece = await asyncio.to_thread(os.path.realpath, f"{pipe}.out")
        await self.load()

    async def start(self) -> int:
        """The offset of the oldest byte that is still kept."""
        return await asyncio.to_thread(segments.first, self._log)

    async def read(self, offset: int, limit: int) -> tuple[int, bytes]:
        """Up to `limit` bytes from `offset` on, and where they really begin: later than `offset` if that was dropped."""
        begin, data = await asyncio.to_thread(segments.read, self._log, offset, limit)
        self.end = max(self.end, begin + len(data)) if data else self.end
        return begin, data

    async def follow(self, offset: int, *, chunk: int = 65_536) -> AsyncGenerator[tuple[int, bytes], None]:
        """Everything from `offset` on as it comes, in pieces with their offsets, until the machine has stopped and all was read."""
        while True:
            changed = self._changed
            live = self.attached
            begin, data = await self.read(offset, chunk)
            if data:
                yield begin, data
                offset = begin + len(data)
            elif live:
                await changed.wait()
            else:
                return

    async def write(self, data: bytes) -> None:
        """Types into the port; returns when the bytes are on their way to QEMU.

        Raises:
            MonitorUnavailable: the machine does not run, or its port is not connected.
            Busy: the guest does not read, and the bytes that wait for it are at the limit.
        """
        async with self._typing:
            pieces = [data[at : at + 1] for at in range(len(data))] if self._input_delay_s else [data]
            for number, piece in enumerate(pieces):
                if number:
                    # Some UARTs have no FIFO and their guests lose what comes faster (board field console.input_delay_ms).
                    await asyncio.sleep(self._input_delay_s)
                await self._send(piece)

    async def _send(self, data: bytes) -> None:
        try:
            async with asyncio.timeout(INPUT_DEADLINE_S):
                while data:
                    if self._input is None:
                        raise MonitorUnavailable("nobody is listening on this serial port: the machine does not run")
                    try:
                        data = data[os.write(self._input, data) :]
                    except BlockingIOError:
                        await self._writable(self._input)
        except TimeoutError as error:
            raise Busy("the guest does not read its serial port; what was typed before is still waiting") from error

    async def _writable(self, descriptor: int) -> None:
        """Returns when the guest has read something, or the machine has ended."""
        loop = asyncio.get_running_loop()
        self._room.clear()
        loop.add_writer(descriptor, self._room.set)
        try:
            await self._room.wait()
        finally:
            loop.remove_writer(descriptor)

    @asynccontextmanager
    async def connected(self, pipe: str) -> AsyncIterator[None]:
        """Keeps up with the log that QEMU writes to `pipe`.out, and can type into `pipe`.in; at the end followers see the end of the log.

        Raises:
            OSError: one of the two is not there.
        """
        self.piece = await asyncio.to_thread(os.path.realpath, f"{pipe}.out")
        self._grew = self._looking = False
        async with background() as looks:
            with self._watch.told(self.piece, partial(self._grow, looks)), _opened(f"{pipe}.in") as descriptor:
                self._input = descriptor
                try:
                    await self.load()
                    yield
                finally:
                    self._input, self.piece = None, None
                    self._room.set()
                    async with self._typing:
                        pass  # who was typing has let go of the descriptor, which can be closed now
                    self._announce()

    def _grow(self, looks: Tasks) -> None:
        """The log grew: somebody looks at it, unless that is on its way. A log that does not grow costs no task."""
        self._grew = True
        if not self._looking:
            self._looking = True
            looks.start(self._look(), f"console:{self._log}")

    async def _look(self) -> None:
        try:
            while self._grew:
                self._grew = False
                await self.load()
                await asyncio.sleep(LOOK_S)
        finally:
            self._looking = False

    def _announce(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()


@asynccontextmanager
async def all_connected(consoles: Mapping[int, Console], pipes: Mapping[str, str]) -> AsyncIterator[None]:
    """The consoles of a machine that runs, connected with its pipes by the names of its serial ports."""
    async with AsyncExitStack() as stack:
        for index, console in consoles.items():
            pipe = pipes.get(f"serial{index}")
            if pipe is None:
                continue  # the board may have got another port since the machine was launched
            try:
                await stack.enter_async_context(console.connected(pipe))
            except OSError as error:
                # The machine runs on, and QEMU goes on logging: only typing is impossible.
                _logger.warning("console not attached", extra={"path": pipe, "error": str(error)})
        yield


@contextmanager
def _opened(fifo: str) -> Iterator[int]:
    # Reading as well, so that it can be opened before QEMU does, and is never without a reader.
    descriptor = os.open(fifo, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def port_of(consoles: dict[int, Console], wanted: int | None, default: int | None, machine: str) -> Console:
    """The console of a port number; None asks for the machine's console.

    Raises:
        NotFound: the machine has no such port, or none at all; the message names those it has.
    """
    number = default if wanted is None else wanted
    if number is None or number not in consoles:
        known = ", ".join(str(index) for index in sorted(consoles)) or "none"
        raise NotFound(f"machine {machine!r} keeps no serial port {'' if number is None else number} (kept ports: {known})")
    return consoles[number]
