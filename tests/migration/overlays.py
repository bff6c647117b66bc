"""Images upon a base: made, read through all that they lie upon, and changed where a guest does not write."""

from __future__ import annotations

import asyncio
import json
import random
from pathlib import Path
from typing import Final

from qmpd.spec import BaseImage, DiskFormat, ImageDisk, MachineSpec
from tests.guests.build import Guest
from tests.guests.ring import RING_SECTORS, RING_START, SECTOR_BYTES
from tests.machines import copy_of, spec_of

MIB: Final = 1024 * 1024
BASE_MIB: Final = 24
#: A base, and one upon it.
LOWEST: Final = "base.raw"
MIDDLE: Final = "middle.qcow2"
#: Where the guest writes to.
RING: Final = slice(RING_START * SECTOR_BYTES, (RING_START + RING_SECTORS) * SECTOR_BYTES)
#: What was written to an image before its guest runs, zeroed and discarded: all that may shine through from a base, or must not.
CHANGES: Final = ("write -z -u 10M 1M", "discard 12M 1M", "write -P 7 14M 64k", "write -z 15M 4k")
#: The same in a layer below, at other places and at the same.
CHANGES_BELOW: Final = ("write -P 5 5M 1M", "write -z -u 8M 1M", "write -P 9 14M 1M")


async def qemu_img(*words: str) -> str:
    """What it prints, if it has nothing to complain about."""
    return await _said("qemu-img", *words)


async def content(image: Path, directory: Path) -> bytes:
    """All that a guest sees of an image, through its whole chain; `flat.raw` in the directory has it too."""
    flat = directory / "flat.raw"
    await qemu_img("convert", "-f", "qcow2", "-O", "raw", str(image), str(flat))
    return flat.read_bytes()


async def below(image: Path) -> str | None:
    """What an image says it lies upon."""
    found: str | None = json.loads(await qemu_img("info", "-U", "--output=json", str(image))).get("full-backing-filename")
    return found


async def base_made(directory: Path, guest: Guest, base_format: DiskFormat = "raw") -> BaseImage:
    """The guest's disk, with something behind it that the guest does not touch."""
    raw = copy_of(guest, directory).file
    with raw.open("r+b") as file:
        file.seek(2 * MIB)
        file.write(random.Random(1).randbytes(BASE_MIB * MIB - 2 * MIB))
    base = directory / (LOWEST if base_format == "raw" else "base.qcow2")
    await qemu_img("convert", "-f", "raw", "-O", base_format, str(raw), str(base))
    return BaseImage(path=str(base), format=base_format)


async def layered(directory: Path, guest: Guest, *, name: str | None = None) -> BaseImage:
    """A changed image upon the guest's disk, as a base; it refers to the latter by `name`, or in full."""
    lowest = await base_made(directory, guest)
    middle = directory / MIDDLE
    await qemu_img("create", "-q", "-f", "qcow2", "-b", name or lowest.path, "-F", lowest.format, str(middle))
    await qemu_io(middle, *CHANGES_BELOW)
    return BaseImage(path=str(middle), format="qcow2", base=lowest)


async def laid_upon(base: BaseImage, image: Path) -> ImageDisk:
    """A new image upon a base, as a disk."""
    await qemu_img("create", "-q", "-f", "qcow2", "-b", base.path, "-F", base.format, str(image))
    return ImageDisk(path=str(image), format="qcow2", base=base, bus="ide")


async def qemu_io(image: Path, *changes: str) -> None:
    """Changes an image that nobody has open."""
    await _said("qemu-io", "-f", "qcow2", "-d", "unmap", *(word for change in changes for word in ("-c", change)), str(image))


async def overlaid(directory: Path, guest: Guest, base_format: DiskFormat = "raw") -> MachineSpec:
    """A machine whose guest writes to an image upon a base that is full of something."""
    base = await base_made(directory, guest, base_format)
    return spec_of(guest, "web", disks=(await laid_upon(base, directory / "web.qcow2"),))


def base_of(spec: MachineSpec) -> Path:
    """What the only disk lies upon."""
    (disk,) = spec.disks
    assert isinstance(disk, ImageDisk)
    assert disk.base is not None
    return Path(disk.base.path)


async def _said(*argv: str) -> str:
    process = await asyncio.create_subprocess_exec(*argv, stdout=asyncio.subprocess.PIPE)
    output, _ = await process.communicate()
    assert process.returncode == 0, argv
    return output.decode()
