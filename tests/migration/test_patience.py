"""A machine whose image is still locked when it arrives goes on as soon as the lock is free, and says meanwhile why it waits."""

from __future__ import annotations

import asyncio
import fcntl
import os
import struct
from collections.abc import Iterator
from contextlib import AsyncExitStack, ExitStack, contextmanager
from pathlib import Path

import pytest

from qmpd.errors import Held
from qmpd.lifecycle import State
from qmpd.migration import patience, reception
from qmpd.views import StartRequest
from tests.api.lab import Daemon, authority, daemon, host, peer, port
from tests.conftest import end_machines
from tests.guests.build import Guest
from tests.machines import spec_of
from tests.migration.doubtful import NAME, until, view
from tests.migration.test_moves import HUNG_S, LOOK_S, counting, known, moved, pair, printed

__all__ = ["counting"]
pytestmark = pytest.mark.qemu

#: The byte of an image by which a QEMU says that it lets nobody else write (block/file-posix.c: RAW_LOCK_SHARED_BASE, BLK_PERM_WRITE).
NOBODY_WRITES = 201


@contextmanager
def locking(image: Path) -> Iterator[None]:
    """Somebody wants nobody to write to an image. Whoever does already goes on, and nobody begins."""
    with image.open("rb") as file:
        fcntl.fcntl(file, fcntl.F_OFD_SETLK, struct.pack("hhxxxxqqixxxx", fcntl.F_RDLCK, os.SEEK_SET, NOBODY_WRITES, 1, 0))
        yield


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reception, "LOCK_PATIENCE_S", 0.2)


async def waits(there: Daemon) -> None:
    """Returns when the machine is here, and waits."""
    async with asyncio.timeout(HUNG_S):
        while not (doubt := view(there).doubt) or "lock" not in doubt:
            await asyncio.sleep(LOOK_S)


async def test_a_machine_goes_on_as_soon_as_its_image_is_free(short_directory: Path, counting: Guest) -> None:
    async with pair(short_directory) as (a, b):
        await a.service.create(spec_of(counting, NAME), start=True)
        await printed(a, NAME, 100)
        with locking(counting.file):
            report = await moved(a, NAME, "b")
            assert report.owner == "destination"
            assert known(a, NAME) is None
            await waits(b)
            found = view(b)
            assert (found.phase, found.owner) == ("taken", "destination")
            assert found.doubt is not None
            assert 'Failed to get "write" lock' in found.doubt
            assert b.service.machine(NAME).state is State.PAUSED
            with pytest.raises(Held):
                await b.service.resume(NAME)
            told = [event for event in (await b.service.events_page(0, 1000, NAME)).events if event.kind == "machine.locked-out"]
            assert len(told) == 1
            assert str(told[0].data["reason"]) in found.doubt
        await until(b, "arrived")
        await printed(b, NAME, 100)
        assert view(b).doubt is None
        assert b.service.machine(NAME).operation is None
        await b.service.kill(NAME)


async def test_it_is_left_to_a_person_in_the_end(short_directory: Path, counting: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "LOCK_LIMIT_S", 0.5)
    async with pair(short_directory) as (a, b):
        await a.service.create(spec_of(counting, NAME), start=True)
        with locking(counting.file):
            await moved(a, NAME, "b")
            await until(b, "arrived")
            told = [event for event in (await b.service.events_page(0, 1000, NAME)).events if event.kind == "machine.arrived"]
            assert "lock" in str(told[0].data["problem"])
            async with asyncio.timeout(HUNG_S):
                while b.service.machine(NAME).operation is not None:
                    await asyncio.sleep(LOOK_S)
            assert b.service.machine(NAME).state is State.PAUSED
        await b.service.resume(NAME)
        await printed(b, NAME, 100)
        await b.service.kill(NAME)


async def test_it_is_killed_like_any_other(short_directory: Path, counting: Guest) -> None:
    async with pair(short_directory) as (a, b):
        await a.service.create(spec_of(counting, NAME), start=True)
        with locking(counting.file):
            await moved(a, NAME, "b")
            await waits(b)
            assert (await b.service.kill(NAME)).method == "sigkill"
            await until(b, "arrived")
        async with asyncio.timeout(HUNG_S):
            while b.service.machine(NAME).operation is not None:
                await asyncio.sleep(LOOK_S)
        await b.service.start(NAME, StartRequest())
        await b.service.kill(NAME)


async def test_the_next_daemon_goes_on_waiting(short_directory: Path, counting: Guest) -> None:
    root = authority(short_directory / "ca")
    a_pki, b_pki = (host(root, short_directory / name / "pki", name) for name in ("a", "b"))
    async with AsyncExitStack() as stack:
        listener, number = stack.enter_context(port())
        with port() as (first, b_number), ExitStack() as lock:
            a = await stack.enter_async_context(daemon("a", short_directory / "a", a_pki, listener, [peer("b", b_number)]))
            async with daemon("b", short_directory / "b", b_pki, first, [peer("a", number)]) as before:
                await a.service.create(spec_of(counting, NAME), start=True)
                await printed(a, NAME, 100)
                lock.enter_context(locking(counting.file))
                await moved(a, NAME, "b")
                await waits(before)
            again, _ = stack.enter_context(port())
            b = await stack.enter_async_context(daemon("b", short_directory / "b", b_pki, again, [peer("a", number)]))
            stack.push_async_callback(end_machines, b.service)
            await waits(b)
            assert view(b).phase == "taken"
        await until(b, "arrived")
        await printed(b, NAME, 100)
