"""Machines that do not run move as files: all of them, bit by bit, or nothing; and nobody starts them."""

from __future__ import annotations

import asyncio
import os
import random
from pathlib import Path

import msgspec
import pytest

from qmpd import segments
from qmpd.errors import Held, WrongState
from qmpd.failpoint import arm
from qmpd.lifecycle import State
from qmpd.migration import delivery, wondering
from qmpd.migration.extents import allocated
from qmpd.migrationviews import MigrateRequest
from qmpd.spec import BlankDisk
from qmpd.views import JobView, StartRequest
from tests.api.lab import Daemon
from tests.guests.build import Guest
from tests.guests.trace import check_trace
from tests.machines import copy_of, spec_of
from tests.migration.test_moves import HUNG_S, LOOK_S, ended, known, moved, pair, printed
from tests.migration.test_moving_logs import gone, hosts, log_of, phase_at

pytestmark = pytest.mark.qemu
MIB = 1 << 20


@pytest.fixture
def counting(guests: dict[str, Guest], short_directory: Path) -> Guest:
    """A guest that counts, on a disk of its own."""
    return copy_of(guests["x86_64-q35"], short_directory)


def holed(path: Path, size: int, seed: int) -> bytes:
    """A file with data at both ends and a hole between; its content."""
    first, last = random.Random(seed).randbytes(MIB + 12345), random.Random(seed + 1).randbytes(54321)
    with path.open("r+b" if path.exists() else "w+b") as file:
        file.truncate(0)
        file.write(first)
        file.seek(size - len(last))
        file.write(last)
    return path.read_bytes()


def arriving(directory: Path) -> list[Path]:
    """What is on its way, or was left."""
    walked = os.walk(directory)  # what is removed meanwhile it passes over
    return [Path(place, name) for place, _, names in walked for name in names if name.startswith(".") and name.endswith(".arriving")]


def choice_of(path: Path, disk: int = 0) -> dict[str, object]:
    return {"disk": disk, "how": "copy", "path": str(path)}


async def made(there: Daemon, directory: Path, guest: Guest, **changes: object) -> tuple[bytes, bytes]:
    """A machine that has run, with a disk that qmpd made, full of something, and the guest's own; what is in both."""
    disks = (*spec_of(guest, "rest").disks, BlankDisk(size_mib=64, format="raw"), BlankDisk(size_mib=8))
    await there.service.create(spec_of(guest, "rest", disks=disks, **changes), start=True)
    await printed(there, "rest", 300)
    await there.service.stop("rest")
    own = directory / there.name / "s/machines/rest/disk1.raw"
    return guest.file.read_bytes(), await asyncio.to_thread(holed, own, 64 * MIB, 1)


async def test_all_of_a_machine_at_rest_moves_and_nobody_starts_it(short_directory: Path, counting: Guest) -> None:
    async with pair(short_directory) as (a, b):
        image, own = await made(a, short_directory, counting)
        before, log = a.service.machine("rest"), await log_of(a, "rest")
        target = short_directory / "there.raw"
        report = await moved(a, "rest", "b", disks=[choice_of(target)])
        assert known(a, "rest") is None
        assert not (short_directory / "a/s/machines/rest").exists()
        view = b.service.machine("rest")
        assert (view.state, view.operation, view.uuid, view.exit) == (State.STOPPED, None, before.uuid, before.exit)
        there = short_directory / "b/s/machines/rest/disk1.raw"
        assert (target.read_bytes(), there.read_bytes()) == (image, own)
        assert allocated(str(there)) < 4 * MIB
        assert await log_of(b, "rest") == log
        assert arriving(short_directory) == []
        assert [(disk.disk, disk.how) for disk in report.disks] == [(0, "copied"), (1, "copied"), (2, "copied")]
        assert report.transferred_bytes < 8 * MIB
        assert report.epoch == 1
        assert b.service.definition("rest").spec.disks[0].path == str(target)  # type: ignore[union-attr]
        counting.file.unlink()  # so that the disk at the destination is seen to be its own
        assert (await b.service.start("rest", StartRequest())).state is State.RUNNING
        await printed(b, "rest", 200)
        begin, data = await log_of(b, "rest")
        assert (begin, data[: len(log[1])]) == log
        assert check_trace(data).boots == 2
        await b.service.stop("rest")
        report = await moved(b, "rest", "a", disks=[choice_of(counting.file)])
        assert report.epoch == 2
        assert a.service.machine("rest").state is State.STOPPED
        assert await log_of(a, "rest") == (begin, (await log_of(a, "rest"))[1])
        events = (await a.service.events_page(0, 1000, "rest")).events
        assert ("b", "machine.arrived") in [(event.data.get("host"), event.data.get("kind")) for event in events]


async def test_an_image_that_both_hosts_see_stays_where_it_is(short_directory: Path, counting: Guest) -> None:
    async with pair(short_directory) as (a, b):
        await a.service.create(spec_of(counting, "rest"))
        report = await moved(a, "rest", "b")
        assert [(disk.how, disk.bytes) for disk in report.disks] == [("shared", 0)]
        assert (await b.service.start("rest", StartRequest())).state is State.RUNNING
        await b.service.kill("rest")


async def refused(source: Daemon, **request: object) -> JobView:
    """A migration that does not happen, and leaves everything as it was."""
    job = await ended(source, await source.service.migration.migrate("rest", msgspec.convert({"peer": "b", **request}, MigrateRequest)))
    assert job.state == "failed"
    view = source.service.machine("rest")
    assert (view.state, view.operation) == (State.STOPPED, None)
    return job


async def test_what_cannot_be_is_refused_before_anything_is_sent(
    short_directory: Path, counting: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery, "OFFER_DEADLINE_S", 0.0)
    async with pair(short_directory) as (a, b):
        await made(a, short_directory, counting)
        taken = short_directory / "taken.raw"
        taken.write_bytes(b"somebody's")
        assert "exists" in str((await refused(a, disks=[choice_of(taken)])).error)
        assert "format" in str((await refused(a, disks=[choice_of(short_directory / "x", 0) | {"format": "qcow2"}])).error)
        assert "own directory" in str(
            (await refused(a, disks=[choice_of(short_directory / "x"), choice_of(short_directory / "y", 1)])).error
        )
        assert "directory" in str((await refused(a, disks=[choice_of(short_directory / "nowhere" / "x")])).error)
        huge = short_directory / "a/s/machines/rest/disk1.raw"
        os.truncate(huge, 65 * MIB)
        lies = str((await refused(a, disks=[choice_of(short_directory / "x")])).error)
        assert "by its definition" in lies
        os.truncate(huge, 64 * MIB)
        monkeypatch.setattr("qmpd.migration.itemdesk.SPARE_BYTES", 1 << 60)
        full = await refused(a, disks=[choice_of(short_directory / "x")])
        assert full.error is not None
        assert full.error["details"]["error"]["code"] == "no_space"  # type: ignore[index]
        assert taken.read_bytes() == b"somebody's"
        assert known(b, "rest") is None
        assert not (short_directory / "b/s/machines/rest").exists()
        assert arriving(short_directory) == []


async def test_it_is_held_meanwhile_and_can_be_kept(short_directory: Path, counting: Guest) -> None:
    async with pair(short_directory) as (a, b):
        image, own = await made(a, short_directory, counting)
        slow = {"peer": "b", "goal": {"bandwidth_mib_s": 1}, "disks": [choice_of(short_directory / "there.raw")]}
        job = await a.service.migration.migrate("rest", msgspec.convert(slow, MigrateRequest))
        async with asyncio.timeout(HUNG_S):
            while not arriving(short_directory) or not (await a.service.job(job.id)).progress.done:
                await asyncio.sleep(LOOK_S)
        progress = (await a.service.job(job.id)).progress
        assert (progress.unit, progress.phase) == ("bytes", "files")
        assert progress.total is not None
        assert 0 < progress.done <= progress.total
        for there in (a, b):
            with pytest.raises((Held, WrongState)):
                await there.service.start("rest", StartRequest())
            with pytest.raises((Held, WrongState)):
                await there.service.delete("rest", None)
        assert (await a.service.cancel(job.id)).state == "cancelled"
        await gone(b, "rest")
        async with asyncio.timeout(HUNG_S):
            while arriving(short_directory) or (short_directory / "b/s/machines/rest").exists():
                await asyncio.sleep(LOOK_S)
        assert counting.file.read_bytes() == image
        assert (short_directory / "a/s/machines/rest/disk1.raw").read_bytes() == own
        assert (await a.service.start("rest", StartRequest())).state is State.RUNNING
        await a.service.kill("rest")


async def test_it_stays_at_its_deadline_if_that_was_asked_for(short_directory: Path, counting: Guest) -> None:
    async with pair(short_directory) as (a, b):
        await made(a, short_directory, counting)
        goal = {"bandwidth_mib_s": 1, "deadline_s": 1, "then": "abort"}
        assert "within 1 s" in str((await refused(a, goal=goal)).error)
        await gone(b, "rest")
        goal["then"] = "pause"
        assert (await moved(a, "rest", "b", goal=goal)).owner == "destination"


async def test_it_is_started_or_moved_and_never_both(short_directory: Path, counting: Guest) -> None:
    async with pair(short_directory) as (a, b):
        await made(a, short_directory, counting)
        request = MigrateRequest(peer="b")
        job, begun = await asyncio.gather(
            a.service.migration.migrate("rest", request), a.service.start("rest", StartRequest()), return_exceptions=True
        )
        assert isinstance(job, JobView)
        job = await ended(a, job)
        if job.state == "succeeded":  # the machine that runs may have been moved as well: then as one that runs
            there = b.service.machine("rest").state
            assert there is (State.STOPPED if isinstance(begun, BaseException) else State.RUNNING)
            assert known(a, "rest") is None
        else:
            assert not isinstance(begun, BaseException)
            assert a.service.machine("rest").state is State.RUNNING
            await gone(b, "rest")
        owner, other = (b, a) if job.state == "succeeded" else (a, b)
        if owner.service.machine("rest").state is State.RUNNING:
            await owner.service.kill("rest")
        second = "a" if owner is b else "b"
        both = await asyncio.gather(
            *(owner.service.migration.migrate("rest", MigrateRequest(peer=second)) for _ in range(2)), return_exceptions=True
        )
        jobs = [await ended(owner, one) for one in both if isinstance(one, JobView)]
        assert [one.state for one in jobs].count("succeeded") == 1
        assert (known(owner, "rest"), other.service.machine("rest").state) == (None, State.STOPPED)


async def test_a_file_that_somebody_put_in_its_place_is_not_lost(short_directory: Path, counting: Guest) -> None:
    """The machine is given already: it waits, says for what, and goes on when the place is free."""
    async with pair(short_directory) as (a, b):
        image, _ = await made(a, short_directory, counting)
        target = short_directory / "there.raw"
        slow = {"peer": "b", "goal": {"bandwidth_mib_s": 1}, "disks": [choice_of(target)]}
        job = await a.service.migration.migrate("rest", msgspec.convert(slow, MigrateRequest))
        async with asyncio.timeout(HUNG_S):
            while not arriving(short_directory):
                await asyncio.sleep(LOOK_S)
        target.write_bytes(b"somebody's")
        async with asyncio.timeout(HUNG_S):
            while (doubt := a.service.migration.list().migrations[0].doubt) is None or "exists already" not in doubt:
                await asyncio.sleep(LOOK_S)
        assert target.read_bytes() == b"somebody's"
        for there in (a, b):
            with pytest.raises((Held, WrongState)):
                await there.service.start("rest", StartRequest())
        target.unlink()
        assert (await ended(a, job)).state == "succeeded"
        assert target.read_bytes() == image
        assert (known(a, "rest"), b.service.machine("rest").state) == (None, State.STOPPED)


async def test_a_machine_that_was_lost_to_its_source_leaves_nothing_when_it_is_discarded(short_directory: Path, counting: Guest) -> None:
    """All of it was there, and its directory had lost the mark of what is not finished."""
    async with pair(short_directory) as (a, b):
        image, _ = await made(a, short_directory, counting)
        target = short_directory / "there.raw"
        arm("ownership-give:error")
        report = await refused(a, disks=[choice_of(target)])
        arm("")
        assert report.error is not None
        await gone(b, "rest")
        async with asyncio.timeout(HUNG_S):
            while (short_directory / "b/s/machines/rest").exists() or arriving(short_directory):
                await asyncio.sleep(LOOK_S)
        assert not target.exists()
        assert phase_at(b) == "discarded"
        await moved(a, "rest", "b", disks=[choice_of(target)])  # its name and its place are free again
        assert target.read_bytes() == image


@pytest.mark.parametrize(
    ("point", "who", "phases", "moves"),
    [
        ("migration-performing-written", "a", ("performing", "awaiting"), False),
        ("migration-performing-written", "b", ("performing", "awaiting"), False),
        ("ownership-give", "a", ("performing", "loaded"), False),
        ("ownership-give", "b", ("performing", "loaded"), True),
        ("ownership-given", "a", ("given", "loaded"), True),
        ("ownership-given", "b", ("given", "loaded"), True),
        ("migration-moved-written", "a", ("moved", "arrived"), True),
        ("migration-moved-written", "b", ("moved", "arrived"), True),
    ],
)
async def test_a_daemon_that_is_restarted_settles_it(
    short_directory: Path, counting: Guest, monkeypatch: pytest.MonkeyPatch, point: str, who: str, phases: tuple[str, str], moves: bool
) -> None:
    monkeypatch.setattr(wondering, "ASK_S", HUNG_S)  # the destination finds out by itself else
    async with hosts(short_directory) as both:
        a, b = both.daemons["a"], both.daemons["b"]
        image, own = await made(a, short_directory, counting)
        target = short_directory / "there.raw"
        arm(f"{point}:hang")
        await a.service.migration.migrate("rest", msgspec.convert({"peer": "b", "disks": [choice_of(target)]}, MigrateRequest))
        async with asyncio.timeout(HUNG_S):
            while (phase_at(a), phase_at(b)) != phases:
                await asyncio.sleep(LOOK_S)
        arm("")
        await both.restart(who)
        if who == "b":
            await both.restart("a")
        a, b = both.daemons["a"], both.daemons["b"]
        moves = moves and not (who == "b" and point == "ownership-give")
        there, other, name = (b, a, "b") if moves else (a, b, "a")
        await gone(other, "rest")
        async with asyncio.timeout(HUNG_S):
            rest = short_directory / other.name / "s/machines/rest"
            while there.service.machine("rest").operation is not None or arriving(short_directory) or rest.exists():
                await asyncio.sleep(LOOK_S)
        assert there.service.machine("rest").state is State.STOPPED
        assert (short_directory / name / "s/machines/rest/disk1.raw").read_bytes() == own
        assert (target if moves else counting.file).read_bytes() == image
        assert target.exists() is moves
        assert (await there.service.start("rest", StartRequest())).state is State.RUNNING


@pytest.mark.parametrize(
    "point",
    [
        "peer-answered:error@3",
        "migration-file-place:error@1",
        "migration-file-placed:error@1",
        "ownership-take:error@1",
        "migration-log-place:error@1",
        "migration-log-write:error@1",
    ],
)
async def test_what_fails_once_is_done_again(short_directory: Path, counting: Guest, point: str) -> None:
    async with hosts(short_directory) as both:
        a, b = both.daemons["a"], both.daemons["b"]
        image, own = await made(a, short_directory, counting)
        log = await log_of(a, "rest")
        arm(point)
        await moved(a, "rest", "b", disks=[choice_of(short_directory / "there.raw")])
        assert (short_directory / "there.raw").read_bytes() == image
        assert (short_directory / "b/s/machines/rest/disk1.raw").read_bytes() == own
        assert await log_of(b, "rest") == log
        assert segments.pieces(str(short_directory / "b/s/machines/rest/serial0.log"), ".arriving") == []
