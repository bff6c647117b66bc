"""Whatever a QEMU does, its machine ends in a state that is true, and nobody waits for ever."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable
from pathlib import Path

import pytest

from qmpd.access import Caller
from qmpd.daemon import running
from qmpd.errors import Busy, Held, Invalid, LaunchFailed, MonitorUnavailable, NotYet, QemuDied, QemuRefused, QemuSilent, WrongState
from qmpd.lifecycle import AT_REST, State
from qmpd.service import Service
from qmpd.settings import Settings
from qmpd.spec import RestartPolicy
from qmpd.views import ExpectRequest, JobView, QmpRequest, ShutdownRequest, StartRequest
from tests.process.standin_qemu import toy, toy_settings, toys

PATIENCE_S = 60.0
ADMIN = Caller(user="admin")
ALWAYS = RestartPolicy(when="always", backoff_s=0.1)


async def process_of(service: Service, name: str = "one") -> int:
    """The pid of a machine that is being launched, as soon as it has one."""
    async with asyncio.timeout(PATIENCE_S):
        while (pid := service.machine(name).pid) is None:
            await asyncio.sleep(0.01)
    return pid


async def connected(service: Service, name: str = "one") -> None:
    """Returns when a verb can reach the process of a machine that is being launched."""
    async with asyncio.timeout(PATIENCE_S):
        while service._registry.get(name)._session is None:
            await asyncio.sleep(0.01)


async def ended(service: Service, job: JobView) -> JobView:
    async with asyncio.timeout(PATIENCE_S):
        while (job := await service.job(job.id)).state == "running":
            await asyncio.sleep(0.02)
    return job


async def within_patience(work: Awaitable[object]) -> object:
    async with asyncio.timeout(PATIENCE_S):
        return await work


async def answers(service: Service) -> bool:
    """Whether the machine has a monitor."""
    try:
        await service.qmp("one", QmpRequest(execute="query-status"), ADMIN)
    except MonitorUnavailable:
        return False
    return True


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


async def states_of(service: Service) -> list[object]:
    return [event.data["state"] for event in (await service.events_page(0, 1000, "one")).events if event.kind == "machine.state"]


async def test_a_machine_that_behaves_is_started_and_stopped(settings: Settings, short_directory: Path) -> None:
    async with toys(settings, short_directory) as service:
        view = await service.create(toy(), start=True)
        assert (view.state, view.emulator_version, view.accel) == (State.RUNNING, "9.8.7", "tcg")
        assert (await service.expect("one", ExpectRequest(pattern="toy booted", from_start=True, timeout_s=PATIENCE_S))).matched
        stopped = await service.stop("one")
        assert (stopped.method, stopped.clean, stopped.machine.operation) == ("quit", True, None)


async def test_what_qemu_says_before_it_dies_is_passed_on_without_its_tricks(settings: Settings, short_directory: Path) -> None:
    async with toys(settings, short_directory, start=("dies",)) as service:
        with pytest.raises(LaunchFailed, match="the guest") as failed:
            await service.create(toy(restart=ALWAYS), start=True)
        assert "\x1b" not in failed.value.message
        assert failed.value.details["exit"] == "status 1"
        assert await states_of(service) == ["starting", "stopped"]


@pytest.mark.parametrize(
    ("habits", "reason"), [({"start": ("hangs up",)}, "monitor ended before QEMU was ready"), ({"refuses": ("cont",)}, "I will not cont")]
)
async def test_a_qemu_that_does_not_become_ready_is_ended(
    settings: Settings, short_directory: Path, habits: dict[str, tuple[str, ...]], reason: str
) -> None:
    async with toys(settings, short_directory, **habits) as service:
        starting = asyncio.create_task(service.create(toy(), start=True), name="starting")
        await asyncio.sleep(0)
        async with asyncio.timeout(PATIENCE_S):
            while "one" not in {view.name for view in service.machines({}, None).machines}:
                await asyncio.sleep(0.01)
        pid = await process_of(service)
        with pytest.raises(LaunchFailed, match=f"was not ready in time and was ended.*{reason}") as failed:
            await within_patience(starting)
        assert failed.value.details["exit"] == "SIGKILL"
        assert gone(pid)
        assert service.machine("one").state is State.STOPPED
        assert not (Path(settings.run_dir) / "m" / "one" / "launch.msgpack").exists()


async def test_a_machine_that_is_killed_while_it_starts_is_stopped_and_stays_so(settings: Settings, short_directory: Path) -> None:
    async with toys(settings, short_directory, start=("mute",)) as service:
        await service.create(toy(restart=ALWAYS))
        starting = asyncio.create_task(service.start("one", StartRequest()), name="starting")
        pid = await process_of(service)
        with pytest.raises(Held):
            await service.stop("one")
        killed = await service.kill("one")
        assert (killed.method, killed.machine.state) == ("sigkill", State.STOPPED)
        with pytest.raises(LaunchFailed):
            await within_patience(starting)
        assert gone(pid)
        with pytest.raises(NotYet):
            await service.wait("one", frozenset({State.STARTING}), 0.5)


async def test_kill_does_not_wait_for_a_process_to_say_so(settings: Settings, short_directory: Path) -> None:
    async with toys(settings, short_directory) as service:
        await service.create(toy())
        starting = asyncio.create_task(service.start("one", StartRequest()), name="starting")
        async with asyncio.timeout(PATIENCE_S):
            while service.machine("one").state is State.STOPPED:
                await asyncio.sleep(0)
        killed = await service.kill("one")
        assert killed.machine.state is State.STOPPED
        with pytest.raises(LaunchFailed):
            await within_patience(starting)
        assert (await service.start("one", StartRequest())).state is State.RUNNING


async def test_a_machine_whose_starter_went_away_can_be_stopped(settings: Settings, short_directory: Path) -> None:
    async with toys(settings, short_directory, start=("mute",)) as service:
        await service.create(toy())
        starting = asyncio.create_task(service.start("one", StartRequest()), name="starting")
        pid = await process_of(service)
        starting.cancel()
        await asyncio.wait([starting])
        assert (service.machine("one").state, service.machine("one").operation) == (State.STARTING, None)
        with pytest.raises(MonitorUnavailable):
            await service.qmp("one", QmpRequest(execute="query-status"), ADMIN)
        stopped = await service.stop("one")
        assert (stopped.method, stopped.machine.state) == ("sigterm", State.STOPPED)
        assert gone(pid)


async def test_a_qemu_that_will_not_quit_is_told_to_by_a_signal(settings: Settings, short_directory: Path) -> None:
    async with toys(settings, short_directory, refuses=("quit",)) as service:
        await service.create(toy(), start=True)
        stopped = await service.stop("one")
        assert (stopped.method, stopped.clean, stopped.machine.state) == ("sigterm", False, State.STOPPED)


async def test_a_qemu_that_obeys_nobody_is_left_until_it_is_killed(settings: Settings, short_directory: Path) -> None:
    async with toys(settings, short_directory, refuses=("quit",), ignores=("SIGTERM",)) as service:
        view = await service.create(toy(), start=True)
        with pytest.raises(QemuSilent, match="only kill is left"):
            await service.stop("one")
        assert service.machine("one").state is State.STOPPING
        assert not gone(view.pid or 0)
        assert (await service.kill("one")).method == "sigkill"


async def test_a_guest_that_obeys_the_power_button_stays_off(settings: Settings, short_directory: Path) -> None:
    async with toys(settings, short_directory, guest=("powers off",)) as service:
        await service.create(toy(restart=ALWAYS), start=True)
        job = await ended(service, await service.shutdown("one", ShutdownRequest()))
        assert job.result is not None
        assert (job.state, job.result["method"], job.result["clean"]) == ("succeeded", "acpi", True)
        with pytest.raises(NotYet):
            await service.wait("one", frozenset({State.RUNNING}), 0.5)


async def test_a_guest_that_powers_off_by_itself_is_started_again_if_its_definition_says_so(
    settings: Settings, short_directory: Path
) -> None:
    async with toys(settings, short_directory) as service:
        first = await service.create(toy(restart=ALWAYS), start=True)
        await service.qmp("one", QmpRequest(execute="x-guest-powers-off"), ADMIN)
        await service.wait("one", frozenset({State.STOPPED}), PATIENCE_S)
        again = await service.wait("one", frozenset({State.RUNNING}), PATIENCE_S)
        assert again.pid not in {None, first.pid}


@pytest.mark.parametrize(("verb", "method", "clean"), [("stop", "quit", True), ("kill", "sigkill", False)])
async def test_a_polite_shutdown_ends_with_what_ended_the_machine(
    settings: Settings, short_directory: Path, verb: str, method: str, clean: bool
) -> None:
    async with toys(settings, short_directory) as service:
        await service.create(toy(), start=True)
        job = await service.shutdown("one", ShutdownRequest(timeout_s=3600))
        async with asyncio.timeout(PATIENCE_S):
            while service.machine("one").operation != "shutdown":
                await asyncio.sleep(0)
        with pytest.raises(Held):
            await service.shutdown("one", ShutdownRequest())
        await (service.stop if verb == "stop" else service.kill)("one")
        job = await ended(service, job)
        assert job.result is not None
        assert (job.state, job.result["method"], job.result["clean"]) == ("succeeded", method, clean)
        assert service.machine("one").operation is None
        assert (await service.start("one", StartRequest())).state is State.RUNNING


async def test_a_polite_shutdown_tells_a_signal_from_an_obedient_guest(settings: Settings, short_directory: Path) -> None:
    async with toys(settings, short_directory) as service:
        view = await service.create(toy(), start=True)
        job = await service.shutdown("one", ShutdownRequest(timeout_s=3600))
        async with asyncio.timeout(PATIENCE_S):
            while service.machine("one").operation != "shutdown":
                await asyncio.sleep(0)
        assert view.pid is not None
        os.kill(view.pid, signal.SIGTERM)
        job = await ended(service, job)
        assert job.result is not None
        assert (job.result["method"], job.result["clean"]) == ("sigterm", False)


@pytest.mark.parametrize(("then", "method"), [("stop", "quit"), ("kill", "sigkill")])
async def test_a_shutdown_that_is_ignored_goes_on_as_the_caller_said(
    settings: Settings, short_directory: Path, then: str, method: str
) -> None:
    async with toys(settings, short_directory) as service:
        await service.create(toy(restart=ALWAYS), start=True)
        job = await ended(service, await service.shutdown("one", ShutdownRequest(timeout_s=0.05, then=then)))  # type: ignore[arg-type]  # one of them
        assert job.result is not None
        assert job.result["method"] == method
        with pytest.raises(NotYet):
            await service.wait("one", frozenset({State.RUNNING}), 0.5)


async def test_a_guest_that_ignored_the_power_button_and_crashes_later_is_started_again(settings: Settings, short_directory: Path) -> None:
    async with toys(settings, short_directory) as service:
        view = await service.create(toy(restart=ALWAYS), start=True)
        job = await ended(service, await service.shutdown("one", ShutdownRequest(timeout_s=0.05)))
        assert (job.error or {})["code"] == "not_yet"
        assert view.pid is not None
        os.kill(view.pid, signal.SIGSEGV)
        await service.wait("one", frozenset({State.CRASHED}), PATIENCE_S)
        await service.wait("one", frozenset({State.RUNNING}), PATIENCE_S)


async def test_a_monitor_that_is_lost_is_found_again(settings: Settings, short_directory: Path) -> None:
    async with toys(settings, short_directory) as service:
        view = await service.create(toy(), start=True)
        with pytest.raises(QemuDied):
            await service.qmp("one", QmpRequest(execute="x-hang-up"), ADMIN)
        with pytest.raises(MonitorUnavailable):
            await service.qmp("one", QmpRequest(execute="query-status"), ADMIN)
        async with asyncio.timeout(PATIENCE_S):
            while not await answers(service):
                await asyncio.sleep(0.1)
        assert (service.machine("one").state, service.machine("one").pid) == (State.RUNNING, view.pid)
        assert set(await states_of(service)) <= {"starting", "running", "unreachable"}


async def test_a_machine_that_does_not_answer_a_new_daemon_is_known_and_answers_later(settings: Settings, short_directory: Path) -> None:
    async with running(toy_settings(settings, short_directory), {}) as service:
        pid = (await service.create(toy(), start=True)).pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    async with running(toy_settings(settings, short_directory), {}) as service:
        try:
            assert service.machine("one").state in {State.UNREACHABLE, State.UNRESPONSIVE}
            with pytest.raises(WrongState):
                await service.start("one", StartRequest())
            await service.wait("one", frozenset({State.UNRESPONSIVE}), PATIENCE_S)
            os.kill(pid, signal.SIGCONT)
            assert (await service.wait("one", frozenset({State.RUNNING}), PATIENCE_S)).pid == pid
        finally:
            await service.kill("one")


async def test_a_machine_whose_monitor_is_gone_can_still_be_ended(settings: Settings, short_directory: Path) -> None:
    async with running(toy_settings(settings, short_directory), {}) as service:
        pid = (await service.create(toy(), start=True)).pid
    (Path(settings.run_dir) / "m" / "one" / "qmp.sock").unlink()
    async with running(toy_settings(settings, short_directory), {}) as service:
        view = await service.wait("one", frozenset({State.UNREACHABLE}), PATIENCE_S)
        assert view.pid == pid
        with pytest.raises(MonitorUnavailable):
            await service.qmp("one", QmpRequest(execute="query-status"), ADMIN)
        stopped = await service.stop("one")
        assert (stopped.method, stopped.machine.state) == ("sigterm", State.STOPPED)
        assert gone(pid or 0)


async def test_an_ending_is_told_even_if_nobody_can_read_what_qemu_said(settings: Settings, short_directory: Path) -> None:
    async with toys(settings, short_directory) as service:
        await service.create(toy(), start=True)
        said = Path(settings.state_dir) / "machines" / "one" / "stderr.log"
        said.unlink()
        said.mkdir()
        stopped = await service.stop("one")
        assert stopped.machine.exit is not None
        assert (stopped.clean, stopped.machine.exit.stderr_tail) == (True, "")


async def test_what_qemu_refuses_is_the_callers_mistake_only_where_it_is(settings: Settings, short_directory: Path) -> None:
    async with toys(settings, short_directory, refuses=("device_del",), lacks=("query-nothing",)) as service:
        await service.create(toy(), start=True)
        with pytest.raises(QemuRefused, match="I will not device_del"):
            await service.qmp("one", QmpRequest(execute="device_del"), ADMIN)
        with pytest.raises(Invalid, match=r"\$\.execute: The command query-nothing has not been found"):
            await service.qmp("one", QmpRequest(execute="query-nothing"), ADMIN)


async def test_more_callers_than_a_monitor_takes_change_nothing_about_the_machine(settings: Settings, short_directory: Path) -> None:
    async with toys(settings, short_directory) as service:
        await service.create(toy(), start=True)

        async def ask() -> object:
            return await service.qmp("one", QmpRequest(execute="query-status"), ADMIN)

        for command, state in (("stop", State.PAUSED), ("cont", State.RUNNING)) * 3:
            asking = [service.qmp("one", QmpRequest(execute=command), ADMIN), *(ask() for _ in range(200))]
            outcomes = await asyncio.gather(*asking, return_exceptions=True)
            assert any(isinstance(outcome, Busy) for outcome in outcomes)
            assert not [outcome for outcome in outcomes if isinstance(outcome, BaseException) and not isinstance(outcome, Busy)]
            await service.wait("one", frozenset({state}), PATIENCE_S)


async def test_verbs_need_the_state_they_are_for(settings: Settings, short_directory: Path) -> None:
    async with toys(settings, short_directory) as service:
        await service.create(toy())
        for verb in (service.pause, service.resume, service.reset):
            with pytest.raises(WrongState) as wrong:
                await verb("one")
            assert wrong.value.details["state"] == "stopped"
        with pytest.raises(WrongState, match="it has no process"):
            await service.qmp("one", QmpRequest(execute="query-status"), ADMIN)
        for ending in (await service.stop("one"), await service.kill("one")):
            assert (ending.method, ending.clean) == ("already-stopped", True)
        await service.start("one", StartRequest(paused=True))
        with pytest.raises(WrongState):
            await service.shutdown("one", ShutdownRequest())
        assert (await service.reset("one")).state is State.PAUSED
        async with asyncio.timeout(PATIENCE_S):
            while service.machine("one").resets == 0:
                await asyncio.sleep(0.01)
        assert service.machine("one").state not in AT_REST
