"""What a QEMU says of itself when it is asked everything."""

from __future__ import annotations

import msgspec


class Answer(msgspec.Struct, frozen=True, kw_only=True, rename="kebab"):
    """Base of QEMU's answers; what qmpd does not need is left out."""


class Medium(Answer, frozen=True, kw_only=True):
    """What is in a drive."""

    file: str
    drv: str
    ro: bool = False


class Drive(Answer, frozen=True, kw_only=True):
    """A drive; `driver` is the device it is attached to."""

    device: str = ""
    qdev: str | None = None
    inserted: Medium | None = None
    driver: str | None = None


class Chardev(Answer, frozen=True, kw_only=True):
    """A character device and where it leads."""

    label: str
    filename: str


class Device(Answer, frozen=True, kw_only=True):
    """A device that was plugged in by option or command; MAC and network backend where it has them."""

    path: str
    driver: str
    mac: str | None = None
    netdev: str | None = None


class Findings(Answer, frozen=True, kw_only=True):
    """What a QEMU said of itself. `machine` is the type's name, `relatives` all types by name with their other names."""

    version: str
    target: str
    name: str | None
    uuid: str
    kvm: bool
    machine: str
    relatives: dict[str, str | None]
    memory_bytes: int
    cpus: int
    cpu_type: str | None
    boot: dict[str, str]
    drives: tuple[Drive, ...]
    devices: tuple[Device, ...]
    chardevs: tuple[Chardev, ...]
