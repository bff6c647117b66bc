"""QEMU's own locks keep two machines from writing to one image; the second is told, and the first notices nothing."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from qmpd.errors import LaunchFailed
from qmpd.lifecycle import State
from qmpd.service import Service
from qmpd.spec import ImageDisk, MachineSpec
from qmpd.views import StartRequest
from tests.guests.build import Guest
from tests.machines import spec_of

pytestmark = pytest.mark.qemu


@pytest.fixture
def image(short_directory: Path) -> Path:
    path = short_directory / "shared.img"
    path.write_bytes(bytes(1 << 20))
    return path


def sharing(guests: dict[str, Guest], name: str, image: Path, *, read_only: bool = False) -> MachineSpec:
    disk = ImageDisk(path=str(image), format="raw", read_only=read_only)
    return spec_of(guests["x86_64-q35-quiet"], name, disks=(disk,))


@pytest.mark.parametrize("read_only", [False, True])
async def test_an_image_that_is_written_to_belongs_to_one_machine(
    service: Service, guests: dict[str, Guest], image: Path, read_only: bool
) -> None:
    await service.create(sharing(guests, "one", image), start=True)
    await service.create(sharing(guests, "two", image, read_only=read_only))
    with pytest.raises(LaunchFailed, match="lock") as failed:
        await service.start("two", StartRequest())
    assert "shared.img" in str(failed.value.details["stderr"])
    assert (service.machine("one").state, service.machine("two").state) == (State.RUNNING, State.STOPPED)
    await service.stop("one")
    assert (await service.start("two", StartRequest())).state is State.RUNNING


async def test_two_that_start_at_once_do_not_both_run(service: Service, guests: dict[str, Guest], image: Path) -> None:
    for name in ("one", "two"):
        await service.create(sharing(guests, name, image))
    outcomes = await asyncio.gather(*(service.start(name, StartRequest()) for name in ("one", "two")), return_exceptions=True)
    assert sum(isinstance(outcome, LaunchFailed) for outcome in outcomes) == 1
    assert sorted(view.state for view in service.machines({}, None).machines) == [State.RUNNING, State.STOPPED]


async def test_an_image_that_is_only_read_is_everybodys(service: Service, guests: dict[str, Guest], image: Path) -> None:
    for name in ("one", "two"):
        assert (await service.create(sharing(guests, name, image, read_only=True), start=True)).state is State.RUNNING
