"""What two daemons say to each other to move a machine, or to copy one: documents, and nothing that acts.

Every verb may be repeated and then gets the same answer, so that a lost answer is asked for again. `VERSION` is raised when a daemon
could misunderstand another one's offer; a destination refuses what it does not know.
"""

from __future__ import annotations

from binascii import a2b_base64, b2a_base64
from collections.abc import Iterator
from math import ceil
from typing import Annotated, Final, Literal

from msgspec import Meta

from qmpd.migration.likeness import DestinationFacts
from qmpd.migration.parcels import MAX_PARCELS, Parcel
from qmpd.migration.phases import Phase, Role
from qmpd.spec import UUID_PATTERN, DiskFormat, MachineSpec, Name, Path, Text, Word
from qmpd.viewbase import Request, View

VERSION: Final = 1
ID_PATTERN: Final = r"^[0-9a-f]{16}\Z"
#: So much of each console's log travels with the hand-over itself; most was sent before, and what is more follows while the guest runs.
TAIL_BYTES: Final = 64 * 1024
MAX_PORTS: Final = 4

#: What a connection of QEMU's carries that goes through the API: memory and devices, or the content of disks.
Channel = Literal["memory", "disks"]
MigrationId = Annotated[str, Meta(pattern=ID_PATTERN)]
Epoch = Annotated[int, Meta(ge=1, le=2**53)]
Bytes = Annotated[int, Meta(ge=0, le=2**60)]
Port = Annotated[int, Meta(ge=0, lt=MAX_PORTS)]


class FileMark(Request, frozen=True, kw_only=True):
    """What tells a file on storage that both hosts see: the boot id of the host, and device and inode there; its size."""

    boot_id: str
    device: int
    inode: int
    size: Bytes


class BaseOffer(Request, frozen=True, kw_only=True):
    """What lies below a disk's image at the source: `path` is where the destination is to look for the same, `size` its length,
    `used_bytes` what is in it and all below it, and `digest` tells whether it is the same (`qmpd.migration.extents`). `below`: it lies upon
    another one, which has to be the same as well, where the header of this one leads from `path`."""

    path: Path
    format: DiskFormat
    size: Bytes
    used_bytes: Bytes = 0
    digest: Text
    below: BaseOffer | None = None

    def layers(self) -> Iterator[BaseOffer]:
        """This one, and all that lie below it, the uppermost first."""
        layer: BaseOffer | None = self
        while layer is not None:
            yield layer
            layer = layer.below


class DiskOffer(Request, frozen=True, kw_only=True):
    """How disk `index` of the definition goes: on storage that both hosts see (`shared`), or copied while the guest runs.

    `virtual_bytes` is what the guest sees, `used_bytes` what the image has of it, as far as is known. `mark` is set where
    the source could look at the file. `path` and `format` are what the destination is to use instead of the source's. `base` is what the
    image lies upon.
    """

    index: Annotated[int, Meta(ge=0, le=255)]
    how: Literal["shared", "copy", "auto"]
    virtual_bytes: Bytes
    used_bytes: Bytes = 0
    mark: FileMark | None = None
    path: Path | None = None
    format: DiskFormat | None = None
    base: BaseOffer | None = None


class Original(Request, frozen=True, kw_only=True):
    """The machine at the source that an offer is a copy of."""

    name: Name
    uuid: Annotated[str, Meta(pattern=UUID_PATTERN)]


class Offer(Request, frozen=True, kw_only=True):
    """A machine that another host offers to hand over.

    `state` is what it does there now. `parcels` is what it brings beside its memory: all of it where it is `stopped`, and then nobody knows
    an accelerator or an emulator of it. `bitmaps`: its disks have some, which move along. `unlimited`: it is taken without its limits where
    they cannot be kept. `copy_of`: it is no machine of the source's, but a copy of one that stays there, with an identity of its own.
    """

    protocol: int
    id: MigrationId
    epoch: Epoch
    spec: MachineSpec
    uuid: Annotated[str, Meta(pattern=UUID_PATTERN)]
    created_at: Text
    changed_at: Text
    state: Literal["running", "paused", "stopped"]
    machine: Word
    accel: Literal["kvm", "tcg"] | None = None
    emulator_version: Text = ""
    disks: tuple[DiskOffer, ...] = ()
    parcels: Annotated[tuple[Parcel, ...], Meta(max_length=MAX_PARCELS)] = ()
    channels: Annotated[int, Meta(ge=0, le=255)] = 0
    postcopy: bool = False
    bitmaps: bool = False
    tunnel: bool = False
    unlimited: bool = False
    copy_of: Original | None = None

    def __post_init__(self) -> None:
        if self.accel is None and self.state != "stopped":
            raise ValueError("a machine that is not stopped has an accelerator: `accel` is missing")


class Endpoint(View, frozen=True, kw_only=True):
    """Where the destination awaits the machine. `host` is what the source connects to, `tls_name` what its certificate must say.

    `secret` is what the source's daemon says there first, in hexadecimal digits, on each connection (`qmpd.migration.door`). `nbd_port` is
    there if disks are copied.
    """

    host: str
    port: int
    tls_name: str
    secret: str
    nbd_port: int | None = None


class DiskAccepted(View, frozen=True, kw_only=True):
    """How disk `index` will go, and where its image is at the destination; `export` is the NBD export of one that is copied. `base` is
    where the destination has what it lies upon: only what is above that is to be sent."""

    index: int
    how: Literal["shared", "copy"]
    path: str
    export: str | None = None
    base: str | None = None


class Acceptance(View, frozen=True, kw_only=True):
    """The destination waits. `endpoint` is where its QEMU does; None if there is none, or the data goes through the API. `facts` is what
    the source compares."""

    id: str
    endpoint: Endpoint | None
    disks: tuple[DiskAccepted, ...] = ()
    channels: int = 0
    postcopy: bool = False
    bitmaps: bool = False
    emulator_version: str
    facts: DestinationFacts | None = None


class ConsoleEnd(Request, frozen=True, kw_only=True):
    """Where the log of a serial port ended when the guest was halted, and some that was not sent before, from `offset` on, in base64."""

    port: Port
    end: Bytes
    offset: Bytes
    data: Annotated[str, Meta(max_length=4 * ceil(TAIL_BYTES / 3))] = ""

    def __post_init__(self) -> None:
        if len(self.tail) > TAIL_BYTES:
            raise ValueError(f"`data` stands for more than {TAIL_BYTES} bytes")

    @property
    def tail(self) -> bytes:
        """The bytes that `data` stands for. Raises ValueError where it is no base64, which no decoded one is."""
        return a2b_base64(self.data, strict_mode=True)


def console_end(port: int, end: int, offset: int, tail: bytes = b"") -> ConsoleEnd:
    """One with these bytes."""
    return ConsoleEnd(port=port, end=end, offset=offset, data=b2a_base64(tail, newline=False).decode())


class Handover(Request, frozen=True, kw_only=True):
    """The source has given the machine away, under this epoch. `run` says whether the guest ran."""

    epoch: Epoch
    run: bool
    consoles: Annotated[tuple[ConsoleEnd, ...], Meta(max_length=MAX_PORTS)] = ()


class LoadedRequest(Request, frozen=True, kw_only=True):
    """How long the destination may wait for the whole state before it says how far it is."""

    timeout_s: Annotated[float, Meta(ge=0, le=60)] = 30.0


class RecoverRequest(Request, frozen=True, kw_only=True):
    """The connection over which memory follows the guest was lost: the destination shall listen again."""


class DiscardRequest(Request, frozen=True, kw_only=True):
    """Why the destination shall discard what it has."""

    reason: Text = ""


class Landed(View, frozen=True, kw_only=True):
    """How many bytes have come that were sent to find out how fast the way is, and were thrown away."""

    bytes: int


class LogReceived(View, frozen=True, kw_only=True):
    """How much the destination has of a serial port's log."""

    port: int
    received: int


class Standing(View, frozen=True, kw_only=True):
    """How far a side is, as it wrote it down. `problem` is what keeps it from going on; `handover` is there once the source has given,
    `logs` once the destination has taken: the source sends what is missing of them."""

    id: str
    machine: str
    role: Role
    phase: Phase
    epoch: int
    reason: str = ""
    problem: str = ""
    handover: Handover | None = None
    logs: tuple[LogReceived, ...] = ()
