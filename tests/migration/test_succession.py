"""Another QEMU takes the place of a machine's: the guest goes on where it was, and there is one QEMU and always one."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path

import msgspec
import pytest

from qmpd.access import OURSELVES
from qmpd.daemon import running
from qmpd.errors import CannotMove, Held, NotFound, WrongState
from qmpd.failpoint import VARIABLE, arm
from qmpd.forwards import in_force
from qmpd.lifecycle import State
from qmpd.migration.successor import PLACES
from qmpd.migrationviews import UpgradeReport, UpgradeRequest
from qmpd.runlock import is_taken
from qmpd.service import Service
from qmpd.settings import Settings
from qmpd.spec import BlankDisk, Forward, Limits, MachineSpec, UserNic
from qmpd.views import ExpectRequest, JobView, QmpRequest, StartRequest
from qmpd_api.client import Client, DaemonUnavailable
from scripts.lib.restartable import Restartable, restartable
from tests.conftest import CACHE
from tests.guests.build import Guest
from tests.guests.trace import check_trace
from tests.machines import copy_of, spec_of
from tests.newer_qemu import OTHER_QEMU
from tests.process.emulator import QEMU

pytestmark = pytest.mark.qemu

NAME = "one"
LOOK_S = 0.02
#: The distribution's own, where another one comes first in PATH.
INSTALLED = shutil.which("qemu-system-x86_64", path="/usr/local/bin:/usr/bin:/bin") or "qemu-system-x86_64"
#: Means that something hangs.
HUNG_S = 120.0


@pytest.fixture
def counting(guests: dict[str, Guest], short_directory: Path) -> Guest:
    """A guest that counts, on a disk of its own: two that run at the same time lock each other's."""
    return copy_of(guests["x86_64-q35"], short_directory)


@contextmanager
def armed(failpoint: str) -> Iterator[None]:
    arm(failpoint)
    try:
        yield
    finally:
        arm("")


async def ended(service: Service, job: JobView) -> JobView:
    async with asyncio.timeout(HUNG_S):
        while (view := await service.job(job.id)).state == "running":
            await asyncio.sleep(LOOK_S)
    return view


async def upgraded(service: Service, **request: object) -> UpgradeReport:
    """Replaces the machine's QEMU, which must work."""
    job = await ended(service, await service.successions.upgrade(NAME, msgspec.convert(request, UpgradeRequest)))
    assert job.state == "succeeded", job.error
    return msgspec.convert(job.result, UpgradeReport)


async def printed(service: Service, more: int) -> None:
    console = service.console(NAME, None)
    wanted = console.end + more
    async with asyncio.timeout(HUNG_S):
        while console.end < wanted:
            await asyncio.sleep(LOOK_S)


def qemus(settings: Settings) -> list[int]:
    """The processes that were started with a file of the machine."""
    mark = f"{settings.run_dir}/m/{NAME}/".encode()
    found = []
    for entry in os.scandir("/proc"):
        try:
            words = Path(entry.path, "cmdline").read_bytes().split(b"\0") if entry.name.isdecimal() else []
        except OSError:
            continue
        if any(mark in word for word in words):
            found.append(int(entry.name))
    return found


async def everything(service: Service) -> bytes:
    """The whole log of the console."""
    console = service.console(NAME, None)
    data, at = b"", await console.start()
    while (piece := await console.read(at, 1 << 20))[1]:
        assert piece[0] == at, "a gap"
        data, at = data + piece[1], at + len(piece[1])
    return data


async def test_a_guest_counts_on_in_another_qemu_again_and_again(settings: Settings, counting: Guest) -> None:
    spec = spec_of(counting, NAME)
    async with running(settings, {}) as service:
        created = await service.create(msgspec.structs.replace(spec, disks=(*spec.disks, BlankDisk(size_mib=8))), start=True)
        pids = [created.pid]
        for _ in range(3):
            await printed(service, 200)
            report = await upgraded(service)
            view = service.machine(NAME)
            assert (view.state, view.operation, view.pid) == (State.RUNNING, None, report.pid)
            assert (report.before_pid, report.problems) == (pids[-1], ())
            assert report.downtime_ms > 0
            pids.append(report.pid)
            assert qemus(settings) == [report.pid]
            assert is_taken(f"{settings.state_dir}/machines/{NAME}")
        await printed(service, 200)
        assert len(set(pids)) == 4
        place = Path(settings.run_dir) / "m" / NAME
        assert sorted(path.name for path in place.iterdir()) == [PLACES[0], "begun", "launch.msgpack"]
        await service.pause(NAME)
        trace = check_trace(await everything(service))
        assert (trace.boots, trace.breaks) == (1, ())
        await service.kill(NAME)
        assert not is_taken(f"{settings.state_dir}/machines/{NAME}")
        assert (await service.start(NAME, StartRequest())).state is State.RUNNING
        await service.kill(NAME)


async def test_a_halted_guest_stays_halted_and_is_typed_to_afterwards(settings: Settings, guests: dict[str, Guest]) -> None:
    async with running(settings, {}) as service:
        await service.create(spec_of(copy_of(guests["x86_64-pc-echo"], Path(settings.run_dir).parent), NAME), start=True)
        await service.expect(NAME, ExpectRequest(pattern="BM-OK", from_start=True, timeout_s=HUNG_S))
        await service.pause(NAME)
        await upgraded(service)
        assert service.machine(NAME).state is State.PAUSED
        await service.resume(NAME)
        answer = await service.expect(NAME, ExpectRequest(send="hello\r", pattern="HELLO", timeout_s=HUNG_S))
        assert answer.matched
        await service.kill(NAME)


async def test_a_new_qemu_that_does_not_start_leaves_the_old_one_running(
    settings: Settings, counting: Guest, short_directory: Path
) -> None:
    refusing = short_directory / "bin" / "qemu-system-x86_64"
    refusing.parent.mkdir()
    refusing.write_text(f'#!/bin/sh\ncase "$*" in *defer*) echo "qemu-system-x86_64: no" >&2; exit 1;; esac\nexec {QEMU} "$@"\n')
    refusing.chmod(0o755)
    also = msgspec.structs.replace(settings, emulators=(str(refusing.parent),))
    spec = spec_of(counting, NAME, emulator=shutil.which("qemu-system-x86_64"))
    async with running(also, {}) as service:
        created = await service.create(spec, start=True)
        before = await service.qmp(NAME, QmpRequest(execute="query-migrate-capabilities"), OURSELVES)
        job = await ended(service, await service.successions.upgrade(NAME, UpgradeRequest(emulator=str(refusing))))
        assert job.error is not None
        assert job.error["code"] == "launch_failed", job.error
        view = service.machine(NAME)
        assert (view.state, view.operation, view.pid) == (State.RUNNING, None, created.pid)
        assert await service.qmp(NAME, QmpRequest(execute="query-migrate-capabilities"), OURSELVES) == before
        await printed(service, 100)
        assert qemus(settings) == [created.pid]
        place = Path(settings.run_dir) / "m" / NAME
        assert not [path.name for path in place.iterdir() if path.is_dir()]
        assert not [path for path in (Path(settings.state_dir) / "machines" / NAME).iterdir() if path.name.endswith(".next")]
        assert check_trace(await everything(service)).breaks == ()
        await upgraded(service)
        await service.kill(NAME)


async def test_what_cannot_be_replaced_is_said_before_anything_is_done(settings: Settings, counting: Guest) -> None:
    async with running(settings, {}) as service:
        with pytest.raises(NotFound):
            await service.successions.upgrade(NAME, UpgradeRequest())
        await service.create(spec_of(counting, NAME))
        with pytest.raises(WrongState):
            await service.successions.upgrade(NAME, UpgradeRequest())
        await service.start(NAME, StartRequest())
        machine = service._registry.get(NAME)
        limited = msgspec.structs.replace(machine.definition.spec, limits=Limits(memory_max_mib=512))
        machine.definition = msgspec.structs.replace(machine.definition, spec=limited)
        with pytest.raises(CannotMove, match="limits"):
            await service.successions.upgrade(NAME, UpgradeRequest())
        with machine.holding("migrate"):
            machine.definition = msgspec.structs.replace(machine.definition, spec=spec_of(counting, NAME))
            job = await ended(service, await service.successions.upgrade(NAME, UpgradeRequest()))
            assert job.error is not None
            assert job.error["code"] == Held.code
        await service.kill(NAME)


async def test_ports_are_forwarded_by_the_new_qemu(settings: Settings, counting: Guest) -> None:
    async with running(settings, {}) as service:
        await service.create(spec_of(counting, NAME, nics=(UserNic(forwards=(Forward(guest_port=22),)),)), start=True)
        assert (await upgraded(service)).problems == ()
        machine = service._registry.get(NAME)
        (forward,) = await in_force(machine.session, machine.definition.spec)
        assert (forward.guest_port, forward.protocol) == (22, "tcp")
        await service.kill(NAME)


@pytest.mark.skipif(OTHER_QEMU is None, reason="there is one QEMU alone (scripts/test --qemu)")
async def test_a_guest_goes_over_to_a_newer_qemu(settings: Settings, counting: Guest) -> None:
    newer = Path(str(OTHER_QEMU)) / "qemu-system-x86_64"
    also = msgspec.structs.replace(settings, emulators=(str(newer.parent), str(Path(INSTALLED).parent)))
    async with running(also, {}) as service:
        created = await service.create(spec_of(counting, NAME, machine="pc-q35-7.2", emulator=INSTALLED), start=True)
        await printed(service, 200)
        report = await upgraded(service, emulator=str(newer))
        assert (report.before_pid, report.before_version.partition(".")[0]) == (created.pid, "7")
        assert int(report.emulator_version.partition(".")[0]) >= 10
        assert service.machine(NAME).state is State.RUNNING
        await printed(service, 200)
        await service.pause(NAME)
        assert check_trace(await everything(service)).breaks == ()
        await service.kill(NAME)


@pytest.mark.parametrize(
    ("failpoint", "code"),
    [("succession-note:error", "no_space"), ("succession-note:error@2", "no_space"), ("succession-commit:error", "no_space")],
)
async def test_what_cannot_be_written_down_leaves_the_old_qemu_running(
    settings: Settings, counting: Guest, failpoint: str, code: str
) -> None:
    async with running(settings, {}) as service:
        created = await service.create(spec_of(counting, NAME), start=True)
        await printed(service, 100)
        with armed(failpoint):
            job = await ended(service, await service.successions.upgrade(NAME, UpgradeRequest()))
        assert job.error is not None
        assert job.error["code"] == code
        async with asyncio.timeout(HUNG_S):
            while (view := service.machine(NAME)).state is not State.RUNNING:
                await asyncio.sleep(LOOK_S)
        assert (view.operation, view.pid, qemus(settings)) == (None, created.pid, [created.pid])
        await printed(service, 100)
        await upgraded(service)
        await printed(service, 100)
        await service.pause(NAME)
        assert check_trace(await everything(service)).breaks == ()
        await service.kill(NAME)


@pytest.mark.parametrize("failpoint", ["succession-log:error@1", "succession-cont:error@1"])
async def test_a_new_qemu_that_is_not_set_going_at_once_is_a_moment_later(settings: Settings, counting: Guest, failpoint: str) -> None:
    async with running(settings, {}) as service:
        await service.create(spec_of(counting, NAME), start=True)
        await printed(service, 100)
        with armed(failpoint):
            report = await upgraded(service)
        view = service.machine(NAME)
        assert (view.state, view.pid, qemus(settings)) == (State.RUNNING, report.pid, [report.pid])
        await printed(service, 100)
        await service.pause(NAME)
        assert check_trace(await everything(service)).breaks == ()
        await service.kill(NAME)


async def test_a_job_that_is_cancelled_leaves_the_old_qemu_running(settings: Settings, counting: Guest) -> None:
    async with running(settings, {}) as service:
        created = await service.create(spec_of(counting, NAME), start=True)
        with armed("succession-move:hang"):
            job = await service.successions.upgrade(NAME, UpgradeRequest())
            async with asyncio.timeout(HUNG_S):
                while len(qemus(settings)) < 2:
                    await asyncio.sleep(LOOK_S)
            with pytest.raises(Held):
                await service.pause(NAME)
            assert (await service.cancel(job.id)).state == "cancelled"
        view = service.machine(NAME)
        assert (view.state, view.operation, view.pid, qemus(settings)) == (State.RUNNING, None, created.pid, [created.pid])
        await printed(service, 100)
        await service.kill(NAME)


# A daemon that is killed.


@asynccontextmanager
async def killed_at(spec: MachineSpec, sign: str, failpoint: str) -> AsyncIterator[tuple[Restartable, Client, int]]:
    """A daemon that was killed at a failpoint while it replaced the QEMU of a guest that had printed `sign`, and the next one; the first
    QEMU."""
    async with AsyncExitStack() as stack:
        daemon = await stack.enter_async_context(restartable(CACHE, {}, prefix="qs-"))
        daemon.start(**{VARIABLE: failpoint})
        await asyncio.to_thread(daemon.wait_answer)
        async with Client(daemon.socket) as client:
            pid = (await client.create(spec, start=True)).pid
            assert pid is not None
            await client.expect(NAME, ExpectRequest(pattern=sign, from_start=True, timeout_s=HUNG_S))
            with suppress(DaemonUnavailable):  # that it is killed is what is wanted
                job = await client.upgrade_emulator(NAME, UpgradeRequest())
                async with asyncio.timeout(HUNG_S):
                    while (view := await client.job(job.id)).state == "running":
                        await asyncio.sleep(LOOK_S)
                pytest.fail(f"{failpoint} was not passed: {view.error or view.result}")
        assert daemon.process is not None
        assert await asyncio.to_thread(daemon.process.wait, HUNG_S) == -signal.SIGKILL
        daemon.start(**{VARIABLE: ""})
        await asyncio.to_thread(daemon.wait_answer)
        yield daemon, await stack.enter_async_context(Client(daemon.socket)), pid


@pytest.mark.parametrize(
    ("failpoint", "stays"),
    [
        ("succession-note:kill@1", True),
        ("gate-spawn:kill@2", True),
        ("record-write:kill@2", True),
        ("record-named:kill@2", True),
        ("gate-gone:kill@2", True),
        ("succession-move:kill", True),
        ("succession-note:kill@2", True),
        ("succession-commit:kill", True),
        ("record-written:kill@3", True),
        ("record-named:kill@3", False),
        ("succession-committed:kill", False),
        ("succession-log:kill", False),
        ("migration-log-relink:kill", False),
        ("succession-cont:kill", False),
        ("succession-settle:kill", False),
    ],
)
async def test_a_daemon_that_is_killed_leaves_one_qemu_and_the_next_one_goes_on(counting: Guest, failpoint: str, stays: bool) -> None:
    async with killed_at(spec_of(counting, NAME), "00000003", failpoint) as (daemon, client, pid):
        async with asyncio.timeout(HUNG_S):
            while (view := await client.machine(NAME)).state is not State.RUNNING or view.operation is not None:
                await asyncio.sleep(LOOK_S)
        assert (view.pid == pid) is stays
        assert [one.pid for one in daemon.qemus()] == [view.pid]
        place = daemon.run_dir / "m" / NAME
        assert not (place / "succession.msgpack").exists()
        assert [path.name for path in place.iterdir() if path.is_dir()] == ([] if stays else [PLACES[0]])
        # It is a machine like any other: the guest's output goes on, and its QEMU can be replaced.
        start = (await client.log(NAME)).end
        while (await client.log(NAME)).end < start + 100:
            await asyncio.sleep(LOOK_S)
        job = await client.upgrade_emulator(NAME, UpgradeRequest())
        while (ending := await client.job(job.id)).state == "running":
            await asyncio.sleep(LOOK_S)
        assert ending.state == "succeeded", ending.error
        start = (await client.log(NAME)).end
        while (await client.log(NAME)).end < start + 100:
            await asyncio.sleep(LOOK_S)
        trace = check_trace((await client.log(NAME)).data)
        assert (trace.boots, trace.breaks) == (1, ())
        await client.kill(NAME)
