"""Disks that move along: copied while their guest writes to them, or on storage that both hosts see."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from qmpd.errors import CannotMove
from qmpd.lifecycle import State
from qmpd.migrationviews import MigrateRequest, MoveDiskRequest
from qmpd.spec import BlankDisk, ImageDisk
from qmpd.views import StartRequest
from tests.api.lab import Daemon
from tests.guests.build import Guest
from tests.guests.ring import acknowledged, missing, read_ring
from tests.machines import copy_of, spec_of
from tests.migration.test_moves import HUNG_S, LOOK_S, ended, moved, pair, printed

pytestmark = pytest.mark.qemu


async def written(there: Daemon, name: str, more: int) -> int:
    """Waits until the guest has seen `more` further blocks written; the last one."""
    before, now = await said(there, name), 0
    async with asyncio.timeout(HUNG_S):
        while now < before + more:
            await asyncio.sleep(LOOK_S)
            now = await said(there, name)
    return now


async def said(there: Daemon, name: str) -> int:
    console = there.service.console(name, None)
    await console.load()
    _, output = await console.read(max(0, console.end - 4096), 4096)
    return acknowledged(output[output.find(b"BLOCK") :]).last if b"BLOCK" in output else 0


@pytest.mark.parametrize("how", ["shared", "copy"])
async def test_no_block_is_lost_of_a_disk_that_moves(short_directory: Path, guests: dict[str, Guest], how: str) -> None:
    guest = copy_of(guests["x86_64-pc-blocks"], short_directory)
    target = guest.file if how == "shared" else short_directory / "there.raw"
    choice = {"disk": 0, "how": how} | ({"path": str(target)} if how == "copy" else {})
    async with pair(short_directory) as (a, b):
        await a.service.create(spec_of(guest, "writer"), start=True)
        await written(a, "writer", 30)
        report = await moved(a, "writer", "b", disks=[choice])
        (disk,) = report.disks
        assert (disk.disk, disk.how, disk.path) == (0, "shared" if how == "shared" else "copied", str(target))
        assert (disk.bytes > 0) is (how == "copy")
        last = await written(b, "writer", 30)
        await b.service.stop("writer")
        ring = read_ring(target)
        assert ring.newest >= last
        assert ring.torn == ()
        assert missing(ring, last) == ()
        assert b.service.definition("writer").spec.disks[0].path == str(target)  # type: ignore[union-attr]


async def test_a_disk_that_qmpd_made_moves_along_and_is_removed_where_it_was(short_directory: Path, guests: dict[str, Guest]) -> None:
    spec = spec_of(guests["x86_64-q35-quiet"], "owner", disks=(BlankDisk(size_mib=16),))
    async with pair(short_directory) as (a, b):
        await a.service.create(spec, start=True)
        await printed(a, "owner", 0)
        await moved(a, "owner", "b")
        assert b.service.machine("owner").state is State.RUNNING
        assert not (short_directory / "a/s/machines/owner").exists()
        assert (short_directory / "b/s/machines/owner/disk0.qcow2").exists()
        await b.service.kill("owner")


async def test_snapshots_in_an_image_are_lost_only_where_that_is_accepted(short_directory: Path, guests: dict[str, Guest]) -> None:
    """What a guest sees of a disk is copied while it runs, and all of the image while it does not."""
    spec = spec_of(guests["x86_64-q35-quiet"], "owner", disks=(BlankDisk(size_mib=16),))
    here, there = (short_directory / f"{host}/s/machines/owner/disk0.qcow2" for host in ("a", "b"))
    async with pair(short_directory) as (a, b):
        await a.service.create(spec)
        made = await asyncio.create_subprocess_exec("qemu-img", "snapshot", "-c", "before", str(here))
        assert await made.wait() == 0
        await a.service.start("owner", StartRequest())
        refused = await ended(a, await a.service.migration.migrate("owner", MigrateRequest(peer="b")))
        assert refused.error is not None
        assert refused.error["code"] == "cannot_move"
        assert "snapshots in this image would be lost, which are no part of what is copied: before" in str(refused.error["message"])
        with pytest.raises(CannotMove, match="lost \\(before\\)"):
            await a.service.disk_moves._begun(a.service._registry.get("owner"), 0, MoveDiskRequest(path=str(short_directory / "new.qcow2")))
        await a.service.kill("owner")
        await moved(a, "owner", "b")
        assert await snapshots_in(there) == ["before"]
        await b.service.start("owner", StartRequest())
        report = await moved(b, "owner", "a", accept=["snapshots-lost"])
        assert [finding.code for finding in report.findings if finding.severity == "warning"] == ["snapshots-lost"]
        await a.service.kill("owner")
        assert await snapshots_in(here) == []


async def noted(there: Daemon, name: str) -> list[tuple[str, bool]]:
    """The bitmaps of the machine's disks, and whether anything was noted in them."""
    nodes = await there.service._registry.get(name).session.execute("query-named-block-nodes", {"flat": True})
    assert isinstance(nodes, list)
    return [(bitmap["name"], bitmap["count"] > 0) for node in nodes for bitmap in node.get("dirty-bitmaps", ()) if "name" in bitmap]


async def facts_of(image: Path) -> dict[str, Any]:
    """What an image has, when nobody uses it."""
    process = await asyncio.create_subprocess_exec("qemu-img", "info", "--output=json", str(image), stdout=asyncio.subprocess.PIPE)
    output, _ = await process.communicate()
    return dict(json.loads(output))


async def kept_in(image: Path) -> list[str]:
    """The bitmaps that an image has."""
    return [bitmap["name"] for bitmap in (await facts_of(image))["format-specific"]["data"].get("bitmaps", ())]


async def snapshots_in(image: Path) -> list[str]:
    """The snapshots that an image has."""
    return [snapshot["name"] for snapshot in (await facts_of(image)).get("snapshots", ())]


@pytest.mark.parametrize("how", ["shared", "copy"])
async def test_what_was_noted_of_a_disk_moves_along(short_directory: Path, guests: dict[str, Guest], how: str) -> None:
    guest = copy_of(guests["x86_64-pc-blocks"], short_directory)
    here, there = short_directory / "here.qcow2", short_directory / ("here.qcow2" if how == "shared" else "there.qcow2")
    convert = await asyncio.create_subprocess_exec("qemu-img", "convert", "-O", "qcow2", str(guest.file), str(here))
    assert await convert.wait() == 0
    spec = spec_of(guest, "writer", disks=(ImageDisk(path=str(here), format="qcow2", bus="ide"),))
    async with pair(short_directory) as (a, b):
        await a.service.create(spec, start=True)
        wanted = {"node": "disk0-image", "name": "since-monday", "persistent": True}
        await a.service._registry.get("writer").session.execute("block-dirty-bitmap-add", wanted)
        await written(a, "writer", 10)
        choice = {"disk": 0, "how": how} | ({"path": str(there)} if how == "copy" else {})
        if how == "copy":
            raw = msgspec.convert({"peer": "b", "disks": [{**choice, "format": "raw"}]}, MigrateRequest)
            refused = await ended(a, await a.service.migration.migrate("writer", raw))
            assert refused.error is not None
            assert refused.error["code"] == "cannot_move"
            assert "bitmaps" in str(refused.error["message"])
        await moved(a, "writer", "b", disks=[choice])
        assert await noted(b, "writer") == [("since-monday", True)]
        await written(b, "writer", 10)
        await b.service.stop("writer")
    assert await kept_in(there) == ["since-monday"]
