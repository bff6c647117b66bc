"""A machine never runs twice, and is never destroyed because a daemon lost sight of it."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
from pathlib import Path

import msgspec
import pytest

from qmpd.daemon import running
from qmpd.errors import Held, HostError, Invalid, MonitorUnavailable, WrongState
from qmpd.lifecycle import State
from qmpd.record import LaunchRecord, read_record, write_record
from qmpd.runlock import taken
from qmpd.service import Service
from qmpd.settings import Settings
from qmpd.spec import BlankDisk, MachineSpec
from qmpd.views import StartRequest
from tests.guests.build import Guest
from tests.machines import spec_of

pytestmark = pytest.mark.qemu
PATIENCE_S = 120.0
LOOK_S = 0.02


def quiet(guests: dict[str, Guest], **changes: object) -> MachineSpec:
    return spec_of(guests["x86_64-q35-quiet"], "one", **changes)


async def started(settings: Settings, spec: MachineSpec, *, paused: bool = False) -> int:
    """Starts a machine under a daemon that then ends; the pid that lives on."""
    async with running(settings, {}) as service:
        view = await service.create(spec, start=True, paused=paused)
        assert view.pid is not None
        return view.pid


async def untouchable(service: Service, pid: int) -> None:
    """What holds for a machine whose QEMU is alive and cannot be reached."""
    async with asyncio.timeout(PATIENCE_S):
        while (view := service.machine("one")).trouble is None:  # the daemon answers before it has asked every QEMU
            await asyncio.sleep(LOOK_S)
    assert (view.state, view.pid) == (State.UNREACHABLE, pid)
    assert "no monitor" in view.trouble.reason
    with pytest.raises(WrongState):
        await service.start("one", StartRequest())
    with pytest.raises(WrongState):
        await service.delete("one", None)
    with pytest.raises(MonitorUnavailable):
        await service.screenshot("one")
    os.kill(pid, 0)
    os.kill(pid, signal.SIGKILL)
    view = await service.wait("one", frozenset({State.CRASHED}), PATIENCE_S)
    assert view.pid is None
    await service.delete("one", None)


async def test_a_wiped_run_directory_starts_nothing_twice(settings: Settings, guests: dict[str, Guest]) -> None:
    pid = await started(settings, quiet(guests))
    shutil.rmtree(settings.run_dir)
    async with running(settings, {}) as service:
        await untouchable(service, pid)


async def test_a_daemon_with_another_run_directory_finds_its_machines(settings: Settings, guests: dict[str, Guest]) -> None:
    pid = await started(settings, quiet(guests))
    async with running(msgspec.structs.replace(settings, run_dir=f"{settings.run_dir}2"), {}) as service:
        view = await service.wait("one", frozenset({State.RUNNING}), PATIENCE_S)
        assert view.pid == pid
        assert (await service.stop("one")).method == "quit"


@pytest.mark.parametrize("damage", [b"", b"\xc1 not a record", b"\x91" * 100_000, None], ids=["empty", "garbage", "deep", "gone"])
async def test_a_machine_is_taken_over_without_a_launch_record(settings: Settings, guests: dict[str, Guest], damage: bytes | None) -> None:
    pid = await started(settings, quiet(guests))
    record = Path(settings.run_dir) / "m" / "one" / "launch.msgpack"
    if damage is None:
        record.unlink()
    else:
        record.write_bytes(damage)
    async with running(settings, {}) as service:
        view = await service.wait("one", frozenset({State.RUNNING}), PATIENCE_S)
        assert (view.pid, view.trouble) == (pid, None)
        assert service.console("one", 0).attached
    assert read_record(str(record.parent)).identity.pid == pid
    if damage is not None:
        assert (record.parent / "launch.msgpack.damaged").read_bytes() == damage
    async with running(settings, {}) as service:
        await service.wait("one", frozenset({State.RUNNING}), PATIENCE_S)
        assert (await service.stop("one")).method == "quit"


async def test_a_process_without_any_record_keeps_its_machine_from_being_started(
    service: Service, settings: Settings, guests: dict[str, Guest]
) -> None:
    await service.create(quiet(guests))
    directory = Path(settings.state_dir) / "machines" / "one"
    directory.mkdir(parents=True, exist_ok=True)
    with taken(str(directory)):
        with pytest.raises(Held):
            await service.start("one", StartRequest())
        with pytest.raises(Held):
            await service.delete("one", None)
    assert (await service.start("one", StartRequest())).state is State.RUNNING


async def test_a_lost_database_loses_no_machine(settings: Settings, guests: dict[str, Guest]) -> None:
    pid = await started(settings, quiet(guests))
    for name in ("qmpd.db", "qmpd.db-wal"):
        (Path(settings.state_dir) / name).unlink(missing_ok=True)
    async with running(settings, {}) as service:
        view = await service.wait("one", frozenset({State.RUNNING}), PATIENCE_S)
        assert view.pid == pid
        assert (await service.stop("one")).method == "quit"


async def test_a_guest_that_was_launched_to_run_is_set_going(settings: Settings, guests: dict[str, Guest]) -> None:
    await started(settings, quiet(guests), paused=True)
    directory = f"{settings.run_dir}/m/one"
    record: LaunchRecord = read_record(directory)
    write_record(directory, msgspec.structs.replace(record, paused=False))
    async with running(settings, {}) as service:
        assert (await service.wait("one", frozenset({State.RUNNING}), PATIENCE_S)).status == "running"
        await service.kill("one")


async def test_how_a_machine_ended_is_known_to_the_next_daemon(settings: Settings, guests: dict[str, Guest]) -> None:
    async with running(settings, {}) as service:
        view = await service.create(quiet(guests), start=True)
        assert view.pid is not None
        os.kill(view.pid, signal.SIGSEGV)
        await service.wait("one", frozenset({State.CRASHED}), PATIENCE_S)
    async with running(settings, {}) as service:
        ending = service.machine("one").exit
        assert ending is not None
        assert ending.signal == "SIGSEGV"


async def test_a_disk_that_is_gone_is_not_replaced_by_an_empty_one(service: Service, settings: Settings, guests: dict[str, Guest]) -> None:
    await service.create(quiet(guests, disks=(BlankDisk(size_mib=1),)))
    disk = Path(settings.state_dir) / "machines" / "one" / "disk0.qcow2"
    disk.unlink()
    with pytest.raises(HostError, match=r"disk0\.qcow2 is gone"):
        await service.start("one", StartRequest())
    assert not disk.exists()
    assert service.machine("one").state is State.STOPPED


async def test_a_replacement_keeps_the_disks_that_were_made(service: Service, guests: dict[str, Guest]) -> None:
    root, data = BlankDisk(size_mib=1, serial="root"), BlankDisk(size_mib=2, serial="data")
    view = await service.create(quiet(guests, disks=(root, data)))
    for disks in ((data,), (data, root), (root,), (root, BlankDisk(size_mib=3))):
        with pytest.raises(Invalid):
            await service.replace("one", quiet(guests, disks=disks), view.revision)
    changed = await service.replace("one", quiet(guests, disks=(root, data, BlankDisk(size_mib=1))), view.revision)
    assert changed.revision > view.revision


async def test_a_monitor_that_serves_somebody_else_is_replaced_by_the_other(settings: Settings, guests: dict[str, Guest]) -> None:
    pid = await started(settings, quiet(guests))
    with socket.socket(socket.AF_UNIX) as somebody:
        somebody.connect(f"{settings.run_dir}/m/one/qmp.sock")
        assert await asyncio.to_thread(somebody.recv, 1) == b"{"  # greeted: QEMU serves one client at a time
        async with running(settings, {}) as service:
            view = await service.wait("one", frozenset({State.RUNNING}), PATIENCE_S)
            assert view.pid == pid
            assert (await service.stop("one")).method == "quit"
