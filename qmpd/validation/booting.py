"""Checks on how the guest boots."""

from __future__ import annotations

from collections.abc import Iterator

from qmpd.errors import Problem
from qmpd.plan.disks import is_cdrom
from qmpd.plan.resolution import disk_bus, nic_model
from qmpd.spec import BiosFirmware, DefaultFirmware, NoFirmware, PflashFirmware
from qmpd.validation.subject import Subject, file_problems, problem


def firmware(subject: Subject) -> Iterator[Problem]:
    """The firmware must be of a kind the board takes, and its files must be there."""
    chosen, board, name = subject.spec.firmware, subject.board.firmware, subject.named.id
    if isinstance(chosen, BiosFirmware):
        if not board.bios:
            yield problem("firmware.kind", f"board {name!r} takes no firmware file")
        yield from file_problems(subject, chosen.path, "firmware.path")
    elif isinstance(chosen, PflashFirmware):
        if not board.pflash:
            yield problem("firmware.kind", f"board {name!r} has no flash for firmware")
        yield from file_problems(subject, chosen.code, "firmware.code")
        yield from file_problems(subject, chosen.vars, "firmware.vars")
    elif isinstance(chosen, NoFirmware) and not board.bios:
        yield problem("firmware.kind", f"board {name!r} takes no firmware option")
    elif isinstance(chosen, DefaultFirmware) and board.default == "required":
        yield problem("firmware", f"board {name!r} has no firmware of its own in this QEMU: name one (kind = 'bios'), or kind = 'none'")


def kernel(subject: Subject) -> Iterator[Problem]:
    """Direct kernel boot must be possible on the board, and all its files must be there."""
    chosen, board, name = subject.spec.kernel, subject.board.kernel, subject.named.id
    if chosen is None:
        if board is not None and board.required and isinstance(subject.spec.firmware, DefaultFirmware | NoFirmware):
            yield problem("kernel", f"board {name!r} starts only with a kernel: give kernel.image")
        return
    if board is None:
        yield problem("kernel", f"board {name!r} cannot boot a kernel directly; boot it from firmware or a disk")
        return
    yield from file_problems(subject, chosen.image, "kernel.image")
    if chosen.initrd is not None:
        yield from file_problems(subject, chosen.initrd, "kernel.initrd")
    if chosen.dtb is not None and board.dtb == "none":
        yield problem("kernel.dtb", f"board {name!r} takes no device tree")
    elif chosen.dtb is not None:
        yield from file_problems(subject, chosen.dtb, "kernel.dtb")
    elif board.dtb == "required" and "elf" not in (subject.file(chosen.image).magic or ""):
        yield problem("kernel.dtb", f"a kernel on board {name!r} needs a device tree: give kernel.dtb")


def boot_order(subject: Subject) -> Iterator[Problem]:
    """Each kind once, and only kinds of which there is a device that firmware can be pointed at."""
    order = subject.spec.boot_order
    for index, kind in enumerate(order):
        where = f"boot_order[{index}]"
        if kind in order[:index]:
            yield problem(where, f"{kind!r} is listed twice")
        elif kind == "network" and not subject.spec.nics:
            yield problem(where, "there is no NIC to boot from")
        elif kind != "network" and not any(is_cdrom(disk) == (kind == "cdrom") for disk in subject.spec.disks):
            yield problem(where, f"there is no {kind} to boot from")
    if order:
        yield from _without_boot_index(subject)


def _without_boot_index(subject: Subject) -> Iterator[Problem]:
    order = subject.spec.boot_order
    for index, disk in enumerate(subject.spec.disks):
        name, bus = disk_bus(disk, subject.board)
        if bus is not None and bus.drive_interface is not None and ("cdrom" if is_cdrom(disk) else "disk") in order:
            yield problem("boot_order", f"disks[{index}] is in the board's own {name!r} slot, whose place in the boot order cannot be set")
    for index, nic in enumerate(subject.spec.nics):
        name, model = nic_model(nic, subject.board)
        if model is not None and model.on_board is not None and "network" in order:
            yield problem("boot_order", f"nics[{index}] is the board's own {name!r}, whose place in the boot order cannot be set")
