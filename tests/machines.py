"""Definitions of machines that run our own guests, as a user would write them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

import msgspec

from qmpd.spec import BiosFirmware, Disk, ImageDisk, Kernel, MachineSpec, NoFirmware
from tests.guests.build import Guest


def spec_of(guest: Guest, name: str, **changes: object) -> MachineSpec:
    """The definition that boots a guest on its board, with further fields set."""
    kernel = Kernel(image=str(guest.file), console=False) if guest.how == "kernel" else None
    disks: tuple[Disk, ...] = ()
    if guest.how in {"disk", "floppy"}:
        bus = "floppy" if guest.how == "floppy" else "ide"
        disks = (ImageDisk(path=str(guest.file), format="raw", bus=bus, read_only=False),)
    spec = MachineSpec(name=name, board=guest.board, accel="tcg", memory_mib=guest.memory_mib, kernel=kernel, disks=disks)
    if "none" in guest.options and "-bios" in guest.options:
        spec = msgspec.structs.replace(spec, firmware=NoFirmware())
    if guest.how == "bios":
        spec = msgspec.structs.replace(spec, firmware=BiosFirmware(path=str(guest.file)))
    return msgspec.structs.replace(spec, **changes)


#: Above what any guest of ours uses, and below the end of a laden one's memory.
LADEN_FROM: Final = 0x1000000
LADEN_BYTES: Final = 16 * 1024 * 1024
LADEN_MIB: Final = 64


def laden(spec: MachineSpec, directory: Path) -> MachineSpec:
    """The same with noise in its memory, which takes long to send where little is sent per second. What a guest uses itself does not."""
    noise = directory / "noise"
    noise.write_bytes(os.urandom(LADEN_BYTES))
    device = {"driver": "loader", "file": str(noise), "addr": LADEN_FROM, "force-raw": True}
    return msgspec.structs.replace(spec, memory_mib=LADEN_MIB, devices=(*spec.devices, device))


def copy_of(guest: Guest, directory: Path) -> Guest:
    """The guest with a copy of its file, for guests that write to their disk."""
    target = directory / guest.file.name
    target.write_bytes(guest.file.read_bytes())
    return msgspec.structs.replace(guest, file=target)
