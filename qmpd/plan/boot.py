"""Fragments for how the guest boots: firmware and direct kernel boot."""

from __future__ import annotations

from qmpd.argv import Option, document
from qmpd.plan.launch import Copy
from qmpd.plan.resolution import Resolved
from qmpd.spec import BiosFirmware, Kernel, NoFirmware, PflashFirmware


def firmware(machine: Resolved) -> list[Option]:
    """The firmware options; none where QEMU loads the board's own."""
    chosen = machine.spec.firmware
    if isinstance(chosen, BiosFirmware):
        return [Option("bios", chosen.path)]
    if isinstance(chosen, PflashFirmware):
        return [
            _flash("pflash0", chosen.code, chosen.format, read_only=True),
            _flash("pflash1", machine.world.paths.variables, chosen.format, read_only=False),
        ]
    if isinstance(chosen, NoFirmware) or machine.board.firmware.default == "none":
        return [Option("bios", "none")]
    return []


def variables(machine: Resolved) -> tuple[Copy, ...]:
    """The copy of the firmware variables that must exist before the first start."""
    chosen = machine.spec.firmware
    return (Copy(source=chosen.vars, target=machine.world.paths.variables),) if isinstance(chosen, PflashFirmware) else ()


def _flash(node: str, path: str, image_format: str, *, read_only: bool) -> Option:
    file = {"driver": "file", "node-name": f"{node}-file", "filename": path}
    return document("blockdev", {"driver": image_format, "node-name": node, "read-only": read_only, "file": file})


def kernel(machine: Resolved) -> list[Option]:
    """Direct kernel boot, with the board's console in front of the command line so that the definition's words win."""
    chosen = machine.spec.kernel
    if chosen is None:
        return []
    options = [Option("kernel", chosen.image)]
    if chosen.initrd is not None:
        options.append(Option("initrd", chosen.initrd))
    if chosen.dtb is not None:
        options.append(Option("dtb", chosen.dtb))
    words = command_line(machine, chosen)
    if words:
        options.append(Option("append", words))
    return options


def command_line(machine: Resolved, chosen: Kernel) -> str:
    """The kernel command line as the guest sees it."""
    board = machine.board
    words: list[str] = []
    if chosen.console and board.console.kernel is not None:
        words.append(f"console={board.console.kernel}")
    if chosen.console and board.kernel is not None and board.kernel.append:
        words.append(board.kernel.append)
    if chosen.append:
        words.append(chosen.append)
    return " ".join(words)
