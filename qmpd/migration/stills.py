"""The disks of a machine that lives, as they are at one moment: images beside its own, which nobody writes to afterwards.

Each disk is mirrored to a file while the guest runs. When all have caught up the guest is halted, each mirror is made complete, and the
guest goes on: so what the images hold is of the same moment, and no more than what was on its way takes its time. A mirror that fails, for
want of space say, fails alone. QEMU's backup jobs would need no halt, but before 10.1 an error of the copy is one of the guest's own write,
and they fill the holes of raw files.

What is in the images is what a power cut would leave: what the guest had not written out is not there.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from qmpd.errors import CannotMove, MigrationFailed, NoSpace
from qmpd.facts import MachinePaths
from qmpd.failpoint import failpoint, passing
from qmpd.jobs import Report
from qmpd.machine import Machine
from qmpd.migration.arrivingfiles import private, trouble
from qmpd.migration.discrepancy import found
from qmpd.migration.diskoffers import node_of
from qmpd.migration.extents import allocated
from qmpd.migration.items import MAX_TPM_BYTES, Target, targets
from qmpd.migration.media import media
from qmpd.migration.mirror import STALL_LIMIT_S, DiskCopy, Mirrors, drop_all
from qmpd.migration.parcels import Parcel
from qmpd.migration.qemu import Qemu, ask_list, run_state
from qmpd.migration.watch import watching
from qmpd.migrationviews import MigrationFinding
from qmpd.plan import BlankImage
from qmpd.plan.disks import base_of, is_read_only
from qmpd.spec import BaseImage, DiskFormat, PflashFirmware
from qmpd.storage import draft_of, replace
from qmpd.tasks import undivided
from qmpd.views import Progress

MIB: Final = 1024 * 1024
#: What stays free beside a machine's images: its guest goes on writing to them.
SPARE_BYTES: Final = 64 * MIB
#: Whoever may read the original is not asked: for its time the image is the daemon's alone.
PRIVATE: Final = 0o600
#: A guest that writes all the time is never caught up with. What so little is left of for so long is made up for while it stands still.
LITTLE_BYTES: Final = 64 * MIB
PATIENCE_S: Final = 5.0
#: The node of the firmware's variables, as the plan names it.
_VARIABLES: Final = "pflash1"

_log = logging.getLogger(__name__)


class Still(msgspec.Struct, frozen=True, kw_only=True):
    """An image to be made of what node `node` has in the file `original`, which has `used_bytes`; the guest sees `size_bytes` of it.
    It lies upon the same `base` as the original.

    Without a node it is a small file that changes only on behalf of the guest.
    """

    item: str
    node: str | None
    original: str
    path: str
    format: DiskFormat
    size_bytes: int
    used_bytes: int
    base: BaseImage | None = None

    def parcel(self) -> Parcel:
        """The image, as it is sent. Blocks. Raises OSError."""
        return Parcel(item=self.item, size=Path(self.path).stat().st_size, allocated=allocated(self.path))


class Shortage(NamedTuple):
    """A file system without room for the images that come to it."""

    place: str
    needed: int
    free: int

    def __str__(self) -> str:
        return (
            f"{self.place} needs room for another {self.needed // MIB + 1} MiB while the machine is copied: its guest goes on, and the "
            f"disks of one moment are kept beside its own. {self.free // MIB} MiB are free"
        )


async def planned(machine: Machine, paths: MachinePaths, migration: str) -> tuple[Still, ...]:
    """An image for each file that the guest can write to.

    Raises:
        CannotMove: what QEMU has in a disk is not known.
        MonitorUnavailable, QemuSilent: QEMU cannot be asked.
    """
    spec, session = machine.definition.spec, machine.session
    inserted, sizes = await media(session), await _sizes(session)
    stills = []
    for item, target in targets(spec, paths).items():
        base: BaseImage | None = None
        if target.kind == "disk":
            index = int(item.removeprefix("disk-"))
            if is_read_only(spec.disks[index]):
                continue
            base = base_of(spec.disks[index])
            node, image_format = inserted[index].node if index in inserted else node_of(index), spec.disks[index].format
        elif target.kind == "vars" and isinstance(spec.firmware, PflashFirmware):
            node, image_format = _VARIABLES, spec.firmware.format
        elif target.kind == "tpm" and await asyncio.to_thread(Path(target.path).exists):
            node, image_format = None, "raw"
        else:
            continue
        if node is not None and node not in sizes:
            raise CannotMove(f"QEMU does not say what it has in {item}: copy the machine while it does not run")
        size_bytes, used_bytes = (0, MAX_TPM_BYTES) if node is None else sizes[node]
        original = Path(await asyncio.to_thread(os.path.realpath, target.path))
        stills.append(
            Still(
                item=item,
                node=node,
                original=str(original),
                path=str(original.with_name(f".{original.name}.{migration}.still")),
                format=image_format,
                size_bytes=size_bytes,
                used_bytes=used_bytes,
                base=base,
            )
        )
    return tuple(stills)


def room_findings(files: dict[str, Target], parcels: Iterable[Parcel]) -> Iterator[MigrationFinding]:
    """Where there is no room for the images of these files. Blocks."""
    for shortage in _shortages((files[parcel.item].path, parcel.allocated) for parcel in parcels):
        yield found("error", "no-space-here", str(shortage), path="$.disks", mend="make room, or copy the machine while it does not run")


def check_room(stills: Iterable[Still]) -> None:
    """Raises NoSpace where the images would not fit. Blocks."""
    for shortage in _shortages((still.original, still.used_bytes) for still in stills):
        raise NoSpace(str(shortage), path=shortage.place, needed=shortage.needed, free=shortage.free)


def _shortages(files: Iterable[tuple[str, int]]) -> Iterator[Shortage]:
    needed: dict[int, tuple[Path, int]] = {}
    for path, size in files:
        place = Path(os.path.realpath(path)).parent
        device = place.stat().st_dev
        needed[device] = (place, needed.get(device, (place, 0))[1] + size)
    for place, size in needed.values():
        there = os.statvfs(place)
        free = there.f_bavail * there.f_frsize
        if size + SPARE_BYTES > free:
            yield Shortage(str(place), size + SPARE_BYTES, free)


def make(stills: Iterable[Still]) -> None:
    """Makes the images, empty. Blocks. Raises NoSpace, HostError."""
    failpoint("still-make")
    for still in stills:
        if still.node is not None:
            replace(BlankImage(path=still.path, format=still.format, size_bytes=still.size_bytes, base=still.base))
            Path(still.path).chmod(PRIVATE)


def _copied(files: Iterable[Still]) -> None:
    for file in files:
        try:
            with open(file.path, "xb", opener=private) as copy:
                copy.write(Path(file.original).read_bytes())
        except OSError as error:
            raise trouble(error, Path(file.original)) from error


def remove(paths: Iterable[str]) -> None:
    """Removes images, and what was left of making them. Blocks."""
    for path in map(Path, paths):
        for each in (path, draft_of(path)):
            try:
                failpoint("still-remove")
                each.unlink(missing_ok=True)
            except OSError as error:
                _log.error("an image that was made for a copy is left", extra={"path": str(each), "error": str(error)})


class Exposure:
    """Fills the images. `halted_ms`: how long the guest stood still; None if it did not run."""

    def __init__(self, qemu: Qemu, stills: tuple[Still, ...], migration: str) -> None:
        self.halted_ms: float | None = None
        self._qemu = qemu
        copies = [
            DiskCopy(node=one.node, export=one.item, top=one.base is not None, path=one.path, format=one.format, base=one.base)
            for one in stills
            if one.node is not None
        ]
        self._files = tuple(one for one in stills if one.node is None)
        self._mirrors = Mirrors(qemu, copies, None, None, prefix=_prefix(migration))

    async def follow(self, report: Report) -> None:
        """Returns when every image follows its disk, or so little is missing that the guest can be halted for it.

        Raises:
            MigrationFailed, QemuRefused: a disk cannot be copied.
        """
        await self._mirrors.begin(None)
        loop = asyncio.get_running_loop()
        near_since: float | None = None
        with watching(self._qemu) as watch:
            while self._mirrors and (disks := await self._mirrors.until_following(watch)) is not None:
                done, total = sum(disk.done_bytes for disk in disks), sum(disk.total_bytes for disk in disks)
                await report(Progress(phase="disks", done=float(done), total=float(total) or None, unit="bytes"))
                near_since = (near_since or loop.time()) if done and total - done <= LITTLE_BYTES else None
                if near_since is not None and loop.time() - near_since > PATIENCE_S:
                    return

    async def finish(self) -> None:
        """Makes all of them those of one moment, for which the guest stands still.

        Raises:
            MigrationFailed: a mirror failed, or does not get done. The guest goes on.
        """
        loop = asyncio.get_running_loop()
        await passing("still-halt")
        began = loop.time()
        ran = await run_state(self._qemu) == "running"
        if ran:
            await self._qemu.execute("stop")
        try:
            await passing("still-halted")
            await self._caught_up()
            await self._mirrors.finish()
            await asyncio.to_thread(_copied, self._files)
        finally:
            if ran:
                await undivided(_set_going(self._qemu), "set-going")
                self.halted_ms = (loop.time() - began) * 1000

    async def _caught_up(self) -> None:
        try:
            async with asyncio.timeout(STALL_LIMIT_S):
                with watching(self._qemu) as watch:
                    while self._mirrors and await self._mirrors.until_following(watch) is not None:
                        pass
        except TimeoutError as error:
            raise MigrationFailed(f"the images of the disks had not caught up {STALL_LIMIT_S:g} s after the guest was halted") from error


async def put_back(qemu: Qemu, migration: str, *, halted: bool) -> None:
    """Leaves no mirror in QEMU, and sets a guest going that was `halted` for the moment. May be repeated.

    Raises:
        MigrationFailed, QemuError: not done yet.
    """
    if halted:
        await _set_going(qemu)
    await drop_all(qemu, _prefix(migration))


def _prefix(migration: str) -> str:
    """Of the names of jobs and nodes, which have 31 characters at most. Not those of a move that came after the copy was taken."""
    return f"still-{migration[:8]}"


async def _set_going(qemu: Qemu) -> None:
    if await run_state(qemu) == "paused":
        await passing("still-cont")
        await qemu.execute("cont")


async def _sizes(qemu: Qemu) -> dict[str, tuple[int, int]]:
    """What the guest sees of each node's image, and what the image has."""
    sizes: dict[str, tuple[int, int]] = {}
    for node in await ask_list(qemu, "query-named-block-nodes", {"flat": True}):
        image = node.get("image")
        if isinstance(image, dict):
            sizes[str(node.get("node-name"))] = (int(image.get("virtual-size", 0)), int(image.get("actual-size", 0)))
    return sizes
