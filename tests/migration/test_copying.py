"""Machines at rest that are copied: another machine is made at the peer, whole or not at all, and the original stays what it was."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
import pytest

from qmpd.errors import Held, Invalid, WrongState
from qmpd.failpoint import arm
from qmpd.lifecycle import State
from qmpd.migration import delivery, wondering
from qmpd.migrationviews import CopyReport, DryRunReport, MigrateRequest, ResolveRequest
from qmpd.spec import Forward, MachineSpec, UserNic
from qmpd.views import JobView, MachineView, StartRequest
from tests.api.lab import Daemon
from tests.guests.build import Guest
from tests.guests.trace import check_trace
from tests.migration.test_moves import HUNG_S, LOOK_S, ended, known, pair, printed
from tests.migration.test_moving_at_rest import MIB, arriving, choice_of, counting, made
from tests.migration.test_moving_logs import gone, hosts, log_of, phase_at

__all__ = ["counting"]

pytestmark = pytest.mark.qemu

NIC = "52:54:00:12:34:56"


def wish(**request: object) -> MigrateRequest:
    return msgspec.convert({"peer": "b", "copy": {}, **request}, MigrateRequest)


async def copied(source: Daemon, name: str | None = None, **request: object) -> CopyReport:
    """Copies the machine, which must work."""
    job = await ended(source, await source.service.migration.migrate("rest", wish(copy={"name": name}, **request)))
    assert job.state == "succeeded", job.error
    assert job.kind == "copy"
    return msgspec.convert(job.result, CopyReport)


async def failed(source: Daemon, **request: object) -> JobView:
    """A copy that does not come about, and leaves the original as it was."""
    before = original(source)
    job = await ended(source, await source.service.migration.migrate("rest", wish(**request)))
    assert job.state == "failed"
    assert original(source) == before
    return job


def original(source: Daemon) -> tuple[MachineView, object]:
    """Everything about it that a copy must leave alone."""
    return source.service.machine("rest"), source.service.definition("rest")


async def nothing_of(there: Daemon, directory: Path, name: str = "rest") -> None:
    """Returns when nothing is at a host of a machine that did not come there."""
    await gone(there, name)
    async with asyncio.timeout(HUNG_S):
        while arriving(directory) or (directory / there.name / "s/machines" / name).exists():
            await asyncio.sleep(LOOK_S)


async def test_a_copy_is_another_machine_with_the_same_disks(short_directory: Path, counting: Guest) -> None:
    async with pair(short_directory) as (a, b):
        nics = (UserNic(mac=NIC, forwards=(Forward(guest_port=22),)), UserNic())
        image, own = await made(a, short_directory, counting, nics=nics, autostart=True, labels={"tier": "db"})
        before, log = original(a), await log_of(a, "rest")
        spec = a.service.definition("rest").spec
        target = short_directory / "there.raw"
        report = await copied(a, "second", disks=[choice_of(target)])
        assert original(a) == before
        assert await log_of(a, "rest") == log
        assert counting.file.read_bytes() == image
        assert (short_directory / "a/s/machines/rest/disk1.raw").read_bytes() == own
        assert (target.read_bytes(), (short_directory / "b/s/machines/second/disk1.raw").read_bytes()) == (image, own)
        assert arriving(short_directory) == []
        view, there = b.service.machine("second"), b.service.definition("second").spec
        assert (view.state, view.operation, view.uuid, view.exit) == (State.STOPPED, None, report.uuid, None)
        assert (report.machine, report.name, report.peer, report.at_rest, report.halted_ms) == ("rest", "second", "b", True, None)
        assert report.uuid not in {before[0].uuid, spec.uuid}
        macs = tuple(nic.mac for nic in there.nics)
        assert macs == report.macs
        assert not {nic.mac for nic in spec.nics} & set(macs)
        assert len(set(macs)) == 2
        assert {finding.code for finding in report.findings} >= {"mac-new", "autostart-off", "forward-moves"}
        assert not there.autostart
        same = msgspec.structs.replace(spec, name="second", uuid=there.uuid, nics=there.nics, disks=there.disks, autostart=False)
        assert there == same
        assert there.nics[0].forwards == spec.nics[0].forwards  # type: ignore[union-attr]
        assert [(disk.disk, disk.how) for disk in report.disks] == [(0, "copied"), (1, "copied"), (2, "copied")]
        assert report.transferred_bytes < 8 * MIB
        assert (await log_of(b, "second"))[1] == b""
        assert [(one.phase, one.copy and one.copy.name) for one in a.service.migration.list().migrations] == [("copied", "second")]
        for host, name in ((a, "rest"), (b, "second")):  # both at a time
            assert (await host.service.start(name, StartRequest())).state is State.RUNNING
        await printed(b, "second", 200)
        assert check_trace((await log_of(b, "second"))[1]).boots == 1
        assert ("machine.arrived", "second") in [
            (event.kind, event.machine) for event in (await b.service.events_page(0, 1000, "second")).events
        ]


async def test_it_has_the_name_of_its_original_if_none_is_said_and_can_be_made_again(short_directory: Path, counting: Guest) -> None:
    async with pair(short_directory) as (a, b):
        await made(a, short_directory, counting)
        first = await copied(a, disks=[choice_of(short_directory / "1.raw")])
        second = await copied(a, "again", disks=[choice_of(short_directory / "2.raw")])
        assert (first.name, second.name) == ("rest", "again")
        assert first.uuid != second.uuid
        assert {view.name for view in b.service.machines({}, None).machines} == {"rest", "again"}
        await b.service.delete("rest", None)
        assert a.service.machine("rest").state is State.STOPPED


@pytest.mark.parametrize(
    ("request_", "fields"),
    [
        ({"goal": {"downtime_ms": 20}}, ["$.goal.downtime_ms"]),
        ({"goal": {"then": "postcopy", "deadline_s": 3}}, ["$.goal.then"]),
        ({"goal": {"deadline_s": 3}}, ["$.goal.then"]),
        ({"goal": {"auto_converge": True}, "channels": 2, "tunnel": True}, ["$.goal.auto_converge", "$.channels", "$.tunnel"]),
        ({"storage": "shared"}, ["$.storage"]),
    ],
)
async def test_wishes_that_mean_nothing_of_a_copy_are_named(
    short_directory: Path, counting: Guest, request_: dict[str, object], fields: list[str]
) -> None:
    async with pair(short_directory) as (a, _):
        await made(a, short_directory, counting)
        with pytest.raises(Invalid) as refusal:
            await a.service.migration.migrate("rest", wish(**request_))
        assert [problem.path for problem in refusal.value.problems] == fields


@pytest.mark.parametrize("name", ["", "Upper", "a b", "../x", "-x", "x" * 64])
def test_a_name_that_no_machine_could_have_is_no_request(name: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=r"copy\.name"):
        wish(copy={"name": name})


async def test_what_cannot_be_copied_is_refused_and_a_dry_run_says_so_before(
    short_directory: Path, counting: Guest, monkeypatch: pytest.MonkeyPatch, free_port: int
) -> None:
    monkeypatch.setattr(delivery, "OFFER_DEADLINE_S", 0.0)
    async with pair(short_directory) as (a, b):
        await made(a, short_directory, counting, nics=(UserNic(mac=NIC, forwards=(Forward(guest_port=22, host_port=free_port),)),))
        await b.service.create(MachineSpec(name="taken", board="x86_64-q35"))
        spare = {"disks": [choice_of(short_directory / "there.raw")]}

        async def found(**request: object) -> list[tuple[str, str]]:
            job = await ended(a, await a.service.migration.migrate("rest", wish(dry_run=True, **request)))
            assert job.state == "succeeded", job.error
            report = msgspec.convert(job.result, DryRunReport)
            errors = [(one.code, one.mend) for one in report.findings if one.severity == "error"]
            assert report.possible is not bool(errors)
            return errors

        assert await found(**spare) == []
        assert await found(copy={"name": "taken"}, **spare) == [("name-taken", "give the copy another name (--as NAME)")]
        assert "'taken'" in str((await failed(a, copy={"name": "taken"}, **spare)).error)
        assert [code for code, _ in await found()] == ["disk-is-shared"]
        assert "another path" in str((await failed(a)).error)
        shared = {"disks": [{"disk": 0, "how": "shared"}]}
        assert "cannot be shared" in str((await failed(a, **shared)).error)
        assert "format" in str((await failed(a, disks=[choice_of(short_directory / "x") | {"format": "qcow2"}])).error)
        monkeypatch.setattr("qmpd.migration.itemdesk.SPARE_BYTES", 1 << 60)
        full = await failed(a, **spare)
        assert full.error is not None
        assert full.error["details"]["error"]["code"] == "no_space"  # type: ignore[index]
        await nothing_of(b, short_directory)
        assert not (short_directory / "there.raw").exists()


async def test_the_original_is_held_while_it_is_read_and_a_cancelled_copy_leaves_nothing(short_directory: Path, counting: Guest) -> None:
    async with pair(short_directory) as (a, b):
        await made(a, short_directory, counting)
        before = original(a)
        job = await a.service.migration.migrate("rest", wish(goal={"bandwidth_mib_s": 1}, disks=[choice_of(short_directory / "there.raw")]))
        async with asyncio.timeout(HUNG_S):
            while not arriving(short_directory):
                await asyncio.sleep(LOOK_S)
        with pytest.raises(Held, match="'copy'"):
            await a.service.start("rest", StartRequest())
        with pytest.raises((Held, WrongState)):
            await b.service.start("rest", StartRequest())
        with pytest.raises(Held):
            await a.service.delete("rest", None)
        assert (await a.service.cancel(job.id)).state == "cancelled"
        await nothing_of(b, short_directory)
        assert not (short_directory / "there.raw").exists()
        assert original(a) == before
        assert (await a.service.start("rest", StartRequest())).state is State.RUNNING


async def test_a_deadline_gives_a_copy_up(short_directory: Path, counting: Guest) -> None:
    async with pair(short_directory) as (a, b):
        await made(a, short_directory, counting)
        goal = {"bandwidth_mib_s": 1, "deadline_s": 0.5, "then": "abort"}
        assert "0.5 s" in str((await failed(a, goal=goal, disks=[choice_of(short_directory / "there.raw")])).error)
        await nothing_of(b, short_directory)


@pytest.mark.parametrize(
    ("point", "who", "phases", "whole"),
    [
        ("migration-performing-written", "a", ("performing", "awaiting"), False),
        ("migration-performing-written", "b", ("performing", "awaiting"), False),
        ("migration-released", "a", ("performing", "loaded"), False),
        ("migration-released-written", "a", ("released", "loaded"), True),
        ("migration-released-written", "b", ("released", "loaded"), True),
        ("migration-copied", "a", ("released", "arrived"), True),
        ("migration-copied-written", "a", ("copied", "arrived"), True),
    ],
)
async def test_a_daemon_that_is_restarted_settles_it(
    short_directory: Path, counting: Guest, monkeypatch: pytest.MonkeyPatch, point: str, who: str, phases: tuple[str, str], whole: bool
) -> None:
    monkeypatch.setattr(wondering, "ASK_S", HUNG_S)  # the destination finds out by itself else
    async with hosts(short_directory) as both:
        a, b = both.daemons["a"], both.daemons["b"]
        image, own = await made(a, short_directory, counting)
        before = original(a)
        target = short_directory / "there.raw"
        arm(f"{point}:hang")
        await a.service.migration.migrate("rest", wish(copy={"name": "second"}, disks=[choice_of(target)]))
        async with asyncio.timeout(HUNG_S):
            while (phase_at(a), phase_at(b)) != phases:
                await asyncio.sleep(LOOK_S)
        arm("")
        await both.restart(who)
        if who == "b":
            await both.restart("a")
        a, b = both.daemons["a"], both.daemons["b"]
        async with asyncio.timeout(HUNG_S):
            while (phase_at(a), phase_at(b)) != (("copied", "arrived") if whole else ("kept", "discarded")):
                await asyncio.sleep(LOOK_S)
        if whole:
            async with asyncio.timeout(HUNG_S):
                while b.service.machine("second").operation is not None:
                    await asyncio.sleep(LOOK_S)
            assert (b.service.machine("second").state, target.read_bytes()) == (State.STOPPED, image)
            assert (short_directory / "b/s/machines/second/disk1.raw").read_bytes() == own
        else:
            await nothing_of(b, short_directory, "second")
            assert not target.exists()
        async with asyncio.timeout(HUNG_S):
            while a.service.machine("rest").operation is not None:
                await asyncio.sleep(LOOK_S)
        assert (original(a)[0].uuid, original(a)[1]) == (before[0].uuid, before[1])
        assert (await a.service.start("rest", StartRequest())).state is State.RUNNING


@pytest.mark.parametrize(
    "point", ["peer-answered:error@3", "migration-file-place:error@1", "ownership-take:error@1", "migration-copied:error@1"]
)
async def test_what_fails_once_is_done_again(short_directory: Path, counting: Guest, point: str) -> None:
    async with hosts(short_directory) as both:
        a, b = both.daemons["a"], both.daemons["b"]
        image, _ = await made(a, short_directory, counting)
        arm(point)
        await copied(a, "second", disks=[choice_of(short_directory / "there.raw")])
        assert (short_directory / "there.raw").read_bytes() == image
        assert known(b, "second") is not None


async def test_a_peer_that_is_lost_before_it_has_all_gets_nothing(
    short_directory: Path, counting: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qmpd.migration.fileitems.ATTEMPTS", 2)
    monkeypatch.setattr("qmpd.migration.fileitems.AGAIN_S", 0.1)
    async with hosts(short_directory) as both:
        a = both.daemons["a"]
        await made(a, short_directory, counting)
        before = original(a)
        slow = wish(goal={"bandwidth_mib_s": 1}, disks=[choice_of(short_directory / "there.raw")])
        job = await a.service.migration.migrate("rest", slow)
        async with asyncio.timeout(HUNG_S):
            while not arriving(short_directory):
                await asyncio.sleep(LOOK_S)
        await both.stop("b")
        view = await ended(a, job)
        assert (view.state, view.error and view.error["code"]) == ("failed", "peer_unavailable")
        assert original(a) == before
        await nothing_of(await both.start("b"), short_directory)


async def test_a_copy_whose_peer_never_says_can_be_given_up(short_directory: Path, counting: Guest) -> None:
    async with hosts(short_directory) as both:
        a = both.daemons["a"]
        await made(a, short_directory, counting)
        arm("migration-released-written:hang")
        job = await a.service.migration.migrate("rest", wish(copy={"name": "second"}, disks=[choice_of(short_directory / "there.raw")]))
        async with asyncio.timeout(HUNG_S):
            while phase_at(a) != "released":
                await asyncio.sleep(LOOK_S)
        with pytest.raises(WrongState, match="no return"):
            await a.service.cancel(job.id)
        await both.stop("b")
        arm("")
        a = await both.restart("a")
        async with asyncio.timeout(HUNG_S):
            while a.service.migration.list().migrations[0].doubt is None:
                await asyncio.sleep(LOOK_S)
        with pytest.raises(WrongState, match="nothing to remove"):
            await a.service.migration.resolve("rest", ResolveRequest(action="moved", confirm="rest"))
        view = await a.service.migration.resolve("rest", ResolveRequest(action="keep", confirm="rest"))
        assert view.phase == "kept"
        await nothing_of(await both.start("b"), short_directory, "second")
        assert not (short_directory / "there.raw").exists()
