"""What one QEMU is made of, as far as another one has to be made of the same to take its state over."""

from __future__ import annotations

from typing import TypeAlias

import msgspec

#: What a CPU model says of itself: flags, numbers and names.
Trait: TypeAlias = bool | int | str


class Part(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of these facts. They are sent to another daemon, which refuses what it does not know."""


class RamBlock(Part, frozen=True, kw_only=True):
    """A piece of guest memory or ROM; it can grow up to `most_bytes`."""

    name: str
    bytes: int
    most_bytes: int


class CpuFacts(Part, frozen=True, kw_only=True):
    """The processors. `words`: feature bits the guest sees, by CPUID leaf and register (x86). `unavailable`: features that were asked for,
    and that the host does not have. `traits`: what the model is, where it can be asked (not on x86)."""

    type: str
    count: int
    words: dict[str, int] = {}
    unavailable: tuple[str, ...] = ()
    traits: dict[str, Trait] = {}


class DeviceFacts(Part, frozen=True, kw_only=True):
    """A device that was plugged in, by option or later: its place in the tree of objects, its type, its bus and where it sits there."""

    path: str
    type: str
    bus: str = ""
    address: str = ""


class PciFacts(Part, frozen=True, kw_only=True):
    """A PCI function: the way to it as slots and functions from the root bus, and what it says it is."""

    place: str
    vendor: int
    device: int
    id: str = ""


class DriveFacts(Part, frozen=True, kw_only=True):
    """A drive with something in it, by the device it is attached to."""

    device: str
    format: str
    bytes: int
    read_only: bool


class QemuFacts(Part, frozen=True, kw_only=True):
    """One QEMU with its machine. `types`: all machine types it knows, with the alias of each. `built_in`: how many objects of which type
    the machine itself consists of, empty if unknown. `blockers`: why it cannot be migrated at the moment, in its own words. `replay` is
    `none`, `record` or `play`."""

    version: tuple[int, int, int]
    target: str
    machine: str
    types: dict[str, str | None] = {}
    accelerator: str
    status: str
    memory_bytes: int
    ram_blocks: tuple[RamBlock, ...] = ()
    cpu: CpuFacts | None = None
    devices: tuple[DeviceFacts, ...] = ()
    built_in: dict[str, int] = {}
    pci: tuple[PciFacts, ...] = ()
    drives: tuple[DriveFacts, ...] = ()
    capabilities: tuple[str, ...] = ()
    blockers: tuple[str, ...] = ()
    replay: str = "none"
    dumping: bool = False
    jobs: tuple[str, ...] = ()
