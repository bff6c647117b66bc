"""Machines with a TPM: a real swtpm beside a real QEMU, and a guest that uses it."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from qmpd import tpm
from qmpd.daemon import running
from qmpd.errors import HostError, Invalid, LaunchFailed
from qmpd.failpoint import VARIABLE, arm
from qmpd.hostprocess import is_alive
from qmpd.lifecycle import AT_REST, State
from qmpd.plan import TpmEmulator, TpmLine
from qmpd.process import Identity
from qmpd.record import read_record, write_record
from qmpd.service import Service
from qmpd.settings import Settings
from qmpd.spec import MachineSpec, Tpm
from qmpd.views import Event, ExpectRequest, StartRequest
from qmpd_api.client import Client, DaemonUnavailable
from scripts.lib.restartable import restartable
from tests.conftest import CACHE
from tests.guests.build import Guest
from tests.guests.tpmtrace import MEASURED, WORKS, said, tpms_below
from tests.machines import spec_of
from tests.unavailable import tool

pytestmark = pytest.mark.qemu

NAME = "one"
#: Means that something hangs.
HUNG_S = 60.0
LOOK_S = 0.02


@pytest.fixture
def machine(guests: dict[str, Guest]) -> MachineSpec:
    """A machine whose guest reads its TPM again and again."""
    tool("swtpm", "swtpm")
    return spec_of(guests["x86_64-q35-tpm"], NAME, tpm=Tpm())


@contextmanager
def armed(failpoint: str) -> Iterator[None]:
    arm(failpoint)
    try:
        yield
    finally:
        arm("")


def swtpm_of(settings: Settings) -> Identity:
    """The TPM's process, as it was recorded."""
    found = read_record(f"{settings.run_dir}/m/{NAME}").tpm
    assert found is not None
    return found


def state_of(settings: Settings) -> Path:
    return Path(settings.state_dir) / "machines" / NAME / "tpm"


async def gone(identity: Identity) -> None:
    async with asyncio.timeout(HUNG_S):
        while await asyncio.to_thread(is_alive, identity):
            await asyncio.sleep(LOOK_S)


async def heard(service: Service, kind: str) -> Event:
    async with asyncio.timeout(HUNG_S):
        while True:
            found = [event for event in (await service.events_page(0, 1000, NAME)).events if event.kind == kind]
            if found:
                return found[0]
            await asyncio.sleep(LOOK_S)


async def test_a_guest_uses_its_tpm_whose_state_outlives_a_stop_and_goes_with_the_machine(
    service: Service, settings: Settings, machine: MachineSpec
) -> None:
    await service.create(machine)
    state = state_of(settings)
    assert list(state.iterdir()) == []
    await service.start(NAME, StartRequest())
    first, swtpm = await said(service, NAME), swtpm_of(settings)
    assert (first.code, first.register) == (WORKS, MEASURED)
    assert (state.stat().st_mode & 0o777, (state / "tpm2-00.permall").stat().st_mode & 0o777) == (0o700, 0o600)
    stopped = await service.stop(NAME)
    assert stopped.machine.state is State.STOPPED
    assert not is_alive(swtpm)
    await service.start(NAME, StartRequest())
    second = await said(service, NAME)
    assert (second.code, second.register) == (WORKS, MEASURED)  # it was cleared, or it would have been extended twice
    assert second.resets > first.resets  # the TPM counts them for ever
    swtpm = swtpm_of(settings)
    await service.kill(NAME)
    assert not is_alive(swtpm)
    await service.delete(NAME, None)
    assert not state.exists()


async def test_a_reset_of_the_guest_resets_its_tpm(service: Service, machine: MachineSpec) -> None:
    await service.create(machine, start=True)
    first = await said(service, NAME)
    await service.reset(NAME)
    async with asyncio.timeout(HUNG_S):
        while (second := await said(service, NAME)).resets == first.resets:
            await asyncio.sleep(LOOK_S)
    assert (second.code, second.register) == (WORKS, MEASURED)


async def test_a_guest_whose_swtpm_died_goes_on_and_that_is_said(service: Service, settings: Settings, machine: MachineSpec) -> None:
    await service.create(machine, start=True)
    await said(service, NAME)
    os.kill(swtpm_of(settings).pid, signal.SIGKILL)
    event = await heard(service, "machine.tpm-lost")
    assert event.data["reason"] == service.machine(NAME).tpm_lost == "swtpm ended with SIGKILL"
    async with asyncio.timeout(HUNG_S):
        while (await said(service, NAME)).code == WORKS:
            await asyncio.sleep(LOOK_S)
    assert service.machine(NAME).state is State.RUNNING
    await service.stop(NAME)
    await service.start(NAME, StartRequest())
    assert (await said(service, NAME)).code == WORKS
    assert service.machine(NAME).tpm_lost is None


async def test_a_qemu_that_is_found_without_its_record_is_found_with_its_tpm(settings: Settings, machine: MachineSpec) -> None:
    async with running(settings, {}) as service:
        await service.create(machine, start=True)
        first, swtpm = await said(service, NAME), swtpm_of(settings)
    (Path(settings.run_dir) / "m" / NAME / "launch.msgpack").unlink()
    async with running(settings, {}) as service:
        await service.wait(NAME, frozenset({State.RUNNING}), HUNG_S)
        assert await said(service, NAME) == first
        assert (swtpm_of(settings), service.machine(NAME).tpm_lost) == (swtpm, None)
        await service.kill(NAME)
        assert not is_alive(swtpm)


async def test_a_tpm_outlives_the_daemon_and_ends_with_its_qemu(settings: Settings, machine: MachineSpec) -> None:
    async with running(settings, {}) as service:
        await service.create(machine, start=True)
        first, swtpm = await said(service, NAME), swtpm_of(settings)
    assert is_alive(swtpm)
    async with running(settings, {}) as service:
        assert await said(service, NAME) == first
        pid = service.machine(NAME).pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        await service.wait(NAME, AT_REST, HUNG_S)
        assert not is_alive(swtpm)
        assert "machine.tpm-lost" not in {event.kind for event in (await service.events_page(0, 1000, NAME)).events}


async def test_a_daemon_hears_that_a_tpm_died_while_none_ran(settings: Settings, machine: MachineSpec) -> None:
    async with running(settings, {}) as service:
        await service.create(machine, start=True)
        await said(service, NAME)
        swtpm = swtpm_of(settings)
    os.kill(swtpm.pid, signal.SIGKILL)
    await asyncio.to_thread(os.waitpid, swtpm.pid, 0)  # nobody else reaps it: it is this process's child
    async with running(settings, {}) as service:
        assert "while nobody looked" in str((await heard(service, "machine.tpm-lost")).data["reason"])
        await service.wait(NAME, frozenset({State.RUNNING}), HUNG_S)
        await service.kill(NAME)


async def test_what_is_left_of_a_qemu_that_never_opened_its_tpm_is_ended_by_the_next_daemon(
    settings: Settings, machine: MachineSpec
) -> None:
    """swtpm waits for ever for a QEMU that ended before: a daemon that was killed at that moment leaves it, and its record."""
    async with running(settings, {}) as service:
        await service.create(machine, start=True)
        record = read_record(f"{settings.run_dir}/m/{NAME}")
        await service.kill(NAME)
    with tpm.gated(_plan(settings)) as companion:
        assert companion.gate is not None
        os.write(companion.gate.pipe, b"go\n")
        left = companion.gate.identity
    await asyncio.sleep(0)
    assert is_alive(left)
    write_record(record.run_dir, msgspec.structs.replace(record, tpm=left))
    async with running(settings, {}) as service:
        await gone(left)
        assert (await service.start(NAME, StartRequest())).state is State.RUNNING
        await service.kill(NAME)


def _plan(settings: Settings) -> TpmEmulator:
    line = TpmLine(id="tpm0-control", path=f"{settings.run_dir}/m/{NAME}/tpm.sock")
    state = state_of(settings)
    return TpmEmulator(program=shutil.which("swtpm") or "", directory=str(state), log=f"{state.parent}/tpm.log", line=line)


@pytest.mark.parametrize("point", ["gate-go", "tpm-go"])
async def test_a_launch_in_which_one_of_both_never_ran_leaves_nothing(
    service: Service, settings: Settings, machine: MachineSpec, point: str
) -> None:
    await service.create(machine)
    with armed(f"{point}:error"), pytest.raises(LaunchFailed):
        await service.start(NAME, StartRequest())
    assert service.machine(NAME).state in AT_REST
    with pytest.raises(FileNotFoundError):
        read_record(f"{settings.run_dir}/m/{NAME}")
    assert tpms_below(state_of(settings).parent) == []
    assert (await service.start(NAME, StartRequest())).state is State.RUNNING


async def test_a_launch_that_fails_in_qemu_ends_the_tpm(service: Service, settings: Settings, machine: MachineSpec) -> None:
    await service.create(msgspec.structs.replace(machine, machine_options={"no-such": True}))
    with pytest.raises(LaunchFailed, match="QEMU ended with status 1") as failed:
        await service.start(NAME, StartRequest())
    assert "no-such" in str(failed.value)
    assert tpms_below(state_of(settings).parent) == []


async def test_a_tpm_that_does_not_start_says_why(service: Service, settings: Settings, machine: MachineSpec) -> None:
    await service.create(machine)
    (state_of(settings) / "tpm2-00.permall").write_bytes(b"this is no state of a TPM")
    with pytest.raises(LaunchFailed, match=r"CMD_INIT.* \(swtpm said .*\)"):
        await service.start(NAME, StartRequest())
    assert tpms_below(state_of(settings).parent) == []


async def test_a_swtpm_that_cannot_run_says_why(
    service: Service, settings: Settings, machine: MachineSpec, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = tmp_path / "swtpm"
    broken.write_text("#!/bin/sh\necho this one is broken >&2\nexit 3\n")
    broken.chmod(0o755)
    await service.create(machine)
    with monkeypatch.context() as here:
        here.setattr(tpm, "ENVIRONMENT", {"PATH": str(tmp_path)})
        with pytest.raises(LaunchFailed, match=r"swtpm ended with status 3 .* this one is broken"):
            await service.start(NAME, StartRequest())
    assert (await service.start(NAME, StartRequest())).state is State.RUNNING


async def test_a_state_that_is_gone_is_not_taken_for_a_new_one(service: Service, settings: Settings, machine: MachineSpec) -> None:
    await service.create(machine)
    state_of(settings).rmdir()
    with pytest.raises(HostError, match="tpm is gone: restore it"):
        await service.start(NAME, StartRequest())


async def test_a_host_without_swtpm_and_a_board_without_tpm_say_so(
    service: Service, machine: MachineSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Invalid) as refused:
        await service.create(MachineSpec(name="two", board="sparc-ss5", tpm=Tpm()))
    assert [(problem.path, problem.message) for problem in refused.value.problems] == [
        ("$.tpm", "no TPM can be attached to board 'sparc-ss5'")
    ]
    monkeypatch.setattr(tpm, "ENVIRONMENT", {"PATH": "/nowhere"})
    with pytest.raises(Invalid, match="package swtpm"):
        await service.create(machine)


@pytest.mark.parametrize(
    "failpoint", ["gate-spawn:kill@1", "gate-spawn:kill@2", "record-named:kill", "gate-go:kill", "tpm-go:kill", "gate-gone:kill"]
)
async def test_a_daemon_that_is_killed_at_a_start_leaves_a_machine_with_its_tpm_or_nothing(machine: MachineSpec, failpoint: str) -> None:
    async with restartable(CACHE, {}, prefix="qs-") as daemon:
        daemon.start(**{VARIABLE: failpoint})
        await asyncio.to_thread(daemon.wait_answer)
        async with Client(daemon.socket) as client:
            await client.create(machine)
            with pytest.raises(DaemonUnavailable):
                await client.start(NAME)
        assert daemon.process is not None
        assert await asyncio.to_thread(daemon.process.wait, HUNG_S) == -signal.SIGKILL
        daemon.start(**{VARIABLE: ""})
        await asyncio.to_thread(daemon.wait_answer)
        state = daemon.state_dir / "machines" / NAME
        async with Client(daemon.socket) as client:
            async with asyncio.timeout(HUNG_S):
                while (view := await client.machine(NAME)).state not in AT_REST | {State.RUNNING}:
                    await asyncio.sleep(LOOK_S)
                while len(await asyncio.to_thread(tpms_below, state)) != (view.state is State.RUNNING):
                    await asyncio.sleep(LOOK_S)
            assert len(await asyncio.to_thread(daemon.qemus)) == (view.state is State.RUNNING)
            if view.state is not State.RUNNING:
                await client.start(NAME)
            assert (await said(client, NAME)).code == WORKS
            await client.kill(NAME)
        assert await asyncio.to_thread(tpms_below, state) == []


async def test_a_definition_gets_and_loses_a_tpm_whose_state_is_kept(service: Service, settings: Settings, machine: MachineSpec) -> None:
    view = await service.create(msgspec.structs.replace(machine, tpm=None), start=True)
    assert (await service.expect(NAME, ExpectRequest(pattern="TPM none", from_start=True, timeout_s=HUNG_S))).matched
    await service.stop(NAME)
    view = await service.replace(NAME, machine, view.revision)
    await service.start(NAME, StartRequest())
    first = await said(service, NAME)
    await service.stop(NAME)
    view = await service.replace(NAME, msgspec.structs.replace(machine, tpm=None), view.revision)
    assert state_of(settings).is_dir()
    await service.replace(NAME, machine, view.revision)
    await service.start(NAME, StartRequest())
    assert (await said(service, NAME)).resets > first.resets


async def test_the_printed_command_runs_by_hand(service: Service, settings: Settings, machine: MachineSpec) -> None:
    await service.create(machine)
    command = await service.command(machine)
    run = Path(settings.run_dir) / "m" / NAME
    run.mkdir(parents=True)
    words = command.text.rstrip() + " -monitor stdio"
    process = await asyncio.create_subprocess_shell(words, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE)
    answer, _ = await asyncio.wait_for(process.communicate(b"info tpm\nquit\n"), HUNG_S)
    assert b"tpm-crb" in answer
    async with asyncio.timeout(HUNG_S):
        while _listens(run / "tpm.sock"):
            await asyncio.sleep(LOOK_S)


def _listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as peer:
        return peer.connect_ex(str(path)) == 0
