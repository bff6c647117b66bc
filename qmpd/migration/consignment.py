"""A machine at rest on its way to another host: all that is to be sent of it are files, which nobody changes meanwhile."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Final

from qmpd import segments
from qmpd.errors import CannotMove, PeerError
from qmpd.facts import MachinePaths
from qmpd.jobs import Report
from qmpd.machine import Machine
from qmpd.migration.consolelogs import LogSender
from qmpd.migration.extents import allocated
from qmpd.migration.fileitems import FileSender
from qmpd.migration.items import Target, log_item, targets
from qmpd.migration.parcels import ItemStanding, Parcel
from qmpd.migration.protocol import DiskOffer
from qmpd.peers import PeerDaemon
from qmpd.plan.disks import base_of
from qmpd.spec import ImageDisk, MachineSpec
from qmpd.storage import backing_at, guest_bytes
from qmpd.tasks import alongside
from qmpd.views import Progress

MIB: Final = 1024 * 1024
#: The journal keeps what is reported; a bar needs no more.
REPORT_S: Final = 0.5

_log = logging.getLogger(__name__)


def check_formats(spec: MachineSpec, disks: Iterable[DiskOffer]) -> None:
    """Raises CannotMove where a disk is to be another one's format, or upon another base: nobody rewrites a file that is sent as it is."""
    for disk in disks:
        base = base_of(spec.disks[disk.index])
        if disk.base is not None and base is not None and disk.base.path != base.path:
            message = (
                f"disk {disk.index} of a machine at rest is sent as it is, and lies upon {base.path} everywhere: not upon {disk.base.path}"
            )
            raise CannotMove(message)
        if disk.format not in {None, spec.disks[disk.index].format}:
            message = f"disk {disk.index} of a machine at rest is sent as it is, in the format that it has: not as {disk.format}"
            raise CannotMove(message)


def check_bases(spec: MachineSpec, disks: Iterable[DiskOffer]) -> None:
    """Raises CannotMove where an image would not say any more upon what it lies, once it is in another directory. Blocks."""
    for wanted in disks:
        disk = spec.disks[wanted.index]
        if not isinstance(disk, ImageDisk) or disk.base is None or wanted.path is None:
            continue
        if backing_at(disk.path, wanted.path) != os.path.realpath(disk.base.path):
            message = f"{disk.path} names what it lies upon relative to its own directory, and is to be in another one there"
            raise CannotMove(f"{message}: name it in full first (qemu-img rebase -u -b {disk.base.path} -F {disk.base.format})")


def sizes_at_rest(spec: MachineSpec, paths: Iterable[str]) -> dict[str, tuple[int, int]]:
    """What a guest sees of each image, and what that takes, by its path; without those that cannot be looked at. Blocks."""
    sizes: dict[str, tuple[int, int]] = {}
    for disk, path in zip(spec.disks, paths, strict=True):
        with suppress(OSError):
            sizes[path] = (guest_bytes(path, disk.format), max(1, allocated(path)))  # 0 would say that it is not known
    return sizes


def packed(machine: Machine, paths: MachinePaths, left: Collection[int], *, all_of_it: bool) -> tuple[Parcel, ...]:
    """What a machine at rest brings: its disks but for those that are `left` where they are, its firmware's variables, the state of a TPM
    that was used, and with `all_of_it` what tells of its past: logs, and how it ended. Blocks.

    Raises:
        CannotMove: a file of it cannot be looked at.
    """
    parcels, wanted = [], {"tpm", "stderr", "exit"} if all_of_it else {"tpm"}
    for item, target in targets(machine.definition.spec, paths, tuple(machine.consoles)).items():
        if target.kind == "disk" and int(item.removeprefix("disk-")) in left:
            continue
        if target.kind == "log" and all_of_it:
            parcels.append(_log_parcel(machine, item, target))
        elif target.kind in {"disk", "vars"} or (target.kind in wanted and Path(target.path).exists()):
            parcels.append(_file_parcel(item, target.path))
    return tuple(parcels)


def _file_parcel(item: str, path: str) -> Parcel:
    try:
        return Parcel(item=item, size=Path(path).stat().st_size, allocated=allocated(path))
    except OSError as error:
        raise CannotMove(f"{path} cannot be looked at: {error.strerror}", path=path) from error


def _log_parcel(machine: Machine, item: str, target: Target) -> Parcel:
    end = next(console.end for port, console in machine.consoles.items() if log_item(port) == item)
    there = sum(allocated(str(piece)) for _, piece in segments.pieces(target.path))
    return Parcel(item=item, size=end, allocated=min(there, end))


class Consignment:
    """The files of one machine, of which the destination takes `parcels`. `sent` says how many bytes of each went over the network.
    `files` says where each lies."""

    def __init__(
        self,
        machine: Machine,
        files: Mapping[str, Target],
        migration: str,
        parcels: tuple[Parcel, ...],
        link: PeerDaemon,
        limit_mib: int | None,
    ) -> None:
        self.sent = {parcel.item: 0 for parcel in parcels}
        self._machine = machine
        self._targets = files
        self._migration = migration
        self._parcels = parcels
        self._link = link
        self._bytes_per_s = None if limit_mib is None else limit_mib * MIB
        self._done = dict.fromkeys(self.sent, 0)
        self._began = asyncio.get_running_loop().time()

    @property
    def elapsed_s(self) -> float:
        """Seconds since it began."""
        return asyncio.get_running_loop().time() - self._began

    async def send(self, report: Report) -> None:
        """Returns when all of it is at the destination, and was read again there.

        Raises:
            PeerRefused, PeerUnavailable, PeerSilent: the destination does not take it, or does not answer.
            MigrationFailed: what arrived is not what was sent.
            CannotMove: a file cannot be read.
        """
        async with alongside(self._tell(report), f"progress:{self._machine.name}"):
            for parcel in self._parcels:
                target = self._targets[parcel.item]
                if target.kind == "log":
                    await self._send_log(parcel, target)
                    continue
                try:
                    path = await asyncio.to_thread(os.path.realpath, target.path)
                    await FileSender(self, self._migration, parcel.item, path).send(self._progressed(parcel.item))
                except OSError as error:
                    raise CannotMove(f"{target.path} cannot be read: {error.strerror}", path=target.path) from error

    # What a sender needs of the connection (`fileitems.ItemLink`).

    async def item(self, migration: str, item: str) -> ItemStanding:
        """How much of an item the destination has."""
        return await self._link.item(migration, item)

    async def put_item(self, migration: str, item: str, offset: int, data: bytes) -> ItemStanding:
        """Hands in a piece, no sooner than the bandwidth allows."""
        standing = await self._link.put_item(migration, item, offset, data)
        self.sent[item] += len(data)
        if self._bytes_per_s is not None:
            await asyncio.sleep(max(0.0, sum(self.sent.values()) / self._bytes_per_s - self.elapsed_s))
        return standing

    async def _send_log(self, parcel: Parcel, target: Target) -> None:
        """A log is sent as it is kept, and what does not arrive now follows when the machine is there."""
        port, console = next(one for one in self._machine.consoles.items() if log_item(one[0]) == parcel.item)
        sender = LogSender(port, console, partial(self.put_item, self._migration, parcel.item))
        try:
            await sender.finish(0, parcel.size)
        except (PeerError, OSError) as error:
            _log.info("a log falls behind its machine", extra={"path": target.path, "error": str(error)})
        self._done[parcel.item] = parcel.size

    def _progressed(self, item: str) -> Callable[[int, int], None]:
        def take(done: int, _of: int) -> None:
            self._done[item] = done

        return take

    async def _tell(self, report: Report) -> None:
        total = sum(parcel.size for parcel in self._parcels)
        while True:
            done, rate = sum(self._done.values()), sum(self.sent.values()) / max(self.elapsed_s, REPORT_S)
            eta_s = (total - done) / rate if rate else None
            await report(Progress(phase="files", done=float(done), total=float(total), unit="bytes", rate=rate, eta_s=eta_s))
            await asyncio.sleep(REPORT_S)
