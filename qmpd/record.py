"""What is written down of a machine: its stored definition, and the launch record that lets a later daemon find its process.

The launch record lies in the machine's run directory and is there before QEMU runs. It holds all that is needed to take the
process over again without the database.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Final, Literal

import msgspec

from qmpd.errors import GivenAway
from qmpd.failpoint import failpoint
from qmpd.process import Identity
from qmpd.processviews import AdoptedView
from qmpd.spec import MachineSpec

RECORD_NAME: Final = "launch.msgpack"
BEGUN_NAME: Final = "begun"
#: 2 since a record may be that of a machine which another host owns (`incoming`): an older daemon must not take it for its own.
FORMAT: Final = 2
OLDER_FORMATS: Final = frozenset({1})
#: Far more than a record with the largest definition; a larger file is not one of ours.
RECORD_LIMIT: Final = 4 * 1024 * 1024

_log = logging.getLogger(__name__)


class Adoption(msgspec.Struct, frozen=True, kw_only=True):
    """A QEMU that somebody else started, and was taken over: who it is, where its monitor is and which UUID it says, what it was
    found to be, and what qmpd cannot change (`fixed`) or did not understand (`unknown`) about it."""

    at: str
    identity: Identity
    qmp: str
    uuid: str
    accel: Literal["kvm", "tcg"]
    emulator: str
    emulator_version: str
    machine: str
    started_at: str
    fixed: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()

    def view(self) -> AdoptedView:
        """What is shown of it."""
        return AdoptedView(at=self.at, qmp=self.qmp, fixed=self.fixed, unknown=self.unknown)


class Given(msgspec.Struct, frozen=True, kw_only=True):
    """That a machine was given to another host, by which migration, and under which epoch."""

    peer: str
    migration: str
    epoch: int


class Definition(msgspec.Struct, frozen=True, kw_only=True):
    """A stored definition. `spec` has its UUID, versioned machine type and MAC addresses filled in. `adoption` is set as long as the
    machine is, or last was, a QEMU that somebody else started.

    Whose definition is stored may run the machine, unless it is `given`: then another host may, and this one must not, whatever else
    is known. `epoch` counts the changes of owner; `arrived` is the migration by which the machine came here.
    """

    spec: MachineSpec
    uuid: str
    created_at: str
    changed_at: str
    adoption: Adoption | None = None
    epoch: int = 0
    given: Given | None = None
    arrived: str | None = None

    def check_owned(self) -> None:
        """Raises GivenAway when another host owns the machine: whatever its process here does, it must not run."""
        if self.given is not None:
            message = f"machine {self.spec.name!r} was given to {self.given.peer}, which owns it"
            raise GivenAway(message, peer=self.given.peer, migration=self.given.migration)


class LaunchRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One launched QEMU: who it is, and what it was launched as. `incoming` is the migration whose state it was launched to take in, `tpm`
    the process that is its TPM."""

    format: int = FORMAT
    identity: Identity
    definition: Definition
    argv: tuple[str, ...]
    sockets: dict[str, str]
    pipes: dict[str, str]
    accel: Literal["kvm", "tcg"]
    accel_reason: str
    emulator: str
    emulator_version: str
    machine: str
    started_at: str
    run_dir: str
    paused: bool = False
    uuid: str | None = None
    incoming: str | None = None
    tpm: Identity | None = None

    @property
    def expected_uuid(self) -> str:
        """What the process says when it is asked for its UUID: an adopted one may have another than its machine, or none."""
        return self.uuid or self.definition.uuid


def record_of_adopted(definition: Definition, adoption: Adoption, run_dir: str) -> LaunchRecord:
    """The launch record of a process that was adopted, made from the stored definition alone."""
    return LaunchRecord(
        identity=adoption.identity,
        definition=definition,
        argv=(),
        sockets={"qmp": adoption.qmp},
        pipes={},
        accel=adoption.accel,
        accel_reason="chosen by whoever started it",
        emulator=adoption.emulator,
        emulator_version=adoption.emulator_version,
        machine=adoption.machine,
        started_at=adoption.started_at,
        run_dir=run_dir,
        paused=True,  # whether its guest runs is its owner's affair
        uuid=adoption.uuid,
    )


def write_record(directory: str, record: LaunchRecord) -> None:
    """Writes the record down: whole or not at all, whatever becomes of this process. Blocks.

    It is not synced to the disk: that would protect it from a crash of the host, which no QEMU survives that it could name, and
    would cost a start more than all its other steps together.
    """
    target = Path(directory) / RECORD_NAME
    temporary = target.with_suffix(".new")
    try:
        failpoint("record-write")
        # Buffered: a single write(2) may take less than all of it on a disk that is nearly full, and say nothing.
        with open(temporary, "wb", opener=_private) as file:
            file.write(msgspec.msgpack.encode(record))
        failpoint("record-written")
        temporary.rename(target)
        failpoint("record-named")
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC, 0o600)


def read_record(directory: str) -> LaunchRecord:
    """The record of a run directory. Blocks.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, too large, or of a format this daemon does not know.
    """
    path = Path(directory) / RECORD_NAME
    with path.open("rb") as file:
        data = file.read(RECORD_LIMIT + 1)
    if len(data) > RECORD_LIMIT:
        raise ValueError(f"{path} is larger than any launch record")
    try:
        record = msgspec.msgpack.decode(data, type=LaunchRecord)
    except (msgspec.DecodeError, msgspec.ValidationError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if record.format not in {FORMAT, *OLDER_FORMATS}:
        raise ValueError(f"{path} has format {record.format}, this daemon knows {FORMAT}")
    return record


def mark_begun(directory: str) -> None:
    """Notes that the guest was set going, so that nobody does it again for a guest that somebody has halted since. Blocks."""
    try:
        failpoint("begun-mark")
        (Path(directory) / BEGUN_NAME).touch(mode=0o600)
    except OSError as error:
        _log.warning("that the guest was set going was not noted", extra={"directory": directory, "error": str(error)})


def has_begun(directory: str) -> bool:
    """Whether the guest was set going. Blocks."""
    return (Path(directory) / BEGUN_NAME).exists()


def remove_record(directory: str) -> None:
    """Forgets the record; the process it names is gone. What cannot be removed is found stale later. Blocks."""
    for name in (RECORD_NAME, BEGUN_NAME):
        try:
            failpoint("record-remove")
            (Path(directory) / name).unlink(missing_ok=True)
        except OSError as error:
            _log.warning("launch record was not removed", extra={"directory": directory, "error": str(error)})
