"""Fragments for disks: the block graph, the devices and the controllers they need."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import Final

from qmpd.argv import Option, document, pairs
from qmpd.board import DiskBus
from qmpd.facts import MachinePaths
from qmpd.plan.launch import BlankImage
from qmpd.plan.resolution import Resolved, disk_bus, on_bus
from qmpd.spec import BaseImage, BlankDisk, BootDevice, Disk, DiskErrors, ImageDisk, MachineSpec

MIB: Final = 1024 * 1024
#: The devices that can halt the guest when their image fails. All others give every error to the guest.
HALTING: Final = frozenset(
    {"ide-cd", "ide-hd", "scsi-cd", "scsi-hd", "usb-storage", "virtio-blk-ccw", "virtio-blk-device", "virtio-blk-pci"}
)
#: What QEMU is told for each policy but its own default, which is `enospc` for what is written and `report` for what is read.
ERROR_OPTIONS: Final[dict[DiskErrors, dict[str, object]]] = {
    "enospc": {},
    "stop": {"werror": "stop", "rerror": "stop"},
    "report": {"werror": "report", "rerror": "report"},
    "ignore": {"werror": "ignore", "rerror": "ignore"},
}
#: A disk's device, by its id or its path (virtio's backend is below it).
_DEVICE: Final = re.compile(r"(?:^|/)disk([0-9]+)(?:/|$)")


def disk_path(spec: MachineSpec, paths: MachinePaths, index: int) -> str:
    """The image behind disk `index` of a definition."""
    disk = spec.disks[index]
    return disk.path if isinstance(disk, ImageDisk) else paths.disk(index, disk.format)


def image_path(machine: Resolved, index: int) -> str:
    """The image behind disk `index`."""
    return disk_path(machine.spec, machine.world.paths, index)


def blank_images(machine: Resolved) -> tuple[BlankImage, ...]:
    """The images qmpd has to make."""
    return tuple(
        BlankImage(path=image_path(machine, index), format=disk.format, size_bytes=disk.size_mib * MIB)
        for index, disk in enumerate(machine.spec.disks)
        if isinstance(disk, BlankDisk)
    )


def is_cdrom(disk: Disk) -> bool:
    """Whether the guest sees a CD-ROM drive."""
    return isinstance(disk, ImageDisk) and disk.media == "cdrom"


def is_read_only(disk: Disk) -> bool:
    """Whether QEMU may open the image for reading only."""
    return isinstance(disk, ImageDisk) and (disk.read_only or disk.media == "cdrom")


def base_of(disk: Disk) -> BaseImage | None:
    """What lies below the image of a disk, if anything does."""
    return disk.base if isinstance(disk, ImageDisk) else None


def disk_of(device: str) -> int | None:
    """The place in the definition of the disk that a device of the plan is, by its id or its path; None where it is none."""
    found = _DEVICE.search(device)
    return int(found[1]) if found is not None else None


def layers(disk: Disk) -> Iterator[tuple[int, BaseImage]]:
    """All that lies below the image of a disk, and how deep each lies: 1 is what the image was made upon."""
    base = base_of(disk)
    return enumerate(base.layers(), 1) if base is not None else iter(())


def boot_index(machine: Resolved, kind: BootDevice, ordinal: int) -> int | None:
    """The boot index of the `ordinal`-th device of a kind: all of the first kind in `boot_order`, then all of the next."""
    order = machine.spec.boot_order
    if kind not in order:
        return None
    counts: Counter[BootDevice] = Counter("cdrom" if is_cdrom(disk) else "disk" for disk in machine.spec.disks)
    counts["network"] = len(machine.spec.nics)
    return sum(counts[earlier] for earlier in order[: order.index(kind)]) + ordinal


def disks(machine: Resolved) -> list[Option]:
    """All disks in their order, each after the controller that the first of its kind needs."""
    options: list[Option] = []
    used: Counter[str] = Counter()
    of_kind: Counter[BootDevice] = Counter()
    for index, disk in enumerate(machine.spec.disks):
        name, bus = disk_bus(disk, machine.board)
        if name is None or bus is None:
            raise ValueError(f"disk {index} has no bus on this board: the definition was not validated")
        kind: BootDevice = "cdrom" if is_cdrom(disk) else "disk"
        if bus.controller is not None and used[name] == 0:
            options.append(document("device", {"driver": bus.controller, "id": f"{name}-controller", **on_bus(machine.board)}))
        if bus.drive_interface is not None:
            options.append(_board_slot(machine, index, bus, used[name]))
        else:
            options.append(_block_node(machine, index))
            options.append(_device(machine, index, bus, name, used[name], boot_index(machine, kind, of_kind[kind])))
        used[name] += 1
        of_kind[kind] += 1
    return options


def halts_on_error(disk: Disk, bus: DiskBus) -> bool:
    """Whether the guest can be halted when the image of a disk on this bus fails."""
    return (bus.cdrom_device if is_cdrom(disk) else bus.device) in HALTING


def _block_node(machine: Resolved, index: int) -> Option:
    disk = machine.spec.disks[index]
    file: dict[str, object] = {"driver": "file", "node-name": f"disk{index}-file", "filename": image_path(machine, index)}
    node: dict[str, object] = {"driver": disk.format, "node-name": f"disk{index}-image", "read-only": is_read_only(disk), "file": file}
    if disk.discard and not is_read_only(disk):
        node["discard"] = file["discard"] = "unmap"
    if (base := base_of(disk)) is not None:
        node["backing"] = base_node(base)
    return document("blockdev", node)


def base_node(base: BaseImage) -> dict[str, object]:
    """What lies below an image, as QEMU is told: in full, down to the lowest layer, so that no header makes it open another file."""
    node: dict[str, object] = {"driver": base.format, "read-only": True, "file": {"driver": "file", "filename": base.path}}
    below = base_node(base.base) if base.base is not None else None
    return node | ({"backing": below} if base.format == "qcow2" else {})


def _device(machine: Resolved, index: int, bus: DiskBus, name: str, position: int, boot: int | None) -> Option:
    disk = machine.spec.disks[index]
    device: dict[str, object] = {
        "driver": bus.cdrom_device if is_cdrom(disk) else bus.device,
        "id": f"disk{index}",
        "drive": f"disk{index}-image",
    }
    if bus.bus is not None:
        device["bus"] = bus.bus.format(index=position // bus.units)
    elif bus.controller is not None:
        device["bus"] = f"{name}-controller.0"
    else:
        device |= on_bus(machine.board)
    serial = disk.serial or (f"disk{index}" if bus.needs_serial else None)
    if serial is not None:
        device["serial"] = serial
    if boot is not None:
        device["bootindex"] = boot
    return document("device", device | ERROR_OPTIONS[disk.on_error])


def _board_slot(machine: Resolved, index: int, bus: DiskBus, position: int) -> Option:
    disk = machine.spec.disks[index]
    values: dict[str, str | int | bool | None] = {
        "if": bus.drive_interface,
        "index": position,
        "id": f"disk{index}",
        "media": "cdrom" if is_cdrom(disk) else None,
        "format": disk.format,
        "read-only": True if is_read_only(disk) else None,
        "file.driver": "file",
        "file.filename": image_path(machine, index),
    }
    for depth, layer in layers(disk):
        named = {"driver": layer.format, "file.driver": "file", "file.filename": layer.path, "read-only": True}
        values |= {f"{'backing.' * depth}{key}": value for key, value in named.items()}
    return pairs("drive", "", values)
