"""What a user says about a machine: the one document type behind TOML, JSON and msgpack.

Types are frozen and refuse unknown fields; variants are tagged unions (`kind`). A decoded document is structurally right;
whether it fits a board and a host is for `qmpd.validation`. Units are in the names.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

#: Lower case only, so that two names never differ by case alone; 63 fits a DNS label and a socket path.
NAME_PATTERN: Final = r"^[a-z0-9][a-z0-9-]{0,62}\Z"
#: What may appear in text that ends up in an option QEMU parses as key=value.
WORD_PATTERN: Final = r"^[A-Za-z0-9][A-Za-z0-9._+-]{0,127}\Z"
UUID_PATTERN: Final = r"^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}\Z"
MAC_PATTERN: Final = r"^[0-9a-f]{2}(:[0-9a-f]{2}){5}\Z"
#: Absolute, printable and without control characters; `qmpd.validation` says where a path may lead.
PATH_PATTERN: Final = r"^/[^\x00-\x1f\x7f]*\Z"
TEXT_PATTERN: Final = r"^[^\x00-\x08\x0b-\x1f\x7f]*\Z"

#: A name of an emulator (`riscv64`), or its path.
EMULATOR_PATTERN: Final = r"^[A-Za-z0-9/][^\x00-\x1f\x7f]*\Z"
IPV4_PATTERN: Final = r"^[0-9.]{7,15}\Z"

#: What the patterns mean, for people: a decoder can only quote them.
MEANINGS: Final = {
    NAME_PATTERN: "a name of at most 63 lower-case letters, digits and '-', beginning with a letter or digit",
    WORD_PATTERN: "a word of letters, digits and '._+-', beginning with a letter or digit",
    UUID_PATTERN: "a UUID in lower case, like 123e4567-e89b-42d3-a456-426614174000",
    MAC_PATTERN: "a MAC address in lower case, like 52:54:00:12:34:56",
    PATH_PATTERN: "an absolute path without control characters",
    TEXT_PATTERN: "text without control characters",
    EMULATOR_PATTERN: "an emulator's name or absolute path",
    IPV4_PATTERN: "an IPv4 address",
}

MAX_DISKS: Final = 32
#: Each layer is one more open file and one more table to look at for every block that is read; longer chains are somebody's mistake.
MAX_LAYERS: Final = 8
MAX_NICS: Final = 16
MAX_LABELS: Final = 64
MAX_MEMORY_MIB: Final = 16 * 1024 * 1024

Name = Annotated[str, Meta(pattern=NAME_PATTERN, max_length=63, description="[a-z0-9][a-z0-9-]{0,62}")]
Word = Annotated[str, Meta(pattern=WORD_PATTERN, max_length=128)]
Path = Annotated[str, Meta(pattern=PATH_PATTERN, max_length=4096, description="an absolute path")]
Text = Annotated[str, Meta(pattern=TEXT_PATTERN, max_length=4096)]
Label = Annotated[str, Meta(pattern=TEXT_PATTERN, max_length=256)]
Port = Annotated[int, Meta(ge=1, le=65535)]
Seconds = Annotated[float, Meta(ge=0, le=86_400)]
#: Negative ones, so that something can come before what was there already.
Order = Annotated[int, Meta(ge=-1000, le=1000)]
#: As cgroup v2 has them: 100 is what everybody has.
Weight = Annotated[int, Meta(ge=1, le=10_000)]
#: What can be stored. QEMU takes larger ones as text.
Integer = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
OptionValue = str | Integer | bool

Accel = Literal["auto", "kvm", "tcg"]
DiskFormat = Literal["raw", "qcow2"]
BootDevice = Literal["disk", "cdrom", "network"]
#: What becomes of an error of the disk's image, in QEMU's words for `werror`.
DiskErrors = Literal["enospc", "stop", "report", "ignore"]


class Document(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Base of the document types: frozen, named fields only, unknown fields refused, defaults left out on the wire."""


class Topology(Document, frozen=True, kw_only=True):
    """How the vCPUs are arranged; sockets x cores x threads must equal the CPU count."""

    sockets: Annotated[int, Meta(ge=1, le=4096)] = 1
    cores: Annotated[int, Meta(ge=1, le=4096)] = 1
    threads: Annotated[int, Meta(ge=1, le=64)] = 1


class Cpu(Document, frozen=True, kw_only=True):
    """The processor: how many vCPUs (default: as few as the board takes), QEMU's model name (default: the board's), features."""

    count: Annotated[int, Meta(ge=1, le=4096)] | None = None
    model: Word | None = None
    features: Annotated[dict[Word, bool | Integer | Word], Meta(max_length=128)] = {}
    topology: Topology | None = None


class DefaultFirmware(Document, frozen=True, kw_only=True, tag_field="kind", tag="default"):
    """What the board brings: its own firmware, or none where it boots kernels directly."""


class NoFirmware(Document, frozen=True, kw_only=True, tag_field="kind", tag="none"):
    """No firmware at all (`-bios none`), for boards that allow it."""


class BiosFirmware(Document, frozen=True, kw_only=True, tag_field="kind", tag="bios"):
    """One firmware file (`-bios`)."""

    path: Path


class PflashFirmware(Document, frozen=True, kw_only=True, tag_field="kind", tag="pflash"):
    """UEFI in two flash devices: read-only `code`, and variables copied from the template `vars` for each machine."""

    code: Path
    vars: Path
    format: DiskFormat = "raw"


Firmware = DefaultFirmware | NoFirmware | BiosFirmware | PflashFirmware


class Kernel(Document, frozen=True, kw_only=True):
    """Direct kernel boot. `append` is the guest's command line; the board's console is put in front unless `console` is false."""

    image: Path
    initrd: Path | None = None
    append: Text = ""
    dtb: Path | None = None
    console: bool = True


class BaseImage(Document, frozen=True, kw_only=True):
    """What lies below an image that holds only what was written since (an overlay). It is only read, by any number of machines. A qcow2 one
    may lie upon a `base` itself; at most 8 lie below one disk."""

    path: Path
    format: DiskFormat
    base: BaseImage | None = None

    def layers(self) -> Iterator[BaseImage]:
        """This one, and all that lie below it, the uppermost first."""
        layer: BaseImage | None = self
        while layer is not None:
            yield layer
            layer = layer.base


class ImageDisk(Document, frozen=True, kw_only=True, tag_field="kind", tag="image"):
    """A disk backed by an existing image file. The format is stated, never guessed; `base` is what a qcow2 image was made upon."""

    path: Path
    format: DiskFormat
    base: BaseImage | None = None
    bus: Word | None = None
    media: Literal["disk", "cdrom"] = "disk"
    read_only: bool = False
    serial: Word | None = None
    discard: bool = True
    on_error: DiskErrors = "enospc"


class BlankDisk(Document, frozen=True, kw_only=True, tag_field="kind", tag="blank"):
    """A new empty disk of `size_mib`, made by qmpd when the machine is created and deleted with it."""

    size_mib: Annotated[int, Meta(ge=1, le=64 * 1024 * 1024)]
    format: DiskFormat = "qcow2"
    bus: Word | None = None
    serial: Word | None = None
    discard: bool = True
    on_error: DiskErrors = "enospc"


Disk = ImageDisk | BlankDisk


class Forward(Document, frozen=True, kw_only=True):
    """A port of the host that leads to a port of the guest; `host_port` 0 lets the system choose."""

    guest_port: Port
    host_port: Annotated[int, Meta(ge=0, le=65535)] = 0
    protocol: Literal["tcp", "udp"] = "tcp"
    host_address: Annotated[str, Meta(pattern=IPV4_PATTERN)] = "127.0.0.1"


class UserNic(Document, frozen=True, kw_only=True, tag_field="kind", tag="user"):
    """A NIC on QEMU's user-mode network. `restrict` cuts the guest off from everything but the forwards."""

    model: Word | None = None
    mac: Annotated[str, Meta(pattern=MAC_PATTERN)] | None = None
    forwards: Annotated[tuple[Forward, ...], Meta(max_length=256)] = ()
    restrict: bool = False


class DisconnectedNic(Document, frozen=True, kw_only=True, tag_field="kind", tag="none"):
    """A NIC whose cable leads nowhere."""

    model: Word | None = None
    mac: Annotated[str, Meta(pattern=MAC_PATTERN)] | None = None


Nic = UserNic | DisconnectedNic


class SerialConsole(Document, frozen=True, kw_only=True, tag_field="kind", tag="console"):
    """A serial port whose output is kept in a log and which any number of viewers may watch and type into."""


class SerialNone(Document, frozen=True, kw_only=True, tag_field="kind", tag="none"):
    """A serial port that leads nowhere."""


SerialPort = SerialConsole | SerialNone


class NoDisplay(Document, frozen=True, kw_only=True, tag_field="kind", tag="none"):
    """No display backend and no display device beyond what is soldered to the board."""


class VncDisplay(Document, frozen=True, kw_only=True, tag_field="kind", tag="vnc"):
    """A display device (default: the board's) served over VNC on a private Unix socket."""

    device: Word | None = None


Display = NoDisplay | VncDisplay


class Actions(Document, frozen=True, kw_only=True):
    """What QEMU does when something happens to the guest, in QEMU's own words; the defaults are QEMU's but for `panic`.

    QEMU would end on a panic, with the exit status of success; here the machine is kept for inspection unless something else is said.
    """

    panic: Literal["pause", "shutdown", "exit-failure", "none"] = "pause"
    reboot: Literal["reset", "shutdown"] = "reset"
    shutdown: Literal["poweroff", "pause"] = "poweroff"
    watchdog: Literal["reset", "shutdown", "poweroff", "pause", "debug", "none", "inject-nmi"] = "reset"


class Watchdog(Document, frozen=True, kw_only=True):
    """A watchdog device (default: the board's first); what it does when it fires is in `actions`."""

    model: Word | None = None


class Tpm(Document, frozen=True, kw_only=True):
    """A TPM, emulated by swtpm; its state is the machine's own. `model` is the device (default: the board's first)."""

    version: Literal["2.0"] = "2.0"
    model: Word | None = None


class RestartPolicy(Document, frozen=True, kw_only=True):
    """What to do when QEMU ends without having been asked to."""

    when: Literal["never", "on-failure", "always"] = "never"
    limit: Annotated[int, Meta(ge=1, le=1000)] = 5
    backoff_s: Annotated[float, Meta(ge=0.1, le=3600)] = 1.0


class Limits(Document, frozen=True, kw_only=True):
    """What QEMU may take of the host, all its threads together: the guest's RAM and processors, and QEMU's own needs.

    `cpu_percent` and `memory_max_mib` are never exceeded; the weights (of everybody's 100) count only while several want the same.
    """

    cpu_percent: Annotated[int, Meta(ge=1, le=1_000_000)] | None = None
    cpu_weight: Weight | None = None
    memory_max_mib: Annotated[int, Meta(ge=1, le=2 * MAX_MEMORY_MIB)] | None = None
    io_weight: Weight | None = None
    tasks_max: Annotated[int, Meta(ge=64, le=4_194_304)] | None = None


class MachineSpec(Document, frozen=True, kw_only=True):
    """A machine definition. Only `name` and `board` are needed; everything else has the board's default."""

    name: Name
    board: Word
    title: Text = ""
    uuid: Annotated[str, Meta(pattern=UUID_PATTERN)] | None = None
    emulator: Annotated[str, Meta(pattern=EMULATOR_PATTERN, max_length=4096)] | None = None
    machine: Word | None = None
    machine_options: Annotated[dict[Word, OptionValue], Meta(max_length=64)] = {}
    accel: Accel = "auto"
    cpu: Cpu = Cpu()
    memory_mib: Annotated[int, Meta(ge=1, le=MAX_MEMORY_MIB)] | None = None
    firmware: Firmware = DefaultFirmware()
    kernel: Kernel | None = None
    boot_order: Annotated[tuple[BootDevice, ...], Meta(max_length=3)] = ()
    disks: Annotated[tuple[Disk, ...], Meta(max_length=MAX_DISKS)] = ()
    nics: Annotated[tuple[Nic, ...], Meta(max_length=MAX_NICS)] = ()
    rng: bool = False
    serial_ports: Annotated[tuple[SerialPort, ...], Meta(max_length=4)] = ()
    display: Display = NoDisplay()
    devices: Annotated[tuple[dict[str, object], ...], Meta(max_length=64)] = ()
    extra_args: Annotated[tuple[Text, ...], Meta(max_length=256)] = ()
    labels: Annotated[dict[Word, Label], Meta(max_length=MAX_LABELS)] = {}
    actions: Actions = Actions()
    watchdog: Watchdog | None = None
    tpm: Tpm | None = None
    limits: Limits = Limits()
    restart: RestartPolicy = RestartPolicy()
    resume_when_space: bool = False
    autostart: bool = False
    autostart_order: Order = 0
    autostart_delay_s: Seconds = 0.0
    shutdown_timeout_s: Seconds = 60.0
    protected: bool = False


class MachineChanges(Document, frozen=True, kw_only=True):
    """What of a definition may change while the machine runs, because its QEMU knows nothing of it. What is left out stays as it is.

    `labels` and `restart` are replaced as a whole.
    """

    title: Text | None = None
    labels: Annotated[dict[Word, Label], Meta(max_length=MAX_LABELS)] | None = None
    restart: RestartPolicy | None = None
    resume_when_space: bool | None = None
    autostart: bool | None = None
    autostart_order: Order | None = None
    autostart_delay_s: Seconds | None = None
    shutdown_timeout_s: Seconds | None = None
    protected: bool | None = None


def changed(spec: MachineSpec, changes: MachineChanges) -> MachineSpec:
    """The definition with what was given."""
    given = {name: value for name in MachineChanges.__struct_fields__ if (value := getattr(changes, name)) is not None}
    return msgspec.structs.replace(spec, **given)


def explained(message: str) -> str:
    """A decoder's message with what a pattern means in place of the pattern."""
    for pattern, meaning in MEANINGS.items():
        message = message.replace(f"Expected `str` matching regex {pattern!r}", f"Expected {meaning}")
    return message
