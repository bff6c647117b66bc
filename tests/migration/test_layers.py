"""A disk whose base lies upon another one: every layer is named, none is found by a header alone, and only what is above them is sent."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import msgspec
import pytest

from qmpd.errors import Invalid
from qmpd.lifecycle import State
from qmpd.spec import MAX_LAYERS, BaseImage, ImageDisk, MachineSpec
from qmpd.views import StartRequest
from tests.guests.build import Guest
from tests.machines import spec_of
from tests.migration import overlays
from tests.migration.overlays import RING, below, content, laid_upon
from tests.migration.test_bases import check
from tests.migration.test_copying_live import copied, in_order
from tests.migration.test_disk_moves import moved as moved_disk
from tests.migration.test_dry_runs import tried
from tests.migration.test_moves import moved, pair
from tests.migration.test_moving_disks import written

pytestmark = pytest.mark.qemu

MIB = 1024 * 1024


async def layered(directory: Path, guest: Guest, *, name: str | None = None) -> MachineSpec:
    """A machine upon an image that was changed, upon a raw one; the former refers to the latter by `name`, or in full."""
    await asyncio.to_thread(directory.mkdir, exist_ok=True)
    base = await overlays.layered(directory, guest, name=name)
    return spec_of(guest, "web", disks=(await laid_upon(base, directory / "web.qcow2"),))


def only(spec: MachineSpec) -> ImageDisk:
    (disk,) = spec.disks
    assert isinstance(disk, ImageDisk)
    return disk


def with_base(spec: MachineSpec, base: BaseImage | None) -> MachineSpec:
    return msgspec.structs.replace(spec, disks=(msgspec.structs.replace(only(spec), base=base),))


async def test_only_what_lies_upon_all_layers_is_sent(short_directory: Path, guests: dict[str, Guest]) -> None:
    here, there = short_directory / "here", short_directory / "there"
    spec = await layered(here, guests["x86_64-pc-blocks"], name="base.raw")
    raw = await content(here / "middle.qcow2", short_directory)
    there.mkdir()
    for name in ("middle.qcow2", "base.raw"):
        shutil.copyfile(here / name, there / name)
    choice = {"disk": 0, "how": "copy", "path": str(there / "web.qcow2"), "base": str(there / "middle.qcow2")}
    async with pair(short_directory) as (a, b):
        await a.service.create(spec, start=True)
        await written(a, "web", 20)
        assert "base-same" in {finding.code for finding in (await tried(a, "web", disks=[choice])).findings}
        (disk,) = (await moved(a, "web", "b", disks=[choice])).disks
        assert (disk.base, disk.bytes < 4 * MIB) == (choice["base"], True)
        lowest = BaseImage(path=str(there / "base.raw"), format="raw")
        assert only(b.service.definition("web").spec).base == BaseImage(path=str(choice["base"]), format="qcow2", base=lowest)
        last = await written(b, "web", 20)
        await check(b, there / "web.qcow2", short_directory, raw, last)
        assert await below(there / "web.qcow2") == choice["base"]
        await b.service.start("web", StartRequest())
        await written(b, "web", 5)
        back = {"disk": 0, "how": "copy", "path": str(here / "back.qcow2"), "base": str(here / "middle.qcow2")}
        (disk,) = (await moved(b, "web", "a", disks=[back])).disks
        assert only(a.service.definition("web").spec).base == only(spec).base
        last = await written(a, "web", 5)
        await check(a, here / "back.qcow2", short_directory, raw, last)


async def test_a_layer_that_is_not_the_same_has_all_of_the_disk_sent(short_directory: Path, guests: dict[str, Guest]) -> None:
    here, there = short_directory / "here", short_directory / "there"
    spec = await layered(here, guests["x86_64-pc-blocks"], name="base.raw")
    raw = await content(here / "middle.qcow2", short_directory)
    there.mkdir()
    for name in ("middle.qcow2", "base.raw"):
        shutil.copyfile(here / name, there / name)
    with (there / "base.raw").open("r+b") as file:
        file.seek(20 * MIB)
        file.write(b"somebody was here")
    choice = {"disk": 0, "how": "copy", "path": str(there / "web.qcow2"), "base": str(there / "middle.qcow2")}
    async with pair(short_directory) as (a, b):
        await a.service.create(spec, start=True)
        await written(a, "web", 10)
        dry = await tried(a, "web", disks=[choice])
        (finding,) = [finding for finding in dry.findings if finding.code == "base-differs"]
        assert f"below it, of {there / 'base.raw'}: it has other contents" in finding.message
        assert dry.prediction is not None
        assert dry.prediction.disk_bytes > 20 * MIB
        (disk,) = (await moved(a, "web", "b", disks=[choice])).disks
        assert (disk.base, disk.bytes > 20 * MIB) == (None, True)
        last = await written(b, "web", 10)
        assert only(b.service.definition("web").spec).base is None
        await check(b, there / "web.qcow2", short_directory, raw, last)
        assert await below(there / "web.qcow2") is None


async def test_whatever_else_moves_or_is_copied_stays_upon_all_layers(short_directory: Path, guests: dict[str, Guest]) -> None:
    spec = await layered(short_directory, guests["x86_64-pc-blocks"])
    raw = await content(short_directory / "middle.qcow2", short_directory)
    second, upon, there = (short_directory / f"{name}.qcow2" for name in ("second", "upon", "there"))
    async with pair(short_directory) as (a, b):
        await a.service.create(spec, start=True)
        last = await written(a, "web", 10)
        report = await copied(a, "web", copy={"name": "second"}, disks=[{"disk": 0, "how": "copy", "path": str(second)}])
        assert report.disks[0].bytes < 4 * MIB
        assert only(b.service.definition("second").spec).base == only(spec).base
        found = await content(second, short_directory)
        in_order(short_directory / "flat.raw", last)
        assert (found[: RING.start], found[RING.stop :]) == (raw[: RING.start], raw[RING.stop :])
        await moved_disk(a, "web", upon, format="qcow2")
        last = await written(a, "web", 10)
        await check(a, upon, short_directory, raw, last)
        await moved(a, "web", "b", disks=[{"disk": 0, "how": "copy", "path": str(there)}])  # at rest
        assert (await b.service.start("web", StartRequest())).state is State.RUNNING
        last = await written(b, "web", 5)
        await check(b, there, short_directory, raw, last)
        await b.service.start("web", StartRequest())
        await moved_disk(b, "web", short_directory / "all.raw", format="raw")
        assert only(b.service.definition("web").spec).base is None
        await b.service.kill("web")


async def test_layers_that_no_definition_names_are_refused_and_so_are_others(short_directory: Path, guests: dict[str, Guest]) -> None:
    spec = await layered(short_directory, guests["x86_64-pc-blocks"])
    base = only(spec).base
    assert base is not None
    assert base.base is not None
    other = short_directory / "other.raw"
    shutil.copyfile(base.base.path, other)
    endless = base
    for _ in range(MAX_LAYERS):
        endless = msgspec.structs.replace(base, base=endless)
    wrong = {
        "lies upon": msgspec.structs.replace(base, base=None),
        "was made upon": msgspec.structs.replace(base, base=BaseImage(path=str(other), format="raw")),
        "no such file": msgspec.structs.replace(base, base=BaseImage(path="/nowhere/base", format="raw")),
        "not a qcow2 image": msgspec.structs.replace(base, base=BaseImage(path=base.base.path, format="qcow2")),
        "has nothing below it": msgspec.structs.replace(base, base=msgspec.structs.replace(base.base, base=base.base)),
        "more than 8 layers": endless,
        "cannot be used": msgspec.structs.replace(base, base=BaseImage(path="/proc/kcore", format="raw")),
    }
    async with pair(short_directory) as (a, _):
        for words, changed in wrong.items():
            with pytest.raises(Invalid) as error:
                await a.service.create(with_base(spec, changed))
            assert words in str(error.value), words
