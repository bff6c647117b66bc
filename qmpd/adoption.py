"""From what a QEMU said of itself, and its command line, to a definition: what it can say, and a list of what it cannot.

The definition of an adopted machine is for looking at, and for starting the machine again. So every part that is not understood is
named, and nobody starts a machine from a definition that leaves out part of what ran.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

import msgspec

from qmpd.board import Board, NamedBoard
from qmpd.commandline import fields, options
from qmpd.findings import Device, Drive, Findings
from qmpd.redaction import redacted
from qmpd.spec import MachineSpec

#: What a QEMU says whose owner gave it no UUID.
NULL_UUID: Final = "00000000-0000-0000-0000-000000000000"
#: The board of a machine that none in the catalogue is.
NO_BOARD: Final = "unknown"
MIB: Final = 1024 * 1024
#: Serial ports of a definition.
PORTS: Final = 4

#: Options that QMP's answers cover, or that matter to whoever started it and not to the guest.
_COVERED: Final = frozenset(
    {
        "name", "uuid", "machine", "M", "accel", "enable-kvm", "cpu", "smp", "m", "qmp", "qmp-pretty", "mon", "monitor", "chardev",
        "pidfile", "daemonize", "S", "nodefaults", "no-user-config", "D", "d", "msg", "sandbox", "runas", "kernel", "initrd", "append",
        "dtb", "drive", "blockdev", "hda", "hdb", "hdc", "hdd", "cdrom", "device", "netdev", "serial", "parallel", "gdb", "s",
        "nographic",
    }
)  # fmt: skip
#: Options that are covered with this value alone.
_COVERED_VALUES: Final = frozenset({("display", "none"), ("vga", "none"), ("net", "none"), ("nic", "none")})
#: Of these options only these keys are covered; others change the machine in ways that no answer tells.
_UNDERSTOOD: Final = {"smp": {"cpus"}, "m": {"size"}, "machine": {"accel", "type"}, "M": {"accel", "type"}}
_CPU_TYPE: Final = re.compile(r"(.+)-[a-z0-9_]+-cpu")
_VERSION: Final = re.compile(r"-\d+\.\d+$")
#: Drivers that are there for other devices, or that a definition makes by itself.
_CONTROLLERS: Final = frozenset({"virtio-scsi-pci", "qemu-xhci", "isa-fdc"})


class Described(msgspec.Struct, frozen=True, kw_only=True):
    """The definition, and what it does not say: see `AdoptedView`."""

    spec: MachineSpec
    fixed: tuple[str, ...]
    unknown: tuple[str, ...]


class Subject(msgspec.Struct, frozen=True, kw_only=True):
    """The QEMU to describe: what it said, how it was started and where."""

    findings: Findings
    argv: tuple[str, ...]
    directory: str
    name: str
    uuid: str


def described(subject: Subject, boards: Mapping[str, NamedBoard]) -> Described:
    """The definition of a QEMU that runs, as far as it can be known."""
    named = board_of(subject.findings, boards)
    document, unknown = _document(subject, named)
    unknown += _options(subject)
    if named is None:
        unknown.insert(0, f"board: none in the catalogue is a {subject.findings.target} {subject.findings.machine}")
    spec, refused = _decoded(document)
    return Described(spec=spec, fixed=tuple(_fixed(subject.findings)), unknown=(*unknown, *refused))


def name_of(wanted: str | None, findings: Findings, pid: int) -> str:
    """The machine's name: as asked, else QEMU's own made into one, else one with its process number."""
    if wanted is not None:
        return wanted
    own = re.sub(r"[^a-z0-9]+", "-", (findings.name or "").lower()).strip("-")[:63].strip("-")
    return own or f"adopted-{pid}"


def board_of(findings: Findings, boards: Mapping[str, NamedBoard]) -> NamedBoard | None:
    """The board whose emulator and machine type these are; any version of the type will do."""
    family = _VERSION.sub("", findings.machine)
    names = {name for name, alias in findings.relatives.items() if _VERSION.sub("", name) == family}
    names |= {alias for name in names if (alias := findings.relatives[name]) is not None} | {findings.machine, family}
    fitting = [
        named for named in boards.values() if findings.target in named.board.emulators and names & {named.board.machine, *named.board.also}
    ]

    def unlikeliness(named: NamedBoard) -> tuple[int, int, int]:
        # A board may exist in several forms that differ by options; the one without any is what somebody else most likely started.
        return named.board.emulators.index(findings.target), len(named.board.machine_options), len(named.id)

    return min(fitting, key=unlikeliness, default=None)


def _document(subject: Subject, named: NamedBoard | None) -> tuple[dict[str, object], list[str]]:
    findings, board = subject.findings, named.board if named is not None else None
    disks, unknown = _disks(subject, board)
    nics, more = _nics(subject, board)
    entropy = any(board is not None and device.driver == board.rng for device in findings.devices)
    model = _CPU_TYPE.fullmatch(findings.cpu_type or "")
    ports = [chardev.label for chardev in findings.chardevs if chardev.label.startswith("serial")]
    document: dict[str, object] = {
        "name": subject.name,
        "board": named.id if named is not None else NO_BOARD,
        "uuid": subject.uuid,
        "machine": findings.machine,
        "accel": "kvm" if findings.kvm else "tcg",
        "cpu": {"count": findings.cpus or None, "model": model[1] if model else None},
        "memory_mib": max(1, findings.memory_bytes // MIB),
        "disks": disks,
        "nics": nics,
        "rng": entropy,
        "serial_ports": [{"kind": "none"} for _ in ports[:PORTS]],
    }
    if findings.boot.get("kernel"):
        files = {"image": "kernel", "initrd": "initrd", "dtb": "dtb"}
        boot = {field: _absolute(subject, findings.boot[key]) for field, key in files.items() if key in findings.boot}
        document["kernel"] = {"append": findings.boot.get("append", ""), "console": False, **boot}
    return document, [*unknown, *more, *_devices(findings.devices, findings.drives, board)]


def _disks(subject: Subject, board: Board | None) -> tuple[list[dict[str, object]], list[str]]:
    disks: list[dict[str, object]] = []
    unknown = []
    for drive in subject.findings.drives:
        medium = drive.inserted
        if medium is None:
            continue
        bus, media = _bus(drive, board)
        if bus is None or medium.drv not in {"raw", "qcow2"} or ":" in medium.file.split("/")[0]:
            what = f"drive {drive.device or drive.qdev or '?'}: {medium.drv} {redacted((medium.file,))[0]} on {drive.driver or 'the board'}"
            unknown.append(what)
            continue
        path = _absolute(subject, medium.file)
        disks.append({"kind": "image", "path": path, "format": medium.drv, "bus": bus, "media": media, "read_only": medium.ro})
    return disks, unknown


def _bus(drive: Drive, board: Board | None) -> tuple[str | None, str]:
    for name, bus in board.disks.items() if board is not None and drive.driver is not None else ():
        if drive.driver == bus.device:
            return name, "disk"
        if drive.driver == bus.cdrom_device:
            return name, "cdrom"
    return None, "disk"


def _nics(subject: Subject, board: Board | None) -> tuple[list[dict[str, object]], list[str]]:
    given = [fields(value) for name, value in options(subject.argv) if name == "netdev"]
    backends: dict[str | None, tuple[str, dict[str, str]]] = {pairs.get("id"): (kind, pairs) for kind, pairs in given}
    models = {model.device: name for name, model in board.nics.items()} if board is not None else {}
    nics: list[dict[str, object]] = []
    unknown = []
    for device in subject.findings.devices:
        if device.mac is None:
            continue
        kind, pairs = backends.get(device.netdev, ("none" if not device.netdev else "?", {}))
        if device.driver not in models or kind not in {"user", "none"} or pairs.keys() - {"id"}:
            unknown.append(f"NIC {device.driver} {device.mac}: on {device.netdev or 'no backend'}")
            continue
        nics.append({"kind": kind, "model": models[device.driver], "mac": device.mac.lower()})
    return nics, unknown


def _devices(devices: Sequence[Device], drives: Sequence[Drive], board: Board | None) -> Iterator[str]:
    disks = {(drive.qdev or "").removesuffix("/virtio-backend") for drive in drives}
    for device in devices:
        entropy = board is not None and device.driver == board.rng
        if device.mac is None and device.path not in disks and device.driver not in _CONTROLLERS and not entropy:
            yield f"device {device.driver}"


def _options(subject: Subject) -> list[str]:
    found = []
    given = list(options(subject.argv))
    if not any(name == "nodefaults" for name, _ in given):
        found.append("default devices: it was started without -nodefaults")
    for name, value in given:
        _, pairs = fields(value)
        if (name, value) in _COVERED_VALUES:
            continue
        if name not in _COVERED or pairs.keys() - _UNDERSTOOD.get(name, pairs.keys()) or (name == "cpu" and "," in value):
            found.append(f"option -{name} {redacted((value,))[0]}".rstrip())
    return found


def _fixed(findings: Findings) -> Iterator[str]:
    yield "command: the options of this QEMU cannot be changed; a changed definition counts from its next start"
    yield "lock: this QEMU does not hold the machine's lock; that it lives is known from its process number and start time"
    for chardev in findings.chardevs:
        if chardev.label.startswith("serial"):
            yield f"console: {chardev.label} stays with {chardev.filename}; qmpd keeps no log of it and cannot type into it"


def _absolute(subject: Subject, path: str) -> str:
    return posixpath.join(subject.directory, path)


def _decoded(document: dict[str, object]) -> tuple[MachineSpec, list[str]]:
    """The document as a definition, without the parts that no definition may have."""
    refused: list[str] = []
    while True:
        try:
            return msgspec.convert(document, MachineSpec), refused
        except msgspec.ValidationError as error:
            message, _, where = str(error).partition(" - at `$.")
            part = re.split(r"[.\[`]", where)[0]
            if part not in document or part in {"name", "board", "uuid"}:
                raise
            refused.append(f"{part}: {message}")
            del document[part]
