"""Checks on disks and NICs."""

from __future__ import annotations

import ipaddress
from collections import Counter
from collections.abc import Iterator
from typing import Final

from qmpd.board import DiskBus
from qmpd.errors import Problem
from qmpd.plan.disks import halts_on_error, is_cdrom, is_read_only, layers
from qmpd.plan.resolution import disk_bus, mac_address, nic_model
from qmpd.spec import MAX_LAYERS, BaseImage, BlankDisk, Disk, ImageDisk, MachineSpec, UserNic
from qmpd.validation.subject import Subject, choices, file_problems, problem

#: The multicast bit of a MAC address (IEEE 802.3, I/G bit).
MULTICAST: Final = 1


def disks(subject: Subject) -> Iterator[Problem]:
    """Every disk must have a bus with room on it, and an image that is what the definition says."""
    on_bus: Counter[str] = Counter()
    for index, disk in enumerate(subject.spec.disks):
        where = f"disks[{index}]"
        name, bus = disk_bus(disk, subject.board)
        if name is None or bus is None:
            known = choices(subject.board.disks) or "none at all"
            yield problem(f"{where}.bus", f"board {subject.named.id!r} has no disk bus {name or 'by default'!r}; it has {known}")
        else:
            on_bus[name] += 1
            if on_bus[name] > bus.limit:
                yield problem(f"{where}.bus", f"bus {name!r} of board {subject.named.id!r} takes at most {bus.limit} disk(s)")
            yield from _suitable(subject, disk, name, bus, where)
        if isinstance(disk, ImageDisk):
            yield from _image(subject, disk, where)


def _suitable(subject: Subject, disk: Disk, name: str, bus: DiskBus, where: str) -> Iterator[Problem]:
    emulator = subject.world.emulator
    if bus.gone_in is not None and emulator.major_version >= bus.gone_in:
        lacking = f"{emulator.path} ({emulator.version}) has bus {name!r} of board {subject.named.id!r}"
        yield problem(f"{where}.bus", f"{lacking} with default devices only, which qmpd leaves out")
    if is_cdrom(disk) and bus.cdrom_device is None and bus.drive_interface not in {"ide", "scsi"}:
        yield problem(f"{where}.media", f"bus {name!r} of board {subject.named.id!r} takes no CD-ROM")
    if disk.on_error != "enospc" and not halts_on_error(disk, bus):
        yield problem(f"{where}.on_error", f"bus {name!r} of board {subject.named.id!r} gives every error to the guest; leave on_error out")
    if bus.drive_interface == "sd":
        yield from _card_size(subject, disk, where)


def _image(subject: Subject, disk: ImageDisk, where: str) -> Iterator[Problem]:
    base = disk.base
    found = list(file_problems(subject, disk.path, f"{where}.path", writable=not is_read_only(disk), based=base is not None))
    yield from found
    facts = subject.file(disk.path)
    if not found and disk.format == "qcow2" and facts.magic != "qcow2":
        yield problem(f"{where}.format", f"{disk.path} is not a qcow2 image; state format = 'raw' if it is a raw one")
    elif base is not None and len(list(base.layers())) > MAX_LAYERS:
        yield problem(f"{where}.base", f"more than {MAX_LAYERS} layers lie below this image: flatten some of them with qemu-img convert")
    elif base is not None:
        yield from _based(subject, disk, base, where, seen=not found)


def _based(subject: Subject, above: ImageDisk | BaseImage, base: BaseImage, where: str, *, seen: bool) -> Iterator[Problem]:
    """A base must be what the image `above` was made upon: with another one the guest would find another disk. So must what it lies upon
    itself, of which its header says what it is, and the definition whether that may be."""
    below = subject.file(base.path)
    if below.backing is not None and base.base is None:
        message = f"{base.path} lies upon {below.backing} itself: name that as its base, or flatten it with qemu-img convert"
        yield problem(f"{where}.base.path", message)
        return
    found = list(file_problems(subject, base.path, f"{where}.base.path", based=base.base is not None))
    yield from found
    if above.format != "qcow2":
        yield problem(f"{where}.base", f"a {above.format} image has nothing below it; leave base out")
    elif not found and base.format == "qcow2" and below.magic != "qcow2":
        yield problem(f"{where}.base.format", f"{base.path} is not a qcow2 image; state format = 'raw' if it is a raw one")
    elif not found and seen and (backing := subject.file(above.path).backing) != (below.real_path or base.path):
        made = f"upon {backing}" if backing is not None else "upon nothing"
        yield problem(f"{where}.base.path", f"{above.path} was made {made}: name that (qemu-img rebase -u, where the file was moved)")
    if base.base is not None:
        yield from _based(subject, base, base.base, f"{where}.base", seen=not found)


def _card_size(subject: Subject, disk: Disk, where: str) -> Iterator[Problem]:
    size = disk.size_mib * 1024 * 1024 if isinstance(disk, BlankDisk) else subject.file(disk.path).size
    raw = isinstance(disk, BlankDisk) or disk.format == "raw"
    if raw and size > 0 and size & (size - 1):
        yield problem(
            where, f"an SD card must have a power of two as its size, and this one has {size} bytes; enlarge it with qemu-img resize"
        )


def disk_changes(before: MachineSpec, after: MachineSpec) -> list[Problem]:
    """What a replacement would do to disks that qmpd made: each has its file by its place, and its size was given once."""
    found = []
    for index, disk in enumerate(before.disks):
        if not isinstance(disk, BlankDisk):
            continue
        now = after.disks[index] if index < len(after.disks) else None
        if not isinstance(now, BlankDisk) or (now.size_mib, now.format) != (disk.size_mib, disk.format):
            message = f"was made for this machine as a {disk.size_mib} MiB {disk.format} disk, and must stay in its place as it is"
            found.append(problem(f"disks[{index}]", message))
    return found


def shared_images(subject: Subject) -> Iterator[Problem]:
    """One image must not be attached twice where one of the two may write."""
    seen: dict[str, tuple[int, bool]] = {}
    for index, disk in enumerate(subject.spec.disks):
        if not isinstance(disk, ImageDisk):
            continue
        named = [("path", disk.path, is_read_only(disk)), *((f"{'base.' * depth}path", layer.path, True) for depth, layer in layers(disk))]
        for field, path, read_only in named:
            real = subject.file(path).real_path or path
            if real in seen and not (read_only and seen[real][1]):
                yield problem(f"disks[{index}].{field}", f"{path} is already disks[{seen[real][0]}]; both must be read_only for that")
            seen.setdefault(real, (index, read_only))


def nics(subject: Subject) -> Iterator[Problem]:
    """Every NIC must be of a model the board takes, and its forwards must be possible."""
    of_model: Counter[str] = Counter()
    for index, nic in enumerate(subject.spec.nics):
        where = f"nics[{index}]"
        name, model = nic_model(nic, subject.board)
        if name is None or model is None:
            known = choices(subject.board.nics) or "none at all"
            yield problem(f"{where}.model", f"board {subject.named.id!r} has no NIC model {name or 'by default'!r}; it has {known}")
            continue
        of_model[name] += 1
        if of_model[name] > model.limit:
            yield problem(f"{where}.model", f"board {subject.named.id!r} takes at most {model.limit} NIC(s) of model {name!r}")


def addresses(subject: Subject) -> Iterator[Problem]:
    """MAC addresses must be unicast and different, host ports free of each other, host addresses addresses."""
    macs: dict[str, int] = {}
    ports: dict[tuple[str, int], str] = {}
    for index, nic in enumerate(subject.spec.nics):
        mac = mac_address(subject.spec, index)
        if int(mac[:2], 16) & MULTICAST:
            yield problem(f"nics[{index}].mac", f"{mac} is a multicast address")
        if mac in macs:
            yield problem(f"nics[{index}].mac", f"{mac} is already the address of nics[{macs[mac]}]")
        macs.setdefault(mac, index)
        if isinstance(nic, UserNic):
            yield from _forwards(nic, index, ports)


def _forwards(nic: UserNic, index: int, ports: dict[tuple[str, int], str]) -> Iterator[Problem]:
    for position, forward in enumerate(nic.forwards):
        where = f"nics[{index}].forwards[{position}]"
        try:
            ipaddress.IPv4Address(forward.host_address)
        except ValueError:
            yield problem(f"{where}.host_address", f"{forward.host_address!r} is not an IPv4 address")
        key = (forward.protocol, forward.host_port)
        if forward.host_port and key in ports:
            yield problem(f"{where}.host_port", f"{forward.protocol} port {forward.host_port} is already taken by {ports[key]}")
        ports.setdefault(key, where)
