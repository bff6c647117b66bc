"""A machine with firmware variables takes them along, and needs nothing of what they were made of on its new host."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from qmpd.failpoint import arm
from qmpd.lifecycle import State
from qmpd.migrationviews import MigrateRequest
from qmpd.spec import MachineSpec, PflashFirmware
from qmpd.views import StartRequest
from tests.migration.test_firmware_variables import CODE, TEMPLATE, written
from tests.migration.test_moves import ended, moved, pair
from tests.unavailable import unavailable

pytestmark = pytest.mark.qemu


@pytest.fixture
def uefi(short_directory: Path) -> MachineSpec:
    """A UEFI machine whose variables were made of a file that may go."""
    if not CODE.exists():
        unavailable("OVMF is not installed (Debian: the package ovmf)")
    template = short_directory / "template.fd"
    shutil.copyfile(TEMPLATE, template)
    firmware = PflashFirmware(code=str(CODE), vars=str(template))
    return MachineSpec(name="uefi", board="x86_64-q35", accel="tcg", memory_mib=128, firmware=firmware)


def variables(directory: Path, there: str) -> Path:
    return directory / there / "s/machines/uefi/firmware-vars.fd"


@pytest.mark.parametrize("runs", [True, False], ids=["goes on", "stays halted"])
async def test_variables_move_along_without_their_template(short_directory: Path, uefi: MachineSpec, runs: bool) -> None:
    here, there = (variables(short_directory, name) for name in ("a", "b"))
    async with pair(short_directory) as (a, b):
        await a.service.create(uefi, start=True)
        await written(here, b"")
        if not runs:
            await a.service.pause("uefi")
        said = here.read_bytes()
        (short_directory / "template.fd").unlink()
        await moved(a, "uefi", "b")
        assert b.service.machine("uefi").state is (State.RUNNING if runs else State.PAUSED)
        assert not here.exists()
        if not runs:
            assert there.read_bytes() == said
        await b.service.stop("uefi")
        assert there.stat().st_size == len(said)
        assert there.read_bytes() != TEMPLATE.read_bytes()
        assert (await b.service.start("uefi", StartRequest())).state is State.RUNNING
        await b.service.kill("uefi")


async def test_a_halted_machine_whose_variables_do_not_arrive_stays(short_directory: Path, uefi: MachineSpec) -> None:
    async with pair(short_directory) as (a, b):
        await a.service.create(uefi, start=True)
        await a.service.pause("uefi")
        try:
            arm("migration-variables-write:error")
            job = await ended(a, await a.service.migration.migrate("uefi", MigrateRequest(peer="b")))
        finally:
            arm("")
        assert job.error is not None
        assert job.error["code"] == "migration_failed"
        assert "variables" in str(job.error["message"])
        assert a.service.machine("uefi").state is State.PAUSED
        await a.service.resume("uefi")
        await moved(a, "uefi", "b")
        await b.service.kill("uefi")
