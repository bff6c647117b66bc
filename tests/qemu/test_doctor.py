"""A doctor who looks at real machines, real files and real processes."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sqlite3
from pathlib import Path

import msgspec
import pytest

from qmpd.access import Caller
from qmpd.daemon import running
from qmpd.errors import QemuSilent
from qmpd.facts import FileFacts
from qmpd.lifecycle import State
from qmpd.service import Service
from qmpd.settings import Settings
from qmpd.spec import BlankDisk, ImageDisk, MachineSpec
from qmpd.views import DoctorFinding, DoctorReport, QmpRequest, StartRequest
from tests.conftest import end_machines
from tests.guests.build import Guest
from tests.machines import spec_of
from tests.newer_qemu import skip_with_start_script
from tests.unit.test_doctor_looking import blocked, fifo

pytestmark = pytest.mark.qemu

#: Generous: the hosts that run this are shared and slow, and only a hang may fail.
PATIENCE_S = 120.0


def quiet(guests: dict[str, Guest], name: str = "one", **changes: object) -> MachineSpec:
    return spec_of(guests["x86_64-q35-quiet"], name, **changes)


def about(report: DoctorReport, *words: str) -> list[DoctorFinding]:
    """The findings that have all of these in them, but for what is the host's own trouble."""
    return [finding for finding in report.findings if all(word in f"{finding.where}: {finding.what}" for word in words)]


def of_machines(report: DoctorReport) -> list[DoctorFinding]:
    return about(report, "machine ")


async def test_machines_that_are_well_are_not_mentioned(service: Service, guests: dict[str, Guest]) -> None:
    await service.create(quiet(guests, disks=(BlankDisk(size_mib=1),)), start=True)
    await service.create(quiet(guests, "two"))
    report = await service.upkeep.doctor()
    assert report.machines == 2
    assert of_machines(report) == []
    assert about(report, "database") == []
    assert about(report, "no machine has this directory") == []


async def test_a_silent_machine_is_found_and_holds_nobody_up(service: Service, guests: dict[str, Guest]) -> None:
    await service.create(quiet(guests), start=True)
    pid = service.machine("one").pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    try:
        with pytest.raises(QemuSilent):
            await service.qmp("one", QmpRequest(execute="query-status"), Caller(user="somebody"))
        assert (await service.wait("one", frozenset({State.UNRESPONSIVE}), PATIENCE_S)).state is State.UNRESPONSIVE
        report = await service.upkeep.doctor()
    finally:
        os.kill(pid, signal.SIGCONT)
    (finding,) = of_machines(report)
    assert (finding.severity, finding.where) == ("fail", "machine one")
    assert "does not answer its monitor" in finding.what
    assert not report.ok


async def test_a_machine_that_crashes_again_and_again_is_found(service: Service, guests: dict[str, Guest]) -> None:
    await service.create(quiet(guests), start=True)
    for crash in range(1, 4):
        pid = service.machine("one").pid
        assert pid is not None
        os.kill(pid, signal.SIGSEGV)
        await service.wait("one", frozenset({State.CRASHED}), PATIENCE_S)
        (finding,) = of_machines(await service.upkeep.doctor())
        assert "crashed" in finding.what
        assert "SIGSEGV" in finding.what
        often = crash == 3
        assert (finding.severity, "3 times within an hour" in finding.what) == ("fail" if often else "warn", often)
        if not often:
            await service.start("one", StartRequest())


async def test_files_that_are_gone_are_found(service: Service, guests: dict[str, Guest], settings: Settings, tmp_path: Path) -> None:
    image = tmp_path / "image.raw"
    image.write_bytes(bytes(1 << 20))
    disks = (ImageDisk(path=str(image), format="raw"), BlankDisk(size_mib=1))
    await service.create(quiet(guests, disks=disks), start=True)
    await service.stop("one")
    image.unlink()
    own = Path(settings.state_dir) / "machines" / "one" / "disk1.qcow2"
    own.unlink()
    findings = of_machines(await service.upkeep.doctor())
    assert {(finding.severity, finding.where, finding.what) for finding in findings} == {
        ("fail", f"machine one, disk {image}", "it is not there"),
        ("fail", f"machine one, disk {own}", "it is not there"),
    }


async def test_a_replaced_emulator_is_an_upgrade_that_is_pending(
    settings: Settings, guests: dict[str, Guest], short_directory: Path
) -> None:
    skip_with_start_script()
    emulator = short_directory / "qemu-system-arm"  # that of x86 has modules, which it finds beside itself only
    await asyncio.to_thread(shutil.copy, shutil.which(emulator.name) or "", emulator)
    changed = msgspec.structs.replace(settings, emulators=(str(emulator),))
    async with running(changed, {}) as service:
        await service.create(spec_of(guests["arm-virt"], "one", emulator=str(emulator)), start=True)
        assert of_machines(await service.upkeep.doctor()) == []
        newer = short_directory / "newer"
        newer.write_bytes(b"#!/bin/false\n")
        newer.rename(emulator)
        (finding,) = of_machines(await service.upkeep.doctor())
        assert finding.severity == "note"
        assert "an upgrade is pending" in finding.what
        await end_machines(service)


async def test_what_belongs_to_nobody_is_listed_and_left_alone(service: Service, settings: Settings) -> None:
    left = [Path(settings.state_dir) / "machines" / "gone", Path(settings.run_dir) / "m" / "gone"]
    for directory in left:
        directory.mkdir(parents=True)
        (directory / "file").touch()
    words = ("-M", "none", "-display", "none", "-qmp", f"unix:{settings.run_dir}/foreign.sock,server=on,wait=off")
    null = asyncio.subprocess.DEVNULL
    foreign = await asyncio.create_subprocess_exec("qemu-system-x86_64", *words, stdin=null, stdout=null, stderr=null)
    try:
        async with asyncio.timeout(PATIENCE_S):
            while not about(await service.upkeep.doctor(), f"process {foreign.pid}"):
                await asyncio.sleep(0.05)
        report = await service.upkeep.doctor()
        assert foreign.returncode is None
    finally:
        foreign.kill()
        await foreign.wait()
    (finding,) = about(report, f"process {foreign.pid}")
    assert (finding.severity, settings.run_dir in finding.what) == ("warn", True)
    assert {finding.where for finding in about(report, "no machine has this directory")} == {str(path) for path in left}
    assert all((directory / "file").exists() for directory in left)
    assert about(await service.upkeep.doctor(), f"process {foreign.pid}") == []


async def test_a_definition_that_is_damaged_is_found(settings: Settings, guests: dict[str, Guest]) -> None:
    async with running(settings, {}) as service:
        await service.create(quiet(guests))
    database = sqlite3.connect(f"{settings.state_dir}/qmpd.db")
    assert database.execute("UPDATE record SET value = x'c1' WHERE key = 'machine/one'").rowcount == 1
    database.commit()
    database.close()
    async with running(settings, {}) as service:
        (finding,) = about(await service.upkeep.doctor(), "damaged")
        assert (finding.severity, finding.where) == ("fail", f"{settings.state_dir}/machines/one")


async def test_a_machine_whose_board_is_gone_is_found(settings: Settings, guests: dict[str, Guest], short_directory: Path) -> None:
    boards = short_directory / "boards"
    boards.mkdir()
    shipped = Path(__file__).parents[2] / "machines" / "x86_64-q35.toml"
    (boards / "my-board.toml").write_text(shipped.read_text())
    changed = msgspec.structs.replace(settings, boards=(str(boards),))
    async with running(changed, {}) as service:
        await service.create(quiet(guests, board="my-board"))
    (boards / "my-board.toml").unlink()
    async with running(changed, {}) as service:
        (finding,) = of_machines(await service.upkeep.doctor())
        assert (finding.severity, "'my-board' is not in the catalogue" in finding.what) == ("fail", True)


async def test_a_file_system_that_does_not_answer_is_a_finding(
    service: Service, guests: dict[str, Guest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qmpd.doctor.looking.LOOK_DEADLINE_S", 0.5)
    image = tmp_path / "image.raw"
    image.write_bytes(bytes(1 << 20))
    await service.create(quiet(guests, disks=(ImageDisk(path=str(image), format="raw"),)))
    table = tmp_path / "mountinfo"
    table.write_text(f"1 0 8:1 / / rw - ext4 /dev/a rw\n2 1 8:2 / {tmp_path} rw - nfs server:/ rw\n")
    monkeypatch.setattr("qmpd.doctor.looking.MOUNTS", table)
    with fifo(tmp_path / "dead") as dead:

        def examine(paths: list[str], _pools: tuple[str, ...]) -> dict[str, FileFacts]:
            blocked(dead)
            return dict.fromkeys(paths, FileFacts(kind="missing"))

        monkeypatch.setattr("qmpd.doctor.gathering.examine", examine)
        kernel = str(guests["x86_64-q35-quiet"].file)
        found = {finding.where: finding for finding in of_machines(await service.upkeep.doctor())}
        on_mount = found[f"machine one, disk {image}"]
        assert (on_mount.severity, on_mount.what) == ("fail", "its file system does not answer")
        assert len([where for where in found if kernel in where]) == 1
        again = await service.upkeep.doctor()
        assert about(again, "does not answer", str(image))


async def test_the_oldest_console_output_is_no_longer_kept(service: Service, guests: dict[str, Guest], settings: Settings) -> None:
    await service.create(quiet(guests), start=True)
    await service.stop("one")
    assert of_machines(await service.upkeep.doctor()) == []
    for piece in (Path(settings.state_dir) / "machines" / "one").glob("serial0.log.*"):
        piece.rename(piece.with_name(f"serial0.log.{4096:020}"))
    (finding,) = of_machines(await service.upkeep.doctor())
    assert (finding.severity, "serial port 0" in finding.what) == ("note", True)


async def test_a_database_that_does_not_answer_is_found(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qmpd.doctor.DATABASE_DEADLINE_S", 0.2)

    async def never(*_: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(service.journal, "last", never)
    (finding,) = about(await service.upkeep.doctor(), "database")
    assert (finding.severity, finding.what) == ("fail", "it does not answer")
