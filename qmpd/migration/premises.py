"""What a host has for a machine that may come to it: files, room, ports, names, limits. Only looks; starts and makes nothing."""

from __future__ import annotations

import asyncio
import os
import socket
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from qmpd.errors import CannotMove, QmpdError
from qmpd.facts import FileFacts, MachinePaths
from qmpd.hostcheck.resources import available_bytes
from qmpd.hostcheck.tree import HostTree
from qmpd.migration.bases import Bases
from qmpd.migration.diskoffers import mark_of
from qmpd.migration.fingerprints import Fingerprints
from qmpd.migration.likeness import BaseThere, DestinationFacts, HostPort, TargetDisk
from qmpd.migration.protocol import VERSION, DiskOffer, FileMark, Offer
from qmpd.migration.retargeting import host_findings, host_paths
from qmpd.plan.disks import base_of, disk_path
from qmpd.planning import Planning
from qmpd.registry import Registry
from qmpd.settings import Settings
from qmpd.spec import BlankDisk, ImageDisk, MachineSpec, UserNic
from qmpd.storage import examine

MIB: Final = 1024 * 1024
_KINDS: Final = {"tcp": socket.SOCK_STREAM, "udp": socket.SOCK_DGRAM}
#: Formats whose images grow as they are written to: their size says nothing about which image it is.
_GROWING: Final = frozenset({"qcow2"})


class Premises:
    """Looks at one host on behalf of those that offer machines to it."""

    def __init__(self, settings: Settings, registry: Registry, planning: Planning, fingerprints: Fingerprints, bases: Bases) -> None:
        self._pools = settings.pools
        self._registry = registry
        self._planning = planning
        self._fingerprints = fingerprints
        self._bases = bases

    async def of(self, offer: Offer) -> DestinationFacts:
        """Everything but its name, its UUID and its QEMU.

        Raises:
            CannotMove: the offer does not fit its own definition.
            NotYet: what a disk lies upon is still being read.
        """
        spec = offer.spec
        try:
            limits = await self._planning.limits_unkept(spec)
        except QmpdError:
            limits = {}  # there is no such board here, or no emulator: whoever starts it finds out
        paths = self._registry.paths(spec.name)
        bases = {wanted.index: await self._bases.found(wanted.base) for wanted in _based(offer) if wanted.base is not None}
        facts = await asyncio.to_thread(self._looked, offer, paths, bases)
        holders = {nic.mac: machine.name for machine in self._registry for nic in machine.definition.spec.nics if nic.mac is not None}
        taken = {nic.mac: holders[nic.mac] for nic in spec.nics if nic.mac in holders and holders[nic.mac] != spec.name}
        return msgspec.structs.replace(facts, limits_unkept=limits, macs_taken={mac: holder for mac, holder in taken.items() if mac})

    def named(self, offer: Offer) -> tuple[bool, str | None]:
        """Whether its name is taken, and which other machine has its UUID."""
        name = offer.spec.name
        holders = (machine.name for machine in self._registry if machine.definition.uuid == offer.uuid and machine.name != name)
        return name in self._registry.names or name in self._registry.damaged, next(holders, None)

    def _looked(self, offer: Offer, paths: MachinePaths, bases: Mapping[int, BaseThere]) -> DestinationFacts:
        return DestinationFacts(
            protocols=(VERSION,),
            firmware=self._fingerprints.of(offer.spec),
            disks=tuple(self._targets(offer, paths, bases)),
            ports_taken=tuple(port for port in forwarded(offer.spec) if _is_taken(port)),
            free_memory_mib=available_bytes(HostTree()) // MIB or None,
            findings=tuple(host_findings(offer.spec, examine([named.path for named in host_paths(offer.spec)], self._pools))),
        )

    def _targets(self, offer: Offer, paths: MachinePaths, bases: Mapping[int, BaseThere]) -> Iterator[TargetDisk]:
        spec = offer.spec
        for wanted in offer.disks:
            if wanted.index >= len(spec.disks):
                raise CannotMove(f"disk {wanted.index} is offered, and the definition has only {len(spec.disks)}")
        shared = {wanted.index for wanted in offer.disks if is_shared(wanted, spec.disks[wanted.index])}
        places = {wanted.index: _target(wanted, spec, paths) for wanted in offer.disks}
        based = {index for index, base in bases.items() if base.same}
        room = _room(
            {
                wanted.index: (places[wanted.index], needed_bytes(wanted, based=wanted.index in based))
                for wanted in offer.disks
                if wanted.index not in shared
            }
        )
        for wanted in offer.disks:
            index, path = wanted.index, places[wanted.index]
            own = isinstance(spec.disks[index], BlankDisk)
            looked = FileFacts(kind="file" if Path(path).exists() else "missing") if own else examine([path], self._pools)[path]
            same = _is_same(wanted, path, spec.disks[index].format)
            yield TargetDisk(
                index=index,
                path=path,
                how="shared" if index in shared else "copy",
                exists=looked.kind not in {"missing", "denied"},
                refusal=_refusal(looked, wanted_here=index in shared and not _is_overlay(spec.disks[index], looked))
                or _placeless(offer, path, own=own or index in shared),
                same=same,
                format=None if same else looked.magic,
                needed_bytes=room[index].needed_bytes if index in room else 0,
                free_bytes=room[index].free_bytes if index in room else None,
                base=bases.get(index),
            )


class _Room(NamedTuple):
    needed_bytes: int
    free_bytes: int


def needed_bytes(wanted: DiskOffer, *, based: bool) -> int:
    """What a copy of a disk takes: what it has now, where that is known, without its base where it is `based` on one that is there. It may
    grow to what the guest sees."""
    below = wanted.base.used_bytes if wanted.base is not None and not based else 0
    return min(wanted.used_bytes + below, wanted.virtual_bytes or wanted.used_bytes + below) if wanted.used_bytes else wanted.virtual_bytes


def _based(offer: Offer) -> Iterator[DiskOffer]:
    """The disks whose base is to be here as well: what is copied to another format has none."""
    for wanted in offer.disks:
        disk = offer.spec.disks[wanted.index] if wanted.index < len(offer.spec.disks) else None
        if disk is not None and base_of(disk) is not None and wanted.base is not None and wanted.format in {None, "qcow2"}:
            yield wanted


def _is_overlay(disk: ImageDisk | BlankDisk, looked: FileFacts) -> bool:
    """Whether all that could be said against an image is that it has a base, which the definition names."""
    return base_of(disk) is not None and looked.backing is not None


def forwarded(spec: MachineSpec) -> tuple[HostPort, ...]:
    """The ports of the host that a definition names; those that the system chooses are none of them."""
    return tuple(
        HostPort(protocol=forward.protocol, address=forward.host_address, port=forward.host_port)
        for nic in spec.nics
        if isinstance(nic, UserNic)
        for forward in nic.forwards
        if forward.host_port
    )


def is_shared(wanted: DiskOffer, disk: ImageDisk | BlankDisk) -> bool:
    """Whether an image is the same file on both hosts. Who says so must be right where it can be looked at. Blocks."""
    if isinstance(disk, BlankDisk):
        return False
    if wanted.how != "auto":
        return wanted.how == "shared"
    mark, there = mark_of(disk.path), wanted.mark
    # Not their sizes: an image may have grown since the source looked at it.
    return mark is not None and there is not None and (mark.boot_id, *_inode(mark)) == (there.boot_id, *_inode(there))


def _target(wanted: DiskOffer, spec: MachineSpec, paths: MachinePaths) -> str:
    if isinstance(spec.disks[wanted.index], ImageDisk) and wanted.path is not None and not is_shared(wanted, spec.disks[wanted.index]):
        return wanted.path
    return disk_path(spec, paths, wanted.index)


def _is_same(wanted: DiskOffer, path: str, image_format: str) -> bool | None:
    """Whether what is at a path is the source's file. None: it may be."""
    mark, there = mark_of(path), wanted.mark
    if mark is None or there is None:
        return None
    if mark.boot_id == there.boot_id:
        return _inode(mark) == _inode(there)
    return False if image_format not in _GROWING and mark.size != there.size else None


def _refusal(looked: FileFacts, *, wanted_here: bool) -> str:
    """Why this daemon may not use a path; what is wrong with an image matters only where it is to be used."""
    if looked.refusal is not None and (wanted_here or looked.kind != "file"):
        return looked.refusal
    return "permission denied" if looked.kind == "denied" else ""


def _placeless(offer: Offer, path: str, *, own: bool) -> str:
    """Why the image of a machine at rest cannot be put where it is to be. For others a directory is made."""
    if own or offer.state != "stopped" or Path(path).parent.is_dir():
        return ""
    return f"there is no directory {Path(path).parent}"


def _inode(mark: FileMark) -> tuple[int, int]:
    return mark.device, mark.inode


def _room(places: dict[int, tuple[str, int]]) -> dict[int, _Room]:
    """What the file systems of these paths have free, and what all that goes there needs. What cannot be looked at is left out."""
    systems: dict[int, tuple[int, int]] = {}
    for index, (path, _) in places.items():
        try:
            where = _nearest(path)
            found = os.statvfs(where)
            systems[index] = (where.stat().st_dev, found.f_bavail * found.f_frsize)
        except OSError:
            continue
    needed: Counter[int] = Counter()
    for index, (device, _) in systems.items():
        needed[device] += places[index][1]
    return {index: _Room(needed[device], free) for index, (device, free) in systems.items()}


def _nearest(path: str) -> Path:
    """The directory that a file would be made in, or the nearest above that is there."""
    return next(above for above in Path(path).parents if above.is_dir())


def _is_taken(port: HostPort) -> bool:
    with closing(socket.socket(socket.AF_INET, _KINDS[port.protocol])) as attempt:
        if port.protocol == "tcp":
            attempt.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as QEMU does: connections that have ended are in nobody's way
        try:
            attempt.bind((port.address, port.port))
            if port.protocol == "tcp":
                attempt.listen(1)
        except (OSError, ValueError):
            return True
    return False
