"""Whether a machine can go where it is to go: everything that is in the way, each with what would mend it. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Final, TypeAlias

import msgspec

from qmpd.migration.discrepancy import discrepancies, found, shown
from qmpd.migration.likeness import BaseThere, DestinationFacts, FirmwareFile, MachineFacts, Obstacle, SourceDisk, SourceFacts, TargetDisk
from qmpd.migrationviews import MigrationFinding, Severity
from qmpd.plan.disks import disk_of

MIB: Final = 1024 * 1024
Check: TypeAlias = Callable[[SourceFacts, DestinationFacts], Iterator[MigrationFinding]]
CheckAtRest: TypeAlias = Callable[[MachineFacts, DestinationFacts], Iterator[MigrationFinding]]
#: Where the template of firmware variables is named. A machine has its own, which travel with it.
VARIABLES: Final = "firmware.vars"
_ORDER: Final[dict[Severity, int]] = {"error": 0, "warning": 1, "info": 2}

#: Errors that may be taken upon oneself: if QEMU refuses the state, the guest goes on; if the guest minds, its owner knew.
ACCEPTABLE: Final = frozenset(
    {
        "machine-unversioned",
        "known-trouble",
        "cpu-type-differs",
        "cpu-features-missing",
        "device-added",
        "limit-unkept",
        "board-refused",
        "snapshots-lost",
    }
)
#: What a board file's word about migration means for one.
_WORKS: Final[dict[str, tuple[Severity, str]]] = {
    "needs-input": ("warning", "a guest of this board stands still after a migration until a byte is typed on its console"),
    "slow": ("warning", "a guest of this board stands still for up to a minute after a migration"),
    "frozen": ("error", "a guest of this board is dead after a migration, which QEMU does not notice"),
    "refused": ("error", "QEMU refuses to migrate this board"),
    "crashes": ("error", "QEMU crashes when it migrates this board"),
    "untested": ("warning", "nobody has tried to migrate this board"),
}
#: Run states of a guest that has stopped for a reason of its own: it arrives as it is.
_STOPPED_BY_ITSELF: Final = frozenset({"io-error", "internal-error", "guest-panicked", "watchdog", "shutdown"})


def compared(departure: MachineFacts, arrival: DestinationFacts) -> tuple[MigrationFinding, ...]:
    """Everything that speaks against a migration, or is worth knowing before it: errors first.

    A machine at rest is started anew there, some day: no QEMU has to be like another one.
    """
    if isinstance(departure, SourceFacts):
        findings = [finding for check in CHECKS for finding in check(departure, arrival)]
    else:
        findings = [finding for check in CHECKS_AT_REST for finding in check(departure, arrival)]
    known = {(finding.code, finding.path) for finding in findings}
    return _in_order([*findings, *(finding for finding in arrival.findings if (finding.code, finding.path) not in known)])


def possible(findings: tuple[MigrationFinding, ...]) -> bool:
    """Whether nothing of it is in the way."""
    return all(finding.severity != "error" for finding in findings)


def accepted(findings: tuple[MigrationFinding, ...], codes: tuple[str, ...]) -> tuple[MigrationFinding, ...]:
    """The findings, those errors made warnings that somebody takes upon himself. Only where QEMU or the guest is the judge."""
    return _in_order(
        msgspec.structs.replace(finding, severity="warning")
        if finding.severity == "error" and finding.code in ACCEPTABLE.intersection(codes)
        else finding
        for finding in findings
    )


def _in_order(findings: Iterable[MigrationFinding]) -> tuple[MigrationFinding, ...]:
    return tuple(sorted(findings, key=lambda finding: _ORDER[finding.severity]))


def _protocol(departure: MachineFacts, arrival: DestinationFacts) -> Iterator[MigrationFinding]:
    if departure.protocol not in arrival.protocols:
        spoken = ", ".join(map(str, arrival.protocols)) or "none"
        yield found(
            "error",
            "protocol-differs",
            f"the daemons do not understand each other: this one speaks version {departure.protocol} of their protocol, the other {spoken}",
            mend="upgrade the older qmpd",
        )


def _taken(departure: MachineFacts, arrival: DestinationFacts) -> Iterator[MigrationFinding]:
    if arrival.name_taken:
        message = f"the destination has a machine {departure.name} already"
        yield found("error", "name-taken", message, path="$.name", mend="rename or delete one of them")
    if arrival.uuid_taken_by is not None:
        message = f"machine {arrival.uuid_taken_by} of the destination has the same UUID"
        yield found("error", "uuid-taken", message, path="$.uuid", mend="give one of them another UUID")
    for mac in departure.macs:
        if holder := arrival.macs_taken.get(mac):
            message = f"machine {holder} of the destination has the same MAC address {mac}"
            yield found("warning", "mac-taken", message, path="$.nics", mend="on one network they would disturb each other: change one")


def _state(departure: SourceFacts, _arrival: DestinationFacts) -> Iterator[MigrationFinding]:
    qemu = departure.qemu
    for reason in qemu.blockers:
        yield found("error", "blocked", f"QEMU says that it cannot be migrated: {reason}")
    if qemu.replay != "none":
        yield found("error", "replay", f"the machine is in {qemu.replay} mode, which QEMU does not survive in a migration")
    if qemu.dumping:
        yield found("error", "dumping", "its memory is being dumped", mend="wait for the dump, or cancel it")
    for job in qemu.jobs:
        yield found("error", "block-job", f"job {job} works on its disks", mend="wait for it, or cancel it")
    if qemu.status in _STOPPED_BY_ITSELF:
        yield found("warning", "guest-stopped", f"the guest has stopped ({qemu.status}), and will arrive like that")


def _board(departure: SourceFacts, _arrival: DestinationFacts) -> Iterator[MigrationFinding]:
    if departure.works in _WORKS:
        severity, message = _WORKS[departure.works]
        yield found(severity, f"board-{departure.works}", message, path="$.board")


def _twin(departure: SourceFacts, arrival: DestinationFacts) -> Iterator[MigrationFinding]:
    if arrival.qemu is None:
        yield from _obstacles(arrival.obstacles or (Obstacle(message="it does not say why"),))
        return
    yield from discrepancies(departure.qemu, arrival.qemu)
    here, there = departure.qemu.capabilities, arrival.qemu.capabilities
    wanted = {"multifd": departure.channels > 0, "postcopy-ram": departure.postcopy, "dirty-bitmaps": departure.bitmaps}
    for name in (name for name, is_wanted in wanted.items() if is_wanted and not (name in here and name in there)):
        yield found("error", "capability-missing", f"it needs {name}, which is not in both QEMUs", mend="leave it out")


def _start(_departure: MachineFacts, arrival: DestinationFacts) -> Iterator[MigrationFinding]:
    yield from _obstacles(arrival.obstacles)  # none, and no QEMU either, where a machine comes at rest: it is not started


def _obstacles(obstacles: Iterable[Obstacle]) -> Iterator[MigrationFinding]:
    for obstacle in obstacles:
        message = f"the destination cannot start this machine: {obstacle.message}"
        mend = "make the destination's host fit, or the definition" if obstacle.path else ""
        yield found("error", "cannot-start", message, path=obstacle.path, mend=mend)


def _alias(departure: SourceFacts, _arrival: DestinationFacts) -> Iterator[MigrationFinding]:
    if departure.alias and departure.alias != departure.qemu.machine:
        yield found(
            "info",
            "machine-alias",
            f"the definition says {departure.alias}, which is {departure.qemu.machine} here and may be something else there: it travels as "
            f"{departure.qemu.machine}",
            path="$.machine",
        )


def _firmware(departure: MachineFacts, arrival: DestinationFacts) -> Iterator[MigrationFinding]:
    there = {file.role: file for file in arrival.firmware}
    for file in departure.firmware:
        if file.role != VARIABLES:
            yield from _firmware_file(file, there.get(file.role))
        elif VARIABLES not in there:
            message = "the file that the variables were made of is not at the destination: the machine brings its own along"
            yield found("warning", "template-missing", message, path=f"$.{VARIABLES}", mend="copy the source's file to the destination")


def _firmware_file(here: FirmwareFile, there: FirmwareFile | None) -> Iterator[MigrationFinding]:
    path, mend = f"$.{here.role}", "copy the source's file to the destination"
    if there is None:
        yield found("error", "firmware-missing", "this file is not at the destination", path=path, mend=mend)
    elif here.bytes != there.bytes:
        message = f"this file has {here.bytes} bytes, and {there.bytes} at the destination"
        yield found("error", "firmware-size", message, path=path, mend=mend)
    elif here.sha256 != there.sha256:
        message = "this file is another one at the destination: the guest keeps what it has, and gets the other when it is started again"
        yield found("warning", "firmware-differs", message, path=path, mend=mend)


def _firmware_at_rest(departure: MachineFacts, arrival: DestinationFacts) -> Iterator[MigrationFinding]:
    """QEMU reads it anew: a state that has to fit to its size there is none."""
    for finding in _firmware(departure, arrival):
        if finding.code in {"firmware-size", "firmware-differs"}:
            message = "this file is another one at the destination: the guest gets that one when it is started"
            yield found("warning", "firmware-differs", message, path=finding.path, mend=finding.mend)
        else:
            yield finding


def _disks(departure: MachineFacts, arrival: DestinationFacts) -> Iterator[MigrationFinding]:
    there = {disk.index: disk for disk in arrival.disks}
    for disk in departure.disks:
        path, other = f"$.disks[{disk.index}]", there.get(disk.index)
        if other is None:
            yield found("error", "disk-unknown", "the destination does not say where this disk would be", path=path)
        elif other.refusal:
            mend = "say another target path, or name its directory in the destination's setting `pools`"
            yield found("error", "disk-refused", f"the destination may not use {other.path}: {other.refusal}", path=path, mend=mend)
        else:
            yield from _shared(disk, other, path) if disk.how == "shared" else _copied(disk, other, path)
            if other.base is not None:
                yield from _base(disk, other.base, path, whole=disk.how == "copy" and isinstance(departure, SourceFacts))


def _shared(here: SourceDisk, there: TargetDisk, path: str) -> Iterator[MigrationFinding]:
    mend = "copy it (--copy-storage), or mount the storage at the same place on both hosts"
    if not there.exists:
        yield found("error", "disk-missing", f"there is no {there.path} at the destination", path=path, mend=mend)
    elif there.same is False:
        message = f"{there.path} at the destination is another file: the guest would find another disk under its feet"
        yield found("error", "disk-not-shared", message, path=path, mend=mend)
    elif there.same is None:
        message = f"nothing proves that {there.path} is the same file on both hosts"
        yield found("warning", "disk-shared-unproven", message, path=path, mend="say --copy-storage if it is not")
    if there.exists and there.format is not None and there.format != here.format:
        yield found("error", "disk-format", f"this disk is {here.format}, and {there.format} at the destination", path=path)


def _copied(here: SourceDisk, there: TargetDisk, path: str) -> Iterator[MigrationFinding]:
    if there.same:
        message = f"{there.path} at the destination is the very file that would be copied"
        yield found("error", "disk-is-shared", message, path=path, mend="move it as shared storage (--shared-storage)")
        return
    if there.exists:
        mend = "remove it, or say another target path"
        if there.same is None:
            mend += "; if both hosts see the same file there, say so (--shared-storage)"
        yield found("error", "disk-target-exists", f"there is a file {there.path} at the destination already", path=path, mend=mend)
        if there.bytes is not None and there.bytes < here.bytes:
            yield found("error", "disk-too-small", f"this disk has {here.bytes} bytes, and {there.bytes} at the destination", path=path)
    if there.free_bytes is not None and there.free_bytes < there.needed_bytes:
        message = f"{there.path} needs {there.needed_bytes // MIB} MiB, and {there.free_bytes // MIB} MiB are free there"
        yield found("error", "no-space", message, path=path, mend="make room, or say another target path")


def _base(here: SourceDisk, there: BaseThere, path: str, *, whole: bool) -> Iterator[MigrationFinding]:
    above = f"{here.used_bytes / MIB:.1f} MiB"
    if there.same and here.how == "copy":
        yield found("info", "base-same", f"{there.path} is the same at the destination: {above} that lie upon it are sent", path=path)
    if there.same:
        return
    other = f"{there.path} at the destination is not what this disk lies upon ({there.why})"
    if whole:
        message = f"{other}: all of the disk is sent, {(here.used_bytes + here.base_bytes) / MIB:.1f} MiB"
        mend = f"put the source's file there, or say where it is (--disk {here.index}=copy,base=PATH): then {above} are sent"
        yield found("warning", "base-differs", message, path=path, mend=mend)
    else:
        mend = "put the source's file there; of a machine that runs, all of a disk can be copied (--copy-storage)"
        yield found("error", "base-differs", other, path=path, mend=mend)


def _snapshots(departure: SourceFacts, _arrival: DestinationFacts) -> Iterator[MigrationFinding]:
    """QEMU copies what the guest sees of a disk."""
    copied = {disk.index for disk in departure.disks if disk.how == "copy"}
    for drive in departure.qemu.drives:
        if drive.snapshots and (index := disk_of(drive.device)) in copied:
            message = f"the snapshots in this image would be lost, which are no part of what is copied: {shown(drive.snapshots)}"
            mend = "move it as shared storage, or the machine while it does not run; or remove them (qemu-img snapshot -d)"
            yield found("error", "snapshots-lost", message, path=f"$.disks[{index}]", mend=mend)


def _ports(departure: MachineFacts, arrival: DestinationFacts) -> Iterator[MigrationFinding]:
    for port in departure.forwards:
        if port in arrival.ports_taken:
            message = (
                f"port {port.port}/{port.protocol} of {port.address} cannot be had at the destination: it is taken, or not one of its own"
            )
            yield found("error", "port-taken", message, path="$.nics", mend="free it, or let the system choose (host_port = 0)")


def _ports_at_rest(departure: MachineFacts, arrival: DestinationFacts) -> Iterator[MigrationFinding]:
    """They are wanted when it is started, and may be free by then."""
    for finding in _ports(departure, arrival):
        yield msgspec.structs.replace(finding, severity="warning")


def _limits(_departure: MachineFacts, arrival: DestinationFacts) -> Iterator[MigrationFinding]:
    for name, reason in sorted(arrival.limits_unkept.items()):
        path = f"$.limits.{name}" if name else "$.limits"
        mend = "`qmpd check` at the destination says what is missing; or take the limit out of the definition"
        yield found("error", "limit-unkept", f"the destination cannot keep this limit: {reason}", path=path, mend=mend)


def _room(departure: SourceFacts, arrival: DestinationFacts) -> Iterator[MigrationFinding]:
    needed = departure.qemu.memory_bytes // MIB
    if arrival.free_memory_mib is not None and arrival.free_memory_mib < needed:
        message = f"the guest has {needed} MiB of memory, and the destination has {arrival.free_memory_mib} MiB available"
        yield found("warning", "little-memory", message, path="$.memory_mib", mend="stop something there, or choose another host")


CHECKS: Final[tuple[Check, ...]] = (
    _protocol,
    _taken,
    _state,
    _board,
    _twin,
    _alias,
    _firmware,
    _disks,
    _snapshots,
    _ports,
    _limits,
    _room,
)
CHECKS_AT_REST: Final[tuple[CheckAtRest, ...]] = (_protocol, _taken, _start, _firmware_at_rest, _disks, _ports_at_rest, _limits)
