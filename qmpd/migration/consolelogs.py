"""Console logs on their way to another host, where every byte keeps its number.

The source sends while the guest runs, and the little that is left when it has stopped. At the destination a QEMU has its own piece
open by then, empty, and named as if nothing had been written before: nobody knew how much it would be. What arrives lies beside it
under names that are not part of the log. When the end is known QEMU's piece is renamed to begin there (QEMU keeps its descriptor),
and what arrived gets its names. Bytes that the source had dropped are between two pieces: they are nowhere, as at the source.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
from collections.abc import Awaitable, Callable, Iterable, Sequence
from pathlib import Path
from typing import Final

from qmpd import segments
from qmpd.capture import trim_now
from qmpd.console import Console
from qmpd.errors import QmpdError
from qmpd.failpoint import failpoint
from qmpd.migration.arrivingfiles import private, sync, trouble, write_all
from qmpd.migration.protocol import ConsoleEnd, console_end
from qmpd.plan import SerialPipe

#: What is sent at once: well below what a request may have.
CHUNK_BYTES: Final = 256 * 1024
#: Between two requests for a guest that prints a few bytes at a time: whoever moves a machine does not watch its console meanwhile.
PACE_S: Final = 0.1
#: The name of a piece that is not part of the log yet ends in this.
ARRIVING: Final = ".arriving"
#: Runs of bytes with gaps between them. An honest source has a handful; each costs a file.
RUNS_KEPT: Final = 64

_log = logging.getLogger(__name__)

#: Takes bytes to the destination, the first of which has the number that is given.
Send = Callable[[int, bytes], Awaitable[object]]


class LogSender:
    """Sends one serial port's log. All before `sent` is at the destination; after a failure any method may be called again."""

    def __init__(self, port: int, console: Console, send: Send, *, sent: int = 0) -> None:
        self.sent = sent
        self._port = port
        self._console = console
        self._send = send

    async def keep_up(self) -> None:
        """Sends what there is and what comes, until the machine has ended or the caller cancels this. Raises what `send` raises."""
        async with contextlib.aclosing(self._console.follow(self.sent, chunk=CHUNK_BYTES)) as pieces:
            async for begin, data in pieces:
                await self._send(begin, data)
                self.sent = begin + len(data)
                if len(data) < CHUNK_BYTES:
                    await asyncio.sleep(PACE_S)

    async def tail(self, limit: int) -> ConsoleEnd:
        """The end of the log of a guest that has stopped, with up to `limit` of the bytes that were not sent yet."""
        await self._console.load()
        end = self._console.end
        offset, data = await self._console.read(self.sent, limit)
        return console_end(self._port, end, offset, data)

    async def finish(self, received: int, end: int) -> None:
        """Sends what the destination has not got of a log that ended at `end`: it says that it `received` what is before that."""
        self.sent = received
        while self.sent < end:
            begin, data = await self._console.read(self.sent, min(CHUNK_BYTES, end - self.sent))
            if not data or begin >= end:
                return
            await self._send(begin, data)
            self.sent = begin + len(data)


class ArrivingLog:
    """One serial port's log at the destination; `end` is where it ended at the source, once that is known. Everything here blocks.

    What it knows is in the names and sizes of files alone, so it can be made anew at any time. One at a time may write.
    """

    def __init__(self, stem: str, cap_bytes: int, *, end: int | None = None) -> None:
        self._stem = stem
        self._cap_bytes = cap_bytes
        self._end = end

    def received(self) -> int:
        """The number behind the last byte that is here; 0 if there is none."""
        runs = self._runs()
        return _end_of(*runs[-1]) if runs else 0

    def write(self, offset: int, data: bytes) -> int:
        """Lays bytes down, the first of which has the number `offset`, and returns `received`. What is here already is not written again.

        Bytes come in their order. Those between `received` and `offset` are gone at the source. The oldest go when the log is over
        its cap.

        Raises:
            NoSpace: there is no space; what was written counts as received.
            HostError: they cannot be written.
        """
        if self._end is not None:
            data = data[: max(0, self._end - offset)]  # what comes later is the new QEMU's
        runs = self._runs()
        received = _end_of(*runs[-1]) if runs else 0
        data, offset = data[max(0, received - offset) :], max(offset, received)
        if not data:
            return received
        base, path = runs[-1] if runs and offset == received else (offset, segments.named(self._stem, offset, self._suffix))
        try:
            failpoint("migration-log-write")
            with open(path, "r+b" if path.exists() else "x+b", buffering=0, opener=private) as file:
                write_all(file.fileno(), data, offset - base)
            self._keep_below_cap()
        except OSError as error:
            raise trouble(error, path) from error
        return offset + len(data)

    def settle(self, pipe: str, end: int) -> None:
        """Numbers the log, before the guest runs here: the piece that QEMU writes to through `pipe`.out begins at `end`, and what
        arrived is in front of it. Killed at any point and called again, it ends in the same state; called once more, it changes nothing.

        Raises:
            HostError, NoSpace: it cannot be done now.
        """
        link, own = Path(f"{pipe}.out"), segments.named(self._stem, end)
        try:
            target = link.readlink()
            if _base_of(target) < end:
                _renumber(target, own)
                # Only now: what arrives may get the very name that the link had.
                _relink(link, own)
        except (OSError, ValueError) as error:
            raise trouble(error, link) from error
        self.place(end)

    def place(self, end: int) -> None:
        """Makes what arrived a part of the log, which ended at `end`. For a log that no QEMU writes to; `settle` does it too.

        Raises:
            HostError, NoSpace: it cannot be done now.
        """
        self._end = end
        for base, path in segments.pieces(self._stem, ARRIVING):
            try:
                failpoint("migration-log-place")
                if base >= end:
                    path.unlink()
                    continue
                if _end_of(base, path) > end:
                    os.truncate(path, end - base)
                path.rename(segments.named(self._stem, base))
            except OSError as error:
                raise trouble(error, path) from error

    def secure(self) -> None:
        """Returns when what is here outlives a crash of the host, so that the source may forget it. Raises HostError, NoSpace."""
        for path in [*(path for _, path in self._runs()), Path(self._stem).parent]:
            try:
                sync(path)
            except OSError as error:
                raise trouble(error, path) from error

    @property
    def _suffix(self) -> str:
        return ARRIVING if self._end is None else ""

    def _runs(self) -> list[tuple[int, Path]]:
        return [(base, path) for base, path in segments.pieces(self._stem, self._suffix) if self._end is None or base < self._end]

    def _keep_below_cap(self) -> None:
        room = self._cap_bytes
        for number, (base, path) in enumerate(reversed(self._runs())):
            if number and (room <= 0 or number >= RUNS_KEPT):
                path.unlink()
                continue
            size = _end_of(base, path) - base
            if size > room:
                trim_now(str(path), room)
            room -= size


def settle_numbering(pipes: Iterable[SerialPipe], tails: Sequence[ConsoleEnd], cap_bytes: int) -> dict[int, int]:
    """Numbers the logs of all serial ports of a machine, and writes their tails. Returns what was received of each; the source sends what
    is missing then, while the guest runs. May be called again, like `ArrivingLog.settle`. Blocks.

    Raises:
        HostError, NoSpace: a log cannot be numbered now. That a tail cannot be written is no error: a guest is more than its log.
    """
    ports = {pipe.id: pipe for pipe in pipes}
    received: dict[int, int] = {}
    for tail in tails:
        pipe = ports.get(f"serial{tail.port}")
        if pipe is None:
            _log.warning("the log of a serial port that is not kept here was left out", extra={"port": tail.port})
            continue
        log = ArrivingLog(pipe.log, cap_bytes)
        log.settle(pipe.path, tail.end)
        try:
            received[tail.port] = log.write(tail.offset, tail.tail)
        except QmpdError as error:
            _log.warning("the end of a console's log was not written", extra={"path": pipe.log, "error": error.message})
            received[tail.port] = log.received()
    return received


def follow_on(pipe: str) -> None:
    """The piece that a QEMU writes to through `pipe`.out, which was begun beside the log of the one before, becomes the newest of the log.
    Nobody writes meanwhile. Killed at any point and called again, it ends in the same state. Blocks. Raises OSError."""
    link = Path(f"{pipe}.out")
    target = link.readlink()
    if target.name.endswith(segments.NEXT):
        failpoint("succession-log")
        _relink(link, segments.joined(str(target).removesuffix(segments.NEXT)))


def _end_of(base: int, path: Path) -> int:
    return base + path.stat().st_size


def _base_of(piece: Path) -> int:
    return int(piece.name[-segments.DIGITS :])


def _renumber(piece: Path, own: Path) -> None:
    if not piece.exists():
        if own.exists():
            return  # somebody was killed between both steps
        raise FileNotFoundError(errno.ENOENT, "the piece that QEMU writes to is gone", str(piece))
    if own.exists():
        raise FileExistsError(errno.EEXIST, "there is another piece in its place", str(own))
    failpoint("migration-log-renumber")
    piece.rename(own)


def _relink(link: Path, own: Path) -> None:
    fresh = link.with_name(f"{link.name}.new")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(own)
    failpoint("migration-log-relink")
    fresh.rename(link)
