"""What one QEMU is made of, as far as another one has to be made of the same to take its state over."""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

from qmpd.migrationviews import MigrationFinding

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
    """A drive with something in it, by the device it is attached to. `snapshots` are the names of those within its image."""

    device: str
    format: str
    bytes: int
    read_only: bool
    snapshots: tuple[str, ...] = ()


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


class FirmwareFile(Part, frozen=True, kw_only=True):
    """A file that QEMU loads into the machine; `role` is where in the definition it is named (`firmware.code`, `kernel.image`)."""

    role: str
    bytes: int
    sha256: str


class HostPort(Part, frozen=True, kw_only=True):
    """A port of a host that leads to the guest."""

    protocol: Literal["tcp", "udp"]
    address: str
    port: int


class SourceDisk(Part, frozen=True, kw_only=True):
    """A disk at the source, and how it is to go; `bytes` is what the guest sees, `used_bytes` what its image has, and `base_bytes`
    what is in that which it lies upon."""

    index: int
    how: Literal["shared", "copy"]
    format: str
    bytes: int
    used_bytes: int = 0
    base_bytes: int = 0


class BaseThere(Part, frozen=True, kw_only=True):
    """What is at the destination in place of what a disk lies upon: the `same`, or `why` not."""

    path: str
    same: bool
    why: str = ""


class TargetDisk(Part, frozen=True, kw_only=True):
    """What is at the destination where a disk is to be. `how` is what the destination made of the source's wish. `same` says whether it is
    the source's file: None if nobody can tell. `refusal`: why this daemon may not use the path. `needed_bytes` (of all disks that go there)
    and `free_bytes` are of the file system it goes to. `base` is there for a disk that lies upon one."""

    index: int
    path: str
    how: Literal["shared", "copy"] = "copy"
    exists: bool
    refusal: str = ""
    same: bool | None = None
    bytes: int | None = None
    format: str | None = None
    needed_bytes: int = 0
    free_bytes: int | None = None
    base: BaseThere | None = None

    @property
    def based(self) -> bool:
        """Whether only what is above its base is sent."""
        return self.how == "copy" and self.base is not None and self.base.same


class MachineFacts(Part, frozen=True, kw_only=True):
    """A machine at its source, by its definition and its files: all that there is of one at rest."""

    name: str
    uuid: str
    macs: tuple[str, ...] = ()
    protocol: int
    firmware: tuple[FirmwareFile, ...] = ()
    disks: tuple[SourceDisk, ...] = ()
    forwards: tuple[HostPort, ...] = ()


class SourceFacts(MachineFacts, frozen=True, kw_only=True):
    """A machine that runs at its source. `works` is what its board file says of migration, `alias` the machine type as the definition has
    it. `channels` and `postcopy` are what the request asks for; `bitmaps`: its disks have some."""

    works: str = "works"
    alias: str = ""
    qemu: QemuFacts
    channels: int = 0
    postcopy: bool = False
    bitmaps: bool = False


class Obstacle(Part, frozen=True, kw_only=True):
    """Something that keeps the destination from starting a QEMU with the definition; `path` is where in it."""

    path: str = ""
    message: str


class DestinationFacts(Part, frozen=True, kw_only=True):
    """What the destination found: a QEMU of its own with the same definition, halted, or why there is none (`obstacles`); what it has no
    room for or has taken already. `limits_unkept`: limits of the definition it cannot keep, and why (`""`: none of them). `findings`: what
    the definition names that is something else there."""

    protocols: tuple[int, ...]
    qemu: QemuFacts | None = None
    obstacles: tuple[Obstacle, ...] = ()
    firmware: tuple[FirmwareFile, ...] = ()
    disks: tuple[TargetDisk, ...] = ()
    ports_taken: tuple[HostPort, ...] = ()
    limits_unkept: dict[str, str] = {}
    name_taken: bool = False
    uuid_taken_by: str | None = None
    macs_taken: dict[str, str] = {}
    free_memory_mib: int | None = None
    findings: tuple[MigrationFinding, ...] = ()
