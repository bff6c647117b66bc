"""Which firmware there is: UEFI through QEMU's descriptor files (docs/interop/firmware.json), and what QEMU loads by itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec

from qmpd.hostcheck.line import Topic
from qmpd.hostcheck.remedies import PACKAGES, installing
from qmpd.hostcheck.tree import HostTree
from qmpd.views import CheckLine

TOPIC: Final = Topic("Firmware")

#: Where descriptors are; a file in the first hides one of the same name in the second, an empty one removes it.
DESCRIPTOR_DIRS: Final = ("/etc/qemu/firmware", "/usr/share/qemu/firmware")

#: Firmware QEMU loads unasked: by target, its name and its file in QEMU's data directories.
BUILT_IN: Final = {
    "x86_64": ("SeaBIOS", "bios-256k.bin"),
    "i386": ("SeaBIOS", "bios-256k.bin"),
    "riscv64": ("OpenSBI", "opensbi-riscv64-generic-fw_dynamic.bin"),
    "riscv32": ("OpenSBI", "opensbi-riscv32-generic-fw_dynamic.bin"),
    "ppc64": ("SLOF", "slof.bin"),
    "ppc": ("OpenBIOS", "openbios-ppc"),
    "sparc": ("OpenBIOS", "openbios-sparc32"),
    "sparc64": ("OpenBIOS", "openbios-sparc64"),
    "s390x": ("s390-ccw", "s390-ccw.img"),
    "alpha": ("palcode", "palcode-clipper"),
    "hppa": ("SeaBIOS-hppa", "hppa-firmware.img"),
}


class File(msgspec.Struct, frozen=True):
    """A firmware file."""

    filename: str


class Mapping(msgspec.Struct, frozen=True):
    """How the firmware is given to QEMU: as flash (`executable`), or in memory (`filename`)."""

    executable: File | None = None
    filename: str | None = None


class Target(msgspec.Struct, frozen=True):
    """What the firmware is for."""

    architecture: str


class Descriptor(msgspec.Struct, frozen=True, rename="kebab"):
    """One firmware descriptor; what the check has no use for is not kept."""

    interface_types: tuple[str, ...]
    mapping: Mapping
    targets: tuple[Target, ...]
    features: tuple[str, ...] = ()

    @property
    def file(self) -> str:
        """The path of its code."""
        return self.mapping.executable.filename if self.mapping.executable is not None else self.mapping.filename or ""


def descriptors(tree: HostTree) -> dict[str, Descriptor | None]:
    """The descriptors by path, in the order QEMU's users prefer them; None for a file that is not a descriptor. Blocks."""
    paths: dict[str, str] = {}
    for directory in DESCRIPTOR_DIRS:
        for name in tree.names(directory):
            if name.endswith(".json"):
                paths.setdefault(name, f"{directory}/{name}")
    texts = {path: tree.text(path) for _, path in sorted(paths.items())}
    return {path: _decoded(text) for path, text in texts.items() if text}


def _decoded(text: str) -> Descriptor | None:
    try:
        return msgspec.json.decode(text, type=Descriptor)
    except msgspec.MsgspecError:
        return None


def uefi_lines(tree: HostTree, targets: Sequence[str], family: str) -> list[CheckLine]:
    """UEFI by architecture: for those of the installed emulators that are usually booted with it, and wherever there is one. Blocks."""
    found: dict[str, list[Descriptor]] = {}
    useless: list[CheckLine] = []
    for path, descriptor in descriptors(tree).items():
        if descriptor is None:
            useless.append(_useless(path, "is not a firmware descriptor"))
        elif "uefi" not in descriptor.interface_types:
            continue
        elif not tree.exists(descriptor.file):
            useless.append(_useless(path, f"names {descriptor.file}, which does not exist"))
        else:
            for architecture in {target.architecture for target in descriptor.targets}:
                found.setdefault(architecture, []).append(descriptor)
    wanted = {target for target in targets if f"UEFI for {target}" in PACKAGES} | (found.keys() & set(targets))
    return [*(_uefi_line(architecture, found.get(architecture, []), family) for architecture in sorted(wanted)), *useless]


def _useless(path: str, why: str) -> CheckLine:
    mask = f"sudo ln -s /dev/null {DESCRIPTOR_DIRS[0]}/{Path(path).name}"
    return TOPIC.warned("descriptor", f"{path} {why}", "It is ignored.", f"reinstall its package, or mask it: {mask}")


def _uefi_line(architecture: str, found: Sequence[Descriptor], family: str) -> CheckLine:
    subject = f"UEFI for {architecture}"
    if not found:
        meaning = f"Machines for {architecture} cannot boot by UEFI unless their definition names a firmware file."
        return TOPIC.warned(subject, "none", meaning, installing(subject, family))
    files = sorted({descriptor.file for descriptor in found})
    secure = any("secure-boot" in descriptor.features for descriptor in found)
    return TOPIC.passed(subject, f"{files[0]}{f' and {len(files) - 1} more' if files[1:] else ''}{', Secure Boot too' if secure else ''}")


def built_in_lines(targets: Sequence[str], data_dirs: Sequence[str], family: str) -> list[CheckLine]:
    """Firmware that the boards of these targets need and QEMU finds by itself: one line for all that is there, one for each gap. Blocks."""
    needed = [target for target in targets if target in BUILT_IN]
    there = [target for target in needed if any((Path(directory) / BUILT_IN[target][1]).is_file() for directory in data_dirs)]
    users: dict[str, list[str]] = {}
    for target in there:
        users.setdefault(BUILT_IN[target][0], []).append(target)
    gaps = [_gap_line(target, data_dirs if there else (), family) for target in needed if target not in there]
    found = "; ".join(f"{name} ({', '.join(used)})" for name, used in sorted(users.items()))
    return [TOPIC.passed("loaded by QEMU", found), *gaps] if found else gaps


def _gap_line(target: str, data_dirs: Sequence[str], family: str) -> CheckLine:
    """`data_dirs` is empty where QEMU's firmware is not installed at all."""
    name, file = BUILT_IN[target]
    if name == "SeaBIOS":
        mend = installing("SeaBIOS", family)
    elif data_dirs:
        mend = f"copy {file} to {data_dirs[0]} (it is in the directory pc-bios of QEMU's sources)"
    else:
        mend = installing("QEMU's firmware", family)
    meaning = f"{target} machines start only with a firmware of their own, or with none."
    return TOPIC.warned(f"{name} for {target}", f"{file} is missing", meaning, mend)
