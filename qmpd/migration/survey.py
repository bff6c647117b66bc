"""Asking a QEMU what another one would have to be like to take its state over, and how fast its guest changes memory. Only asks.

What is asked of a machine that runs is limited to what every QEMU since 7.2 answers without harm. Where a question is not known to this
QEMU or means nothing on this target, the fact is left out, and nothing is compared there.
"""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import Iterator
from typing import Final, TypeVar

import msgspec

from qmpd.errors import QemuRefused
from qmpd.findings import Answer
from qmpd.inquiry import CONTAINERS, Asked, Child, Cpu, Memory, ask, property_of, text_property
from qmpd.migration.likeness import CpuFacts, DeviceFacts, DriveFacts, PciFacts, QemuFacts, RamBlock, Trait

T = TypeVar("T")

#: What the tree of objects is full of, and no part of a machine's state by itself.
NO_PARTS: Final = frozenset({"irq", "memory-region", "container", "iommu-memory-region", "split-irq", "or-irq"})
#: `info qom-tree`: two spaces more for each level, a name, and a type.
_OBJECT: Final = re.compile(r"^(?P<indent> +)/(?P<name>.*) \((?P<type>[^()]*)\)\r?$", re.MULTILINE)
_BELOW_THE_MACHINE: Final = 2
#: `info ramblock`: name, page size, offset, bytes in use, most bytes (QEMU 9 and later: and more).
_RAM_BLOCK: Final = re.compile(r"^ *(?P<name>\S.*?) +\d+ [KMG]iB +0x[0-9a-f]+ +0x(?P<used>[0-9a-f]+) +0x(?P<most>[0-9a-f]+)", re.MULTILINE)
#: Properties that say where a device sits on its bus: PCI, and channel devices.
_ADDRESSES: Final = ("addr", "dev_id")
#: QEMU compares samples of pages one such period apart. What changes more slowly than that costs one pass at most.
DIRTY_PERIOD_S: Final = 1
#: QEMU knows the result when the period is over, and says nothing by itself: it is asked this often.
_LOOK_EVERY_S: Final = 0.1
#: Taking two samples of all memory takes seconds on a busy host; a migration is predicted without the rate after this.
DIRTY_LIMIT_S: Final = 30.0
#: Pages per GiB that are compared: eight times QEMU's own choice, because most machines here are small.
_SAMPLE_PAGES: Final = 4096


class _Qemu(Answer, frozen=True, kw_only=True):
    major: int
    minor: int
    micro: int


class _Version(Answer, frozen=True, kw_only=True):
    qemu: _Qemu


class _Target(Answer, frozen=True, kw_only=True):
    arch: str


class _Type(Answer, frozen=True, kw_only=True):
    name: str
    alias: str | None = None


class _Kvm(Answer, frozen=True, kw_only=True):
    enabled: bool = False


class _Status(Answer, frozen=True, kw_only=True):
    status: str = ""


class _Word(Answer, frozen=True, kw_only=True):
    cpuid_input_eax: int
    cpuid_input_ecx: int = 0
    cpuid_register: str
    features: int


class _Model(Answer, frozen=True, kw_only=True):
    name: str
    typename: str = ""


class _Expanded(Answer, frozen=True, kw_only=True):
    name: str = ""
    props: dict[str, object] = {}


class _Expansion(Answer, frozen=True, kw_only=True):
    model: _Expanded = _Expanded()


class _PciId(Answer, frozen=True, kw_only=True):
    device: int
    vendor: int


# In this one answer QEMU writes its names with underscores.
class _Bridge(Answer, frozen=True, kw_only=True, rename=None):
    devices: tuple[_PciDevice, ...] = ()


class _PciDevice(Answer, frozen=True, kw_only=True, rename=None):
    slot: int
    function: int
    qdev_id: str = ""
    id: _PciId
    pci_bridge: _Bridge = _Bridge()


class _PciBus(Answer, frozen=True, kw_only=True):
    bus: int
    devices: tuple[_PciDevice, ...] = ()


class _Snapshot(Answer, frozen=True, kw_only=True):
    name: str


class _Image(Answer, frozen=True, kw_only=True):
    virtual_size: int
    snapshots: tuple[_Snapshot, ...] = ()


class _Inserted(Answer, frozen=True, kw_only=True):
    drv: str
    ro: bool = False
    image: _Image


class _Drive(Answer, frozen=True, kw_only=True):
    device: str = ""
    qdev: str | None = None
    inserted: _Inserted | None = None


class _Capability(Answer, frozen=True, kw_only=True):
    capability: str


class _Migration(Answer, frozen=True, kw_only=True):
    blocked_reasons: tuple[str, ...] = ()


class _Replay(Answer, frozen=True, kw_only=True):
    mode: str = "none"


class _Job(Answer, frozen=True, kw_only=True):
    id: str
    type: str = ""


class _DirtyRate(Answer, frozen=True, kw_only=True):
    status: str
    dirty_rate: float | None = None


async def surveyed(qemu: Asked) -> QemuFacts:
    """Everything about this QEMU that matters to a migration of its machine.

    Raises:
        QemuDied: QEMU ended meanwhile, or its answers are not those of a QEMU.
        QemuSilent: it does not answer.
    """
    version = (await ask(qemu, "query-version", _Version)).qemu
    memory = await ask(qemu, "query-memory-size-summary", Memory)
    dump = await _asked_if_known(qemu, "query-dump", _Status, _Status(status="none"))
    return QemuFacts(
        version=(version.major, version.minor, version.micro),
        target=(await ask(qemu, "query-target", _Target)).arch,
        machine=(await text_property(qemu, "/machine", "type") or "").removesuffix("-machine"),
        types={one.name: one.alias for one in await ask(qemu, "query-machines", tuple[_Type, ...])},
        accelerator="kvm" if (await _asked_if_known(qemu, "query-kvm", _Kvm, _Kvm())).enabled else "tcg",
        status=(await ask(qemu, "query-status", _Status)).status,
        memory_bytes=memory.base_memory + memory.plugged_memory,
        ram_blocks=await _ram_blocks(qemu),
        cpu=await _cpu(qemu),
        devices=await _devices(qemu),
        built_in=await _built_in(qemu),
        pci=await _pci(qemu),
        drives=await _drives(qemu),
        capabilities=tuple(one.capability for one in await ask(qemu, "query-migrate-capabilities", tuple[_Capability, ...])),
        blockers=(await ask(qemu, "query-migrate", _Migration)).blocked_reasons,
        replay=(await _asked_if_known(qemu, "query-replay", _Replay, _Replay())).mode,
        dumping=dump.status == "active",
        jobs=tuple(f"{job.id} ({job.type})" for job in await ask(qemu, "query-jobs", tuple[_Job, ...])),
    )


async def _asked_if_known(qemu: Asked, command: str, kind: type[T], otherwise: T, arguments: dict[str, object] | None = None) -> T:
    """The answer, or `otherwise` from a QEMU that does not know the question, or to which it means nothing."""
    try:
        return await ask(qemu, command, kind, arguments)
    except QemuRefused:
        return otherwise


async def _ram_blocks(qemu: Asked) -> tuple[RamBlock, ...]:
    # There is no stable query for this; `x-query-ramblock` prints the same text, and is not in every QEMU.
    text = await _asked_if_known(qemu, "human-monitor-command", str, "", {"command-line": "info ramblock"})
    return tuple(
        RamBlock(name=found["name"], bytes=int(found["used"], 16), most_bytes=int(found["most"], 16)) for found in _RAM_BLOCK.finditer(text)
    )


async def _cpu(qemu: Asked) -> CpuFacts | None:
    cpus = await ask(qemu, "query-cpus-fast", tuple[Cpu, ...])
    if not cpus:
        return None
    path = cpus[0].qom_path
    kind = await text_property(qemu, path, "type") or ""
    words = await property_of(qemu, path, "feature-words")
    missing = await property_of(qemu, path, "unavailable-features")
    return CpuFacts(
        type=kind,
        count=len(cpus),
        words=dict(_words(words)),
        unavailable=tuple(str(name) for name in missing) if isinstance(missing, list) else (),
        traits=await _traits(qemu, kind) if words is None else {},
    )


def _words(answer: object) -> Iterator[tuple[str, int]]:
    for word in msgspec.convert(answer or (), tuple[_Word, ...]):
        yield f"{word.cpuid_input_eax:#x}.{word.cpuid_input_ecx}.{word.cpuid_register}", word.features


async def _traits(qemu: Asked, kind: str) -> dict[str, Trait]:
    models = await _asked_if_known(qemu, "query-cpu-definitions", tuple[_Model, ...], ())
    name = next((model.name for model in models if model.typename == kind), None)
    if name is None:
        return {}
    arguments: dict[str, object] = {"type": "full", "model": {"name": name}}
    expanded = await _asked_if_known(qemu, "query-cpu-model-expansion", _Expansion, _Expansion(), arguments)
    return {key: value for key, value in expanded.model.props.items() if isinstance(value, bool | int | str)}


async def _devices(qemu: Asked) -> tuple[DeviceFacts, ...]:
    devices = []
    for container in CONTAINERS:
        for child in await ask(qemu, "qom-list", tuple[Child, ...], {"path": container}):
            if child.made_of is not None:
                path = f"{container}/{child.name}"
                bus = await text_property(qemu, path, "parent_bus") or ""
                # Only the bus's own name: what it belongs to is numbered differently by different versions.
                devices.append(DeviceFacts(path=path, type=child.made_of, bus=bus.rpartition("/")[2], address=await _address(qemu, path)))
    return tuple(devices)


async def _address(qemu: Asked, path: str) -> str:
    for name in _ADDRESSES:
        value = await property_of(qemu, path, name)
        if isinstance(value, int):
            return f"{value >> 3:02x}.{value & 7}"
        if isinstance(value, str):
            return value
    return ""


async def _built_in(qemu: Asked) -> dict[str, int]:
    """Objects by type below the machine, without those that were plugged in."""
    # One question in place of hundreds: a QEMU answers `qom-list` for one object at a time.
    text = await _asked_if_known(qemu, "human-monitor-command", str, "", {"command-line": "info qom-tree /machine"})
    counts: Counter[str] = Counter()
    nothing_below: int | None = None
    for found in _OBJECT.finditer(text):
        depth, kind = len(found["indent"]), found["type"]
        if nothing_below is not None and depth > nothing_below:
            continue
        nothing_below = None
        if kind not in NO_PARTS:
            counts[kind] += 1
        elif kind != "container" or (depth == _BELOW_THE_MACHINE and f"/machine/{found['name']}" in CONTAINERS):
            nothing_below = depth
    return dict(sorted(counts.items()))


async def _pci(qemu: Asked) -> tuple[PciFacts, ...]:
    buses = await _asked_if_known(qemu, "query-pci", tuple[_PciBus, ...], ())
    return tuple(found for bus in buses for found in _functions(f"{bus.bus:02x}:", bus.devices))


def _functions(way: str, devices: tuple[_PciDevice, ...]) -> Iterator[PciFacts]:
    """The functions of a bus and those behind its bridges. The number of a bus behind a bridge is the guest's choice, and not used."""
    for device in devices:
        place = f"{way}{device.slot:02x}.{device.function}"
        yield PciFacts(place=place, vendor=device.id.vendor, device=device.id.device, id=device.qdev_id)
        yield from _functions(f"{place}/", device.pci_bridge.devices)


async def _drives(qemu: Asked) -> tuple[DriveFacts, ...]:
    return tuple(
        DriveFacts(
            device=drive.qdev or drive.device,
            format=medium.drv,
            bytes=medium.image.virtual_size,
            read_only=medium.ro,
            snapshots=tuple(snapshot.name for snapshot in medium.image.snapshots),
        )
        for drive in await ask(qemu, "query-block", tuple[_Drive, ...])
        if (medium := drive.inserted) is not None
    )


async def dirty_mib_s(qemu: Asked, limit_s: float = DIRTY_LIMIT_S) -> float | None:
    """How much memory the guest changes per second, by comparing samples; None where it cannot be measured.

    Only this way of measuring is used: QEMU 7.2 crashes under TCG when asked for the other two.
    """
    wanted: dict[str, object] = {"calc-time": DIRTY_PERIOD_S, "sample-pages": _SAMPLE_PAGES, "mode": "page-sampling"}
    try:
        await qemu.execute("calc-dirty-rate", wanted)
        async with asyncio.timeout(limit_s):
            while True:
                answer = await ask(qemu, "query-dirty-rate", _DirtyRate)
                if answer.status == "measured":
                    return answer.dirty_rate
                await asyncio.sleep(_LOOK_EVERY_S)
    except (QemuRefused, TimeoutError):
        return None
