"""In what two QEMUs with the same definition differ, as far as a migration between them would notice. Pure.

An `error` was seen to make QEMU refuse the state, or to give the guest another machine under its feet. A `warning` is what may do so:
QEMU finds out while it loads, and then the guest goes on where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final, NamedTuple, TypeAlias

from qmpd.migration.likeness import CpuFacts, DeviceFacts, QemuFacts, RamBlock
from qmpd.migrationviews import MigrationFinding, Severity

Version: TypeAlias = tuple[int, int, int]
Check: TypeAlias = Callable[[QemuFacts, QemuFacts], Iterator[MigrationFinding]]

#: So much of a long list is shown.
SHOWN: Final = 8
MIB: Final = 1024 * 1024
#: What every migration needs at both sides; the fourth at the source.
CAPABILITIES: Final = ("events", "return-path", "validate-uuid", "pause-before-switchover")
#: Blocks of the BIOS's tables are made by QEMU at every start and may grow; the state brings its own.
_MADE: Final = "/rom@"
#: `pcommit`: QEMU 7.2 shows it with TCG, and dropped it because no processor ever had it and no system uses it.
_UNUSED: Final = frozenset({("0x7.0.EBX", 22)})
_AS_BEFORE: Final = "if it fails, the guest goes on at its source"


class Trouble(NamedTuple):
    """A pair of versions between which something was seen to fail: from, up to but without. It concerns machines with one of `devices`
    (none named: every one) that fit `targets`, `machine` and `accelerator` where these are named."""

    severity: Severity
    source: tuple[Version, Version]
    destination: tuple[Version, Version]
    message: str
    mend: str
    targets: tuple[str, ...] = ()
    machine: str = ""
    accelerator: str = ""
    devices: tuple[str, ...] = ()

    def concerns(self, source: QemuFacts, destination: QemuFacts) -> bool:
        """Whether this machine is one of those, between these two."""
        (first, last), (lowest, highest) = self.source, self.destination
        return (
            first <= source.version < last
            and lowest <= destination.version < highest
            and (not self.targets or source.target in self.targets)
            and source.machine.startswith(self.machine)
            and (not self.accelerator or source.accelerator == self.accelerator)
        )


_ANY: Final = (99, 0, 0)
_SEVEN: Final = ((7, 0, 0), (8, 0, 0))
_TEN: Final = ((10, 0, 0), (11, 0, 0))
_FROM_TEN: Final = ((10, 0, 0), _ANY)
_FROM_ELEVEN: Final = ((11, 0, 0), _ANY)
_SAME: Final = "use a destination with the same QEMU"
_REGISTERS: Final = (
    "without KVM the state of an Arm processor is a list of registers, and QEMU 7 and 10 have different ones: QEMU refuses it"
)
TROUBLES: Final = (
    Trouble(
        "warning",
        _TEN,
        _FROM_ELEVEN,
        "QEMU 10.0.13 sends rings of 1024 entries for these devices, which QEMU 11.1.3 refused (vring.num 1024 exceeds allocated max 256)",
        "use a destination with QEMU 10",
        devices=("virtio-net", "virtio-rng", "virtio-scsi"),
    ),
    Trouble("error", _SEVEN, _FROM_TEN, "the BIOS of microvm has another size in QEMU 10 than in 7.2", _SAME, machine="microvm"),
    Trouble("error", _FROM_TEN, _SEVEN, "the BIOS of microvm has another size in QEMU 7.2 than in 10", _SAME, machine="microvm"),
    Trouble("error", _SEVEN, _FROM_TEN, _REGISTERS, _SAME, targets=("arm", "aarch64"), accelerator="tcg"),
    Trouble("error", _FROM_TEN, _SEVEN, _REGISTERS, _SAME, targets=("arm", "aarch64"), accelerator="tcg"),
    Trouble(
        "error",
        _FROM_TEN,
        _SEVEN,
        "QEMU 7.2 refuses the processor of a pseries from QEMU 10 (cpu/slb: incoming version_id 2 is too new)",
        _SAME,
        machine="pseries",
    ),
)


def found(severity: Severity, code: str, message: str, *, path: str = "", mend: str = "") -> MigrationFinding:
    """A finding."""
    return MigrationFinding(severity=severity, code=code, path=path, message=message, mend=mend)


def shown(items: Sequence[str]) -> str:
    """The first of a list, in a sentence."""
    return ", ".join(items[:SHOWN]) + (f" and {len(items) - SHOWN} more" if len(items) > SHOWN else "")


def discrepancies(source: QemuFacts, destination: QemuFacts) -> Iterator[MigrationFinding]:
    """Everything in which the destination's QEMU is not like the source's."""
    for check in CHECKS:
        yield from check(source, destination)


def _target(source: QemuFacts, destination: QemuFacts) -> Iterator[MigrationFinding]:
    if source.target != destination.target:
        yield found("error", "target-differs", f"the machine is of {source.target}, the destination's emulator is of {destination.target}")


def _accelerator(source: QemuFacts, destination: QemuFacts) -> Iterator[MigrationFinding]:
    here, there = source.accelerator, destination.accelerator
    if here != there:
        yield found(
            "error",
            "accelerator-differs",
            f"the guest runs under {here}, and would run under {there}: they keep time, interrupts and the processor's state differently",
            path="$.accel",
            mend=f"move it to a host where it runs under {here}",
        )


def _machine(source: QemuFacts, destination: QemuFacts) -> Iterator[MigrationFinding]:
    if source.machine == destination.machine:
        if not versioned(source.machine) and source.version[:2] != destination.version[:2]:
            yield found(
                "error",
                "machine-unversioned",
                f"machine type {source.machine} has no versions: what QEMU {dotted(source.version)} makes of it and what "
                f"{dotted(destination.version)} does differ, and QEMU refuses the state",
                mend=_SAME,
            )
        return
    known = source.machine in destination.types
    yield found(
        "error",
        "machine-type-differs" if known else "machine-type-unknown",
        f"the machine is a {source.machine}, the destination's QEMU {dotted(destination.version)} "
        + (f"made a {destination.machine} of it" if known else "does not know that type"),
        path="$.machine",
        mend=f'define it with machine = "{source.machine}"'
        if known
        else "start the machine with a type that both know, by its versioned name",
    )


def versioned(machine: str) -> bool:
    """Whether the name of a machine type ends in a version (`pc-q35-7.2`), which is QEMU's promise to keep it as it is."""
    tail = machine.rpartition("-")[2]
    return "." in tail and tail.replace(".", "").isdigit()


def dotted(version: Version) -> str:
    """A version as people write it."""
    return ".".join(map(str, version))


def _versions(source: QemuFacts, destination: QemuFacts) -> Iterator[MigrationFinding]:
    for trouble in TROUBLES:
        kinds = sorted({device.type for device in source.devices if device.type.startswith(trouble.devices)})
        if trouble.concerns(source, destination) and (kinds or not trouble.devices):
            about = f"{shown(kinds)}: " if trouble.devices else ""
            yield found(trouble.severity, "known-trouble", f"{about}{trouble.message}; {_AS_BEFORE}", mend=trouble.mend)
    if destination.version < source.version:
        yield found(
            "info",
            "older-emulator",
            f"the destination's QEMU {dotted(destination.version)} is older than the source's {dotted(source.version)}; {_AS_BEFORE}",
        )


def _cpus(source: QemuFacts, destination: QemuFacts) -> Iterator[MigrationFinding]:
    here, there = source.cpu, destination.cpu
    if here is None or there is None:
        return
    if here.count != there.count:
        yield found(
            "error", "cpu-count-differs", f"the guest has {here.count} processors, and would have {there.count}", path="$.cpu.count"
        )
    if here.type != there.type:
        message = f"the processor is a {here.type}, and would be a {there.type}"
        yield found("error", "cpu-type-differs", message, path="$.cpu.model", mend="name the exact model in the definition")
        return
    lost = _lost_features(here, there)
    if lost:
        yield found(
            "error",
            "cpu-features-missing",
            f"the guest may use features of its processor that the destination does not have: {shown(lost)}",
            path="$.cpu.features",
            mend="define the machine with a CPU model that both hosts have, and start it again",
        )
    yield from _other_traits(here, there)


def _lost_features(here: CpuFacts, there: CpuFacts) -> list[str]:
    named = sorted(set(there.unavailable) - set(here.unavailable))
    traits = sorted(name for name, value in here.traits.items() if value is True and there.traits.get(name) is not True)
    bits = [name for word, value in sorted(here.words.items()) for name in _bits(word, value & ~there.words.get(word, 0))]
    return [*named, *traits, *bits]


def _bits(word: str, value: int) -> Iterator[str]:
    leaf, subleaf, register = word.split(".")
    for bit in range(value.bit_length()):
        if value >> bit & 1 and (word, bit) not in _UNUSED:
            yield f"CPUID {leaf}{f'.{subleaf}' if subleaf != '0' else ''} {register} bit {bit}"


def _other_traits(here: CpuFacts, there: CpuFacts) -> Iterator[MigrationFinding]:
    gained = any(value & ~here.words.get(word, 0) for word, value in there.words.items())
    if gained:
        yield found("info", "cpu-features-added", "the destination's processor has features that the guest has not seen yet")
    other = sorted(
        f"{name} ({value} here, {there.traits[name]} there)"
        for name, value in here.traits.items()
        if not isinstance(value, bool) and name in there.traits and there.traits[name] != value
    )
    if other:
        yield found("warning", "cpu-traits-differ", f"the processors differ: {shown(other)}", path="$.cpu")


def _devices(source: QemuFacts, destination: QemuFacts) -> Iterator[MigrationFinding]:
    here, there = ({device.path: device for device in side.devices} for side in (source, destination))
    for path in sorted(here.keys() | there.keys()):
        yield from _device(path, here.get(path), there.get(path))


def _device(path: str, here: DeviceFacts | None, there: DeviceFacts | None) -> Iterator[MigrationFinding]:
    name = path.rpartition("/")[2]
    if there is None and here is not None:
        message = f"device {name} ({here.type}) is missing at the destination"
        yield found("error", "device-missing", message, mend="unplug it, or add it to the definition")
    elif here is None and there is not None:
        message = f"the destination has a device {name} ({there.type}) that the guest does not have"
        yield found("error", "device-added", message, mend="plug it in, or start the machine again")
    elif here is not None and there is not None and here != there:
        places = [f"{device.type} at {device.bus or 'no bus'} {device.address}".rstrip() for device in (here, there)]
        message = f"device {name} is a {places[0]}, and would be a {places[1]}"
        yield found("error", "device-differs", message, mend="give it a fixed bus and address in the definition")


def _built_in(source: QemuFacts, destination: QemuFacts) -> Iterator[MigrationFinding]:
    here, there = source.built_in, destination.built_in
    if not here or not there or here == there or source.machine != destination.machine:
        return
    differing = [f"{kind} ({here.get(kind, 0)} here, {there.get(kind, 0)} there)" for kind in _uneven(here, there)]
    promised = versioned(source.machine)
    yield found(
        "info" if promised else "warning",
        "built-in-differs",
        f"the machines are made of different parts: {shown(differing)}; "
        + ("QEMU promises that this type fits all the same" if promised else _AS_BEFORE),
    )


def _uneven(here: Mapping[str, int], there: Mapping[str, int]) -> list[str]:
    return sorted(kind for kind in here.keys() | there.keys() if here.get(kind) != there.get(kind))


def _pci(source: QemuFacts, destination: QemuFacts) -> Iterator[MigrationFinding]:
    # Only what sits at a root bus: what is behind a bridge is not to be seen before a guest has numbered its bus.
    here, there = ({card.place: (card.vendor, card.device) for card in side.pci if "/" not in card.place} for side in (source, destination))
    for place in sorted(here.keys() | there.keys()):
        if here.get(place) != there.get(place):
            seen = [f"{pair[0]:04x}:{pair[1]:04x}" if pair else "nothing" for pair in (here.get(place), there.get(place))]
            yield found("error", "pci-differs", f"at PCI address {place} the guest has {seen[0]}, and would have {seen[1]}")


def _memory(source: QemuFacts, destination: QemuFacts) -> Iterator[MigrationFinding]:
    if source.memory_bytes != destination.memory_bytes:
        sizes = f"{source.memory_bytes // MIB} MiB of memory, and would have {destination.memory_bytes // MIB} MiB"
        yield found("error", "memory-differs", f"the guest has {sizes}", path="$.memory_mib")
    there = {block.name: block for block in destination.ram_blocks}
    if not there:
        return
    for block in source.ram_blocks:
        yield from _block(block, there.get(block.name))


def _block(here: RamBlock, there: RamBlock | None) -> Iterator[MigrationFinding]:
    if there is None:
        yield found("error", "block-missing", f"the memory block {here.name} is missing at the destination: QEMU refuses the state")
    elif here.bytes != there.bytes and not _fits(here, there):
        yield found(
            "error",
            "block-differs",
            f"the memory block {here.name} has {here.bytes} bytes, and {there.bytes} at the destination: QEMU refuses the state",
            mend="use the same firmware files and option ROMs on both hosts",
        )


def _fits(here: RamBlock, there: RamBlock) -> bool:
    """Whether the block of the destination takes the size of the state's."""
    resizable = here.name.startswith(_MADE) or there.bytes != there.most_bytes
    return resizable and here.bytes <= there.most_bytes


def _drives(source: QemuFacts, destination: QemuFacts) -> Iterator[MigrationFinding]:
    there = {drive.device: drive for drive in destination.drives}
    for here in source.drives:
        other = there.get(here.device)
        if other is not None and other.bytes < here.bytes:
            message = f"the drive of {here.device} has {here.bytes} bytes, and {other.bytes} at the destination"
            yield found("error", "drive-too-small", message, path="$.disks")
        if other is not None and other.read_only != here.read_only:
            message = f"the drive of {here.device} is read-only on one side alone"
            yield found("error", "drive-read-only", message, path="$.disks")


def _capabilities(source: QemuFacts, destination: QemuFacts) -> Iterator[MigrationFinding]:
    for side, facts in (("source", source), ("destination", destination)):
        if missing := [name for name in CAPABILITIES if name not in facts.capabilities]:
            yield found("error", "capability-missing", f"the QEMU of the {side} cannot {shown(missing)}", mend="use QEMU 7.2 or later")


CHECKS: Final[tuple[Check, ...]] = (
    _target,
    _accelerator,
    _machine,
    _versions,
    _cpus,
    _devices,
    _built_in,
    _pci,
    _memory,
    _drives,
    _capabilities,
)
