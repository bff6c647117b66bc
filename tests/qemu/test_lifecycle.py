"""Machines through the service, with real QEMUs and our own guests."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from pathlib import Path

import msgspec
import pytest

from qmpd.access import Caller
from qmpd.daemon import running
from qmpd.errors import (
    AlreadyExists,
    Forbidden,
    Held,
    Invalid,
    LaunchFailed,
    NotFound,
    NotYet,
    QemuRefused,
    QemuSilent,
    RevisionRequired,
    StaleRevision,
    WrongState,
)
from qmpd.lifecycle import State
from qmpd.service import Service
from qmpd.settings import Settings
from qmpd.spec import BlankDisk, Forward, MachineSpec, RestartPolicy, UserNic, VncDisplay
from qmpd.views import ExpectRequest, QmpRequest, SendKeyRequest, ShutdownRequest, StartRequest
from tests.guests.build import Guest
from tests.guests.trace import check_trace
from tests.machines import spec_of

pytestmark = pytest.mark.qemu

#: Generous: the hosts that run this are shared and slow, and only a hang may fail.
PATIENCE_S = 120.0
ANYBODY = Caller(user="somebody")
ADMIN = Caller(user="admin")


def quiet(guests: dict[str, Guest], name: str, **changes: object) -> MachineSpec:
    """A machine that costs nothing once it has said its banner."""
    return spec_of(guests["x86_64-q35-quiet"], name, **changes)


async def test_a_machine_is_created_started_paused_resumed_reset_and_stopped(service: Service, guests: dict[str, Guest]) -> None:
    view = await service.create(quiet(guests, "one"))
    assert (view.state, view.pid, view.machine) == (State.STOPPED, None, "pc-q35-7.2" if "q35-7.2" in view.machine else view.machine)
    view = await service.start("one", StartRequest())
    assert view.state is State.RUNNING
    assert view.pid is not None
    assert (await service.pause("one")).state is State.PAUSED
    assert (await service.resume("one")).state is State.RUNNING
    assert (await service.reset("one")).state is State.RUNNING
    stopped = await service.stop("one")
    assert (stopped.method, stopped.clean, stopped.machine.state) == ("quit", True, State.STOPPED)
    assert stopped.machine.exit is not None
    assert stopped.machine.exit.reason == "host-qmp-quit"


async def test_what_happens_is_told_in_numbered_events(service: Service, guests: dict[str, Guest]) -> None:
    await service.create(quiet(guests, "one"), start=True)
    await service.stop("one")
    page = await service.events_page(0, 100, "one")
    states = [event.data["state"] for event in page.events if event.kind == "machine.state"]
    assert states == ["starting", "running", "stopping", "stopped"]
    assert [event.number for event in page.events] == sorted({event.number for event in page.events})
    assert {"machine.created", "qmp"} <= {event.kind for event in page.events}


async def test_a_machine_can_be_started_paused_and_then_runs_its_first_instruction(service: Service, guests: dict[str, Guest]) -> None:
    view = await service.create(quiet(guests, "one"), start=True, paused=True)
    assert (view.state, view.status, view.console_bytes) == (State.PAUSED, "prelaunch", 0)
    await service.resume("one")
    found = await service.expect("one", ExpectRequest(pattern="BM-OK [a-z0-9_-]+", from_start=True, timeout_s=PATIENCE_S))
    assert found.matched


async def test_two_verbs_at_once_exclude_each_other_and_kill_waits_for_nobody(service: Service, guests: dict[str, Guest]) -> None:
    view = await service.create(quiet(guests, "one"), start=True)
    assert view.pid is not None
    os.kill(view.pid, signal.SIGSTOP)
    stopping = asyncio.create_task(service.stop("one"), name="stopping")
    while service.machine("one").operation is None:
        await asyncio.sleep(0)
    with pytest.raises(Held) as held:
        await service.pause("one")
    assert held.value.details["holder"] == "stop"
    killed = await service.kill("one")
    assert (killed.method, killed.clean) == ("sigkill", False)
    assert (await stopping).machine.state is State.STOPPED


async def test_a_guest_that_ignores_the_power_button_is_left_running(service: Service, guests: dict[str, Guest]) -> None:
    await service.create(quiet(guests, "one"), start=True)
    job = await service.shutdown("one", ShutdownRequest(timeout_s=0.5))
    while (job := await service.job(job.id)).state == "running":
        await asyncio.sleep(0.05)
    assert job.state == "failed"
    assert job.error is not None
    assert job.error["code"] == NotYet.code
    assert service.machine("one").state is State.RUNNING
    job = await service.shutdown("one", ShutdownRequest(timeout_s=0, then="stop"))
    while (job := await service.job(job.id)).state == "running":
        await asyncio.sleep(0.05)
    assert job.result is not None
    assert job.result["method"] == "quit"


async def test_a_shutdown_job_can_be_cancelled(service: Service, guests: dict[str, Guest]) -> None:
    await service.create(quiet(guests, "one"), start=True)
    job = await service.shutdown("one", ShutdownRequest(timeout_s=3600))
    assert (await service.cancel(job.id)).state == "cancelled"
    assert service.machine("one").state is State.RUNNING
    assert service.machine("one").operation is None
    with pytest.raises(WrongState):
        await service.cancel(job.id)


async def test_a_guest_that_powers_off_ends_its_machine_cleanly(service: Service, guests: dict[str, Guest]) -> None:
    await service.create(spec_of(guests["aarch64-virt-poweroff"], "one"), start=True)
    view = await service.wait("one", frozenset({State.STOPPED}), PATIENCE_S)
    assert view.exit is not None
    assert (view.exit.code, view.exit.reason, view.exit.clean) == (0, "guest-shutdown", True)


async def test_a_guest_that_resets_in_a_loop_is_counted_and_costs_few_events(service: Service, guests: dict[str, Guest]) -> None:
    await service.create(spec_of(guests["aarch64-virt-reset"], "one"), start=True)
    async with asyncio.timeout(PATIENCE_S):
        while service.machine("one").resets < 200:
            await asyncio.sleep(0.05)
    events = (await service.events_page(0, 1000, "one")).events
    assert len(events) < service.machine("one").resets
    assert service.machine("one").state is State.RUNNING


async def test_a_crash_of_qemu_is_told_with_its_signal(service: Service, guests: dict[str, Guest]) -> None:
    view = await service.create(quiet(guests, "one"), start=True)
    assert view.pid is not None
    os.kill(view.pid, signal.SIGSEGV)
    view = await service.wait("one", frozenset({State.CRASHED}), PATIENCE_S)
    assert view.exit is not None
    assert (view.exit.signal, view.exit.clean) == ("SIGSEGV", False)
    assert (await service.start("one", StartRequest())).state is State.RUNNING


async def test_a_machine_that_crashes_is_started_again_as_often_as_it_says(service: Service, guests: dict[str, Guest]) -> None:
    spec = quiet(guests, "one", restart=RestartPolicy(when="on-failure", limit=1, backoff_s=0.1))
    view = await service.create(spec, start=True)
    assert view.pid is not None
    os.kill(view.pid, signal.SIGABRT)
    await service.wait("one", frozenset({State.CRASHED}), PATIENCE_S)
    again = await service.wait("one", frozenset({State.RUNNING}), PATIENCE_S)
    assert again.pid not in (None, view.pid)
    assert again.pid is not None
    os.kill(again.pid, signal.SIGABRT)
    await service.wait("one", frozenset({State.CRASHED}), PATIENCE_S)
    with pytest.raises(NotYet):
        await service.wait("one", frozenset({State.RUNNING}), 1.0)


async def test_a_start_that_fails_says_what_qemu_said_and_leaves_nothing(
    service: Service, settings: Settings, guests: dict[str, Guest]
) -> None:
    spec = quiet(guests, "one", devices=({"driver": "virtio-blk-pci"},))
    with pytest.raises(LaunchFailed) as failed:
        await service.create(spec, start=True)
    assert "drive property not set" in failed.value.message
    assert "drive property not set" in str(failed.value.details["stderr"])
    assert service.machine("one").state is State.STOPPED
    assert not (Path(settings.run_dir) / "m" / "one" / "launch.msgpack").exists()


async def test_a_silent_qemu_is_unresponsive_and_recovers(service: Service, guests: dict[str, Guest]) -> None:
    view = await service.create(quiet(guests, "one"), start=True)
    assert view.pid is not None
    os.kill(view.pid, signal.SIGSTOP)
    with pytest.raises(QemuSilent):
        await service.qmp("one", QmpRequest(execute="query-status"), ANYBODY)
    assert service.machine("one").state is State.UNRESPONSIVE
    assert len(service.machines({}, None).machines) == 1
    os.kill(view.pid, signal.SIGCONT)
    assert (await service.wait("one", frozenset({State.RUNNING}), PATIENCE_S)).status == "running"


async def test_a_running_machine_keeps_its_definition_and_its_name(service: Service, guests: dict[str, Guest]) -> None:
    view = await service.create(quiet(guests, "one"), start=True)
    with pytest.raises(WrongState):
        await service.delete("one", None)
    with pytest.raises(WrongState):
        await service.replace("one", quiet(guests, "one"), view.revision)
    with pytest.raises(AlreadyExists):
        await service.create(quiet(guests, "one"))
    with pytest.raises(WrongState):
        await service.start("one", StartRequest())
    with pytest.raises(WrongState) as wrong:
        await service.resume("one")
    assert wrong.value.details["state"] == "running"


async def test_a_definition_is_replaced_only_from_its_current_revision(service: Service, guests: dict[str, Guest]) -> None:
    first = await service.create(quiet(guests, "one"))
    with pytest.raises(RevisionRequired):
        await service.replace("one", quiet(guests, "one"), None)
    second = await service.replace("one", quiet(guests, "one", title="changed"), first.revision)
    assert (second.title, second.uuid) == ("changed", first.uuid)
    assert second.revision > first.revision
    with pytest.raises(StaleRevision):
        await service.replace("one", quiet(guests, "one"), first.revision)
    with pytest.raises(Invalid):
        await service.replace("one", quiet(guests, "two"), second.revision)


async def test_a_deleted_machine_leaves_no_files(service: Service, settings: Settings, guests: dict[str, Guest]) -> None:
    view = await service.create(quiet(guests, "one", disks=(BlankDisk(size_mib=4), BlankDisk(size_mib=1, format="raw"))), start=True)
    own = Path(settings.state_dir) / "machines" / "one"
    assert sorted(path.name for path in own.iterdir()) == ["disk0.qcow2", "disk1.raw", "running.lock", f"serial0.log.{0:020}", "stderr.log"]
    await service.stop("one")
    with pytest.raises(StaleRevision):
        await service.delete("one", view.revision + 1)
    await service.delete("one", view.revision)
    assert not own.exists()
    assert not (Path(settings.run_dir) / "m" / "one").exists()
    with pytest.raises(NotFound):
        service.machine("one")


async def test_every_byte_of_a_console_is_kept_and_viewers_see_the_same(service: Service, guests: dict[str, Guest]) -> None:
    await service.create(spec_of(guests["riscv64-virt"], "one"), start=True)
    console = service.console("one", None)
    seen = b""
    async with asyncio.timeout(PATIENCE_S):
        async for offset, data in console.follow(0):
            assert offset == len(seen)
            seen += data
            if len(seen) > 300:
                break
    assert check_trace(seen).breaks == ()
    assert (await console.read(0, len(seen)))[1] == seen


async def test_typing_reaches_the_guest_and_expect_sees_its_answer(service: Service, guests: dict[str, Guest]) -> None:
    await service.create(spec_of(guests["riscv64-virt-echo"], "one"), start=True)
    assert (await service.expect("one", ExpectRequest(pattern="BM-OK", from_start=True, timeout_s=PATIENCE_S))).matched
    found = await service.expect("one", ExpectRequest(pattern="(HEL)LO", send="hello", timeout_s=PATIENCE_S))
    assert (found.matched, found.groups, found.end) == (True, ("HEL",), (found.start or 0) + 5)
    missed = await service.expect("one", ExpectRequest(pattern="never printed", timeout_s=0.2))
    assert (missed.matched, missed.reason) == (False, "timeout")
    waiting = asyncio.create_task(service.expect("one", ExpectRequest(pattern="never printed", timeout_s=PATIENCE_S)), name="waiting")
    await service.stop("one")
    assert (await waiting).reason == "ended"
    with pytest.raises(Invalid):
        await service.expect("one", ExpectRequest(pattern="(unclosed"))


async def test_only_trusted_users_send_commands_that_change_something(settings: Settings, guests: dict[str, Guest]) -> None:
    async with running(msgspec.structs.replace(settings, qmp_users=("admin",)), {}) as service:
        await service.create(quiet(guests, "one"), start=True)
        try:
            answer = await service.qmp("one", QmpRequest(execute="query-status"), ANYBODY)
            assert isinstance(answer.result, dict)
            with pytest.raises(Forbidden):
                await service.qmp("one", QmpRequest(execute="stop"), ANYBODY)
            with pytest.raises(Forbidden):
                await service.qmp("one", QmpRequest(execute="getfd", arguments={"fdname": "x"}), ADMIN)
            await service.qmp("one", QmpRequest(execute="stop"), ADMIN)
            await service.wait("one", frozenset({State.PAUSED}), PATIENCE_S)
            with pytest.raises(Invalid, match="query-nothing"):
                await service.qmp("one", QmpRequest(execute="query-nothing"), ANYBODY)
            with pytest.raises(Invalid, match="nosuch"):
                await service.qmp("one", QmpRequest(execute="query-status", arguments={"nosuch": 1}), ANYBODY)
            yanks = await service.qmp("one", QmpRequest(execute="query-yank", oob=True), ADMIN)
            assert isinstance(yanks.result, list)
        finally:
            await service.kill("one")


async def test_a_screenshot_is_a_png_and_keys_are_pressed(service: Service, guests: dict[str, Guest]) -> None:
    await service.create(quiet(guests, "one", display=VncDisplay()), start=True)
    assert (await service.screenshot("one")).startswith(b"\x89PNG\r\n")
    await service.send_key("one", SendKeyRequest(keys=("ctrl", "alt", "delete")))
    with pytest.raises(QemuRefused):
        await service.send_key("one", SendKeyRequest(keys=("nokey",)))
    await service.create(quiet(guests, "two"), start=True)
    with pytest.raises(QemuRefused):
        await service.screenshot("two")


async def test_all_machines_live_on_when_the_daemon_ends_and_are_taken_over(settings: Settings, guests: dict[str, Guest]) -> None:
    async with running(settings, {}) as service:
        counting = await service.create(spec_of(guests["riscv64-virt"], "counting"), start=True)
        paused = await service.create(quiet(guests, "halted"), start=True, paused=True)
        gone = await service.create(quiet(guests, "gone"), start=True)
        assert gone.pid is not None
        last = (await service.events_page(0, 1000, None)).last
    os.kill(gone.pid, signal.SIGKILL)
    async with running(settings, {}) as service:
        try:
            await service.wait("counting", frozenset({State.RUNNING}), PATIENCE_S)
            await service.wait("halted", frozenset({State.PAUSED}), PATIENCE_S)
            views = {view.name: view for view in service.machines({}, None).machines}
            assert (views["counting"].state, views["counting"].pid) == (State.RUNNING, counting.pid)
            assert (views["halted"].state, views["halted"].pid) == (State.PAUSED, paused.pid)
            assert views["gone"].state in {State.STOPPED, State.CRASHED}
            assert (await service.events_page(last, 1000, None)).events[0].number == last + 1
            found = await service.expect("counting", ExpectRequest(pattern="(?s).{200}", timeout_s=PATIENCE_S))
            assert found.matched
            console = service.console("counting", None)
            assert check_trace((await console.read(0, 1 << 20))[1]).breaks == ()
            assert (await service.stop("halted")).method == "quit"
        finally:
            for name in ("counting", "halted"):
                await service.kill(name)


async def test_port_forwards_are_part_of_the_command(service: Service, guests: dict[str, Guest]) -> None:
    spec = quiet(guests, "one", nics=(UserNic(forwards=(Forward(guest_port=22),)),))
    command = await service.command(spec)
    assert any('"hostfwd":[{"str":"tcp:127.0.0.1:0-:22"}]' in word for word in command.argv)
    await service.create(spec, start=True)
    answer = await service.qmp("one", QmpRequest(execute="query-rx-filter"), ANYBODY)
    assert answer.result


async def test_the_printed_command_runs_by_hand(service: Service, settings: Settings, guests: dict[str, Guest]) -> None:
    command = await service.command(quiet(guests, "one"))
    assert command.text.count("\\\n") >= 10
    for directory in (f"{settings.run_dir}/m/one", f"{settings.state_dir}/machines/one"):
        await asyncio.to_thread(Path(directory).mkdir, parents=True)
    process = await asyncio.create_subprocess_exec(*command.argv)
    try:
        for monitor in ("qmp", "rescue"):  # QEMU 7.2 may never hear the very first client of one
            if process.returncode is None:
                await _quit(f"{settings.run_dir}/m/one/{monitor}.sock", process)
        assert process.returncode == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def _quit(path: str, process: asyncio.subprocess.Process) -> None:
    """Tells a QEMU to end, and waits for that."""
    _, writer = await _greeted(path, process)
    writer.write(b'{"execute":"qmp_capabilities"}{"execute":"quit"}')
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(PATIENCE_S / 2):
            await process.wait()
    writer.close()


async def _greeted(path: str, process: asyncio.subprocess.Process) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    async with asyncio.timeout(PATIENCE_S):
        while process.returncode is None:
            try:
                reader, writer = await asyncio.open_unix_connection(path)
            except (FileNotFoundError, ConnectionRefusedError):
                await asyncio.sleep(0.02)  # a QEMU started by hand binds its sockets itself
            else:
                assert b"QMP" in await reader.readline()
                return reader, writer
    raise AssertionError("QEMU ended before it listened")
