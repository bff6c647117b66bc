"""The files of a machine on their way to another host: what is in them is sent, holes are not, and both ends compare a digest.

Who sends asks first how far the other end is, and again whenever an answer did not come: so either daemon may be restarted.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Final, Protocol, TypeVar

from qmpd.errors import MigrationFailed, PeerSilent, PeerUnavailable
from qmpd.migration.extents import BLOCK, Opened, blocks, fingerprint
from qmpd.migration.parcels import VARIABLES, ItemStanding
from qmpd.tasks import alongside, undivided

#: A peer that does not answer is tried again so often, with so long between; its daemon may be restarted meanwhile.
ATTEMPTS: Final = 20
AGAIN_S: Final = 1.5
#: A disk in terabytes takes the other end this long to read again, and more.
DIGEST_LIMIT_S: Final = 6 * 3600.0
#: Times of files are as exact as the kernel's clock ticks; on a network they may come from another clock.
TICK_NS: Final = 2_000_000_000

T = TypeVar("T")
#: Is told how many bytes of the file are done, of how many.
Progress = Callable[[int, int], None]


class ItemLink(Protocol):
    """A connection to the destination. Both raise the errors of a peer (`PeerError`)."""

    async def put_item(self, migration: str, item: str, offset: int, data: bytes) -> ItemStanding:
        """Hand in a piece."""

    async def item(self, migration: str, item: str) -> ItemStanding:
        """Ask how far it is."""


class FileSender:
    """Sends one file that does not change meanwhile."""

    def __init__(self, link: ItemLink, migration: str, item: str, path: str) -> None:
        self._link = link
        self._migration = migration
        self._item = item
        self._path = path
        self._size = 0
        self._received = 0

    async def send(self, progress: Progress = lambda _done, _of: None) -> None:
        """Returns when all of it is there, and was read again there.

        Raises:
            PeerRefused: the other end does not take it.
            PeerUnavailable, PeerSilent: it did not answer for a long time.
            MigrationFailed: what arrived is not what was sent.
            OSError: the file cannot be read.
        """
        async with alongside(fingerprint(self._path), f"fingerprint:{self._item}") as digest:
            fruitless = 0
            while True:
                before = self._received
                try:
                    await self._send_rest(progress)
                    break
                except (PeerSilent, PeerUnavailable):
                    fruitless = fruitless + 1 if self._received <= before else 0
                    if fruitless >= ATTEMPTS:
                        raise
                await asyncio.sleep(AGAIN_S)
            ours = await digest
        theirs = await self._digest_there()
        if theirs != ours:
            raise MigrationFailed(f"{self._item} arrived as another than it was sent: {theirs} there, {ours} here")

    async def _send_rest(self, progress: Progress) -> None:
        """Sends from where the other end is."""
        standing = await self._standing()
        with await asyncio.to_thread(Opened, self._path) as file:
            self._received, self._size = standing.received, file.size
            if standing.size not in {None, file.size}:
                raise MigrationFailed(f"{self._path} has {file.size} bytes, and was announced with {standing.size}")
            pieces = blocks(file.descriptor, standing.received)
            # A thread must not read from a descriptor that is closed already, and may be another file's.
            while (piece := await undivided(asyncio.to_thread(next, pieces, None), f"read:{self._item}")) is not None:
                await self._put(*piece)
                progress(self._received, file.size)
            if self._received < file.size or not file.size:
                await self._put(file.size, b"")
            progress(self._received, file.size)

    async def _put(self, offset: int, data: bytes) -> None:
        self._received = (await self._link.put_item(self._migration, self._item, offset, data)).received

    async def _standing(self) -> ItemStanding:
        return await patiently(lambda: self._link.item(self._migration, self._item))

    async def _digest_there(self) -> str:
        async with asyncio.timeout(DIGEST_LIMIT_S):
            while True:
                standing = await self._standing()
                if standing.received != self._size:
                    raise MigrationFailed(f"{self._item} is not there any more: {standing.received} of {self._size} bytes are")
                if standing.digest is not None:
                    return standing.digest
                await asyncio.sleep(AGAIN_S)


class VariablesSender:
    """Sends the firmware variables of a machine that runs, and later what of them has changed. Everything is sent, zeros too."""

    def __init__(self, link: ItemLink, migration: str, path: str) -> None:
        self._link = link
        self._migration = migration
        self._path = path
        self._sent: dict[int, bytes] = {}
        self._quiet_since = -1

    async def send(self) -> int:
        """Sends every block that is not there as it is here now; returns how many those were. The last time, when the guest has stopped.

        Raises:
            PeerError: the other end does not take it, or does not answer.
            OSError: the file cannot be read.
        """
        changed, quiet_since = await asyncio.to_thread(self._changed)
        for offset, data in changed:
            await patiently(partial(self._link.put_item, self._migration, VARIABLES, offset, data))
            self._sent[offset] = hashlib.sha256(data).digest()
        self._quiet_since = quiet_since
        return len(changed)

    def _changed(self) -> tuple[list[tuple[int, bytes]], int]:
        """What is not there yet, and since when nobody has written.

        A file that is there, and was written to long before it was read, is not read again: a guest waits.
        """
        with Opened(self._path) as file:
            now, written = time.time_ns(), os.fstat(file.descriptor).st_mtime_ns
            if written == self._quiet_since:
                return [], written
            found = []
            for offset in range(0, file.size, BLOCK):
                data = os.pread(file.descriptor, BLOCK, offset)
                if self._sent.get(offset) != hashlib.sha256(data).digest():
                    found.append((offset, data))
            # What is written within the same tick of the clock has the same time.
            return found, written if written + TICK_NS < now else -1


async def patiently(ask: Callable[[], Awaitable[T]]) -> T:
    """Asks a peer until it answers. Raises PeerRefused at once, PeerUnavailable and PeerSilent when it did not for a long time."""
    for _ in range(ATTEMPTS - 1):
        try:
            return await ask()
        except (PeerSilent, PeerUnavailable):
            await asyncio.sleep(AGAIN_S)
    return await ask()
