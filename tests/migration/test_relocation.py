"""A disk moves to another file while its guest writes to it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qmpd.errors import MigrationFailed, QemuRefused
from qmpd.migration.progress import DiskProgress
from qmpd.migration.relocation import relocate
from tests.migration.disks import DISK_BYTES, NODE, Writers
from tests.migration.ends import GivenUpError
from tests.process.emulator import content

pytestmark = pytest.mark.qemu


def target(path: Path) -> dict[str, object]:
    """An image as a node."""
    return {"driver": "raw", "node-name": "elsewhere", "file": {"driver": "file", "filename": str(path)}}


async def unseen(_progress: DiskProgress) -> None:
    """Nobody looks."""


async def test_a_disk_moves_to_another_file(writers: Writers) -> None:
    disk = writers.image()
    moved = writers.image(like=disk)
    source = await writers.source(disk)
    seen: list[DiskProgress] = []

    async def note(progress: DiskProgress) -> None:
        seen.append(progress)

    await relocate(source.monitor, NODE, target(moved), note)
    await source.monitor.execute("blockdev-del", {"node-name": NODE})
    await source.monitor.execute("blockdev-del", {"node-name": f"{NODE}-file"})
    await writers.written(source, 4)
    await source.monitor.execute("stop")
    writers.check(moved, source)
    assert content(moved)[DISK_BYTES // 2 :] == content(disk)[DISK_BYTES // 2 :]
    assert seen[-1].ready
    assert DISK_BYTES // 2 <= seen[-1].done_bytes <= seen[-1].total_bytes  # the guest writes on: a block may be due again


async def test_a_disk_moves_again_and_again_under_a_guest_that_always_writes(writers: Writers) -> None:
    """QEMU 7.2 aborts in one of five changes if the guest is not halted for them."""
    disk = writers.image()
    source = await writers.source(disk)
    node, last = NODE, disk
    for number in range(15):
        moved = writers.image(like=disk)
        following = f"elsewhere{number}"
        await relocate(source.monitor, node, {**target(moved), "node-name": following}, unseen)
        await source.monitor.execute("blockdev-del", {"node-name": node})
        node, last = following, moved
    await writers.written(source, 4)
    await source.monitor.execute("stop")
    writers.check(last, source)


async def test_a_move_that_is_given_up_changes_nothing(writers: Writers) -> None:
    disk = writers.image()
    source = await writers.source(disk)

    async def give_up(_progress: DiskProgress) -> None:
        raise GivenUpError

    async with writers.undisturbed(source, disk):
        with pytest.raises(GivenUpError):
            await relocate(source.monitor, NODE, target(writers.image(like=disk)), give_up, bytes_per_s=1_000_000)


async def test_a_target_that_is_too_short_changes_nothing(writers: Writers) -> None:
    disk = writers.image()
    short = writers.image(like=disk)
    os.truncate(short, DISK_BYTES // 4)
    source = await writers.source(disk)
    async with writers.undisturbed(source, disk):
        with pytest.raises((MigrationFailed, QemuRefused)):
            await relocate(source.monitor, NODE, target(short), unseen)
