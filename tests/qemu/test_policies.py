"""What happens by itself, with real QEMUs and our own guests: panics, watchdogs, autostart, the end of the host."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest

from qmpd.access import Caller
from qmpd.daemon import running
from qmpd.errors import GoingDown, Held, Invalid, Protected, QemuDied, QemuRefused, StaleRevision
from qmpd.lifecycle import State
from qmpd.service import Service
from qmpd.settings import Settings
from qmpd.spec import Actions, ImageDisk, MachineChanges, MachineSpec, RestartPolicy, Watchdog
from qmpd.views import (
    HostShutdownRequest,
    HostShutdownView,
    QmpRequest,
    ShutdownRequest,
    StartRequest,
)
from tests.conftest import end_machines
from tests.guests.build import Guest
from tests.machines import copy_of, spec_of
from tests.waiting import LOOK_S, PATIENCE_S, job_ended, until

pytestmark = pytest.mark.qemu

ADMIN = Caller(user="tester")
MIB = 1024 * 1024


def quiet(guests: dict[str, Guest], name: str, **changes: object) -> MachineSpec:
    """A machine that costs nothing once it has said its banner, and does not listen to its power button."""
    return spec_of(guests["x86_64-q35-quiet"], name, **changes)


@pytest.fixture
def settings(settings: Settings) -> Settings:
    """A daemon whose tester may send any QMP command."""
    return msgspec.structs.replace(settings, qmp_users=("tester",))


async def port_write(service: Service, name: str, port: int, value: int) -> None:
    """Writes a byte to an I/O port, as a guest's driver would. QEMU may end of it before it has answered."""
    line: dict[str, object] = {"command-line": f"o /b {port:#x} {value:#x}"}
    with contextlib.suppress(QemuDied):
        await service.qmp(name, QmpRequest(execute="human-monitor-command", arguments=line), ADMIN)


# -- panics, reboots, watchdogs

PVPANIC = ({"driver": "pvpanic"},)
PVPANIC_PORT = 0x505
PANICKED = 1
IB700_ENABLE = 0x443
#: Of the watchdog's table of times: at once.
NO_TIME = 0xF


@pytest.fixture
def pc(guests: dict[str, Guest], short_directory: Path) -> Guest:
    """A PC's guest that sleeps, on a disk of its own."""
    return copy_of(guests["x86_64-pc-quiet"], short_directory)


def panicking(pc: Guest, **changes: object) -> MachineSpec:
    return spec_of(pc, "one", devices=PVPANIC, **changes)


async def test_a_panic_halts_the_guest_unless_something_else_is_said(service: Service, pc: Guest) -> None:
    await service.create(panicking(pc, restart=RestartPolicy(when="always", backoff_s=0.1)), start=True)
    await port_write(service, "one", PVPANIC_PORT, PANICKED)
    view = await until(service, "one", lambda view: view.state is State.PAUSED)
    assert view.status == "guest-panicked"
    assert view.pid is not None


@pytest.mark.parametrize("action", ["shutdown", "exit-failure"])
async def test_a_panic_that_ends_qemu_is_a_failure_and_is_restarted_as_one(service: Service, pc: Guest, action: str) -> None:
    actions = msgspec.convert({"panic": action}, Actions)
    restart = RestartPolicy(when="on-failure", limit=1, backoff_s=0.1)
    started = await service.create(panicking(pc, actions=actions, restart=restart), start=True)
    await port_write(service, "one", PVPANIC_PORT, PANICKED)
    again = await until(service, "one", lambda view: view.state is State.RUNNING and view.pid != started.pid)
    await port_write(service, "one", PVPANIC_PORT, PANICKED)
    ended = await until(service, "one", lambda view: view.state is State.CRASHED)
    assert again.pid != started.pid
    assert ended.exit is not None
    assert not ended.exit.clean


async def test_a_guest_that_powers_off_is_not_restarted_after_failures_only(service: Service, guests: dict[str, Guest]) -> None:
    restart = RestartPolicy(when="on-failure", backoff_s=0.1)
    await service.create(spec_of(guests["aarch64-virt-poweroff"], "one", restart=restart), start=True)
    await until(service, "one", lambda view: view.state is State.STOPPED)
    await asyncio.sleep(restart.backoff_s * 3)
    assert service.machine("one").state is State.STOPPED


async def test_a_reboot_that_ends_qemu_is_an_orderly_end(service: Service, guests: dict[str, Guest]) -> None:
    restart = RestartPolicy(when="on-failure", backoff_s=0.1)
    actions = Actions(reboot="shutdown")
    await service.create(spec_of(guests["aarch64-virt-reset"], "one", restart=restart, actions=actions), start=True)
    view = await until(service, "one", lambda view: view.state is State.STOPPED)
    assert view.exit is not None
    assert (view.exit.reason, view.exit.clean, view.resets) == ("guest-reset", True, 0)


async def test_a_guest_that_is_off_can_be_kept_and_reset(service: Service, guests: dict[str, Guest]) -> None:
    actions = Actions(shutdown="pause")
    await service.create(spec_of(guests["aarch64-virt-poweroff"], "one", actions=actions), start=True)
    view = await until(service, "one", lambda view: view.status == "shutdown")
    assert view.state is State.PAUSED
    with pytest.raises(QemuRefused):
        await service.resume("one")
    await service.reset("one")
    await until(service, "one", lambda view: view.status == "prelaunch")
    await service.resume("one")
    await until(service, "one", lambda view: view.status == "shutdown")
    assert (await service.stop("one")).clean


@pytest.mark.parametrize(("action", "status"), [("pause", "watchdog"), ("none", "running")])
async def test_a_watchdog_that_fires_does_what_is_said(service: Service, pc: Guest, action: str, status: str) -> None:
    actions = msgspec.convert({"watchdog": action}, Actions)
    spec = spec_of(pc, "one", watchdog=Watchdog(model="ib700"), actions=actions)
    await service.create(spec, start=True)
    await port_write(service, "one", IB700_ENABLE, NO_TIME)
    async with asyncio.timeout(PATIENCE_S):
        while "WATCHDOG" not in {event.data.get("event") for event in (await service.events_page(0, 1000, "one")).events}:
            await asyncio.sleep(LOOK_S)
    assert (await until(service, "one", lambda view: view.status == status)).pid is not None


async def test_a_watchdog_that_ends_qemu_is_a_failure(service: Service, pc: Guest) -> None:
    actions = Actions(watchdog="poweroff")
    await service.create(spec_of(pc, "one", watchdog=Watchdog(model="ib700"), actions=actions), start=True)
    await port_write(service, "one", IB700_ENABLE, NO_TIME)
    view = await until(service, "one", lambda view: view.state is State.CRASHED)
    assert view.exit is not None
    assert (view.exit.code, view.exit.reason, view.exit.clean) == (0, "watchdog", False)


async def test_a_board_without_watchdog_says_so(service: Service) -> None:
    with pytest.raises(Invalid) as refused:
        await service.create(MachineSpec(name="one", board="sparc-ss5", watchdog=Watchdog()))
    assert "$.watchdog" in {problem.path for problem in refused.value.problems}


# -- autostart


@asynccontextmanager
async def daemon(settings: Settings) -> AsyncIterator[Service]:
    """Another daemon of the same settings, whose machines are killed at its end."""
    async with running(settings, {}) as service:
        yield service
        await end_machines(service)


async def test_machines_start_in_their_order_and_one_that_cannot_start_stops_nobody(settings: Settings, guests: dict[str, Guest]) -> None:
    gone = Path(settings.state_dir).parent / "gone.img"
    gone.write_bytes(bytes(MIB))
    async with running(settings, {}) as service:
        await service.create(quiet(guests, "late", autostart=True, autostart_order=5))
        await service.create(quiet(guests, "early", autostart=True, autostart_order=-5, autostart_delay_s=0.2))
        disk = ImageDisk(path=str(gone), format="raw")
        await service.create(quiet(guests, "broken", autostart=True, disks=(disk,)))
        await service.create(quiet(guests, "never"))
    gone.unlink()
    async with daemon(settings) as service:
        await until(service, "late", lambda view: view.state is State.RUNNING)
        states = {name: service.machine(name).state for name in ("late", "early", "broken", "never")}
        assert states == {"late": State.RUNNING, "early": State.RUNNING, "broken": State.STOPPED, "never": State.STOPPED}
        started = [event.machine for event in (await service.events_page(0, 1000, None)).events if event.data.get("state") == "running"]
        assert started == ["early", "late"]


# -- protection and changes


async def test_a_protected_machine_cannot_be_deleted_until_it_is_unprotected(service: Service, guests: dict[str, Guest]) -> None:
    view = await service.create(quiet(guests, "one"), start=True)
    protected = await service.update("one", MachineChanges(protected=True, title="keep"), view.revision)
    assert (protected.protected, protected.title, protected.state) == (True, "keep", State.RUNNING)
    assert protected.revision > view.revision
    await service.stop("one")
    with pytest.raises(Protected) as refused:
        await service.delete("one", None)
    assert refused.value.details == {"field": "protected"}
    with pytest.raises(StaleRevision):
        await service.update("one", MachineChanges(protected=False), view.revision)
    await service.update("one", MachineChanges(protected=False), protected.revision)
    await service.delete("one", None)


async def test_what_is_changed_while_the_machine_runs_is_true_for_the_next_daemon_too(settings: Settings, guests: dict[str, Guest]) -> None:
    async with running(settings, {}) as service:
        view = await service.create(quiet(guests, "one"), start=True)
        changes = MachineChanges(labels={"a": "b"}, shutdown_timeout_s=1.5, restart=RestartPolicy(when="always"))
        changed = await service.update("one", changes, view.revision)
        assert await service.update("one", changes, changed.revision) == msgspec.structs.replace(changed)
        with pytest.raises(StaleRevision):
            await service.update("one", changes, view.revision)
    async with daemon(settings) as service:
        spec = service.definition("one").spec
        assert (spec.labels, spec.shutdown_timeout_s, spec.restart.when) == ({"a": "b"}, 1.5, "always")
        assert (await until(service, "one", lambda view: view.state is State.RUNNING)).pid == view.pid


# -- the end of the host


async def test_the_end_of_the_host_ends_machines_in_reverse_order_and_restarts_none(service: Service, guests: dict[str, Guest]) -> None:
    restart = RestartPolicy(when="always", backoff_s=0.1)
    for order, name in enumerate(("first", "second", "third")):
        changes = {"autostart_order": order, "restart": restart, "shutdown_timeout_s": 0.1}
        await service.create(quiet(guests, name, **changes), start=True)
    await service.pause("second")
    await service.create(quiet(guests, "resting"))
    job = await job_ended(service, await service.shutdown_host(HostShutdownRequest()))
    assert (job.state, job.machine, job.progress.done, job.progress.total) == ("succeeded", None, 3, 3)
    result = msgspec.convert(job.result, HostShutdownView)
    assert [(end.machine, end.method, end.clean) for end in result.machines] == [
        ("third", "quit", True),
        ("second", "quit", True),
        ("first", "quit", True),
    ]
    assert result.left == 0
    await asyncio.sleep(restart.backoff_s * 3)
    assert {service.machine(name).state for name in ("first", "second", "third", "resting")} == {State.STOPPED}
    assert (await service.start("resting", StartRequest())).state is State.RUNNING


async def test_while_the_host_goes_down_nothing_starts(service: Service, guests: dict[str, Guest]) -> None:
    await service.create(quiet(guests, "one", shutdown_timeout_s=3600), start=True)
    await service.create(quiet(guests, "two"))
    job = await service.shutdown_host(HostShutdownRequest())
    await until(service, "one", lambda view: view.operation == "host-shutdown")
    with pytest.raises(GoingDown):
        await service.start("two", StartRequest())
    with pytest.raises(GoingDown):
        await service.shutdown_host(HostShutdownRequest())
    with pytest.raises(Held):
        await service.reset("one")
    assert (await service.cancel(job.id)).state == "cancelled"
    assert service.machine("one").state is State.RUNNING
    await service.start("two", StartRequest())


async def test_a_machine_that_crashes_while_the_host_goes_down_is_not_started_again(service: Service, guests: dict[str, Guest]) -> None:
    restart = RestartPolicy(when="always", backoff_s=0.1)
    await service.create(quiet(guests, "one", autostart_order=1, shutdown_timeout_s=3), start=True)
    view = await service.create(quiet(guests, "two", restart=restart), start=True)
    job = await service.shutdown_host(HostShutdownRequest())
    await until(service, "one", lambda view: view.operation == "host-shutdown")
    assert view.pid is not None
    os.kill(view.pid, 9)
    await job_ended(service, job)
    await asyncio.sleep(restart.backoff_s * 3)
    assert service.machine("two").state is State.CRASHED


async def test_a_qemu_that_answers_nothing_is_killed_only_where_that_was_asked_for(
    service: Service, guests: dict[str, Guest], monkeypatch: pytest.MonkeyPatch
) -> None:
    for limit in ("QUIT_DEADLINE_S", "TERM_DEADLINE_S"):
        monkeypatch.setattr(f"qmpd.power.{limit}", 0.2)
    view = await service.create(quiet(guests, "one", shutdown_timeout_s=0), start=True)
    assert view.pid is not None
    os.kill(view.pid, 19)
    job = await job_ended(service, await service.shutdown_host(HostShutdownRequest()))
    result = msgspec.convert(job.result, HostShutdownView)
    assert result.left == 1
    assert result.machines[0].error is not None
    assert result.machines[0].error.code == "qemu_silent"
    job = await job_ended(service, await service.shutdown_host(HostShutdownRequest(then="kill")))
    assert [(end.method, end.clean) for end in msgspec.convert(job.result, HostShutdownView).machines] == [("sigkill", False)]


async def test_the_end_of_the_host_takes_the_place_of_a_shutdown_that_waits(service: Service, guests: dict[str, Guest]) -> None:
    await service.create(quiet(guests, "one", shutdown_timeout_s=0.1), start=True)
    waiting = await service.shutdown("one", ShutdownRequest(timeout_s=3600))
    job = await job_ended(service, await service.shutdown_host(HostShutdownRequest()))
    assert msgspec.convert(job.result, HostShutdownView).left == 0
    assert (await job_ended(service, waiting)).state == "succeeded"


async def test_a_host_without_machines_goes_down_at_once(service: Service) -> None:
    job = await job_ended(service, await service.shutdown_host(HostShutdownRequest()))
    assert msgspec.convert(job.result, HostShutdownView) == HostShutdownView()
