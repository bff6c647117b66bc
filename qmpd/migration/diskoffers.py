"""What a destination is told of the disks of a machine: how each is to go, how large it is, and what its image lies upon."""

from __future__ import annotations

import asyncio
import os
from typing import Literal

from qmpd.errors import CannotMove, HostError
from qmpd.facts import MachinePaths
from qmpd.lifecycle import AT_REST
from qmpd.machine import Machine
from qmpd.migration.bases import Bases
from qmpd.migration.consignment import sizes_at_rest
from qmpd.migration.protocol import BaseOffer, DiskOffer, FileMark
from qmpd.migration.qemu import ask_list
from qmpd.migrationviews import DiskChoice, MigrateRequest
from qmpd.plan.disks import base_of, disk_path, is_read_only
from qmpd.process import boot_id
from qmpd.spec import Disk


async def disk_offers(machine: Machine, request: MigrateRequest, own: MachinePaths, bases: Bases) -> tuple[DiskOffer, ...]:
    """The disks of a machine, as the request wants them to go. Waits until what they lie upon has been read.

    Raises:
        CannotMove: that cannot be read, or a base is named for a disk that has none.
    """
    spec = machine.definition.spec
    paths = [disk_path(spec, own, index) for index in range(len(spec.disks))]
    marks = await asyncio.to_thread(lambda: [mark_of(path) for path in paths])
    at_rest = machine.state in AT_REST
    sizes = await (asyncio.to_thread(sizes_at_rest, spec, paths) if at_rest else _sizes(machine)) if paths else {}
    chosen = {choice.disk: choice for choice in request.disks}
    offers = []
    for index, mark in enumerate(marks):
        disk, choice = spec.disks[index], chosen.get(index)
        how: Literal["shared", "copy", "auto"] = choice.how if choice is not None else request.storage
        how = "shared" if is_read_only(disk) else how
        virtual, used = sizes.get(paths[index]) or sizes.get(node_of(index), (0, 0))
        offers.append(
            DiskOffer(
                index=index,
                how=how,
                virtual_bytes=virtual,
                used_bytes=used,
                mark=mark,
                path=choice.path if choice is not None else None,
                format=choice.format if choice is not None else None,
                base=await _base(disk, index, choice, bases),
            )
        )
    return tuple(offers)


async def _base(disk: Disk, index: int, choice: DiskChoice | None, bases: Bases) -> BaseOffer | None:
    base, there = base_of(disk), choice.base if choice is not None else None
    if there is not None and (base is None or (choice is not None and choice.how == "shared")):
        what = "lies upon nothing" if base is None else "is to be shared, and its definition names what it lies upon"
        raise CannotMove(f"disk {index} {what}: leave its base out")
    if base is None:
        return None
    try:
        return await bases.offered(base, there)
    except HostError as error:
        raise CannotMove(f"what disk {index} lies upon cannot be compared with the destination's: {error.message}") from error


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


async def _sizes(machine: Machine) -> dict[str, tuple[int, int]]:
    """What the guest sees of each image, and what the image has of it, by its path and by its node: of one upon a base QEMU may name more
    than the path."""
    sizes: dict[str, tuple[int, int]] = {}
    for node in await ask_list(machine.session, "query-named-block-nodes", {"flat": True}):
        image = node.get("image")
        if isinstance(image, dict) and node.get("drv") != "file":
            found = (int(image.get("virtual-size", 0)), int(image.get("actual-size", 0)))
            sizes |= {str(image.get("filename")): found, str(node.get("node-name")): found}
    return sizes
