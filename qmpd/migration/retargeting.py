"""A definition on another host: what of it names something of the host it is on, and the same definition for the other one. Pure.

A path means the file of that name on whichever host reads it. A disk is on storage that both hosts see, or is copied, to another path
perhaps. Whatever QEMU loads into the machine as it starts must be there as well, or QEMU does not even start to wait.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

import msgspec

from qmpd.errors import Problem, invalid
from qmpd.facts import FileFacts
from qmpd.migration.discrepancy import found
from qmpd.migrationviews import MigrationFinding
from qmpd.plan.disks import layers
from qmpd.spec import BaseImage, BiosFirmware, BlankDisk, DiskFormat, ImageDisk, MachineSpec, PflashFirmware, UserNic
from qmpd.viewbase import View

#: What becomes of a path of a definition on another host.
Use = Literal["disk", "base", "loaded", "template", "emulator"]


class HostPath(View, frozen=True, kw_only=True):
    """A path that a definition names, and where.

    A `disk` is the guest's own, a `base` lies below it and is only read; what is `loaded` QEMU reads once, as it starts; a `template` is
    copied when a machine is created, and not looked at any more; the `emulator` is run.
    """

    field: str
    path: str
    use: Use


class DiskTarget(msgspec.Struct, frozen=True, kw_only=True):
    """Where a disk is to be on the other host; None: as it is here. `base` is where that has what it lies upon, and
    what that lies upon, the uppermost first; none: it has all of it."""

    path: str | None = None
    format: DiskFormat | None = None
    base: tuple[str, ...] = ()


class Retarget(msgspec.Struct, frozen=True, kw_only=True):
    """What of a definition is to be otherwise on the other host. `emulator`: the name or path of the one to use there."""

    disks: Mapping[int, DiskTarget] = {}
    emulator: str | None = None


def host_paths(spec: MachineSpec) -> tuple[HostPath, ...]:
    """Every path that a definition names, in its order."""
    return tuple(_host_paths(spec))


def _host_paths(spec: MachineSpec) -> Iterator[HostPath]:
    if spec.emulator is not None and spec.emulator.startswith("/"):
        yield HostPath(field="$.emulator", path=spec.emulator, use="emulator")
    firmware, kernel = spec.firmware, spec.kernel
    if isinstance(firmware, BiosFirmware):
        yield HostPath(field="$.firmware.path", path=firmware.path, use="loaded")
    if isinstance(firmware, PflashFirmware):
        yield HostPath(field="$.firmware.code", path=firmware.code, use="loaded")
        yield HostPath(field="$.firmware.vars", path=firmware.vars, use="template")
    if kernel is not None:
        for name in ("image", "initrd", "dtb"):
            path = getattr(kernel, name)
            if path is not None:
                yield HostPath(field=f"$.kernel.{name}", path=path, use="loaded")
    for index, disk in enumerate(spec.disks):
        if isinstance(disk, ImageDisk):
            yield HostPath(field=f"$.disks[{index}].path", path=disk.path, use="disk")
            for depth, layer in layers(disk):
                yield HostPath(field=f"$.disks[{index}].{'base.' * depth}path", path=layer.path, use="base")


def retargeted(spec: MachineSpec, wanted: Retarget) -> MachineSpec:
    """The definition as it is on the other host.

    Raises:
        Invalid: a disk that it has not, a path for a disk that qmpd keeps itself, another format for one whose content is read as it is.
    """
    problems = list(_problems(spec, wanted))
    if problems:
        raise invalid(problems)
    disks = tuple(_disk(disk, wanted.disks.get(index)) for index, disk in enumerate(spec.disks))
    return msgspec.structs.replace(spec, disks=disks, emulator=wanted.emulator or spec.emulator)


def _problems(spec: MachineSpec, wanted: Retarget) -> Iterator[Problem]:
    paths = {disk.path: index for index, disk in enumerate(spec.disks) if isinstance(disk, ImageDisk) and index not in wanted.disks}
    for index, target in sorted(wanted.disks.items()):
        where = f"$.disks[{index}]"
        disk = spec.disks[index] if 0 <= index < len(spec.disks) else None
        if disk is None:
            yield Problem(path=where, message=f"the definition has only {len(spec.disks)} disk(s)")
            continue
        if isinstance(disk, BlankDisk) and target.path is not None:
            yield Problem(path=f"{where}.path", message="qmpd made this disk, and keeps it in the machine's own directory on every host")
        if isinstance(disk, ImageDisk) and disk.media == "cdrom" and target.format not in {None, disk.format}:
            yield Problem(path=f"{where}.format", message=f"a CD-ROM stays {disk.format}")
        if target.path is not None and not target.path.startswith("/"):
            yield Problem(path=f"{where}.path", message=f"{target.path!r} is not absolute")
        elif target.path is not None and paths.setdefault(target.path, index) != index:
            yield Problem(path=f"{where}.path", message=f"{target.path} would be disks[{paths[target.path]}] too")


def _disk(disk: ImageDisk | BlankDisk, target: DiskTarget | None) -> ImageDisk | BlankDisk:
    if target is None:
        return disk
    if isinstance(disk, BlankDisk):
        return msgspec.structs.replace(disk, format=target.format or disk.format)
    base: BaseImage | None = None
    for (_, layer), path in reversed(list(zip(layers(disk), target.base, strict=False))):
        base = msgspec.structs.replace(layer, path=path, base=base)
    return msgspec.structs.replace(disk, path=target.path or disk.path, format=target.format or disk.format, base=base)


def host_findings(spec: MachineSpec, there: Mapping[str, FileFacts]) -> Iterator[MigrationFinding]:
    """What of a definition means something else on another host, or is missed there only later; `there` is what its paths lead to.

    Whether disks and what QEMU loads are there, and are the same, is for the comparison of both sides to say.
    """
    for named in host_paths(spec):
        facts = there.get(named.path, FileFacts(kind="missing"))
        if named.use == "template" and (facts.kind != "file" or not facts.readable):
            message = f"{named.path} is not at the destination ({facts.refusal or facts.kind}): the machine brings its variables along"
            yield found("warning", "template-missing", message, path=named.field, mend="put the file there: it is needed to make them anew")
    for index, nic in enumerate(spec.nics):
        for position, forward in enumerate(nic.forwards if isinstance(nic, UserNic) else ()):
            what = f"port {forward.host_port}" if forward.host_port else "a port that the system chooses"
            message = f"{what} of {forward.host_address} will be one of the destination: clients have to go there"
            yield found("info", "forward-moves", message, path=f"$.nics[{index}].forwards[{position}]")
    for index, text in enumerate(spec.extra_args):
        if "/" in text:
            message = "what this option names on the host is not known to qmpd: it must be at the destination as well"
            yield found("warning", "option-unknown", message, path=f"$.extra_args[{index}]")
