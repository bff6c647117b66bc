"""What is known about a disk moves too: which blocks were written since, and what the destination has already."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from qmpd.migration import capabilities
from qmpd.migration.capabilities import Agreed
from qmpd.migration.incoming import Listen, listen, wait_loaded
from qmpd.migration.mirror import DiskCopy
from tests.migration.disks import DISK_BYTES, NODE, Writers
from tests.migration.ends import End, at, attempt, go_on, moved, outgoing_to
from tests.process.emulator import content

pytestmark = pytest.mark.qemu


async def bitmaps(end: End) -> list[tuple[str, bool]]:
    """Those of the disk, and whether something was noted."""
    nodes = await end.monitor.execute("query-named-block-nodes", {"flat": True})
    assert isinstance(nodes, list)
    found = next(node for node in nodes if node["node-name"] == NODE)
    return [(bitmap["name"], bitmap["count"] > 0) for bitmap in found.get("dirty-bitmaps", []) if "name" in bitmap]


async def test_bitmaps_move_with_their_disk(writers: Writers) -> None:
    disk = writers.image()
    copy = writers.image(like=disk)
    source, destination = await writers.source(disk), await writers.destination(copy)
    await source.monitor.execute("block-dirty-bitmap-add", {"node": NODE, "name": "since-monday"})
    await writers.written(source, 2)
    directory = writers.ends.directory
    wanted = Listen(memory=at(directory), disks_at=at(directory, "disks"), disks=(NODE,), agreed=Agreed(bitmaps=True))
    await moved(source, destination, wanted)
    assert await bitmaps(destination) == [("since-monday", True)]
    await writers.written(destination, 4)
    await destination.monitor.execute("stop")
    writers.check(copy, source, destination)


def layered(base: Path, top: Path) -> tuple[str, ...]:
    """A disk that is a layer over another image, as options of QEMU."""
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", str(base), str(top)], check=True)
    return (
        *("-blockdev", f"driver=file,node-name={NODE}-base-file,filename={base},read-only=on"),
        *("-blockdev", f"driver=raw,node-name={NODE}-base,file={NODE}-base-file,read-only=on"),
        *("-blockdev", f"driver=file,node-name={NODE}-file,filename={top}"),
        *("-blockdev", f"driver=qcow2,node-name={NODE},file={NODE}-file,backing={NODE}-base"),
        *("-device", f"ide-hd,drive={NODE},id=disk0,bus=ide.0"),
    )


def flatten(image: Path, whole: Path) -> None:
    """All layers as one raw image."""
    subprocess.run(["qemu-img", "convert", "-O", "raw", str(image), str(whole)], check=True)


async def test_what_the_destination_has_already_is_not_copied(writers: Writers) -> None:
    base, ends = writers.image(), writers.ends
    with base.open("r+b") as image:
        os.truncate(image.fileno(), DISK_BYTES)
    here, there = layered(base, ends.directory / "here.qcow2"), layered(base, ends.directory / "there.qcow2")
    source, destination = await ends.start(*here), await ends.start(*there, "-incoming", "defer")
    await source.monitor.execute("cont")
    await writers.written(source, 4)
    launched = await capabilities.read(destination.monitor)
    wanted = Listen(memory=at(ends.directory), disks_at=at(ends.directory, "disks"), disks=(NODE,))
    endpoint = await listen(destination.monitor, wanted)
    outgoing = await outgoing_to(source, endpoint, disks=(DiskCopy(node=NODE, export=NODE, top=True),))
    await attempt(outgoing)
    await wait_loaded(destination.monitor)
    await go_on(destination, launched)
    await writers.written(destination, 4)
    await source.monitor.execute("quit")
    await destination.monitor.execute("quit")
    await destination.emulator.process.wait()
    assert (ends.directory / "there.qcow2").stat().st_size < DISK_BYTES // 2
    whole = ends.directory / "whole.raw"
    flatten(ends.directory / "there.qcow2", whole)
    writers.check(whole, source, destination)
    assert content(whole)[DISK_BYTES // 2 :] == content(base)[DISK_BYTES // 2 :]
