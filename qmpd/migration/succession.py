"""Another QEMU takes the place of a machine's while its guest runs: its state moves over a Unix socket, within one host and one machine.

Nothing changes hands but the process: the machine, its definition and its files stay. The machine's launch record says which QEMU may run
the guest, and nothing else does.

Rules:

* The successor is launched halted, waiting for the state, and never runs before the record names it.
* The record is written when the old QEMU has halted the guest, given everything away and closed its images. Until then any failure ends the
  successor, and the old one goes on. From then on the old one is ended, and never set going again.
* A daemon that is killed at any time leaves a note (`successor.Note`). The next one compares it with the record, ends the other QEMU, and
  goes on: so there are never two that may run, and always one.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from functools import partial
from typing import Final

import msgspec

from qmpd.errors import CannotMove, HostError, MigrationFailed, QemuDied, QmpdError
from qmpd.facts import MachinePaths
from qmpd.failpoint import passing
from qmpd.forwards import remake
from qmpd.jobs import Jobs, Report
from qmpd.launching import Launch
from qmpd.lifecycle import AT_REST, Happening, State
from qmpd.machine import Machine, Publish
from qmpd.migration import capabilities, incoming
from qmpd.migration.addresses import UnixAddress
from qmpd.migration.consolelogs import follow_on
from qmpd.migration.convergence import Tuner, opening
from qmpd.migration.incoming import STAYS, Listen
from qmpd.migration.outgoing import Outgoing, Sending, look, recall
from qmpd.migration.shipping import Shipment, abilities_of
from qmpd.migration.successor import (
    Note,
    Successor,
    beside,
    clear_places,
    end_unled,
    ended,
    launched,
    leads,
    place_beside,
    read_note,
    remove_note,
    write_note,
)
from qmpd.migrationviews import Goal, UpgradeReport, UpgradeRequest
from qmpd.plan import without_forwards
from qmpd.process import NotOurs, adopt
from qmpd.record import LaunchRecord, read_record, remove_record, write_record
from qmpd.registry import Registry
from qmpd.shortage import shortage
from qmpd.spec import Limits, MachineSpec
from qmpd.tasks import Tasks, undivided
from qmpd.tpm import dismiss_recorded, drop, take_place
from qmpd.views import JobView

VERB: Final = "upgrade-emulator"
FROM: Final = frozenset({State.RUNNING, State.PAUSED})
#: Memory goes at the speed of memory; a guest that changes it faster than that is halted for the rest.
_GOAL: Final = Goal(downtime_ms=300, deadline_s=60.0, then="pause")
#: The socket at which the successor waits; no longer than the monitor's, whose length was checked.
_SOCKET: Final = "in-mem"
#: The successor has everything when the old QEMU says `completed`; it only has to read what is in its socket. The guest stands still.
LOAD_LIMIT_S: Final = 60.0
#: What could not be done is tried again this often: the machine is not as it was before.
AGAIN_S: Final = 1.0
#: After a restart of the daemon a QEMU that answers has been taken over by then.
FOUND_S: Final = 60.0

_log = logging.getLogger(__name__)
Planner = Callable[[MachineSpec, MachinePaths], Awaitable[Launch]]


class Successions:
    """Carries them out on one host, and goes on with those of an earlier daemon."""

    def __init__(self, *, registry: Registry, planner: Planner, jobs: Jobs, tasks: Tasks, publish: Publish) -> None:
        self._registry = registry
        self._planner = planner
        self._jobs = jobs
        self._tasks = tasks
        self._publish = publish
        self._left: list[tuple[Machine, Note, bool, ExitStack]] = []

    async def upgrade(self, name: str, request: UpgradeRequest) -> JobView:
        """Has another QEMU take the place of a machine's, as a job.

        Raises:
            NotFound, GivenAway, WrongState: there is no such machine, or nothing of it that could be replaced.
            CannotMove: this machine's QEMU cannot be.
        """
        machine = self._registry.get(name)
        machine.definition.check_owned()
        machine.require(FROM, VERB)
        _recorded(machine)
        return await self._jobs.begin_reporting(VERB, name, lambda report: self._upgraded(machine, request, report))

    async def _upgraded(self, machine: Machine, request: UpgradeRequest, report: Report) -> UpgradeReport:
        with machine.holding(VERB):
            machine.require(FROM, VERB)
            old, paths = _recorded(machine), self._registry.paths(machine.name)
            launch = await self._planned(machine, old, request.emulator)
            note = Note(old=old.identity, tpm=old.tpm, before=await look(machine.session), directory=launch.run_dir)
            await _on_disk(partial(write_note, paths.run, note))
            try:
                result = await self._moved(machine, note, launch, report)
            except BaseException as error:
                if machine.launch is old:  # nobody else leads
                    _log.warning("QEMU was not replaced", extra={"machine": machine.name, "error": str(error)})
                    await undivided(self._stay(machine, note), f"stay:{machine.name}")
                raise
        about = {"emulator": result.emulator, "version": result.emulator_version, "before": result.before_version}
        self._publish("machine.upgraded", machine.name, about)
        return result

    async def _planned(self, machine: Machine, old: LaunchRecord, emulator: str | None) -> Launch:
        """How the successor is launched: the same machine, in its own directory, without what only one process can have."""
        spec = machine.definition.spec
        wanted = msgspec.structs.replace(spec, machine=old.machine, accel=old.accel, emulator=emulator or spec.emulator)
        launch = await self._planner(without_forwards(wanted), place_beside(old, self._registry.paths(machine.name)))
        if launch.machine != old.machine:
            raise CannotMove(f"the machine is a {old.machine}, and would be a {launch.machine}")
        return msgspec.structs.replace(launch, plan=launch.plan.awaiting(), paused=True, beside=True)

    async def _moved(self, machine: Machine, note: Note, launch: Launch, report: Report) -> UpgradeReport:
        loop, old = asyncio.get_running_loop(), _recorded(machine)
        began = loop.time()
        async with launched(launch, machine.definition) as successor:
            note = msgspec.structs.replace(note, fresh=await capabilities.read(successor.session))
            place = UnixAddress(path=f"{launch.run_dir}/{_SOCKET}.sock")
            await incoming.listen(successor.session, Listen(memory=place, stays=STAYS in launch.features))
            shipment = await self._sent(machine, note, place, report)
            halted = loop.time()
            figures = await shipment.measured()
            await _loaded(successor)
            note = msgspec.structs.replace(note, went=shipment.went)
            report.point_of_no_return(f"the guest of machine {machine.name!r} is being set going in its new QEMU")
            await undivided(self._lead(machine, note, successor), f"lead:{machine.name}")
            downtime_ms = figures.downtime_ms + (loop.time() - halted) * 1000
        await undivided(self._follow(machine, successor.record), f"follow:{machine.name}")
        await self._go(machine, note)
        return UpgradeReport(
            machine=machine.name,
            emulator=successor.record.emulator,
            emulator_version=successor.record.emulator_version,
            before=old.emulator,
            before_version=old.emulator_version,
            pid=successor.record.identity.pid,
            before_pid=old.identity.pid,
            downtime_ms=round(downtime_ms, 3),
            problems=await self._settled(machine, note),
            total_ms=round((loop.time() - began) * 1000, 3),
        )

    async def _sent(self, machine: Machine, note: Note, place: UnixAddress, report: Report) -> Shipment:
        """Everything of the guest is sent, and it stands still."""
        abilities = abilities_of(machine, note.before)
        begun = opening(_GOAL, abilities)
        wanted = Sending(memory=place, helping=tuple(begun.capabilities), parameters=dict(begun.parameters))
        async with Outgoing(machine.session, wanted, note.before) as out:
            shipment = Shipment(machine, out, report, Tuner(_GOAL, abilities))
            await shipment.prepare()
            await passing("succession-move")
            await shipment.send()
        return shipment

    async def _lead(self, machine: Machine, note: Note, successor: Successor) -> None:
        """The record by which the successor becomes the machine's QEMU; the old one is ended, and the guest goes on."""
        paths, old = self._registry.paths(machine.name), _recorded(machine)
        await _on_disk(partial(write_note, paths.run, note))
        await machine.release()  # the end of the old QEMU is not that of the machine
        record = msgspec.structs.replace(successor.record, run_dir=paths.run, definition=machine.definition, paused=old.paused)
        await passing("succession-commit")
        await _on_disk(partial(write_record, paths.run, record))
        machine.launch, successor.record, successor.leads = record, record, True
        try:
            await passing("succession-committed")
            await _gone(note, paths)
            await asyncio.to_thread(_join_logs, record)
            await passing("succession-cont")
            if note.went:
                await successor.session.execute("cont")
        except (QmpdError, OSError) as error:  # `_go` tries again
            _log.error("the new QEMU has not been set going yet", extra={"machine": machine.name, "error": str(error)})

    async def _follow(self, machine: Machine, record: LaunchRecord) -> None:
        """The machine is the process of this record from here on. Raises QemuDied where that has ended."""
        paths = self._registry.paths(machine.name)
        try:
            process = await adopt(record.identity)
        except NotOurs as error:
            await asyncio.to_thread(remove_record, paths.run)
            machine.happen(Happening.DIED)
            machine.on_end(machine)
            raise QemuDied(f"the QEMU of machine {machine.name!r} ended while it was replaced") from error
        await machine.adopt(record, process, paths)

    async def _go(self, machine: Machine, note: Note) -> None:
        """Returns when the guest is as it was when it was halted, and the old QEMU is gone; or the machine has ended."""
        while not await machine.until(AT_REST, 0):
            try:
                await _gone(note, self._registry.paths(machine.name))
                await _logs_joined(machine)
                await machine.until(AT_REST | FROM, AGAIN_S)
                if note.went and machine.state is not State.RUNNING:
                    await machine.session.execute("cont")
                    await machine.until(AT_REST | {State.RUNNING}, AGAIN_S)
            except (QmpdError, OSError) as error:
                machine.set_trouble(f"its QEMU was replaced, and the guest cannot be set going yet: {error}")
                await machine.until(AT_REST, AGAIN_S)
            else:
                return

    async def _settled(self, machine: Machine, note: Note) -> tuple[str, ...]:
        """What may happen while the guest runs: nothing is left of the old QEMU, and of the migration in the new one. What went wrong."""
        paths = self._registry.paths(machine.name)
        problems: tuple[str, ...] = ()
        try:
            await passing("succession-settle")
            if note.fresh is not None:
                await incoming.settle(machine.session, note.fresh)
            problems = (await remake(machine.session, machine.definition.spec)).warnings
            if machine.launch is not None:
                await asyncio.to_thread(clear_places, paths.run, machine.launch)
            await asyncio.to_thread(remove_note, paths.run)
        except (QmpdError, OSError) as error:
            problems = (*problems, f"not everything was put in order: {error}")
        for problem in problems:
            _log.warning("the new QEMU lacks something", extra={"machine": machine.name, "problem": problem})
        return problems

    async def _stay(self, machine: Machine, note: Note) -> None:
        """The old QEMU goes on as it was before, however long it takes to get it there."""
        paths, old = self._registry.paths(machine.name), _recorded(machine)
        if machine.alive and not machine.has_process:  # it was let go of, and did not become another
            await self._follow(machine, old)
        while not await machine.until(AT_REST, 0):
            try:
                await machine.until(AT_REST | FROM, AGAIN_S)
                await recall(machine.session, note.before)
            except QmpdError as error:
                _log.error("machine is not as before", extra={"machine": machine.name, "error": error.message})
                await machine.until(AT_REST, AGAIN_S)
            else:
                break
        await asyncio.to_thread(clear_places, paths.run, old)
        await asyncio.to_thread(drop, beside(paths).tpm)
        await asyncio.to_thread(remove_note, paths.run)

    # After a restart of the daemon.

    async def restore(self) -> None:
        """Before processes are taken over: of two QEMUs that an earlier daemon left, the one that does not lead is ended."""
        for machine in self._registry:
            paths = self._registry.paths(machine.name)
            try:
                note = await asyncio.to_thread(read_note, paths.run)
                if note is None:
                    continue
                record = await asyncio.to_thread(read_record, paths.run)
                if led := leads(record, note):
                    await _gone(note, paths)
                    await asyncio.to_thread(_join_logs, record)
                else:
                    await end_unled(note)
            except (QmpdError, ValueError, OSError) as error:
                # Which of both leads is not known, or the other one does not end: neither is set going.
                _log.error("a machine whose QEMU was being replaced was left alone", extra={"machine": machine.name, "error": str(error)})
                continue
            held = ExitStack()
            held.enter_context(machine.holding(VERB))
            self._left.append((machine, note, led, held))

    def go_on(self) -> None:
        """After processes were taken over: the guest goes on, in the QEMU that leads."""
        for machine, note, led, held in self._left:
            self._tasks.start(self._go_on(machine, note, held, led=led), f"succession:{machine.name}")
        self._left.clear()

    async def _go_on(self, machine: Machine, note: Note, held: ExitStack, *, led: bool) -> None:
        with held:
            await machine.until(AT_REST | FROM, FOUND_S)
            if machine.launch is None or machine.state in AT_REST:
                await asyncio.to_thread(remove_note, self._registry.paths(machine.name).run)
            elif led:
                await self._go(machine, note)
                await self._settled(machine, note)
            else:
                await self._stay(machine, note)


async def _loaded(successor: Successor) -> None:
    try:
        async with asyncio.timeout(LOAD_LIMIT_S):
            await incoming.wait_loaded(successor.session)
    except TimeoutError as error:
        raise MigrationFailed(f"the new QEMU had everything and had not taken it in after {LOAD_LIMIT_S:g} s") from error


def _recorded(machine: Machine) -> LaunchRecord:
    """The launch record of a QEMU that can be replaced. Raises CannotMove for any other."""
    if machine.launch is None or machine.definition.adoption is not None:
        raise CannotMove(f"machine {machine.name!r} was started by somebody else: qmpd does not know all of it")
    if machine.definition.spec.limits != Limits():
        raise CannotMove(f"machine {machine.name!r} has limits, into which two QEMUs do not fit: stop it and start it instead")
    return machine.launch


async def _gone(note: Note, paths: MachinePaths) -> None:
    """The old QEMU and its TPM are gone, and the successor's TPM has the machine's state. May be repeated. Raises HostError, OSError."""
    await ended(note.old)
    await dismiss_recorded(note.tpm)
    await asyncio.to_thread(take_place, paths.tpm, beside(paths).tpm)


def _join_logs(record: LaunchRecord) -> None:
    """The consoles' bytes go on where those of the QEMU before ended. Nobody writes meanwhile. Blocks. Raises OSError."""
    for pipe in record.pipes.values():
        follow_on(pipe)


async def _logs_joined(machine: Machine) -> None:
    """The same where the machine follows its QEMU already, in case it was not done before. Raises OSError."""
    if machine.launch is None:
        return
    await asyncio.to_thread(_join_logs, machine.launch)
    for index, console in machine.consoles.items():
        if (pipe := machine.launch.pipes.get(f"serial{index}")) is not None:
            await console.moved(pipe)


async def _on_disk(work: Callable[[], None]) -> None:
    try:
        await asyncio.to_thread(work)
    except OSError as error:
        raise shortage(error) or HostError(f"it cannot be written down: {error}") from error
