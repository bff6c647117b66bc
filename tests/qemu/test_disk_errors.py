"""Disks that are full, with a real file system that is: the guest is halted, and no block is lost when it goes on."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from qmpd.daemon import running
from qmpd.lifecycle import State
from qmpd.service import Service
from qmpd.settings import Settings
from qmpd.spec import ImageDisk, MachineChanges, MachineSpec
from qmpd.views import MachineView
from tests.conftest import end_machines
from tests.guests.build import Guest
from tests.guests.ring import SECTOR_BYTES, acknowledged, missing, read_ring
from tests.machines import spec_of
from tests.unavailable import need_root, tool
from tests.waiting import PATIENCE_S, until

pytestmark = pytest.mark.qemu

MIB = 1024 * 1024
#: Of the small file system: what the guest may fill before it is full.
ROOM_BYTES = 64 * 1024


class SmallDisk:
    """A file system of one MiB with an image for a guest, and something that fills the rest."""

    def __init__(self, path: Path, guest: Guest) -> None:
        self.image = path / "disk.img"
        self._ballast = path / "ballast"
        with self.image.open("wb") as file:
            file.write(guest.file.read_bytes()[:SECTOR_BYTES])
            file.truncate(guest.file.stat().st_size)
        with self._ballast.open("wb") as file:
            free = shutil.disk_usage(path).free - ROOM_BYTES
            file.write(bytes(free))

    def free(self) -> None:
        """Makes room."""
        self._ballast.unlink()


@pytest.fixture
def small_disk(short_directory: Path, guests: dict[str, Guest]) -> Iterator[SmallDisk]:
    need_root("mount a small file system")
    tool("mount", "mount")
    path = short_directory / "small"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={MIB}", "tmpfs", str(path)], check=True, timeout=PATIENCE_S)
    try:
        yield SmallDisk(path, guests["x86_64-pc-blocks"])
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True, timeout=PATIENCE_S)


def writer(guests: dict[str, Guest], disk: SmallDisk, **changes: object) -> MachineSpec:
    """A machine whose guest writes numbered blocks to its disk, and prints each number once it is there."""
    disks = (ImageDisk(path=str(disk.image), format="raw", bus="ide"),)
    return spec_of(guests["x86_64-pc-blocks"], "one", disks=disks, **changes)


def is_halted(view: MachineView) -> bool:
    return (view.state, view.status) == (State.PAUSED, "io-error")


async def goes_on(service: Service, settings: Settings, disk: SmallDisk) -> None:
    """The guest writes on, and of all blocks that it saw written none is lost."""
    halted_at = acknowledged(output(settings)).last
    await until(service, "one", lambda _: acknowledged(output(settings)).last >= halted_at + 200)
    await service.stop("one")
    seen = acknowledged(output(settings))
    assert (seen.gaps, seen.errors) == ((), 0)
    ring = read_ring(disk.image)
    assert ring.torn == ()
    assert missing(ring, seen.last) == ()


def output(settings: Settings) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(Path(settings.state_dir, "machines", "one").glob("serial0*")))


async def test_a_full_disk_halts_the_guest_and_after_a_resume_no_block_is_lost(
    service: Service, settings: Settings, guests: dict[str, Guest], small_disk: SmallDisk
) -> None:
    await service.create(writer(guests, small_disk), start=True)
    view = await until(service, "one", is_halted)
    assert view.disk_error is not None
    assert (view.disk_error.disk, view.disk_error.operation, view.disk_error.nospace) == (0, "write", True)
    written = acknowledged(output(settings)).last
    assert written > 0
    await service.resume("one")
    await until(service, "one", is_halted)  # there still is no room
    small_disk.free()
    assert (await service.resume("one")).disk_error is None
    await goes_on(service, settings, small_disk)
    events = [event.data for event in (await service.events_page(0, 1000, "one")).events if event.kind == "machine.disk-error"]
    assert len(events) == 2
    assert (events[0]["disk"], events[0]["nospace"]) == (0, True)


async def test_a_daemon_that_comes_later_knows_which_disk_halted_the_guest(
    settings: Settings, guests: dict[str, Guest], small_disk: SmallDisk
) -> None:
    async with running(settings, {}) as first:
        await first.create(writer(guests, small_disk), start=True)
        await until(first, "one", is_halted)
    async with running(settings, {}) as second:
        view = await until(second, "one", is_halted)
        assert view.disk_error is not None
        assert (view.disk_error.disk, view.disk_error.nospace) == (0, True)
        small_disk.free()
        await second.resume("one")
        await goes_on(second, settings, small_disk)
        await end_machines(second)


async def test_where_the_definition_says_so_the_guest_goes_on_by_itself_when_there_is_room(
    service: Service, settings: Settings, guests: dict[str, Guest], small_disk: SmallDisk
) -> None:
    await service.create(writer(guests, small_disk, resume_when_space=True), start=True)
    await until(service, "one", is_halted)
    small_disk.free()
    await until(service, "one", lambda view: view.state is State.RUNNING)
    await goes_on(service, settings, small_disk)


async def test_without_it_the_guest_stays_halted_until_it_is_resumed(
    service: Service, guests: dict[str, Guest], small_disk: SmallDisk
) -> None:
    view = await service.create(writer(guests, small_disk), start=True)
    await until(service, "one", is_halted)
    small_disk.free()
    changed = await service.update("one", MachineChanges(resume_when_space=True), view.revision)
    assert is_halted(changed)
    await until(service, "one", lambda now: now.state is State.RUNNING)


async def test_a_guest_that_shall_see_its_errors_sees_them(
    service: Service, settings: Settings, guests: dict[str, Guest], small_disk: SmallDisk
) -> None:
    disks = (ImageDisk(path=str(small_disk.image), format="raw", bus="ide", on_error="report"),)
    await service.create(msgspec.structs.replace(writer(guests, small_disk), disks=disks), start=True)
    await until(service, "one", lambda _: acknowledged(output(settings)).errors > 0)
    assert service.machine("one").state is State.RUNNING
    assert service.machine("one").disk_error is None
