"""What a board file says: the facts about a machine type that cannot be asked from QEMU.

One TOML file per board; its name without `.toml` is the board's id. `machines/README.md` explains every field.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from qmpd.spec import OptionValue, Path, Text, Word

#: The name of a board's file without `.toml`: as a machine's name, and `_` for architectures that are spelled with it.
ID_PATTERN: Final = r"^[a-z0-9][a-z0-9_-]{0,62}\Z"
BoardId = Annotated[str, Meta(pattern=ID_PATTERN, max_length=63)]
Snapshots = Literal["works", "needs-input", "frozen", "slow", "refused", "crashes", "untested"]


class Part(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Base of the tables of a board file."""


class Memory(Part, frozen=True, kw_only=True):
    """RAM in MiB: the default qmpd uses, and what the board accepts (a multiple of `step_mib`). `fixed` boards take the default only."""

    default_mib: Annotated[int, Meta(ge=1)]
    min_mib: Annotated[int, Meta(ge=1)] = 1
    max_mib: Annotated[int, Meta(ge=1)] | None = None
    step_mib: Annotated[int, Meta(ge=1)] = 1
    fixed: bool = False


class Console(Part, frozen=True, kw_only=True):
    """The serial console: which `-serial` it is, and what the kernel calls it."""

    kernel: Text | None = None
    serial_index: Annotated[int, Meta(ge=0, le=3)] = 0
    earlycon: Text | None = None
    input_delay_ms: Annotated[int, Meta(ge=0, le=1000)] = 0


class KernelBoot(Part, frozen=True, kw_only=True):
    """Direct kernel boot: the image types `-kernel` takes, extra words for the command line, whether a dtb is needed."""

    formats: tuple[Text, ...]
    append: Text = ""
    dtb: Literal["none", "optional", "required"] = "none"
    required: bool = False


class FirmwareChoice(Part, frozen=True, kw_only=True):
    """What `firmware = default` means: `builtin` (QEMU loads its own), `none` (`-bios none`), `required` (user must name one)."""

    default: Literal["builtin", "none", "required"] = "builtin"
    pflash: bool = False
    bios: bool = True


class DiskBus(Part, frozen=True, kw_only=True):
    """One way to attach a disk: either a `-device` driver (with the controller it needs), or a board's own slot (`-drive if=`)."""

    device: Word | None = None
    cdrom_device: Word | None = None
    drive_interface: Literal["ide", "scsi", "sd", "floppy", "mtd", "pflash"] | None = None
    controller: Word | None = None
    bus: Text | None = None
    units: Annotated[int, Meta(ge=1)] = 1
    needs_serial: bool = False
    size_mib: Annotated[int, Meta(ge=1)] | None = None
    gone_in: Annotated[int, Meta(ge=1)] | None = None
    limit: Annotated[int, Meta(ge=1)] = 32
    root: Text | None = None


class NicModel(Part, frozen=True, kw_only=True):
    """One way to attach a NIC: a `-device` driver, or the NIC on the board (`-nic model=`)."""

    device: Word | None = None
    on_board: Word | None = None
    limit: Annotated[int, Meta(ge=1)] = 16


class DisplayHints(Part, frozen=True, kw_only=True):
    """Displays: what `display.kind = "vnc"` adds (`device`, or a word for `-vga`), and what `-vga` must say when there is none."""

    device: Word | None = None
    vnc_vga: Literal["std", "tcx", "cg3"] | None = None
    vga: Literal["none", "std", "cirrus"] | None = None
    on_board: bool = False


class Power(Part, frozen=True, kw_only=True):
    """What the guest can do to end itself, as seen from the host."""

    acpi_shutdown: bool = False
    poweroff: bool = False
    reset: bool = False


class ProvenGuest(Part, frozen=True, kw_only=True):
    """A guest that was seen to boot on this board. Paths are those of the named distribution packages."""

    summary: Text
    packages: tuple[Text, ...] = ()
    source: Text | None = None
    bios: Path | None = None
    kernel: Path | None = None
    initrd: Path | None = None
    dtb: Path | None = None
    append: Text = ""
    memory_mib: int | None = None
    machine_options: dict[Word, OptionValue] = {}
    expect: Text
    send: Text | None = None
    send_after: Text | None = None
    seconds: float | None = None
    devices: tuple[dict[str, object], ...] = ()


class Board(Part, frozen=True, kw_only=True):
    """A board. `emulators` are the names behind `qemu-system-`, first choice first; `also` are names of the machine in other versions."""

    title: Text
    arch: Word
    emulators: Annotated[tuple[Word, ...], Meta(min_length=1)]
    machine: Word
    also: tuple[Word, ...] = ()
    machine_options: dict[Word, OptionValue] = {}
    cpu: Word | None = None
    kvm_cpu: Word | None = None
    min_cpus: Annotated[int, Meta(ge=1)] = 1
    max_cpus: Annotated[int, Meta(ge=1)] = 1
    kvm_hosts: tuple[Word, ...] = ()
    memory: Memory
    console: Console = Console()
    device_bus: Word | None = None
    kernel: KernelBoot | None = None
    firmware: FirmwareChoice = FirmwareChoice()
    disks: dict[Word, DiskBus] = {}
    default_disk: Word | None = None
    nics: dict[Word, NicModel] = {}
    default_nic: Word | None = None
    rng: Word | None = None
    watchdogs: tuple[Word, ...] = ()
    tpms: tuple[Word, ...] = ()
    display: DisplayHints = DisplayHints()
    power: Power = Power()
    snapshots: Snapshots = "untested"
    migration: Snapshots = "untested"
    memory_dump: bool = False
    nmi: bool = False
    options: tuple[tuple[Word, Text], ...] = ()
    notes: tuple[Text, ...] = ()
    guest: ProvenGuest | None = None


class NamedBoard(msgspec.Struct, frozen=True, kw_only=True):
    """A board under the id it is found by, and the file it came from."""

    id: BoardId
    source: str
    board: Board
