"""Ends whose guest writes numbered blocks to a disk, and prints each once it is written."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

from tests.guests.build import Guest
from tests.guests.ring import acknowledged, missing, read_ring
from tests.migration.ends import End, Ends, unchanged
from tests.process.emulator import PATIENCE_S, QEMU

#: The guest's own megabyte, and something to copy behind it.
DISK_BYTES: Final = 8 * 1024 * 1024
#: The node of the disk.
NODE: Final = "d0"


class Writers:
    """Starts ends with that guest."""

    def __init__(self, ends: Ends, guest: Guest) -> None:
        self.ends = ends
        self._guest = guest
        self._count = 0

    def image(self, *, like: Path | None = None) -> Path:
        """A new disk: the guest's, or an empty one."""
        self._count += 1
        path = self.ends.directory / f"disk{self._count}.raw"
        if like is None:
            shutil.copyfile(self._guest.file, path)
            with path.open("r+b") as image:
                image.seek(DISK_BYTES // 2)
                image.write(os.urandom(DISK_BYTES // 2))
        else:
            path.touch()
            os.truncate(path, like.stat().st_size)
        return path

    async def source(self, disk: Path, program: str = QEMU) -> End:
        """An end whose guest writes."""
        started = await self.ends.start(*options(disk), program=program)
        await started.monitor.execute("cont")
        await self.written(started, 4)
        return started

    async def destination(self, disk: Path, program: str = QEMU) -> End:
        """An end that waits for it."""
        return await self.ends.start(*options(disk), "-incoming", "defer", program=program)

    async def written(self, end: End, count: int) -> None:
        """Waits until the guest has printed so many more blocks here."""
        before = last(end)
        async with asyncio.timeout(PATIENCE_S):
            while last(end) < before + count:
                await asyncio.sleep(0.02)

    @asynccontextmanager
    async def undisturbed(self, source: End, disk: Path) -> AsyncIterator[None]:
        """Whatever happens in the block, afterwards the source is what it was, and its guest has lost nothing and goes on."""
        async with unchanged(source):
            yield
        await self.written(source, 4)
        await source.monitor.execute("stop")
        self.check(disk, source)

    def check(self, disk: Path, *ends: End) -> None:
        """What the guest printed at these ends has no gap, and is on the disk."""
        said = acknowledged(b"".join(end.serial.read_bytes() for end in ends))
        ring = read_ring(disk)
        assert (said.gaps, said.errors) == ((), 0)
        assert missing(ring, said.last) == ()


def options(disk: Path) -> tuple[str, ...]:
    """The disk as options of QEMU."""
    return (
        *("-blockdev", f"driver=file,node-name={NODE}-file,filename={disk}"),
        *("-blockdev", f"driver=raw,node-name={NODE},file={NODE}-file"),
        *("-device", f"ide-hd,drive={NODE},id=disk0,bus=ide.0"),
    )


def last(end: End) -> int:
    """The newest block that was printed here."""
    return acknowledged(end.serial.read_bytes()).last if end.serial.exists() else 0
