"""What the files are that QEMU loads into a machine, so that those of two hosts can be compared without being sent."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Final

from qmpd.emulatorfiles import Stamp, stamp
from qmpd.migration.comparison import VARIABLES
from qmpd.migration.likeness import FirmwareFile
from qmpd.spec import BiosFirmware, MachineSpec, PflashFirmware
from qmpd.storage import examine

#: A gigabyte of initrd takes a second to read, and is read once; this many files are remembered.
REMEMBERED: Final = 256


def loaded_files(spec: MachineSpec) -> dict[str, str]:
    """Every file that a definition has QEMU load, by where it is named."""
    found: dict[str, str | None] = {}
    if isinstance(spec.firmware, BiosFirmware):
        found["firmware.path"] = spec.firmware.path
    elif isinstance(spec.firmware, PflashFirmware):
        found |= {"firmware.code": spec.firmware.code, VARIABLES: spec.firmware.vars}
    if spec.kernel is not None:
        found |= {f"kernel.{name}": getattr(spec.kernel, name) for name in ("image", "initrd", "dtb")}
    return {role: path for role, path in found.items() if path is not None}


class Fingerprints:
    """Reads files once, until they change. Nothing outside of `pools` is read: who asks may be another host."""

    def __init__(self, pools: tuple[str, ...]) -> None:
        self._pools = pools
        self._known: dict[str, tuple[Stamp, str]] = {}

    def of(self, spec: MachineSpec) -> tuple[FirmwareFile, ...]:
        """The files of a definition that are here and can be read. Blocks."""
        named = loaded_files(spec)
        looked = examine(named.values(), self._pools)
        found = []
        for role, path in named.items():
            facts = looked[path]
            seen = stamp(facts.real_path)
            if facts.kind == "file" and facts.readable and seen is not None:
                found.append(FirmwareFile(role=role, bytes=seen.size, sha256=self._digest(facts.real_path, seen)))
        return tuple(found)

    def _digest(self, path: str, seen: Stamp) -> str:
        known = self._known.get(path)
        if known is not None and known[0] == seen:
            return known[1]
        with Path(path).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if len(self._known) >= REMEMBERED:
            self._known.clear()
        self._known[path] = (seen, digest)
        return digest
