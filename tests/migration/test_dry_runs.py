"""What is in the way of a migration is found out before it, by real QEMUs on both sides, and nothing is left of that."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import subprocess
from pathlib import Path
from typing import Final

import msgspec
import pytest

from qmpd.access import OURSELVES
from qmpd.failpoint import arm
from qmpd.lifecycle import State
from qmpd.migration import trial
from qmpd.migration.trial import PLACE
from qmpd.migrationviews import DryRunReport, MigrateRequest
from qmpd.spec import BlankDisk, Forward, ImageDisk, Kernel, UserNic
from qmpd.views import JobView, QmpRequest
from tests.api.lab import Daemon
from tests.guests.build import Guest
from tests.machines import copy_of, spec_of
from tests.migration.hosts import hosts
from tests.migration.network import NoNetworks
from tests.migration.test_moves import HUNG_S, LOOK_S, counting, ended, known, moved, pair, printed
from tests.migration.test_moving_disks import written
from tests.newer_qemu import OTHER_QEMU
from tests.process.emulator import QEMU
from tests.unavailable import unavailable

__all__ = ["counting"]

pytestmark = pytest.mark.qemu

MIB = 1024 * 1024
#: The distribution's own, where another one comes first in PATH.
INSTALLED: Final = shutil.which("qemu-system-x86_64", path="/usr/local/bin:/usr/bin:/bin")
MAC = "52:54:00:12:34:56"


async def looked(source: Daemon, name: str, **request: object) -> JobView:
    """The job of a dry run when it has ended."""
    wanted = msgspec.convert({"peer": "b", "dry_run": True, **request}, MigrateRequest)
    return await ended(source, await source.service.migration.migrate(name, wanted))


async def tried(source: Daemon, name: str, **request: object) -> DryRunReport:
    """What a dry run found, which must end well."""
    job = await looked(source, name, **request)
    assert job.state == "succeeded", job.error
    return msgspec.convert(job.result, DryRunReport)


async def capabilities(there: Daemon, name: str) -> object:
    return await there.service.qmp(name, QmpRequest(execute="query-migrate-capabilities"), OURSELVES)


def codes(report: DryRunReport, severity: str = "error") -> list[str]:
    return [finding.code for finding in report.findings if finding.severity == severity]


def qemus(uuid: str) -> list[int]:
    """The processes that have this UUID on their command line."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdecimal() and uuid.encode() in (entry / "cmdline").read_bytes().split(b"\0"):
                found.append(int(entry.name))
    return found


def left(directory: Path) -> list[str]:
    """What a daemon of the lab has of trials and machines."""
    return [str(path) for place in (f"r/{PLACE}", "r/m", "s/machines") for path in (directory / place).glob("*")]


async def test_a_machine_that_can_go_is_said_to_be_able_to_and_nothing_comes_of_it(short_directory: Path, counting: Guest) -> None:
    disks = (*spec_of(counting, "counter").disks, BlankDisk(size_mib=8))
    async with pair(short_directory) as (a, b):
        created = await a.service.create(spec_of(counting, "counter", disks=disks, nics=(UserNic(),)), start=True)
        await printed(a, "counter", 100)
        before, alive = await capabilities(a, "counter"), qemus(created.uuid)
        report = await tried(a, "counter")
        assert (report.possible, report.findings) == (True, ())
        prediction = report.prediction
        assert prediction is not None
        assert prediction.memory_bytes == (counting.memory_mib or 0) * MIB
        assert prediction.bandwidth_mib_s > 0
        assert prediction.dirty_mib_s is not None
        assert "MiB/s" in prediction.explanation
        assert await capabilities(a, "counter") == before
        view = a.service.machine("counter")
        assert (view.state, view.operation, view.pid) == (State.RUNNING, None, created.pid)
        assert qemus(created.uuid) == alive
        assert left(short_directory / "b") == []
        assert known(b, "counter") is None
        assert b.service.migration.list().migrations == ()
        assert a.service.migration.list().migrations == ()
        await printed(a, "counter", 100)
        await moved(a, "counter", "b")
        await b.service.kill("counter")


async def test_a_guest_that_stands_still_changes_nothing_and_stays_so(short_directory: Path, counting: Guest) -> None:
    async with pair(short_directory) as (a, _):
        await a.service.create(spec_of(counting, "counter"), start=True)
        await printed(a, "counter", 100)
        await a.service.pause("counter")
        report = await tried(a, "counter")
        assert report.possible
        assert report.prediction is not None
        assert report.prediction.dirty_mib_s == 0
        assert a.service.machine("counter").state is State.PAUSED
        await a.service.kill("counter")


async def test_everything_in_the_way_is_named_and_a_migration_refuses_it_too(
    short_directory: Path, counting: Guest, free_port: int
) -> None:
    target = short_directory / "taken.raw"
    target.write_bytes(bytes(512))
    nic = UserNic(mac=MAC, forwards=(Forward(guest_port=22, host_port=free_port),))
    choice = {"disk": 1, "how": "copy", "path": str(target)}
    spec = spec_of(counting, "counter", nics=(nic,))
    own = short_directory / "own.raw"
    own.write_bytes(bytes(MIB))
    spec = msgspec.structs.replace(spec, disks=(*spec.disks, ImageDisk(path=str(own), format="raw")))
    async with pair(short_directory) as (a, b):
        created = await a.service.create(spec, start=True)
        await b.service.create(spec_of(counting, "other", nics=(UserNic(mac=MAC),), uuid=created.uuid))
        await b.service.create(spec_of(counting, "counter"))
        report = await tried(a, "counter", disks=[choice])
        assert not report.possible
        assert sorted(codes(report)) == ["disk-target-exists", "name-taken", "port-taken", "uuid-taken"]
        assert codes(report, "warning") == ["mac-taken"]
        assert codes(report, "info") == ["forward-moves"]
        assert all(finding.mend for finding in report.findings if finding.severity != "info")
        assert report.prediction is not None
        assert target.read_bytes() == bytes(512)
        for name in ("other", "counter"):
            await b.service.delete(name, revision=None)
        job = await ended(a, await a.service.migration.migrate("counter", msgspec.convert({"peer": "b"}, MigrateRequest)))
        assert job.error is not None
        assert job.error["code"] == "cannot_move"
        details = job.error["details"]
        assert isinstance(details, dict)
        found = [(finding["severity"], finding["code"]) for finding in details["findings"]]
        assert found == [("error", "port-taken"), ("info", "forward-moves")]
        view = a.service.machine("counter")
        assert (view.state, view.operation) == (State.RUNNING, None)
        await printed(a, "counter", 100)
        await gone(b, "counter")
        assert left(short_directory / "b") == []
        await a.service.kill("counter")


async def gone(there: Daemon, name: str) -> None:
    """Waits until a daemon has nothing of a machine any more."""
    async with asyncio.timeout(HUNG_S):
        while known(there, name) is not None or there.service.migration.list().migrations[0].phase != "discarded":
            await asyncio.sleep(LOOK_S)
        while name in there.service._registry.names:
            await asyncio.sleep(LOOK_S)


async def test_a_device_that_was_plugged_in_is_missed_and_the_guest_stays(short_directory: Path, guests: dict[str, Guest]) -> None:
    spec = spec_of(guests["x86_64-pc-blocks"], "plugged")
    spec = msgspec.structs.replace(spec, disks=tuple(msgspec.structs.replace(disk, read_only=True, bus="virtio") for disk in spec.disks))
    async with pair(short_directory) as (a, b):
        await a.service.create(spec, start=True)
        plug = {"driver": "virtio-balloon-pci", "id": "extra", "addr": "1e"}
        await a.service._registry.get("plugged").session.execute("device_add", plug)
        report = await tried(a, "plugged")
        assert set(codes(report)) == {"device-missing", "pci-differs"}
        job = await ended(a, await a.service.migration.migrate("plugged", MigrateRequest(peer="b", accept=("device-added",))))
        assert job.error is not None
        assert "extra" in str(job.error["message"])
        await gone(b, "plugged")
        assert a.service.machine("plugged").state is State.RUNNING
        assert left(short_directory / "b") == []
        await a.service.kill("plugged")


async def test_what_is_worth_knowing_is_in_the_report_of_a_migration(short_directory: Path, counting: Guest) -> None:
    async with pair(short_directory) as (a, b):
        await b.service.create(spec_of(counting, "other", nics=(UserNic(mac=MAC),)))
        await a.service.create(spec_of(counting, "counter", nics=(UserNic(mac=MAC),)), start=True)
        report = await moved(a, "counter", "b")
        assert [(finding.severity, finding.code) for finding in report.findings] == [("warning", "mac-taken")]
        await b.service.kill("counter")


async def test_a_definition_that_cannot_be_started_there_says_each_reason(short_directory: Path, guests: dict[str, Guest]) -> None:
    quiet = copy_of(guests["x86_64-q35-quiet"], short_directory)
    extra = short_directory / "initrd"
    extra.write_bytes(b"x" * 4096)
    spec = spec_of(quiet, "orphan")
    assert spec.kernel is not None
    kernel = Kernel(image=spec.kernel.image, initrd=str(extra), console=False)
    async with pair(short_directory) as (a, b):
        await a.service.create(msgspec.structs.replace(spec, kernel=kernel), start=True)
        assert (await tried(a, "orphan")).possible
        quiet.file.unlink()
        extra.unlink()
        report = await tried(a, "orphan")
        found = [(finding.code, finding.path) for finding in report.findings if finding.severity == "error"]
        assert found == [("cannot-start", "$.kernel.image"), ("cannot-start", "$.kernel.initrd")]
        assert left(short_directory / "b") == []
        assert b.service.migration.list().migrations == ()
        await a.service.kill("orphan")


async def is_locked(image: Path) -> bool:
    """Whether a QEMU keeps others from writing to an image."""
    words = ["qemu-io", "-f", "raw", "-c", "read 0 512", str(image)]
    tried_to = await asyncio.to_thread(subprocess.run, words, capture_output=True, text=True, check=False, timeout=HUNG_S)
    return "lock" in tried_to.stderr


async def test_a_trial_leaves_the_lock_of_a_shared_disk_alone(short_directory: Path, guests: dict[str, Guest]) -> None:
    guest = copy_of(guests["x86_64-pc-blocks"], short_directory)
    async with pair(short_directory) as (a, b):
        await a.service.create(spec_of(guest, "writer"), start=True)
        await written(a, "writer", 10)
        assert await is_locked(guest.file)
        for _ in range(3):
            report = await tried(a, "writer", storage="shared")
            assert (report.possible, report.findings) == (True, ())
            await written(a, "writer", 5)
        assert await is_locked(guest.file)
        # Halting QEMU and letting it go on takes the lock anew: nobody else may have it.
        await a.service.pause("writer")
        await a.service.resume("writer")
        await written(a, "writer", 5)
        await moved(a, "writer", "b")
        await b.service.stop("writer")


async def test_only_who_may_send_is_told_anything(short_directory: Path, counting: Guest) -> None:
    async with pair(short_directory, may_send=False) as (a, _):
        await a.service.create(spec_of(counting, "counter"), start=True)
        job = await looked(a, "counter")
        assert job.error is not None
        assert job.error["code"] == "cannot_move"
        assert "may_send = false" in str(job.error["message"])
        await a.service.kill("counter")


async def test_machines_of_a_peer_are_tried_one_after_the_other(short_directory: Path, guests: dict[str, Guest]) -> None:
    async with pair(short_directory) as (a, b):
        names = [f"m{number}" for number in range(3)]
        for name in names:
            await a.service.create(spec_of(guests["x86_64-q35-quiet"], name), start=True)
        reports = await asyncio.gather(*(tried(a, name) for name in names))
        assert all(report.possible for report in reports)
        assert left(short_directory / "b") == []
        assert b.service.machines({}, None).machines == ()
        for name in names:
            await a.service.kill(name)


async def test_a_qemu_that_is_silent_in_a_trial_is_ended_at_its_deadline(
    short_directory: Path, guests: dict[str, Guest], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with pair(short_directory) as (a, _):
        created = await a.service.create(spec_of(guests["x86_64-q35-quiet"], "one"), start=True)
        assert (await tried(a, "one")).possible
        monkeypatch.setattr(trial, "TRIAL_S", 5.0)
        arm("migration-trial:hang")
        try:
            report = await tried(a, "one")
        finally:
            arm("")
        assert [finding.message for finding in report.findings] == [
            "the destination cannot start this machine: its QEMU did not answer within 5 s"
        ]
        assert qemus(created.uuid) == [created.pid]
        assert left(short_directory / "b") == []
        await a.service.kill("one")


async def test_a_goal_that_cannot_be_kept_is_foretold(short_directory: Path, counting: Guest) -> None:
    async with pair(short_directory) as (a, _):
        await a.service.create(spec_of(counting, "counter"), start=True)
        await printed(a, "counter", 100)
        report = await tried(a, "counter", goal={"bandwidth_mib_s": 1, "deadline_s": 1, "then": "abort"})
        assert report.prediction is not None
        assert report.prediction.bandwidth_mib_s == 1
        assert not report.prediction.reachable
        assert "the machine would stay" in report.prediction.explanation
        await a.service.kill("counter")


@pytest.mark.skipif(OTHER_QEMU is None, reason="there is one QEMU alone (scripts/test --qemu)")
@pytest.mark.parametrize("way", ["to-newer", "to-older"])
async def test_another_version_of_qemu_is_compared_by_what_it_is_made_of(short_directory: Path, counting: Guest, way: str) -> None:
    assert INSTALLED is not None
    programs = (INSTALLED, QEMU) if way == "to-newer" else (QEMU, INSTALLED)
    async with pair(short_directory, dict(zip("ab", programs, strict=True))) as (a, b):
        await a.service.create(spec_of(counting, "counter", machine="pc-q35-7.2"), start=True)
        await printed(a, "counter", 100)
        report = await tried(a, "counter")
        # The processor that QEMU 10 emulates can do more than that of 7.2.
        lost = ["cpu-features-missing"] if way == "to-older" else []
        assert codes(report) == lost
        assert set(codes(report, "info")) <= {"built-in-differs", "cpu-features-added", "older-emulator"}
        if lost:
            job = await ended(a, await a.service.migration.migrate("counter", MigrateRequest(peer="b")))
            assert "features of its processor" in str(job.error)
            await gone(b, "counter")
        report = await tried(a, "counter", accept=lost)
        assert (report.possible, codes(report, "warning")) == (True, lost)
        moving = await moved(a, "counter", "b", accept=lost)
        assert moving.findings == report.findings
        await printed(b, "counter", 100)
        await b.service.kill("counter")


@pytest.mark.timeout(240)
async def test_a_daemon_that_is_killed_in_a_trial_leaves_nothing_behind(guests: dict[str, Guest]) -> None:
    try:
        async with hosts() as two:
            await two.start()
            here, there = two[0], two[1]
            spec = spec_of(guests["x86_64-q35-quiet"], "one", disks=(BlankDisk(size_mib=8),))
            async with here.client() as client:
                uuid = (await client.create(spec, start=True)).uuid
                (alive,) = here.qemus("one")
                await there.restart("migration-trial:kill")
                job = await client.migrate("one", MigrateRequest(peer=there.name, dry_run=True))
                async with asyncio.timeout(HUNG_S):
                    while there.up:
                        await asyncio.sleep(LOOK_S)
                    while await asyncio.to_thread(qemus, uuid) != [alive.pid]:  # the kernel ended the one that was tried
                        await asyncio.sleep(LOOK_S)
                trials = there.daemon.run_dir / PLACE
                tried_in = [disk.parent for disk in trials.glob("*/disk0.qcow2")]
                assert tried_in
                await there.restart()
                assert not any(place.exists() for place in tried_in)  # the source may have had it tried anew already
                assert not there.own("one").exists()
                found = await client.wait_job(job.id)  # an answer that was lost is asked for again
                assert found.state == "succeeded", found.error
                assert msgspec.convert(found.result, DryRunReport).possible
                assert list(trials.glob("*")) == []
                await client.kill("one")
    except NoNetworks as reason:
        unavailable(reason)
