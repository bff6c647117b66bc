"""Machines that move between two daemons: one owner at every time, the guest goes on where it was, and nothing is left behind."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import msgspec
import pytest

from qmpd.access import OURSELVES, Caller
from qmpd.errors import Forbidden, Held, Invalid, NotFound, PeerUnavailable, WrongState
from qmpd.forwards import in_force
from qmpd.lifecycle import State
from qmpd.migration.delivery import Departure
from qmpd.migration.phases import Phase
from qmpd.migration.protocol import DiscardRequest, Handover
from qmpd.migrationviews import DiskChoice, Goal, GoalChanges, MigrateRequest, MigrationReport
from qmpd.peers import PeerDaemon
from qmpd.settings import Peer
from qmpd.spec import Forward, ImageDisk, Kernel, MachineSpec, UserNic
from qmpd.views import JobView, MachineView, QmpRequest, StartRequest
from tests.api.lab import Daemon, authority, daemon, host, peer, port
from tests.conftest import end_machines
from tests.guests.build import Guest
from tests.machines import copy_of, spec_of
from tests.migration.test_goals import MIB, WORKING_SET, WRITES_FROM, at_work, busy_kernel
from tests.process.emulator import content

pytestmark = pytest.mark.qemu

#: Means that something hangs.
HUNG_S = 120.0
#: A job is looked at this often.
LOOK_S = 0.02


@pytest.fixture
def counting(guests: dict[str, Guest], short_directory: Path) -> Guest:
    """A guest that counts, on a disk of its own: two that run at the same time lock each other's."""
    return copy_of(guests["x86_64-q35"], short_directory)


@asynccontextmanager
async def pair(directory: Path, emulators: Mapping[str, str] | None = None, **grants: bool) -> AsyncIterator[tuple[Daemon, Daemon]]:
    """Two daemons, `a` and `b`, that are each other's peers; `grants` is what b lets a do. They may have emulators of their own."""
    root = authority(directory / "ca")
    async with AsyncExitStack() as stack:
        ports = {name: stack.enter_context(port()) for name in ("a", "b")}
        peers: dict[str, tuple[Peer, ...]] = {"a": (peer("b", ports["b"][1]),), "b": (peer("a", ports["a"][1], **grants),)}
        made = []
        for name, (listener, _) in ports.items():
            pki = host(root, directory / name / "pki", name)
            own = [emulators[name]] if emulators is not None else []
            made.append(await stack.enter_async_context(daemon(name, directory / name, pki, listener, peers[name], emulators=own)))
            stack.push_async_callback(end_machines, made[-1].service)
        yield made[0], made[1]


async def ended(there: Daemon, job: JobView) -> JobView:
    """The job when it has ended."""
    async with asyncio.timeout(HUNG_S):
        while (view := await there.service.job(job.id)).state == "running":
            await asyncio.sleep(LOOK_S)
    return view


async def moved(source: Daemon, name: str, to: str, **request: object) -> MigrationReport:
    """Moves a machine, which must work."""
    job = await ended(source, await source.service.migration.migrate(name, msgspec.convert({"peer": to, **request}, MigrateRequest)))
    assert job.state == "succeeded", job.error
    return msgspec.convert(job.result, MigrationReport)


def known(there: Daemon, name: str) -> MachineView | None:
    """The machine, where the daemon knows it."""
    return next((view for view in there.service.machines({}, None).machines if view.name == name), None)


async def printed(there: Daemon, name: str, more: int) -> None:
    """Waits until the console of a machine has got `more` bytes."""
    console = there.service.console(name, None)
    wanted = console.end + more
    async with asyncio.timeout(HUNG_S):
        while console.end < wanted:
            await asyncio.sleep(LOOK_S)


async def test_a_running_machine_moves_and_its_memory_goes_on(short_directory: Path, counting: Guest) -> None:
    async with pair(short_directory) as (a, b):
        await a.service.create(spec_of(counting, "counter"), start=True)
        await printed(a, "counter", 500)
        report = await moved(a, "counter", "b")
        assert (report.owner, report.owner_name, report.epoch) == ("destination", "b", 1)
        assert [machine.name for machine in a.service.machines({}, None).machines] == []
        view = b.service.machine("counter")
        assert (view.state, view.operation) == (State.RUNNING, None)
        await printed(b, "counter", 500)
        await b.service.kill("counter")


async def test_a_halted_machine_moves_and_stays_halted(short_directory: Path, counting: Guest) -> None:
    async with pair(short_directory) as (a, b):
        await a.service.create(spec_of(counting, "counter"), start=True)
        await printed(a, "counter", 100)
        await a.service.pause("counter")
        await moved(a, "counter", "b")
        assert b.service.machine("counter").state is State.PAUSED
        assert (await b.service.resume("counter")).state is State.RUNNING
        await printed(b, "counter", 100)
        await b.service.kill("counter")


async def test_a_machine_comes_back_to_where_it_was(short_directory: Path, counting: Guest) -> None:
    async with pair(short_directory) as (a, b):
        created = await a.service.create(spec_of(counting, "counter"), start=True)
        for source, there, epoch in ((a, b, 1), (b, a, 2), (a, b, 3)):
            report = await moved(source, "counter", there.name)
            assert report.epoch == epoch
            await printed(there, "counter", 100)
        assert b.service.machine("counter").uuid == created.uuid
        assert [view.phase for view in a.service.migration.list().migrations] == ["moved", "arrived", "moved"]
        assert [view.phase for view in b.service.migration.list("counter").migrations] == ["arrived", "moved", "arrived"]
        await b.service.kill("counter")


async def test_the_destination_refuses_a_name_that_is_taken_and_the_guest_runs_on(short_directory: Path, counting: Guest) -> None:
    async with pair(short_directory) as (a, b):
        await b.service.create(spec_of(counting, "counter"))
        await a.service.create(spec_of(counting, "counter"), start=True)
        job = await ended(a, await a.service.migration.migrate("counter", MigrateRequest(peer="b")))
        assert job.error is not None
        assert job.error["code"] == "cannot_move"
        assert "already" in str(job.error["message"])
        view = a.service.machine("counter")
        assert (view.state, view.operation) == (State.RUNNING, None)
        await printed(a, "counter", 100)
        assert b.service.machine("counter").state is State.STOPPED
        await a.service.kill("counter")


async def test_while_it_moves_nobody_else_touches_it_and_it_can_be_kept(short_directory: Path, counting: Guest) -> None:
    async with pair(short_directory) as (a, b):
        await a.service.create(spec_of(counting, "counter"), start=True)
        before = await a.service.qmp("counter", QmpRequest(execute="query-migrate-capabilities"), OURSELVES)
        slow = MigrateRequest(peer="b", goal=Goal(bandwidth_mib_s=1))
        job = await a.service.migration.migrate("counter", slow)
        async with asyncio.timeout(HUNG_S):
            while (view := known(b, "counter")) is None or view.state is not State.INCOMING:
                await asyncio.sleep(LOOK_S)
        with pytest.raises(Held):
            await a.service.pause("counter")
        with pytest.raises(Held):
            await b.service.resume("counter")
        with pytest.raises(WrongState):
            await b.service.start("counter", StartRequest())
        assert (await a.service.cancel(job.id)).state == "cancelled"
        async with asyncio.timeout(HUNG_S):
            while "counter" in b.service._registry.names:  # until its files are gone
                await asyncio.sleep(LOOK_S)
        after = await a.service.qmp("counter", QmpRequest(execute="query-migrate-capabilities"), OURSELVES)
        assert after == before
        view = a.service.machine("counter")
        assert (view.state, view.operation) == (State.RUNNING, None)
        await printed(a, "counter", 100)
        assert not (short_directory / "b/s/machines/counter").exists()
        await moved(a, "counter", "b")
        await b.service.kill("counter")


async def test_a_peer_that_is_not_there_costs_the_guest_nothing(short_directory: Path, counting: Guest) -> None:
    async with pair(short_directory) as (a, _):
        await a.service.create(spec_of(counting, "counter"), start=True)
        with pytest.raises(NotFound):
            await a.service.migration.migrate("counter", MigrateRequest(peer="nobody"))
        await a.service.kill("counter")


async def test_what_a_peer_says_of_a_migration_that_is_not_its_own_is_not_heard(short_directory: Path, counting: Guest) -> None:
    async with pair(short_directory) as (a, b):
        await a.service.create(spec_of(counting, "counter"), start=True)
        report = await moved(a, "counter", "b")
        stranger = Caller(user="peer:c", role="peer", peer="c")
        with pytest.raises((NotFound, Forbidden)):
            await b.service.migration.standing(stranger, report.id)
        source = Caller(user="peer:a", role="peer", peer="a")
        assert (await b.service.migration.standing(source, report.id)).phase is Phase.ARRIVED
        again = await b.service.migration.take(source, report.id, Handover(epoch=1, run=True))
        assert again.phase is Phase.ARRIVED
        discarded = await b.service.migration.discard(source, report.id, DiscardRequest(reason="too late"))
        assert discarded.phase is Phase.ARRIVED
        assert b.service.machine("counter").state is State.RUNNING
        await b.service.kill("counter")


async def test_a_migration_gets_another_goal_while_it_is_under_way(short_directory: Path, counting: Guest) -> None:
    async with pair(short_directory) as (a, b):
        full, there = short_directory / "full.raw", short_directory / "there.raw"
        full.write_bytes(random.Random(1).randbytes(32 << 20))
        spec = spec_of(counting, "counter")
        full_disk = ImageDisk(path=str(full), format="raw")
        await a.service.create(msgspec.structs.replace(spec, disks=(*spec.disks, full_disk)), start=True)
        choice = DiskChoice(disk=1, how="copy", path=str(there))
        slow = MigrateRequest(peer="b", goal=Goal(bandwidth_mib_s=1), disks=(choice,))
        job = await a.service.migration.migrate("counter", slow)
        async with asyncio.timeout(HUNG_S):
            while (await a.service.job(job.id)).progress.migration is None:
                await asyncio.sleep(LOOK_S)
        with pytest.raises(Invalid, match="postcopy"):
            await a.service.migration.tune("counter", GoalChanges(then="postcopy"))
        view = await a.service.migration.tune("counter", GoalChanges(bandwidth_mib_s=0))
        assert view.goal == Goal()
        assert view.job == job.id
        report = msgspec.convert((await ended(a, job)).result, MigrationReport)
        assert [tuning.reason for tuning in report.tuned] == ["the goal was changed"]
        assert there.read_bytes() == full.read_bytes()
        with pytest.raises(WrongState):
            await b.service.migration.tune("counter", GoalChanges(downtime_ms=100))
        await b.service.kill("counter")


async def test_ports_are_forwarded_where_the_machine_is(short_directory: Path, counting: Guest) -> None:
    nic = UserNic(forwards=(Forward(guest_port=22),))
    async with pair(short_directory) as (a, b):
        await a.service.create(spec_of(counting, "counter", nics=(nic,)), start=True)
        (before,) = await in_force(a.service._registry.get("counter").session, a.service.definition("counter").spec)
        await moved(a, "counter", "b")
        there = b.service._registry.get("counter")
        async with asyncio.timeout(HUNG_S):
            while not (found := await in_force(there.session, there.definition.spec)):
                await asyncio.sleep(LOOK_S)
        assert [(forward.guest_port, forward.protocol) for forward in found] == [(22, "tcp")]
        assert before.guest_port == 22
        await b.service.kill("counter")


def busy(directory: Path, working_set: int = WORKING_SET) -> MachineSpec:
    """A guest that changes its memory faster than it can be sent."""
    kernel = Kernel(image=str(busy_kernel(directory / "busy", working_set)), console=False)
    return MachineSpec(name="busy", board="x86_64-q35", accel="tcg", memory_mib=64, kernel=kernel)


async def set_to_work(there: Daemon, spec: MachineSpec, working_set: int = WORKING_SET) -> None:
    """Creates and starts such a guest, and returns when it changes its memory; one that is in its BIOS still is moved in a moment."""
    await there.service.create(spec, start=True)
    await at_work(there.service._registry.get(spec.name).session, working_set)


async def test_a_guest_whose_memory_follows_it_runs_at_its_destination_meanwhile(short_directory: Path) -> None:
    async with pair(short_directory) as (a, b):
        await set_to_work(a, busy(short_directory))
        goal = Goal(bandwidth_mib_s=2, downtime_ms=1, deadline_s=2.0, then="postcopy", auto_converge=False)
        job = await ended(a, await a.service.migration.migrate("busy", MigrateRequest(peer="b", goal=goal)))
        assert job.state == "succeeded", job.error
        report = msgspec.convert(job.result, MigrationReport)
        assert (report.owner_name, report.postcopy) == ("b", True)
        assert [tuning.action for tuning in report.tuned][-1] == "postcopy"
        assert known(a, "busy") is None
        async with asyncio.timeout(HUNG_S):
            while (view := b.service.machine("busy")).operation is not None:
                await asyncio.sleep(LOOK_S)
        assert view.state is State.RUNNING
        await b.service.kill("busy")


async def test_a_job_lasts_until_a_guest_that_was_halfway_has_been_brought_through(
    short_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with pair(short_directory) as (a, b):
        giving = a.service.migration._departures._giving
        loaded, asked = giving.loaded, 0

        async def lost_at_first(departure: Departure, link: PeerDaemon, *, halfway: bool) -> None:
            nonlocal asked
            asked += 1
            if asked == 1:
                assert halfway
                raise PeerUnavailable("nobody answers")
            await loaded(departure, link, halfway=halfway)

        monkeypatch.setattr(giving, "loaded", lost_at_first)
        await set_to_work(a, busy(short_directory))
        goal = Goal(bandwidth_mib_s=2, downtime_ms=1, deadline_s=2.0, then="postcopy", auto_converge=False)
        job = await ended(a, await a.service.migration.migrate("busy", MigrateRequest(peer="b", goal=goal)))
        assert (job.state, asked) == ("succeeded", 2), job.error
        assert msgspec.convert(job.result, MigrationReport).postcopy
        assert known(a, "busy") is None
        assert b.service.machine("busy").state is State.RUNNING
        await b.service.kill("busy")


@pytest.mark.parametrize("then", ["pause", "abort"])
async def test_at_the_deadline_is_done_what_the_goal_says(short_directory: Path, then: str) -> None:
    async with pair(short_directory) as (a, b):
        await set_to_work(a, busy(short_directory))
        goal = msgspec.convert({"bandwidth_mib_s": 2, "downtime_ms": 1, "deadline_s": 2.0, "then": then, "auto_converge": False}, Goal)
        job = await ended(a, await a.service.migration.migrate("busy", MigrateRequest(peer="b", goal=goal)))
        there = b if then == "pause" else a
        assert job.state == ("succeeded" if then == "pause" else "failed")
        view = there.service.machine("busy")
        assert view.state is State.RUNNING
        async with asyncio.timeout(HUNG_S):
            while there.service.machine("busy").operation is not None:
                await asyncio.sleep(LOOK_S)
        await there.service.kill("busy")


#: So few that QEMU keeps all of them at hand, and is not told of each store.
FEW_PAGES = 64 * 4096


def filled(spec: MachineSpec, filling: Path) -> MachineSpec:
    """The machine, with memory that takes its time to send."""
    filling.write_bytes(os.urandom(12 * MIB))
    assert spec.kernel is not None
    return msgspec.structs.replace(spec, kernel=msgspec.structs.replace(spec.kernel, initrd=str(filling)))


async def counters(there: Daemon, name: str, path: Path) -> tuple[int, ...]:
    """What the busy guest has counted in each of its pages; it goes round them in order, so they differ by one at most."""
    await there.service._registry.get(name).session.execute("pmemsave", {"val": WRITES_FROM, "size": FEW_PAGES, "filename": str(path)})
    memory = content(path)
    return tuple(int.from_bytes(memory[at : at + 4], "little") for at in range(0, FEW_PAGES, 4096))


@pytest.mark.parametrize(("then", "mib_s", "deadline_s"), [("pause", 40, 3.0), ("postcopy", 4, 1.0)])
async def test_no_store_is_lost_of_a_guest_that_changes_its_memory_all_the_time(
    short_directory: Path, then: str, mib_s: int, deadline_s: float
) -> None:
    """QEMU before 9.0 forgets some under TCG when memory is sent again and again."""
    spec = filled(busy(short_directory, FEW_PAGES), short_directory / "filling")
    goal = {"bandwidth_mib_s": mib_s, "downtime_ms": 1, "deadline_s": deadline_s, "then": then}
    async with pair(short_directory) as (a, b):
        await set_to_work(a, spec, FEW_PAGES)
        for source, there in ((a, b), (b, a)) * 2:
            report = await moved(source, "busy", there.name, goal=goal)
            assert report.postcopy is (then == "postcopy")
            await there.service.pause("busy")
            counted = await counters(there, "busy", short_directory / "memory")
            assert max(counted) - min(counted) <= 1
            assert min(counted) > 0
            await there.service.resume("busy")
        await a.service.kill("busy")
