"""Machines that are copied while they live: their disks of one moment, and a guest that goes on; nothing is left beside its images."""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest

from qmpd.access import OURSELVES
from qmpd.errors import Held, WrongState
from qmpd.failpoint import arm
from qmpd.lifecycle import State
from qmpd.migration import delivery, stills
from qmpd.migration.extents import allocated
from qmpd.migrationviews import CopyReport, DryRunReport, MigrateRequest
from qmpd.plan.disks import is_read_only
from qmpd.spec import BlankDisk, MachineSpec
from qmpd.views import HostShutdownRequest, HostShutdownView, JobView, QmpRequest, StartRequest
from tests.api.lab import Daemon
from tests.guests.build import Guest
from tests.guests.ring import missing, read_ring
from tests.guests.tpmtrace import said
from tests.machines import copy_of, spec_of
from tests.migration.linuxguest import PACKAGE, is_there, linux_spec
from tests.migration.test_moves import HUNG_S, LOOK_S, ended, known, pair
from tests.migration.test_moving_at_rest import MIB, arriving, choice_of
from tests.migration.test_moving_disks import written
from tests.migration.test_moving_logs import gone, hosts, phase_at
from tests.migration.test_moving_tpm import NAME, machine, state_of
from tests.migration.test_moving_variables import uefi, variables
from tests.unavailable import unavailable

__all__ = ["machine", "uefi"]

pytestmark = pytest.mark.qemu


@pytest.fixture
def writing(guests: dict[str, Guest], short_directory: Path) -> Guest:
    """A guest that writes to its disk all the time."""
    return copy_of(guests["x86_64-pc-blocks"], short_directory)


async def begun(there: Daemon, guest: Guest) -> None:
    """A machine that writes to its disk, with two more that qmpd made."""
    disks = (*spec_of(guest, "writer").disks, BlankDisk(size_mib=256, format="raw"), BlankDisk(size_mib=64))
    await there.service.create(spec_of(guest, "writer", disks=disks), start=True)
    await written(there, "writer", 20)


async def copying(source: Daemon, name: str = "writer", **request: object) -> JobView:
    return await source.service.migration.migrate(name, msgspec.convert({"peer": "b", "copy": {}, **request}, MigrateRequest))


async def copied(source: Daemon, name: str = "writer", **request: object) -> CopyReport:
    job = await ended(source, await copying(source, name, **request))
    assert job.state == "succeeded", job.error
    return msgspec.convert(job.result, CopyReport)


def left(directory: Path) -> list[str]:
    """What is beside images that was made for a copy."""
    return [name for _, _, names in os.walk(directory) for name in names if ".still" in name]


async def untouched(there: Daemon, name: str = "writer") -> None:
    """QEMU has no job and no node of a copy, but for filters that 7.2 forgets now and then when one is given up (`mirror.drop_all`)."""
    for command, key in (("query-jobs", "id"), ("query-named-block-nodes", "node-name")):
        answer = await there.service.qmp(name, QmpRequest(execute=command), OURSELVES)
        items = msgspec.convert(answer.result, list[dict[str, object]])
        found = [str(item[key]) for item in items]
        assert [name for name in found if name.startswith("still-") and not name.endswith("-filter")] == []


def in_order(image: Path, last: int) -> None:
    """A disk as a power cut would leave it: every block up to the newest that there is, and none that was begun only."""
    ring = read_ring(image)
    assert ring.newest >= last
    assert ring.torn == ()
    assert missing(ring, ring.newest) == ()


async def test_a_running_machine_is_copied_and_goes_on(short_directory: Path, writing: Guest) -> None:
    async with pair(short_directory) as (a, b):
        await begun(a, writing)
        before, definition = a.service.machine("writer"), a.service.definition("writer")
        last = await written(a, "writer", 5)
        target = short_directory / "there.raw"
        report = await copied(a, copy={"name": "second"}, disks=[choice_of(target)])
        after = a.service.machine("writer")
        assert (after.state, after.pid, after.operation) == (State.RUNNING, before.pid, None)
        assert a.service.definition("writer") == definition
        assert (report.name, report.at_rest) == ("second", False)
        assert report.halted_ms is not None
        assert left(short_directory) == []
        assert arriving(short_directory) == []
        await untouched(a)
        in_order(target, last)
        holes = short_directory / "b/s/machines/second/disk1.raw"
        assert (holes.stat().st_size, allocated(str(holes))) == (256 * MIB, allocated(str(holes)))
        assert allocated(str(holes)) < MIB
        assert report.transferred_bytes < 64 * MIB
        assert b.service.machine("second").state is State.STOPPED
        assert (await b.service.start("second", StartRequest())).state is State.RUNNING
        await written(a, "writer", 10)
        await written(b, "second", 10)
        await a.service.stop("writer")
        in_order(writing.file, last)


async def test_a_guest_that_is_never_caught_up_with_is_halted_until_it_is(
    short_directory: Path, writing: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stills, "PATIENCE_S", -1.0)
    async with pair(short_directory) as (a, _):
        await begun(a, writing)
        last = await written(a, "writer", 5)
        target = short_directory / "there.raw"
        report = await copied(a, copy={"name": "second"}, disks=[choice_of(target)])
        assert report.halted_ms is not None
        in_order(target, last)
        await untouched(a)
        await written(a, "writer", 10)


async def test_the_disks_of_a_copy_are_of_one_moment(short_directory: Path) -> None:
    """Its guest writes each block to the one disk and then to the other: in a copy they are one apart at most."""
    if not is_there():
        unavailable(f"the package {PACKAGE} is not installed")
    images = short_directory / "first.raw", short_directory / "second.raw"
    async with pair(short_directory) as (a, _):
        await a.service.create(linux_spec(short_directory, images[0], "writer", images[1]), start=True)
        for number in range(3):
            last = await written(a, "writer", 10)
            places = [short_directory / f"{number}.{disk}.raw" for disk in range(2)]
            wanted = [choice_of(place, disk) for disk, place in enumerate(places)]
            report = await copied(a, copy={"name": f"copy{number}"}, disks=wanted)
            assert report.halted_ms is not None
            first, second = (read_ring(place) for place in places)
            assert first.torn == second.torn == ()
            assert min(first.newest, second.newest) >= last
            assert abs(first.newest - second.newest) <= 1
            assert missing(first, first.newest) == missing(second, second.newest) == ()


async def test_a_paused_machine_is_copied_and_stays_paused(short_directory: Path, writing: Guest) -> None:
    async with pair(short_directory) as (a, b):
        await begun(a, writing)
        await a.service.pause("writer")
        target = short_directory / "there.raw"
        report = await copied(a, disks=[choice_of(target)])
        assert report.halted_ms is None
        assert a.service.machine("writer").state is State.PAUSED
        assert target.read_bytes() == writing.file.read_bytes()
        assert known(b, "writer") is not None
        assert left(short_directory) == []


async def test_a_copy_has_its_own_firmware_variables(short_directory: Path, uefi: MachineSpec) -> None:
    async with pair(short_directory) as (a, b):
        await a.service.create(uefi, start=True)
        (short_directory / "template.fd").unlink()
        await copied(a, "uefi")
        assert a.service.machine("uefi").state is State.RUNNING
        assert variables(short_directory, "b").stat().st_size == variables(short_directory, "a").stat().st_size
        assert (await b.service.start("uefi", StartRequest())).state is State.RUNNING


async def test_the_original_is_free_as_soon_as_its_disks_are_taken(short_directory: Path, writing: Guest) -> None:
    async with pair(short_directory) as (a, b):
        await begun(a, writing)
        arm("still-halt:hang")
        job = await copying(a, disks=[choice_of(short_directory / "1.raw")])
        async with asyncio.timeout(HUNG_S):
            while not left(short_directory):
                await asyncio.sleep(LOOK_S)
        with pytest.raises(Held, match="'copy'"):
            await a.service.pause("writer")
        assert (await a.service.cancel(job.id)).state == "cancelled"
        arm("")
        assert a.service.machine("writer").state is State.RUNNING
        assert left(short_directory) == []
        await untouched(a)
        target = short_directory / "2.raw"
        job = await copying(a, copy={"name": "second"}, goal={"bandwidth_mib_s": 1}, disks=[choice_of(target)])
        async with asyncio.timeout(HUNG_S):
            while not arriving(short_directory):
                await asyncio.sleep(LOOK_S)
        await a.service.stop("writer")
        assert (await a.service.start("writer", StartRequest())).state is State.RUNNING
        assert (await ended(a, job)).state == "succeeded"
        in_order(target, 20)
        await gone(b, "writer")


async def test_a_host_that_goes_down_does_not_wait_for_a_copy(short_directory: Path, writing: Guest) -> None:
    async with pair(short_directory) as (a, b):
        await begun(a, writing)
        arm("still-halt:hang")
        job = await copying(a, disks=[choice_of(short_directory / "there.raw")])
        async with asyncio.timeout(HUNG_S):
            while not left(short_directory):
                await asyncio.sleep(LOOK_S)
        with pytest.raises(Held, match="'copy'"):
            await a.service.qmp("writer", QmpRequest(execute="stop"), OURSELVES)
        down = await ended(a, await a.service.shutdown_host(HostShutdownRequest(timeout_s=1)))
        arm("")
        assert down.state == "succeeded"
        assert msgspec.convert(down.result, HostShutdownView).left == 0
        assert (await a.service.job(job.id)).state == "cancelled"
        assert left(short_directory) == []
        await gone(b, "writer")


async def test_without_room_nothing_is_begun(short_directory: Path, writing: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery, "OFFER_DEADLINE_S", 0.0)
    async with pair(short_directory) as (a, b):
        await begun(a, writing)
        there = [choice_of(short_directory / "there.raw")]
        with monkeypatch.context() as patch:
            patch.setattr(stills, "SPARE_BYTES", 1 << 60)
            report = msgspec.convert((await ended(a, await copying(a, dry_run=True, disks=there))).result, DryRunReport)
            assert [one.code for one in report.findings if one.severity == "error"] == ["no-space-here"]
            failed = await ended(a, await copying(a, disks=there))
            assert failed.error is not None
            assert (failed.error["code"], "is copied" in str(failed.error["message"])) == ("no_space", True)
        report = msgspec.convert((await ended(a, await copying(a, dry_run=True, disks=there))).result, DryRunReport)
        assert report.possible
        arm("still-make:error")
        failed = await ended(a, await copying(a, disks=there))
        arm("")
        assert failed.error is not None
        assert failed.error["code"] == "no_space"
        assert left(short_directory) == []
        assert a.service.machine("writer").state is State.RUNNING
        await gone(b, "writer")


async def test_a_guest_that_ends_meanwhile_leaves_no_images(short_directory: Path, writing: Guest) -> None:
    async with pair(short_directory) as (a, b):
        await begun(a, writing)
        arm("still-halt:hang")
        job = await copying(a, disks=[choice_of(short_directory / "there.raw")])
        async with asyncio.timeout(HUNG_S):
            while not left(short_directory):
                await asyncio.sleep(LOOK_S)
        pid = a.service.machine("writer").pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        async with asyncio.timeout(HUNG_S):
            while a.service.machine("writer").state is not State.CRASHED:
                await asyncio.sleep(LOOK_S)
        with suppress(WrongState):  # it has failed by itself, if it had not come to its point
            await a.service.cancel(job.id)
        arm("")
        assert left(short_directory) == []
        await gone(b, "writer")
        assert (await a.service.start("writer", StartRequest())).state is State.RUNNING


@pytest.mark.parametrize("point", ["still-halt", "still-halted", "migration-prepared-written", "migration-released-written"])
async def test_a_daemon_that_is_restarted_leaves_no_images_and_no_halted_guest(short_directory: Path, writing: Guest, point: str) -> None:
    async with hosts(short_directory) as both:
        a = both.daemons["a"]
        await begun(a, writing)
        arm(f"{point}:hang")
        await copying(a, copy={"name": "second"}, disks=[choice_of(short_directory / "there.raw")])
        async with asyncio.timeout(HUNG_S):
            while not left(short_directory) or (point.startswith("migration") and phase_at(a) != point.split("-")[1]):
                await asyncio.sleep(LOOK_S)
        arm("")
        a = await both.restart("a")
        whole = "released" in point
        async with asyncio.timeout(HUNG_S):
            while phase_at(a) != ("copied" if whole else "kept") or left(short_directory):
                await asyncio.sleep(LOOK_S)
            while a.service.machine("writer").operation is not None or a.service.machine("writer").state is not State.RUNNING:
                await asyncio.sleep(LOOK_S)
        await untouched(a)
        await written(a, "writer", 10)
        if whole:
            in_order(short_directory / "there.raw", 20)
        else:
            await gone(both.daemons["b"], "second")


@pytest.mark.parametrize("point", ["still-halt:error@1", "still-cont:error@1", "still-remove:error"])
async def test_what_fails_leaves_the_guest_running(short_directory: Path, writing: Guest, point: str) -> None:
    async with hosts(short_directory) as both:
        a = both.daemons["a"]
        await begun(a, writing)
        arm(point)
        job = await ended(a, await copying(a, disks=[choice_of(short_directory / "there.raw")]))
        arm("")
        assert job.state in {"failed", "succeeded"}
        async with asyncio.timeout(HUNG_S):
            while a.service.machine("writer").operation is not None or a.service.machine("writer").state is not State.RUNNING:
                await asyncio.sleep(LOOK_S)
        await untouched(a)
        await written(a, "writer", 10)


@pytest.mark.parametrize("runs", [True, False], ids=["runs", "at rest"])
async def test_a_copy_has_the_tpm_of_its_original(short_directory: Path, machine: MachineSpec, runs: bool) -> None:
    async with pair(short_directory) as (a, b):
        await a.service.create(machine, start=True)
        before = await said(a.service, NAME)
        if not runs:
            await a.service.stop(NAME)
        writable = [number for number, disk in enumerate(machine.disks) if not is_read_only(disk)]
        report = await copied(a, NAME, disks=[choice_of(short_directory / f"{number}.raw", number) for number in writable])
        assert ("info", "tpm-kept") in [(finding.severity, finding.code) for finding in report.findings]
        (state,) = state_of(short_directory, "b").iterdir()
        assert state.stat().st_mode & 0o777 == 0o600
        assert left(short_directory) == []
        await b.service.start(NAME, StartRequest())
        after = await said(b.service, NAME)
        assert (after.code, after.register) == (before.code, before.register)
        assert after.resets >= before.resets
        if runs:
            assert await said(a.service, NAME) == before
