"""Disks of running machines that move to another file of the same host, and the definition that follows them.

The definition must never name an image that a guest has left. So the guest is halted for the change: what is committed between QEMU's
change and the moment it is set going again is right, for both images are the same then. Who was killed in between finds a record of the
move (`diskmove/NAME`), and asks QEMU which image it uses; where there is no QEMU any more, the definition is right.
"""

from __future__ import annotations

import asyncio
import logging
import os
from contextlib import suppress
from functools import partial
from pathlib import Path
from secrets import token_hex
from typing import Final

import msgspec

from qmpd.errors import AlreadyExists, Busy, CannotMove, NoSpace, NotFound, Problem, QemuRefused, QmpdError, StaleRevision, invalid
from qmpd.jobs import Jobs, Report
from qmpd.lifecycle import AT_REST, State
from qmpd.machine import Machine
from qmpd.migration import relocation
from qmpd.migration.bitmaps import bitmaps
from qmpd.migration.extents import allocated
from qmpd.migration.media import Medium, media
from qmpd.migration.progress import DiskProgress
from qmpd.migration.qemu import run_state
from qmpd.migrationviews import DiskMoved, MoveDiskRequest
from qmpd.plan import BlankImage
from qmpd.plan.disks import base_node, base_of, disk_path, is_read_only
from qmpd.record import write_record
from qmpd.registry import Registry
from qmpd.spec import BaseImage, BlankDisk, DiskFormat, ImageDisk, MachineSpec
from qmpd.storage import draft_of, examine, make
from qmpd.store import Store, Unknown
from qmpd.tasks import Tasks, undivided
from qmpd.views import JobView, Progress

PREFIX: Final = "diskmove/"
VERB: Final = "move-disk"
MIB: Final = 1024 * 1024
MOVABLE: Final = frozenset({State.RUNNING, State.PAUSED})
#: A definition that was not written, while the guest stands still, is written again this often: there may be room at any time.
WRITE_AGAIN_S: Final = 1.0
#: A machine whose QEMU does not answer is looked at again this often.
LOOK_AGAIN_S: Final = 5.0

_log = logging.getLogger(__name__)


class DiskMove(msgspec.Struct, frozen=True, kw_only=True):
    """A move that is under way. `source` and `target` are nodes; `made` tells the new file (device, inode), once it is there; `own` is the
    image that qmpd made for the disk, to be removed; `halted`: the guest stands still for the change, and is to go on."""

    machine: str
    uuid: str
    index: int
    path: str
    format: DiskFormat
    source: str
    target: str
    made: tuple[int, int] | None = None
    own: str | None = None
    halted: bool = False


class DiskMoves:
    """Moves disks, one of a machine at a time."""

    def __init__(self, store: Store, registry: Registry, jobs: Jobs, pools: tuple[str, ...]) -> None:
        self._store = store
        self._registry = registry
        self._jobs = jobs
        self._pools = pools

    async def move(self, name: str, disk: str, request: MoveDiskRequest) -> JobView:
        """Moves a disk of a machine that runs or is paused, as a job.

        Raises:
            NotFound: there is no such machine or disk.
            WrongState: it is at rest.
            Invalid, AlreadyExists, CannotMove: this disk cannot move there.
            NoSpace: there is no room for it.
        """
        machine = self._registry.get(name)
        machine.require(MOVABLE, "move a disk of")
        index = _index(machine.definition.spec, disk)
        await self._begun(machine, index, request)  # what is wrong is said at once, and looked at again when the machine is held
        return await self._jobs.begin_reporting(VERB, name, lambda report: self._move(machine, index, request, report))

    async def settle_all(self, tasks: Tasks) -> None:
        """After a restart, when living processes are known: ends what an earlier daemon began. Machines at rest are done on return."""
        for record in (await self._store.read(PREFIX)).records.values():
            move = msgspec.msgpack.decode(record.value, type=DiskMove)
            machine = self._registry.known(move.machine)
            if machine is None or machine.definition.uuid != move.uuid:
                await self._note(move, None)
            elif machine.state in AT_REST:
                await self._settle(machine, move)
            else:
                tasks.start(self._settle_later(machine, move), f"settle-disk-move:{move.machine}")

    async def _begun(self, machine: Machine, index: int, request: MoveDiskRequest) -> tuple[DiskMove, Medium]:
        definition = machine.definition
        spec, disk = definition.spec, definition.spec.disks[index]
        if definition.adoption is not None:
            raise CannotMove(f"machine {machine.name!r} was started by somebody else: qmpd does not know all of it")
        if is_read_only(disk):
            raise CannotMove(f"disk {index} is read-only: nothing of it can be lost, give the machine another one while it is at rest")
        medium = (await media(machine.session)).get(index)
        if medium is None:
            raise CannotMove(f"disk {index} is in a slot of the board: QEMU cannot change what is in it while the guest runs")
        if noted := (await bitmaps(machine.session)).get(medium.node):
            raise CannotMove(
                f"disk {index} has bitmaps that would be lost ({noted[0].name}): remove them first (block-dirty-bitmap-remove)"
            )
        if medium.snapshots and isinstance(disk, BlankDisk):  # of another image the old file stays
            message = f"disk {index} has snapshots in its image that would be lost ({', '.join(medium.snapshots)}): remove them first"
            raise CannotMove(f"{message} (qemu-img snapshot -d, while it is at rest)")
        needed = medium.used_bytes
        if (base := base_of(disk)) is not None and (request.format or disk.format) != "qcow2":
            needed += await asyncio.to_thread(lambda: sum(allocated(layer.path) for layer in base.layers()))
        await asyncio.to_thread(self._check_target, request.path, needed)
        move = DiskMove(
            machine=machine.name,
            uuid=definition.uuid,
            index=index,
            path=request.path,
            format=request.format or disk.format,
            source=medium.node,
            target=f"disk{index}-moved-{token_hex(4)}",
            own=disk_path(spec, self._registry.paths(machine.name), index) if isinstance(disk, BlankDisk) else None,
        )
        return move, medium

    def _check_target(self, path: str, needed: int) -> None:
        found = examine([path], self._pools)[path]
        if found.kind == "missing":
            room = _room(path)
            if room is None:
                raise invalid([Problem(path="$.path", message="the directory does not exist")])
            if room < needed:
                raise NoSpace(f"{path}: {needed} bytes are needed, and {room} are free")
        elif found.kind == "file":
            raise AlreadyExists(f"{path} exists already", path=path)
        else:
            raise invalid([Problem(path="$.path", message=found.refusal or f"cannot be used: {found.kind}")])

    async def _move(self, machine: Machine, index: int, request: MoveDiskRequest, report: Report) -> DiskMoved:
        async with machine.held(VERB):
            machine.require(MOVABLE, "move a disk of")
            move, medium = await self._begun(machine, index, request)
            await self._note(move, move)
            try:
                move = await undivided(self._made(move, medium, machine.definition.spec), f"make-disk:{machine.name}")
                await self._relocated(machine, move, medium, request, report)
            finally:
                # Whatever became of it: QEMU is asked. A daemon that ends leaves it to the next one.
                await self._settled(machine, move)
            return DiskMoved(machine=machine.name, disk=index, path=move.path, format=move.format, bytes=medium.virtual_bytes)

    async def _made(self, move: DiskMove, medium: Medium, spec: MachineSpec) -> DiskMove:
        base = _base(move, spec)
        await make((BlankImage(path=move.path, format=move.format, size_bytes=medium.virtual_bytes, base=base),), ())
        move = msgspec.structs.replace(move, made=await asyncio.to_thread(_mark, move.path))
        await self._note(move, move)
        return move

    async def _relocated(self, machine: Machine, move: DiskMove, medium: Medium, request: MoveDiskRequest, report: Report) -> None:
        async def progressed(progress: DiskProgress) -> None:
            await report(Progress(phase="disk", done=float(progress.done_bytes), total=float(progress.total_bytes) or None, unit="bytes"))

        async def halting() -> None:
            report.point_of_no_return("the guest changes over to the new image")
            await self._note(move, msgspec.structs.replace(move, halted=machine.state is State.RUNNING))

        async def changed() -> None:
            await self._follow(machine, move)

        bytes_s = request.bandwidth_mib_s * MIB if request.bandwidth_mib_s is not None else None
        target = _node(move, machine.definition.spec)
        await relocation.relocate(
            machine.session,
            medium.node,
            target,
            progressed,
            halting=halting,
            changed=changed,
            bytes_per_s=bytes_s,
            top=_base(move, machine.definition.spec) is not None,
        )

    async def _follow(self, machine: Machine, move: DiskMove) -> None:
        """Has the definition name the new image. However long that takes: the guest must not write to it before."""
        while True:
            spec = machine.definition.spec
            disk = spec.disks[move.index]
            if isinstance(disk, ImageDisk) and disk.path == move.path:
                break
            moved = ImageDisk(
                path=move.path,
                format=move.format,
                base=_base(move, spec),
                bus=disk.bus,
                serial=disk.serial,
                discard=disk.discard,
                on_error=disk.on_error,
            )
            disks = (*spec.disks[: move.index], moved, *spec.disks[move.index + 1 :])
            try:
                await self._registry.update(machine, msgspec.structs.replace(spec, disks=disks), machine.revision)
                break
            except (NoSpace, Busy, Unknown, StaleRevision) as refusal:
                _log.error("a guest waits for its definition to be written", extra={"machine": machine.name, "error": refusal.message})
            await asyncio.sleep(WRITE_AGAIN_S)
        if machine.launch is not None:  # of which a daemon makes the definition whose database was lost
            machine.launch = msgspec.structs.replace(machine.launch, definition=machine.definition)
            await asyncio.to_thread(write_record, machine.launch.run_dir, machine.launch)

    async def _settle_later(self, machine: Machine, move: DiskMove) -> None:
        async with machine.held(VERB):
            await self._settled(machine, move)

    async def _settled(self, machine: Machine, move: DiskMove) -> None:
        """Ends a move as soon as its QEMU can be asked."""
        while True:
            await machine.when(lambda: machine.state in MOVABLE or machine.state in AT_REST, LOOK_AGAIN_S)
            try:
                return await self._settle(machine, move)
            except QmpdError as error:
                _log.warning("a move of a disk is not settled yet", extra={"machine": machine.name, "error": error.message})
            await asyncio.sleep(LOOK_AGAIN_S)

    async def _settle(self, machine: Machine, move: DiskMove) -> None:
        """Ends a move, however far it got. May be repeated. Raises what QEMU is asked with, when it cannot be."""
        found = (await self._store.read(PREFIX + move.machine)).records.get(PREFIX + move.machine)
        if found is None:
            return
        move = msgspec.msgpack.decode(found.value, type=DiskMove)
        if machine.state not in AT_REST:
            session = machine.session
            await relocation.undo(session, move.source, move.target)
            medium = (await media(session)).get(move.index)
            if medium is not None and medium.node == move.target:
                await self._follow(machine, move)
                with suppress(QemuRefused):  # it is gone already
                    await session.execute("blockdev-del", {"node-name": move.source})
            if move.halted and await run_state(session) == "paused":
                await session.execute("cont")
        disk = machine.definition.spec.disks[move.index]
        is_moved = isinstance(disk, ImageDisk) and disk.path == move.path
        await asyncio.to_thread(partial(_clear, move, is_moved=is_moved))
        await self._note(move, None)

    async def _note(self, move: DiskMove, content: DiskMove | None) -> None:
        key = PREFIX + move.machine
        found = (await self._store.read(key)).records.get(key)
        value = None if content is None else msgspec.msgpack.encode(content)
        await self._store.commit({key: 0 if found is None else found.revision}, {key: value})


def _index(spec: MachineSpec, disk: str) -> int:
    if not (disk.isascii() and disk.isdecimal() and len(disk) <= 3 and int(disk) < len(spec.disks)):
        raise NotFound(f"machine {spec.name!r} has no disk {disk}: its {len(spec.disks)} disks are counted from 0", disk=disk)
    return int(disk)


def _node(move: DiskMove, spec: MachineSpec) -> dict[str, object]:
    """The new image, opened as the plan opens one."""
    file: dict[str, object] = {"driver": "file", "filename": move.path}
    node: dict[str, object] = {"driver": move.format, "node-name": move.target, "file": file}
    if spec.disks[move.index].discard:
        node["discard"] = file["discard"] = "unmap"
    if (base := _base(move, spec)) is not None:
        node["backing"] = base_node(base)
    return node


def _base(move: DiskMove, spec: MachineSpec) -> BaseImage | None:
    """What the new image lies upon: the same as the old one, and nothing where its format cannot."""
    return base_of(spec.disks[move.index]) if move.format == "qcow2" else None


def _room(path: str) -> int | None:
    try:
        found = os.statvfs(Path(path).parent)
    except OSError:
        return None
    return found.f_bavail * found.f_frsize


def _mark(path: str) -> tuple[int, int]:
    status = Path(path).stat()
    return status.st_dev, status.st_ino


def _clear(move: DiskMove, *, is_moved: bool) -> None:
    """Removes the image that is of no use any more: the old one if qmpd made it, or the new one if the move made it. Blocks."""
    try:
        draft_of(Path(move.path)).unlink(missing_ok=True)
        if is_moved and move.own is not None:
            Path(move.own).unlink(missing_ok=True)
        elif not is_moved and move.made is not None and _mark(move.path) == move.made:
            Path(move.path).unlink()
    except FileNotFoundError:
        pass
    except OSError as error:
        _log.warning("an image that is not used any more was not removed", extra={"machine": move.machine, "error": str(error)})
