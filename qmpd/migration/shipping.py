"""What the source does to the machine it sends: the offer that is made of it, and its QEMU's part of the migration."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Final, Literal

import msgspec

from qmpd.credentials import directory
from qmpd.errors import CannotMove, MonitorUnavailable, QmpdError
from qmpd.facts import MachinePaths
from qmpd.jobs import Report
from qmpd.lifecycle import AT_REST, State
from qmpd.machine import Machine
from qmpd.migration import outgoing
from qmpd.migration.addresses import TcpAddress
from qmpd.migration.capabilities import Agreed
from qmpd.migration.ledger import Entry
from qmpd.migration.mirror import DiskCopy
from qmpd.migration.outgoing import Before, Outgoing, recall
from qmpd.migration.progress import Progress as Figures
from qmpd.migration.protocol import VERSION, Acceptance, DiskOffer, FileMark, Offer
from qmpd.migration.qemu import ask_list
from qmpd.migration.tls import ClientTls
from qmpd.migrationviews import Goal, MigrateRequest, MigrationProgress, MovedDisk
from qmpd.plan.disks import disk_path, is_read_only
from qmpd.process import boot_id
from qmpd.settings import Peer
from qmpd.views import Progress

MIB: Final = 1024 * 1024
#: The journal keeps what is reported; a bar needs no more.
REPORT_S: Final = 0.5
#: The monitor of a QEMU that lives comes back within a second, unless its main loop is blocked.
MONITOR_S: Final = 30.0
#: QEMU's run states on the way out, which say nothing of what the guest did before.
_LEAVING: Final = frozenset({"finish-migrate", "postmigrate"})


class Shipment:
    """One machine's QEMU on its way. `went`: the guest ran when it was halted."""

    def __init__(self, machine: Machine, out: Outgoing, report: Report, goal: Goal) -> None:
        self.went = machine.state is State.RUNNING
        self.figures = Figures()
        self._machine = machine
        self._outgoing = out
        self._report = report
        self._goal = goal
        self._began = asyncio.get_running_loop().time()
        self._reported = 0.0

    async def prepare(self) -> None:
        """Sets QEMU, and begins to copy disks."""
        await self._outgoing.prepare()

    async def send(self) -> None:
        """Copies disks and memory; the guest is halted, and has arrived, when this returns."""
        await self._outgoing.send(self._progressed)
        await self._outgoing.switch_over()

    async def measured(self) -> Figures:
        """What it took in the end; what was known last where QEMU does not say."""
        with suppress(QmpdError):
            self.figures = await self._outgoing.figures()
        return self.figures

    async def _progressed(self, figures: Figures) -> None:
        if self._machine.status not in _LEAVING:
            self.went = self._machine.state is State.RUNNING
        self.figures = figures
        now = asyncio.get_running_loop().time()
        if now - self._reported >= REPORT_S:
            self._reported = now
            await self._report(progress_of("memory" if figures.total_bytes else "disks", figures, now - self._began))


def progress_of(phase: str, figures: Figures, elapsed_s: float) -> Progress:
    """The figures as a job's progress."""
    disks = sum(disk.total_bytes for disk in figures.disks)
    copied = sum(disk.done_bytes for disk in figures.disks)
    total = figures.total_bytes + disks
    left = figures.remaining_bytes + disks - copied
    rate = float(figures.bytes_per_s) or None
    return Progress(
        phase=phase,
        done=float(total - left),
        total=float(total) or None,
        unit="bytes",
        rate=rate,
        migration=MigrationProgress(
            phase=phase,
            memory_total_bytes=figures.total_bytes,
            memory_remaining_bytes=figures.remaining_bytes,
            transferred_bytes=figures.transferred_bytes,
            disk_total_bytes=disks,
            disk_remaining_bytes=disks - copied,
            bandwidth_mib_s=figures.bytes_per_s / MIB if figures.bytes_per_s else None,
            dirty_mib_s=figures.dirty_bytes_per_s / MIB,
            passes=figures.passes,
            throttle_percent=figures.throttle_percent,
            expected_downtime_ms=float(figures.expected_downtime_ms) if figures.expected_downtime_ms else None,
            downtime_ms=float(figures.downtime_ms) if figures.downtime_ms else None,
            elapsed_s=elapsed_s,
        ),
    )


class Shipping:
    """Makes offers of machines, and sends their QEMUs' state."""

    def __init__(self, pki_dir: str, paths: Callable[[str], MachinePaths]) -> None:
        self._pki_dir = pki_dir
        self._paths = paths

    async def offer(self, machine: Machine, request: MigrateRequest, migration: str) -> tuple[Offer, Before]:
        """What the peer is told of a machine, and how its QEMU is before anything is changed in it.

        Raises:
            CannotMove: a machine of this kind cannot be moved.
        """
        launch, definition = machine.launch, machine.definition
        if launch is None or definition.adoption is not None:
            raise CannotMove(f"machine {machine.name!r} was started by somebody else: qmpd does not know all of it")
        disks = await self._disks(machine, request)
        offer = Offer(
            protocol=VERSION,
            id=migration,
            epoch=definition.epoch + 1,
            spec=msgspec.structs.replace(definition.spec, machine=launch.machine, accel=launch.accel),
            uuid=definition.uuid,
            created_at=definition.created_at,
            changed_at=definition.changed_at,
            state="running" if machine.state is State.RUNNING else "paused",
            machine=launch.machine,
            accel=launch.accel,
            emulator_version=launch.emulator_version,
            disks=disks,
            channels=request.channels,
            postcopy=request.goal.then == "postcopy",
            tunnel=request.tunnel,
            trial=request.dry_run,
        )
        return offer, await outgoing.look(machine.session)

    async def _disks(self, machine: Machine, request: MigrateRequest) -> tuple[DiskOffer, ...]:
        spec = machine.definition.spec
        paths = [disk_path(spec, self._paths(machine.name), index) for index in range(len(spec.disks))]
        marks = await asyncio.to_thread(lambda: [mark_of(path) for path in paths])
        sizes = await _sizes(machine) if paths else {}
        chosen = {choice.disk: choice for choice in request.disks}
        offers = []
        for index, mark in enumerate(marks):
            choice = chosen.get(index)
            how: Literal["shared", "copy", "auto"] = choice.how if choice is not None else request.storage
            offers.append(
                DiskOffer(
                    index=index,
                    how="shared" if is_read_only(spec.disks[index]) else how,
                    virtual_bytes=sizes.get(paths[index], 0),
                    mark=mark,
                    path=choice.path if choice is not None else None,
                    format=choice.format if choice is not None else None,
                )
            )
        return tuple(offers)

    @asynccontextmanager
    async def shipment(
        self, machine: Machine, entry: Entry, accepted: Acceptance, peer: Peer, goal: Goal, report: Report
    ) -> AsyncIterator[Shipment]:
        """The machine's QEMU on its way to where the peer listens. Leaving the block before the guest has arrived puts everything back."""
        endpoint = accepted.endpoint
        if endpoint is None or entry.before is None:
            raise CannotMove("the peer named no port to send to")
        host = peer.migration_address or peer.host
        copied = [disk for disk in accepted.disks if disk.how == "copy" and disk.export is not None]
        wanted = outgoing.Sending(
            memory=TcpAddress(host=host, port=endpoint.port),
            disks_at=None if endpoint.nbd_port is None else TcpAddress(host=host, port=endpoint.nbd_port),
            disks=tuple(DiskCopy(node=node_of(disk.index), export=disk.export) for disk in copied if disk.export is not None),
            tls=ClientTls(directory=await asyncio.to_thread(directory, self._pki_dir), hostname=peer.owner),
            agreed=Agreed(channels=accepted.channels, postcopy=accepted.postcopy),
            parameters={"downtime-limit": goal.downtime_ms},
            bytes_per_s=None if goal.bandwidth_mib_s is None else goal.bandwidth_mib_s * MIB,
        )
        async with Outgoing(machine.session, wanted, entry.before) as out:
            yield Shipment(machine, out, report, goal)

    async def recall(self, machine: Machine, entry: Entry) -> None:
        """Puts a machine's QEMU back to what it was before its migration began, from wherever that got to, and its guest with it."""
        await machine.when(lambda: machine.state in AT_REST or machine.state in {State.RUNNING, State.PAUSED}, MONITOR_S)
        if machine.state in AT_REST or entry.before is None:
            return
        if not machine.has_process:
            raise MonitorUnavailable(f"machine {machine.name!r} is {machine.state}")
        await recall(machine.session, entry.before)

    def moved(self, machine: Machine, accepted: Acceptance) -> tuple[MovedDisk, ...]:
        """What became of the disks."""
        spec, paths = machine.definition.spec, self._paths(machine.name)
        return tuple(
            MovedDisk(disk=disk.index, how="copied" if disk.how == "copy" else "shared", path=disk_path(spec, paths, disk.index))
            for disk in accepted.disks
        )


def node_of(index: int) -> str:
    """The block node of a disk, as the plan names it."""
    return f"disk{index}-image"


def mark_of(path: str) -> FileMark | None:
    """What tells a file. None where it cannot be looked at. Blocks."""
    try:
        status = os.stat(path)  # noqa: PTH116  a path of a definition, looked at as QEMU will
    except OSError:
        return None
    return FileMark(boot_id=boot_id(), device=status.st_dev, inode=status.st_ino, size=status.st_size)


async def _sizes(machine: Machine) -> dict[str, int]:
    """What the guest sees of each image, by its path."""
    sizes: dict[str, int] = {}
    for node in await ask_list(machine.session, "query-named-block-nodes", {"flat": True}):
        image = node.get("image")
        if isinstance(image, dict) and node.get("drv") != "file":
            sizes[str(image.get("filename"))] = int(image.get("virtual-size", 0))
    return sizes
