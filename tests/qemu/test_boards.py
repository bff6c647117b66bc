"""Every board of the catalogue is launched for real, with everything that its file says can be attached to it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from qmpd.board import Board
from qmpd.errors import QmpdError
from qmpd.lifecycle import State
from qmpd.plan.disks import halts_on_error
from qmpd.service import Service
from qmpd.spec import BiosFirmware, Firmware, ImageDisk, Kernel, MachineSpec, NoFirmware, Tpm, UserNic, VncDisplay, Watchdog
from qmpd.views import StartRequest
from tests.golden.worlds import CATALOGUE
from tests.guests.build import Guest
from tests.newer_qemu import BOARDS, MAJOR_VERSION, skip_where_it_differs
from tests.unavailable import tool

pytestmark = pytest.mark.qemu

MIB = 1024 * 1024
FLOPPY_BYTES = 2880 * 512
#: Boards that start with an ELF file only, and the guest of another board whose file will do.
ELF_OF = {"mips64el-loongson3": "mips64el-malta", "ppc-ppce500": "ppc-bamboo", "ppc64-ppce500": "ppc-bamboo"}
DEFAULT: Firmware = MachineSpec(name="x", board="x").firmware


def bootable(name: str, board: Board, guests: dict[str, Guest], directory: Path) -> tuple[Kernel | None, Firmware]:
    """A kernel or firmware for the boards that do not start without one; what is in it does not matter, nothing is executed."""
    guest = guests.get(name)
    if guest is not None and guest.how == "bios":
        return None, BiosFirmware(path=str(guest.file))
    if guest is not None and guest.how == "kernel":
        return Kernel(image=str(guest.file), console=False), NoFirmware() if "-bios" in guest.options else DEFAULT
    file = directory / "anything.bin"
    file.write_bytes(guests[ELF_OF[name]].file.read_bytes() if name in ELF_OF else bytes(4096))
    if board.firmware.default == "required":
        return None, BiosFirmware(path=str(file)) if board.firmware.bios else NoFirmware()
    if board.kernel is None or not board.kernel.required:
        return None, DEFAULT
    return Kernel(image=str(file), dtb=str(file) if board.kernel.dtb == "required" else None), DEFAULT


def variants(name: str, plain: MachineSpec, directory: Path) -> Iterator[tuple[str, MachineSpec]]:
    """The plain machine, and one machine for each thing that can be attached."""
    board = CATALOGUE.get(name).board
    yield "plain", plain
    for bus, attachment in board.disks.items():
        if attachment.gone_in is not None and attachment.gone_in <= MAJOR_VERSION:
            continue
        size = FLOPPY_BYTES if bus == "floppy" else (attachment.size_mib or 64) * MIB
        image = directory / f"{bus}.img"
        image.touch()
        with image.open("r+b") as file:
            file.truncate(size)
        disks = [ImageDisk(path=str(image), format="raw", bus=bus)]
        if halts_on_error(disks[0], attachment):  # QEMU refuses the option for a device that cannot
            disks = [msgspec.structs.replace(disks[0], on_error="stop")]
        if attachment.cdrom_device is not None and attachment.limit > 1:
            cdrom = directory / f"{bus}.iso"
            shutil.copyfile(image, cdrom)
            disks.append(ImageDisk(path=str(cdrom), format="raw", bus=bus, media="cdrom"))
        yield f"disk {bus}", msgspec.structs.replace(plain, disks=tuple(disks))
    for model in board.nics:
        yield f"nic {model}", msgspec.structs.replace(plain, nics=(UserNic(model=model),))
    if board.rng is not None:
        yield "rng", msgspec.structs.replace(plain, rng=True)
    for model in board.watchdogs:
        yield f"watchdog {model}", msgspec.structs.replace(plain, watchdog=Watchdog(model=model))
    for model in board.tpms:
        tool("swtpm", "swtpm")
        yield f"TPM {model}", msgspec.structs.replace(plain, tpm=Tpm(model=model))
    if board.display.device or board.display.vnc_vga or board.display.on_board:
        yield "vnc", msgspec.structs.replace(plain, display=VncDisplay())


@pytest.mark.parametrize("name", CATALOGUE.boards)
async def test_a_board_takes_what_its_file_says(name: str, service: Service, guests: dict[str, Guest], short_directory: Path) -> None:
    skip_where_it_differs(name, BOARDS)
    kernel, firmware = bootable(name, CATALOGUE.get(name).board, guests, short_directory)
    plain = MachineSpec(name="one", board=name, accel="tcg", kernel=kernel, firmware=firmware)
    failures = {}
    for what, spec in variants(name, plain, short_directory):
        try:
            view = await service.create(spec)
            view = await service.start("one", StartRequest(paused=True))
            assert view.state is State.PAUSED
            await service.kill("one")
        except QmpdError as error:
            failures[what] = error.message
        if spec.name in {view.name for view in service.machines({}, None).machines}:
            await service.delete("one", None)
    assert not failures
