"""What is removed of a machine that did not come is what was made for it, and nothing else, whoever put it there and when."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path

import msgspec
import pytest

from qmpd.machine import Machine
from qmpd.migration.arrangement import Arranged
from qmpd.migration.likeness import DestinationFacts
from qmpd.migration.protocol import Offer
from qmpd.migration.reception import Reception
from qmpd.migrationviews import DiskChoice, Goal, MigrateRequest
from qmpd.spec import ImageDisk, MachineSpec
from tests.api.lab import Daemon, authority, daemon, host, peer, port
from tests.conftest import end_machines
from tests.guests.build import Guest
from tests.machines import spec_of
from tests.migration.doubtful import NAME
from tests.migration.test_moves import HUNG_S, LOOK_S, busy, counting, ended, known, pair, set_to_work

__all__ = ["counting"]
pytestmark = pytest.mark.qemu

MIB = 1024 * 1024
THEIRS = b"somebody's"


@pytest.fixture
def images(short_directory: Path) -> Path:
    """A directory with a disk, and a file that is nobody's business."""
    directory = short_directory / "images"
    directory.mkdir()
    (directory / "disk.raw").write_bytes(bytes(MIB))
    (directory / "beside.raw").write_bytes(THEIRS)
    return directory


def names(directory: Path) -> list[str]:
    """The files in a directory."""
    return sorted(path.name for path in directory.iterdir())


async def offered(a: Daemon, guest: Guest, images: Path, path: Path) -> dict[str, object]:
    """A machine with a disk is to be copied to a path; the error of that."""
    spec = spec_of(guest, NAME)
    more = ImageDisk(path=str(images / "disk.raw"), format="raw")
    await a.service.create(msgspec.structs.replace(spec, disks=(*spec.disks, more)), start=True)
    request = MigrateRequest(peer="b", disks=(DiskChoice(disk=1, how="copy", path=str(path)),))
    job = await ended(a, await a.service.migration.migrate(NAME, request))
    assert job.error is not None
    return job.error


def meddling(patch: pytest.MonkeyPatch, meddle: Callable[[], object]) -> None:
    """Somebody does something after the destination has looked at its files, and before it makes its own."""
    looked = Reception.arranged

    async def arranged(self: Reception, offer: Offer, spec: MachineSpec, facts: DestinationFacts) -> Arranged:
        found = await looked(self, offer, spec, facts)
        meddle()
        return found

    patch.setattr(Reception, "arranged", arranged)


async def test_a_machine_that_is_still_being_discarded_may_be_offered_again(
    short_directory: Path, counting: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with pair(short_directory) as (a, b):
        await set_to_work(a, busy(short_directory))
        registry, discarding, may_go_on = b.service._registry, asyncio.Event(), asyncio.Event()
        dismiss = registry.dismiss

        async def slow(machine: Machine) -> None:
            discarding.set()
            await may_go_on.wait()
            await dismiss(machine)

        monkeypatch.setattr(registry, "dismiss", slow)
        slowly = MigrateRequest(peer="b", goal=Goal(bandwidth_mib_s=1, auto_converge=False))
        job = await a.service.migration.migrate("busy", slowly)
        async with asyncio.timeout(HUNG_S):
            while known(b, "busy") is None or b.service.migration._arrivals._preparing:
                await asyncio.sleep(LOOK_S)
        await a.service.cancel(job.id)
        async with asyncio.timeout(HUNG_S):
            await discarding.wait()
        again = await a.service.migration.migrate("busy", slowly)
        async with asyncio.timeout(HUNG_S):
            while not b.service.migration._arrivals._preparing:
                assert (await a.service.job(again.id)).state == "running"
                await asyncio.sleep(LOOK_S)
        may_go_on.set()
        async with asyncio.timeout(HUNG_S):
            while [view.phase for view in b.service.migration.list("busy").migrations] != ["awaiting", "discarded"]:
                assert (await a.service.job(again.id)).state == "running"
                await asyncio.sleep(LOOK_S)
        await a.service.cancel(again.id)


async def test_a_file_that_was_there_is_left_alone(short_directory: Path, counting: Guest, images: Path) -> None:
    async with pair(short_directory) as (a, b):
        error = await offered(a, counting, images, images / "beside.raw")
        assert "exists here" in str(error["message"])
        assert (images / "beside.raw").read_bytes() == THEIRS
        assert known(b, NAME) is None


async def test_a_file_that_somebody_puts_there_at_the_last_moment_is_left_alone(
    short_directory: Path, counting: Guest, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = images / "late.raw"
    async with pair(short_directory) as (a, b):
        meddling(monkeypatch, lambda: late.write_bytes(THEIRS))
        error = await offered(a, counting, images, late)
        assert "exists" in str(error["message"])
        assert late.read_bytes() == THEIRS
        assert known(b, NAME) is None
        assert b.service.migration.list(NAME).migrations[0].phase == "discarded"
        assert names(images) == ["beside.raw", "disk.raw", "late.raw"]


async def test_the_disks_of_a_machine_that_was_lost_here_are_left_alone(short_directory: Path, counting: Guest, images: Path) -> None:
    lost = short_directory / "b/s/machines" / NAME / "disk0.raw"
    root = authority(short_directory / "ca")
    a_pki, b_pki = (host(root, short_directory / name / "pki", name) for name in ("a", "b"))
    async with AsyncExitStack() as stack:
        listener, a_number = stack.enter_context(port())
        first, number = stack.enter_context(port())
        a = await stack.enter_async_context(daemon("a", short_directory / "a", a_pki, listener, [peer("b", number)]))
        stack.push_async_callback(end_machines, a.service)
        async with daemon("b", short_directory / "b", b_pki, first, [peer("a", a_number)]):
            lost.parent.mkdir(parents=True)
            lost.write_bytes(THEIRS)
            error = await offered(a, counting, images, images / "new.raw")
            assert "not defined any more" in str(error["message"])
            assert lost.read_bytes() == THEIRS
        again, _ = stack.enter_context(port())
        b = await stack.enter_async_context(daemon("b", short_directory / "b", b_pki, again, [peer("a", a_number)]))
        assert known(b, NAME) is None
        assert lost.read_bytes() == THEIRS
        assert not (images / "new.raw").exists()


async def test_what_was_made_for_it_goes_and_nothing_beside_it(short_directory: Path, images: Path) -> None:
    made = images / "made.raw"
    async with pair(short_directory) as (a, b):
        spec = busy(short_directory)
        disk = ImageDisk(path=str(images / "disk.raw"), format="raw")
        await set_to_work(a, msgspec.structs.replace(spec, disks=(disk,)))
        slow = Goal(bandwidth_mib_s=1, auto_converge=False)
        request = MigrateRequest(peer="b", goal=slow, disks=(DiskChoice(disk=0, how="copy", path=str(made)),))
        job = await a.service.migration.migrate("busy", request)
        async with asyncio.timeout(HUNG_S):
            while known(b, "busy") is None:
                await asyncio.sleep(LOOK_S)
        assert made.exists()
        await a.service.cancel(job.id)
        async with asyncio.timeout(HUNG_S):
            while known(b, "busy") is not None:
                await asyncio.sleep(LOOK_S)
        assert names(images) == ["beside.raw", "disk.raw"]
        assert (images / "beside.raw").read_bytes() == THEIRS
