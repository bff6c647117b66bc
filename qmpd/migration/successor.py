"""A QEMU that is to take the place of a machine's: launched beside it, halted, and nobody's until it has.

It has a directory of its own in the machine's run directory, for its sockets, pipes and the record of who it is; the record of the
machine's own QEMU, a directory above, says which of both may run the guest.
"""

from __future__ import annotations

import asyncio
import shutil
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Final

import msgspec

from qmpd.backlog import QmpEvent
from qmpd.errors import HostError
from qmpd.facts import MachinePaths
from qmpd.failpoint import failpoint
from qmpd.launching import Launch, prepared
from qmpd.lifecycle import Happening
from qmpd.migration.capabilities import Dials
from qmpd.migration.outgoing import Before
from qmpd.monitor import Monitor
from qmpd.process import ExitStatus, Identity, NotOurs, QemuProcess, adopt
from qmpd.record import Definition, LaunchRecord, read_record
from qmpd.segments import NEXT
from qmpd.session import Session
from qmpd.shortage import shortage
from qmpd.tasks import alongside
from qmpd.tpm import dismiss_recorded

NOTE_NAME: Final = "succession.msgpack"
#: Where a successor's sockets and pipes are, in turn: those of the one before are in use.
PLACES: Final = ("a", "b")
#: The kernel ends a killed process at once, unless it waits for a disk that hangs.
END_LIMIT_S: Final = 30.0


class Note(msgspec.Struct, frozen=True, kw_only=True):
    """What a daemon that is killed meanwhile must know: the QEMU before, how it was set (`before`), the successor's directory and how
    that one was set when it was new (`fresh`), whether the guest ran when it was halted for the change, and the TPM of the QEMU before."""

    old: Identity
    before: Before
    directory: str
    went: bool = False
    fresh: Dials | None = None
    tpm: Identity | None = None


def write_note(run_dir: str, note: Note) -> None:
    """Writes the note down: whole or not at all. Like the launch record, it need not survive the host. Blocks. Raises OSError."""
    target = Path(run_dir) / NOTE_NAME
    draft = target.with_suffix(".new")
    failpoint("succession-note")
    draft.write_bytes(msgspec.msgpack.encode(note))
    draft.rename(target)


def read_note(run_dir: str) -> Note | None:
    """The note of a run directory, if there is one. Blocks. Raises ValueError, OSError for one that cannot be read."""
    try:
        data = (Path(run_dir) / NOTE_NAME).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        return msgspec.msgpack.decode(data, type=Note)
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise ValueError(f"{run_dir}/{NOTE_NAME} is damaged: {error}") from error


def remove_note(run_dir: str) -> None:
    """Nothing is left to be done. Blocks."""
    (Path(run_dir) / NOTE_NAME).unlink(missing_ok=True)


def place_beside(record: LaunchRecord, paths: MachinePaths) -> MachinePaths:
    """Where the successor of a recorded QEMU has its sockets."""
    used = Path(record.sockets["qmp"]).parent.name
    free = next(place for place in PLACES if place != used)
    return msgspec.structs.replace(beside(paths), run=f"{paths.run}/{free}")


def beside(paths: MachinePaths) -> MachinePaths:
    """Where the successor of a machine's QEMU has what both cannot have."""
    return msgspec.structs.replace(paths, beside=True)


def leads(record: LaunchRecord, note: Note) -> bool:
    """Whether the machine's record is the successor's already."""
    return str(Path(record.sockets["qmp"]).parent) == note.directory


def clear_places(run_dir: str, leader: LaunchRecord) -> None:
    """Removes the sockets and pipes of all QEMUs of a machine but the one that leads. Blocks. Raises OSError."""
    place = Path(leader.sockets["qmp"]).parent
    for name in PLACES:
        if name != place.name:
            _remove(Path(run_dir) / name)
    if str(place) == run_dir:
        return
    for path in Path(run_dir).iterdir():
        if path.is_socket() or path.is_fifo() or path.is_symlink():
            path.unlink()


def _remove(place: Path) -> None:
    """Removes the place of a QEMU that has ended, and the pieces of logs that it wrote and that became no part of any."""
    for link in place.glob("*.out"):
        if link.is_symlink() and (piece := link.readlink()).name.endswith(NEXT):
            piece.unlink(missing_ok=True)
    shutil.rmtree(place, ignore_errors=True)


async def ended(identity: Identity) -> None:
    """Ends a process at once, if it is still there, and returns when it is gone. Raises HostError when it does not end."""
    try:
        process = await adopt(identity)
    except NotOurs:
        return
    try:
        process.signal(signal.SIGKILL)
        async with asyncio.timeout(END_LIMIT_S):
            await process.wait()
    except TimeoutError as error:
        raise HostError(f"process {identity.pid} does not end: the kernel is waiting for something") from error
    finally:
        process.close()


async def end_unled(note: Note) -> None:
    """Ends the successor that did not become the machine's QEMU, and removes what was made for it. Raises HostError."""
    with suppress(FileNotFoundError, ValueError):
        record = await asyncio.to_thread(read_record, note.directory)
        await ended(record.identity)
        await dismiss_recorded(record.tpm)
    await asyncio.to_thread(_remove, Path(note.directory))


class Successor:
    """One, while it waits. `session` is how it is spoken to, `record` what a later daemon would know of it."""

    def __init__(self, session: Session, record: LaunchRecord, process: QemuProcess) -> None:
        self.session = session
        self.record = record
        self.process = process
        #: It has become the machine's QEMU, and must not be ended any more.
        self.leads = False


class _Nobody:
    """Whom the session of a successor tells: it moves no state."""

    def happen(self, happening: Happening) -> None:
        """See `qmpd.session.Owner`."""

    def set_status(self, status: str) -> None:
        """See `qmpd.session.Owner`."""

    def take_blocks(self, blocks: object) -> None:
        """See `qmpd.session.Owner`."""

    def take_event(self, event: QmpEvent) -> None:
        """See `qmpd.session.Owner`."""

    def set_trouble(self, reason: str) -> None:
        """See `qmpd.session.Owner`."""


@asynccontextmanager
async def launched(launch: Launch, definition: Definition) -> AsyncIterator[Successor]:
    """A QEMU that waits for its state. Leaving the block lets go of the one that leads, and ends any other.

    Raises:
        LaunchFailed, HostError, NoSpace: it did not come so far; nothing is left.
    """
    name = definition.spec.name
    try:
        async with prepared(launch, definition) as (process, record):
            session = Session(_Nobody(), name, process, record.sockets, launch.stderr_path, record.expected_uuid)
            made = Successor(session, record, process)
            try:
                async with _conversing(session, name):
                    yield made
            finally:
                if not made.leads:
                    process.signal(signal.SIGKILL)
                    await process.wait()
    except OSError as error:
        raise shortage(error) or HostError(f"a new QEMU of machine {name!r} could not be started: {error}") from error


@asynccontextmanager
async def _conversing(session: Session, name: str) -> AsyncIterator[None]:
    ready = asyncio.Event()

    async def begin(monitor: Monitor) -> None:
        await session.ask_status(monitor)

    async def end(_status: ExitStatus) -> None:
        """Who waits for something learns it from that."""

    async with (
        alongside(session.launch(begin, ready.set, end), f"successor:{name}") as conversation,
        alongside(ready.wait(), f"successor-ready:{name}") as readying,
    ):
        await asyncio.wait([conversation, readying], return_when=asyncio.FIRST_COMPLETED)
        if conversation.done():
            conversation.result()
        yield
