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

from qmpd.process import Identity
from qmpd.spec import MachineSpec

RECORD_NAME: Final = "launch.msgpack"
BEGUN_NAME: Final = "begun"
FORMAT: Final = 1
#: Far more than a record with the largest definition; a larger file is not one of ours.
RECORD_LIMIT: Final = 4 * 1024 * 1024

_log = logging.getLogger(__name__)


class Definition(msgspec.Struct, frozen=True, kw_only=True):
    """A stored definition. `spec` has its UUID, versioned machine type and MAC addresses filled in."""

    spec: MachineSpec
    uuid: str
    created_at: str
    changed_at: str


class LaunchRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One launched QEMU: who it is, and what it was launched as."""

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


def write_record(directory: str, record: LaunchRecord) -> None:
    """Writes the record down: whole or not at all, whatever becomes of this process. Blocks.

    It is not synced to the disk: that would protect it from a crash of the host, which no QEMU survives that it could name, and
    would cost a start more than all its other steps together.
    """
    target = Path(directory) / RECORD_NAME
    temporary = target.with_suffix(".new")
    try:
        # Buffered: a single write(2) may take less than all of it on a disk that is nearly full, and say nothing.
        with open(temporary, "wb", opener=_private) as file:
            file.write(msgspec.msgpack.encode(record))
        temporary.rename(target)
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
    if record.format != FORMAT:
        raise ValueError(f"{path} has format {record.format}, this daemon knows {FORMAT}")
    return record


def mark_begun(directory: str) -> None:
    """Notes that the guest was set going, so that nobody does it again for a guest that somebody has halted since. Blocks."""
    try:
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
            (Path(directory) / name).unlink(missing_ok=True)
        except OSError as error:
            _log.warning("launch record was not removed", extra={"directory": directory, "error": str(error)})
