"""A disk of a running machine moves to another file, and the definition follows it whatever happens."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
import pytest

from qmpd.errors import AlreadyExists, Invalid, NotFound, WrongState
from qmpd.lifecycle import State
from qmpd.migration.diskmoves import _node
from qmpd.migration.relocation import relocate
from qmpd.migrationviews import MoveDiskRequest
from qmpd.spec import BlankDisk
from qmpd.storage import draft_of
from qmpd.tasks import background
from tests.api.lab import Daemon
from tests.guests.build import Guest
from tests.guests.ring import missing, read_ring
from tests.machines import copy_of, spec_of
from tests.migration.test_moves import ended, pair, printed
from tests.migration.test_moving_disks import written
from tests.migration.test_relocation import unseen

pytestmark = pytest.mark.qemu


async def moved(there: Daemon, name: str, path: Path, disk: int = 0, **request: object) -> None:
    job = await there.service.disk_moves.move(name, str(disk), msgspec.convert({"path": str(path), **request}, MoveDiskRequest))
    view = await ended(there, job)
    assert view.state == "succeeded", view.error


async def test_no_block_is_lost_of_a_disk_that_moves_to_another_file(short_directory: Path, guests: dict[str, Guest]) -> None:
    guest = copy_of(guests["x86_64-pc-blocks"], short_directory)
    first, second = short_directory / "first.qcow2", short_directory / "second.raw"
    async with pair(short_directory) as (a, _):
        await a.service.create(spec_of(guest, "writer"), start=True)
        await written(a, "writer", 20)
        await moved(a, "writer", first, format="qcow2")
        await written(a, "writer", 20)
        await moved(a, "writer", second, format="raw")
        last = await written(a, "writer", 20)
        disk = a.service.definition("writer").spec.disks[0]
        assert (disk.path, disk.format) == (str(second), "raw")  # type: ignore[union-attr]
        assert first.exists()  # an image that a user may have named is left alone
        await a.service.stop("writer")
        ring = read_ring(second)
        assert ring.newest >= last
        assert (ring.torn, missing(ring, last)) == ((), ())


async def test_a_disk_that_qmpd_made_becomes_an_image_and_its_old_file_goes(short_directory: Path, guests: dict[str, Guest]) -> None:
    spec = spec_of(guests["x86_64-q35-quiet"], "owner", disks=(BlankDisk(size_mib=16),))
    async with pair(short_directory) as (a, _):
        await a.service.create(spec, start=True)
        await printed(a, "owner", 0)
        old = short_directory / "a/s/machines/owner/disk0.qcow2"
        assert old.exists()
        for disk, path, error in (("0", old, AlreadyExists), ("0", Path("/proc/x"), Invalid), ("1", short_directory / "x", NotFound)):
            with pytest.raises(error):
                await a.service.disk_moves.move("owner", disk, MoveDiskRequest(path=str(path)))
        await moved(a, "owner", short_directory / "new.qcow2")
        assert not old.exists()
        assert a.service.machine("owner").state is State.RUNNING
        await a.service.kill("owner")
        with pytest.raises(WrongState):
            await a.service.disk_moves.move("owner", "0", MoveDiskRequest(path=str(short_directory / "x")))


async def test_a_move_that_is_cancelled_leaves_nothing(short_directory: Path, guests: dict[str, Guest]) -> None:
    guest, target = copy_of(guests["x86_64-pc-blocks"], short_directory), short_directory / "new.raw"
    async with pair(short_directory) as (a, _):
        await a.service.create(spec_of(guest, "writer"), start=True)
        await written(a, "writer", 5)
        job = await a.service.disk_moves.move("writer", "0", MoveDiskRequest(path=str(target), bandwidth_mib_s=1))
        while not target.exists():
            await asyncio.sleep(0.01)
        assert (await a.service.cancel(job.id)).state == "cancelled"
        assert not target.exists()
        await written(a, "writer", 5)
        disk = a.service.definition("writer").spec.disks[0]
        assert disk.path == str(guest.file)  # type: ignore[union-attr]
        assert a.service.machine("writer").operation is None


@pytest.mark.parametrize("alive", [True, False])
async def test_the_next_daemon_finds_out_which_image_a_guest_has(short_directory: Path, guests: dict[str, Guest], alive: bool) -> None:
    """The daemon was killed when QEMU had changed over, and the definition was not written: the guest stands still."""
    guest, target = copy_of(guests["x86_64-pc-blocks"], short_directory), short_directory / "new.raw"
    async with pair(short_directory) as (a, _):
        await a.service.create(spec_of(guest, "writer"), start=True)
        await written(a, "writer", 10)
        machine, moves = a.service._registry.get("writer"), a.service.disk_moves
        move, medium = await moves._begun(machine, 0, MoveDiskRequest(path=str(target)))
        move = msgspec.structs.replace(await moves._made(move, medium, machine.definition.spec), halted=True)
        await moves._note(move, move)
        with pytest.raises(KilledError):
            await relocate(machine.session, move.source, _node(move, machine.definition.spec), unseen, changed=killed)
        assert machine.definition.spec.disks[0].path == str(guest.file)  # type: ignore[union-attr]
        if not alive:
            await a.service.kill("writer")
        async with background() as tasks:
            await moves.settle_all(tasks)
            while (await moves._store.read("diskmove/")).records:
                await asyncio.sleep(0.01)
        disk = a.service.definition("writer").spec.disks[0]
        assert disk.path == str(target if alive else guest.file)  # type: ignore[union-attr]
        assert target.exists() is alive
        if alive:
            last = await written(a, "writer", 10)
            await a.service.stop("writer")
            assert missing(read_ring(target), last) == ()


async def test_the_next_daemon_removes_what_was_begun_of_an_image(short_directory: Path, guests: dict[str, Guest]) -> None:
    guest, target = copy_of(guests["x86_64-pc-blocks"], short_directory), short_directory / "new.raw"
    async with pair(short_directory) as (a, _):
        await a.service.create(spec_of(guest, "writer"), start=True)
        moves = a.service.disk_moves
        move, _ = await moves._begun(a.service._registry.get("writer"), 0, MoveDiskRequest(path=str(target)))
        await moves._note(move, move)
        draft_of(target).write_bytes(b"as far as it came")
        async with background() as tasks:
            await moves.settle_all(tasks)
            while (await moves._store.read("diskmove/")).records:
                await asyncio.sleep(0.01)
        assert not draft_of(target).exists()
        await written(a, "writer", 5)
        await a.service.kill("writer")


class KilledError(Exception):
    """The daemon is gone."""


async def killed() -> None:
    """The daemon dies."""
    raise KilledError
