"""Fragments for the TPM: the device in QEMU, and the program behind it."""

from __future__ import annotations

from typing import Final

from qmpd.argv import Option, document, pairs
from qmpd.plan.launch import TpmEmulator, TpmLine
from qmpd.plan.resolution import Resolved, tpm_model

LINE: Final = "tpm0-control"
BACKEND: Final = "tpm0-backend"


def device(machine: Resolved) -> list[Option | TpmLine]:
    """The TPM's line, its backend and its device."""
    model = tpm_model(machine.spec, machine.board)
    if model is None:
        return []
    return [
        _line(machine),
        pairs("tpmdev", "emulator", {"id": BACKEND, "chardev": LINE}),
        document("device", {"driver": model, "id": "tpm0", "tpmdev": BACKEND}),
    ]


def emulator(machine: Resolved) -> TpmEmulator | None:
    """The program, for a machine that has a TPM."""
    if machine.spec.tpm is None:
        return None
    paths, program = machine.world.paths, machine.world.swtpm
    if program is None:
        raise ValueError("there is no swtpm: the definition was not validated")
    return TpmEmulator(program=program, directory=paths.tpm, log=paths.log("tpm"), line=_line(machine))


def _line(machine: Resolved) -> TpmLine:
    return TpmLine(id=LINE, path=machine.world.paths.socket("tpm"))
