"""How a machine that comes will be here: its definition with the paths of this host, and how each of its disks comes."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from qmpd.errors import CannotMove
from qmpd.facts import MachinePaths
from qmpd.migration.diskoffers import node_of
from qmpd.migration.likeness import DestinationFacts
from qmpd.migration.parcels import Parcel
from qmpd.migration.premises import is_shared
from qmpd.migration.protocol import BaseOffer, DiskAccepted, DiskOffer, Offer
from qmpd.migration.retargeting import DiskTarget, Retarget, retargeted
from qmpd.plan import BlankImage
from qmpd.plan.disks import base_of, disk_path
from qmpd.spec import ImageDisk, MachineSpec
from qmpd.storage import examine


class Arranged(msgspec.Struct, frozen=True, kw_only=True):
    """How a machine will be here: its definition with the paths of this host, and how each disk comes.

    `made` are images that are made outside of the machine's own directory, `parcels` what else comes.
    """

    spec: MachineSpec
    disks: tuple[DiskAccepted, ...] = ()
    made: tuple[BlankImage, ...] = ()
    parcels: tuple[Parcel, ...] = ()


def arranged(offer: Offer, spec: MachineSpec, facts: DestinationFacts, own: MachinePaths, pools: Sequence[str]) -> Arranged:
    """Which disks both hosts see and which are copied, and the definition with the paths of those here. `facts` says what is here for them
    to lie upon, `own` where the machine's own files are. Changes nothing. Blocks.

    Raises:
        CannotMove: a disk cannot come like this.
    """
    shared = {wanted.index for wanted in offer.disks if wanted.index < len(spec.disks) and is_shared(wanted, spec.disks[wanted.index])}
    copied = {wanted.index: wanted for wanted in offer.disks if wanted.index not in shared}
    based = {disk.index for disk in facts.disks if disk.based}
    bases = {index: wanted.base for index, wanted in copied.items() if index in based and wanted.base is not None}
    wishes = {index: DiskTarget(path=wanted.path, format=wanted.format, base=_paths(bases.get(index))) for index, wanted in copied.items()}
    here = retargeted(spec, Retarget(disks=wishes))
    images = {index: disk for index in copied if isinstance(disk := here.disks[index], ImageDisk)}
    for index, disk in images.items():
        _check_target(index, disk.path, pools)
    if offer.state == "stopped":
        _check_at_rest(offer, spec, here, shared)
    paths = [disk_path(here, own, index) for index in range(len(here.disks))]
    return Arranged(
        spec=here,
        disks=tuple(
            _accepted(wanted, offer, paths[wanted.index], shared=wanted.index in shared, base=_path(bases.get(wanted.index)))
            for wanted in offer.disks
        ),
        made=tuple(_blank(disk, copied[index]) for index, disk in images.items() if offer.state != "stopped"),
        parcels=tuple(parcel for parcel in offer.parcels if parcel.item not in {f"disk-{index}" for index in shared}),
    )


def bases_here(offer: Offer) -> tuple[BaseOffer, ...]:
    """What the disks of an offer lie upon here; its definition has the paths of this host."""
    found = ((wanted.base, base_of(offer.spec.disks[wanted.index])) for wanted in offer.disks)
    return tuple(base for base, here in found if base is not None and here is not None and base.path == here.path)


def _path(base: BaseOffer | None) -> str | None:
    return base.path if base is not None else None


def _paths(base: BaseOffer | None) -> tuple[str, ...]:
    return tuple(layer.path for layer in base.layers()) if base is not None else ()


def _check_target(index: int, path: str, pools: Sequence[str]) -> None:
    found = examine([path], pools)[path]
    if found.kind == "denied" or (found.refusal and found.kind != "file"):
        raise CannotMove(f"disk {index} cannot be copied to {path}: {found.refusal or 'permission denied'}")
    if found.kind != "missing":
        raise CannotMove(f"disk {index} is to be copied to {path}, which exists here: name another path for it")


def _check_at_rest(offer: Offer, spec: MachineSpec, here: MachineSpec, shared: set[int]) -> None:
    brought = {parcel.item for parcel in offer.parcels}
    for index, disk in enumerate(here.disks):
        if index in shared:
            continue
        if f"disk-{index}" not in brought or disk.format != spec.disks[index].format:
            raise CannotMove(f"disk {index} of a machine at rest has to be sent as it is, in the format that it has")
        base = base_of(spec.disks[index])
        if base is not None and base_of(disk) != base:
            raise CannotMove(f"disk {index} of a machine at rest is sent as it is, and what it lies upon is not here at {base.path}")


def _accepted(wanted: DiskOffer, offer: Offer, path: str, *, shared: bool, base: str | None) -> DiskAccepted:
    if shared:
        return DiskAccepted(index=wanted.index, how="shared", path=path)
    export = None if offer.state == "stopped" else node_of(wanted.index)
    return DiskAccepted(index=wanted.index, how="copy", path=path, export=export, base=base)


def _blank(disk: ImageDisk, wanted: DiskOffer) -> BlankImage:
    return BlankImage(path=disk.path, format=disk.format, size_bytes=wanted.virtual_bytes, base=disk.base)
