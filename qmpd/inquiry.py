"""Asking a QEMU that somebody else started what it is: everything QMP can tell that a definition could say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Protocol, TypeVar

import msgspec

from qmpd.errors import QemuDied, QemuRefused
from qmpd.findings import Answer, Chardev, Device, Drive, Findings
from qmpd.monitor import Monitor

T = TypeVar("T")

#: Where QEMU keeps what was given with -device: by id, and without one.
CONTAINERS: Final = ("/machine/peripheral", "/machine/peripheral-anon")
#: Properties of the machine that say what it boots.
BOOT: Final = ("kernel", "initrd", "append", "dtb")
_BACKEND: Final = "/virtio-backend"


class Asked(Protocol):
    """Whatever answers questions as a monitor does."""

    async def execute(self, command: str, arguments: Mapping[str, object] | None = None) -> object:
        """As `Monitor.execute`."""


class _Name(Answer, frozen=True, kw_only=True):
    name: str | None = None


class _Uuid(Answer, frozen=True, kw_only=True):
    uuid: str = msgspec.field(name="UUID")


class _Kvm(Answer, frozen=True, kw_only=True):
    enabled: bool


class _Target(Answer, frozen=True, kw_only=True):
    arch: str


class Memory(Answer, frozen=True, kw_only=True):
    """How much there is, in bytes (`query-memory-size-summary`)."""

    base_memory: int
    plugged_memory: int = 0


class Cpu(Answer, frozen=True, kw_only=True):
    """One of `query-cpus-fast`."""

    qom_path: str


class _Type(Answer, frozen=True, kw_only=True):
    name: str
    alias: str | None = None


class Child(Answer, frozen=True, kw_only=True):
    """An entry of a node of QEMU's tree of objects: a property, or `child<TYPE>`."""

    name: str
    type: str

    @property
    def made_of(self) -> str | None:
        """The type of a child; None for a property."""
        return self.type[6:-1] if self.type.startswith("child<") else None


async def asked(monitor: Monitor) -> Findings:
    """Everything that can be known over this monitor. Only reads.

    Raises:
        QemuDied: QEMU ended meanwhile, or its answers are not those of a QEMU.
        QemuSilent: it does not answer.
        QemuRefused: it does not know a question that every QEMU since 6.0 knows.
    """
    memory = await ask(monitor, "query-memory-size-summary", Memory)
    cpus = await ask(monitor, "query-cpus-fast", tuple[Cpu, ...])
    types = await ask(monitor, "query-machines", tuple[_Type, ...])
    machine = await text_property(monitor, "/machine", "type") or ""
    boot = {name: await text_property(monitor, "/machine", name) for name in BOOT}
    return Findings(
        version=monitor.version,
        target=(await ask(monitor, "query-target", _Target)).arch,
        name=(await ask(monitor, "query-name", _Name)).name,
        uuid=(await ask(monitor, "query-uuid", _Uuid)).uuid,
        kvm=(await ask(monitor, "query-kvm", _Kvm)).enabled,
        machine=machine.removesuffix("-machine"),
        relatives={one.name: one.alias for one in types},
        memory_bytes=memory.base_memory + memory.plugged_memory,
        cpus=len(cpus),
        cpu_type=await text_property(monitor, cpus[0].qom_path, "type") if cpus else None,
        boot={name: value for name, value in boot.items() if value},
        drives=await _drives(monitor),
        devices=await _devices(monitor),
        chardevs=await ask(monitor, "query-chardev", tuple[Chardev, ...]),
    )


async def _drives(monitor: Monitor) -> tuple[Drive, ...]:
    drives = await ask(monitor, "query-block", tuple[Drive, ...])
    return tuple([msgspec.structs.replace(drive, driver=await _driver(monitor, drive.qdev)) for drive in drives])


async def _driver(monitor: Monitor, path: str | None) -> str | None:
    """A virtio disk is split into the device on its bus and the disk in it; the first is what a definition names."""
    return None if path is None else await text_property(monitor, path.removesuffix(_BACKEND), "type")


async def _devices(monitor: Monitor) -> tuple[Device, ...]:
    devices = []
    for container in CONTAINERS:
        for child in await ask(monitor, "qom-list", tuple[Child, ...], {"path": container}):
            if child.made_of is not None:
                path = f"{container}/{child.name}"
                mac = await text_property(monitor, path, "mac")
                netdev = await text_property(monitor, path, "netdev") if mac else None
                devices.append(Device(path=path, driver=child.made_of, mac=mac, netdev=netdev))
    return tuple(devices)


async def text_property(qemu: Asked, path: str, name: str) -> str | None:
    """A property of an object that is text; None if it has none of that name."""
    value = await property_of(qemu, path, name)
    return value if isinstance(value, str) else None


async def property_of(qemu: Asked, path: str, name: str) -> object:
    """A property of an object; None if it has none of that name."""
    try:
        return await qemu.execute("qom-get", {"path": path, "property": name})
    except QemuRefused:
        return None  # this machine has no such property


async def ask(qemu: Asked, command: str, kind: type[T], arguments: dict[str, object] | None = None) -> T:
    """The answer to a query, as what it has to be. Raises QemuDied for anything else."""
    answer = await qemu.execute(command, arguments)
    try:
        return msgspec.convert(answer, kind)
    except msgspec.ValidationError as error:
        raise QemuDied(f"the answer to {command} is not one of a QEMU: {error}") from error
