"""From a launch plan to a running process: directories, sockets, the durable record, and the gate."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import msgspec

from qmpd import segments, tpm
from qmpd.confinement import Admit, Confiner
from qmpd.errors import HostError, LaunchFailed
from qmpd.failpoint import failpoint
from qmpd.journal import timestamp, utc_now
from qmpd.listeners import listening
from qmpd.offload import off_loop
from qmpd.plan import LaunchPlan, SerialPipe
from qmpd.process import Gate, Identity, QemuProcess, discard, gate, launch, opened
from qmpd.record import Definition, LaunchRecord, remove_record, write_record
from qmpd.runlock import taken
from qmpd.tasks import alongside, undivided


class Launch(msgspec.Struct, frozen=True, kw_only=True):
    """A plan, where it is carried out, and what the record says of the emulator.

    `confiner` is there if the definition has limits, `head_start` if its QEMU is on its way to the gate already, `incoming` if QEMU is to
    take in the state that a migration of this id brings, `beside` if it is to take the place of one that lives.
    """

    plan: LaunchPlan
    run_dir: str
    state_dir: str
    stderr_path: str
    machine: str
    emulator_version: str
    features: frozenset[str] = frozenset()
    log_cap_bytes: int
    paused: bool = False
    incoming: str | None = None
    beside: bool = False
    confiner: Confiner | None = None
    head_start: HeadStart | None = None


class HeadStart:
    """A QEMU on its way to the gate while the definition of its machine is being stored. Made by `ahead`. `taken`: it is somebody's."""

    def __init__(self, working: asyncio.Task[Gate], records: Sequence[LaunchRecord], undo: Callable[[Gate], None]) -> None:
        self._working = working
        self._records = records
        self._undo = undo
        self.taken = False

    async def gate(self) -> tuple[Gate, LaunchRecord]:
        """The gate and what was recorded of it, for whoever opens it. Raises what went wrong on the way."""
        made = await asyncio.shield(self._working)
        self.taken = True
        return made, self._records[0]

    async def give_up(self) -> None:
        """Waits until the way has ended, and undoes it, unless the gate was taken."""
        if self.taken:
            return
        self.taken = True
        await asyncio.wait([self._working])
        if self._working.exception() is None:
            await asyncio.to_thread(self._undo, self._working.result())


@asynccontextmanager
async def ahead(what: Launch, definition: Definition, place: Callable[[], None]) -> AsyncIterator[HeadStart]:
    """Begins a launch before the definition is stored: calls `place` in a thread, yields when that has returned, goes on up to the gate.

    QEMU runs only behind the gate, which is opened by nobody but the machine that has the definition, once that is stored. When the block
    is left and nobody took the gate, it is gone, and so is its record.

    Raises:
        Exception: whatever `place` raises.
    """
    loop = asyncio.get_running_loop()
    placed: asyncio.Future[None] = loop.create_future()
    records: list[LaunchRecord] = []

    def work() -> Gate:
        place()
        loop.call_soon_threadsafe(placed.set_result, None)
        return _gated(what, definition, records, None)

    def undo(made: Gate) -> None:
        discard(made)
        remove_record(what.run_dir)

    name = definition.spec.name
    async with alongside(off_loop(work, undo=undo, name="qmpd-spawn"), f"ahead:{name}") as working:
        head = HeadStart(working, records, undo)
        try:
            steps: list[asyncio.Task[Gate] | asyncio.Future[None]] = [working, placed]
            await asyncio.wait(steps, return_when=asyncio.FIRST_COMPLETED)
            if not placed.done():
                working.result()
            yield head
        finally:
            if not head.taken:
                await undivided(head.give_up(), f"give-up:{name}")


@asynccontextmanager
async def prepared(what: Launch, definition: Definition) -> AsyncIterator[tuple[QemuProcess, LaunchRecord]]:
    """A process of this plan, recorded before it ran. Leaving lets go of it; a failure before that leaves nothing behind.

    Raises:
        Held: a QEMU of this machine is alive.
        HostError, NoSpace: directories or sockets could not be made, the machine's own files are gone, or its limits cannot be kept.
        LaunchFailed: from the block; where it was the TPM that failed, with what that said.
        OSError: the process could not be started.
    """
    if what.head_start is not None:
        made, record = await what.head_start.gate()
        process = await opened(made)
    else:
        process, record = await _launched(what, definition)
    try:
        yield process, record
    except LaunchFailed as error:
        await tpm.dismissed(process.companion)
        raise await tpm.explained(error, process.companion, what.plan.tpm) from error
    finally:
        if process.exit is not None:
            await tpm.dismissed(process.companion)
        for one in (process, process.companion):
            if one is not None:
                one.close()


async def _launched(what: Launch, definition: Definition) -> tuple[QemuProcess, LaunchRecord]:
    records: list[LaunchRecord] = []
    async with _admission(what, definition) as admit:
        process = await launch(partial(_gated, what, definition, records, admit), undo=partial(remove_record, what.run_dir))
    return process, records[0]


@asynccontextmanager
async def _admission(what: Launch, definition: Definition) -> AsyncIterator[Admit | None]:
    if what.confiner is None:
        yield None
        return
    async with what.confiner.admission(definition.spec.name, definition.spec.limits) as admit:
        yield admit


def _gated(what: Launch, definition: Definition, records: list[LaunchRecord], admit: Admit | None) -> Gate:
    """Everything between a plan and a process that waits to become QEMU, in one go: a start has few steps between threads."""
    _make_ready(what)
    plan = what.plan
    with taken(what.state_dir, beside=what.beside) as lock, listening(plan.listeners()) as listeners, tpm.gated(plan.tpm) as companion:
        descriptors = {name: listener.fileno() for name, listener in listeners.items()} | dict(companion.descriptors)
        argv = plan.argv(descriptors)

        def write(identity: Identity) -> None:
            # While the gate is being made ready by the kernel: it opens no sooner than all of this is there.
            for pipe in plan.serial_pipes().values():
                make_pipe(pipe, what.log_cap_bytes, beside=what.beside)
            record = _record(what, definition, argv, identity, companion.identity)
            write_record(what.run_dir, record)
            records.append(record)
            if admit is not None:
                _admitted(what, admit, [one.pid for one in (identity, companion.identity) if one is not None])

        made = gate(argv, inherited=[*descriptors.values(), lock], cwd=what.run_dir, stderr=what.stderr_path, record=write)
        return msgspec.structs.replace(made, companion=companion.gate)


def _admitted(what: Launch, admit: Admit, pids: Sequence[int]) -> None:
    """While the gates are closed: QEMU and all its threads are born in their place, and its TPM."""
    try:
        admit(pids)
    except BaseException:
        remove_record(what.run_dir)
        raise


def _record(what: Launch, definition: Definition, argv: tuple[str, ...], identity: Identity, beside: Identity | None) -> LaunchRecord:
    plan = what.plan
    return LaunchRecord(
        identity=identity,
        definition=definition,
        argv=argv,
        sockets=plan.listeners(),
        pipes={name: pipe.path for name, pipe in plan.serial_pipes().items()},
        accel=plan.accel,
        accel_reason=plan.accel_reason,
        emulator=plan.binary,
        emulator_version=what.emulator_version,
        machine=what.machine,
        started_at=timestamp(utc_now()),
        run_dir=what.run_dir,
        paused=what.paused,
        incoming=what.incoming,
        tpm=beside,
    )


def _make_ready(what: Launch) -> None:
    plan = what.plan
    failpoint("run-directory")
    for directory in plan.directories:
        Path(directory).mkdir(mode=0o700, parents=True, exist_ok=True)
    own = [*(image.path for image in plan.blank_images), *(copy.target for copy in plan.copies)]
    if plan.tpm is not None:
        if what.beside:
            tpm.begin_anew(plan.tpm.directory)
        own.append(plan.tpm.directory)
    for path in own:
        # They were made with the machine. An empty one in place of one that is gone would look like lost data to the guest.
        if not Path(path).exists():
            raise HostError(f"{path} is gone: restore it, or create the machine anew", path=path)


def make_pipe(pipe: SerialPipe, cap_bytes: int, *, beside: bool = False) -> None:
    """Both ends of a serial port for a QEMU that is about to be launched, in place of those of the one before. Blocks. Raises OSError.

    With `beside` another QEMU still writes to the log, and what this one writes is no part of it yet (`segments.beside`).
    """
    written, typed = Path(f"{pipe.path}.out"), Path(f"{pipe.path}.in")
    for end in (written, typed):
        end.unlink(missing_ok=True)
    failpoint("log-piece")
    written.symlink_to(segments.beside(pipe.log) if beside else segments.begin(pipe.log, cap_bytes))
    failpoint("fifo-make")
    os.mkfifo(typed, 0o600)
