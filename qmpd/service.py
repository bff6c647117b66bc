"""The verbs: the whole vocabulary of the API. Each is one call; what it needs to hold, it holds here."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager

import msgspec

from qmpd import __version__, operating, power
from qmpd.access import OURSELVES, Caller, in_scope, only_reads
from qmpd.audit import Audit
from qmpd.authority import Authority
from qmpd.board import NamedBoard
from qmpd.bus import Bus
from qmpd.console import Console, port_of
from qmpd.creation import can_hurry, created, hurried
from qmpd.errors import Held, MonitorUnavailable, NotYet, Problem, RevisionRequired, invalid
from qmpd.expecting import expect
from qmpd.hostshutdown import HostShutdown
from qmpd.inventory import Inventory
from qmpd.jobs import Jobs
from qmpd.journal import Journal
from qmpd.launching import Launch
from qmpd.lifecycle import AT_REST, State
from qmpd.machine import Machine, now
from qmpd.migration.diskmoves import DiskMoves
from qmpd.migration.history import HistoryDesk
from qmpd.migration.itemdesk import ItemDesk
from qmpd.migration.succession import Successions
from qmpd.migration.verbs import Migration
from qmpd.peering import Peering
from qmpd.planning import Planning
from qmpd.registry import Registry
from qmpd.rescue import Rescue
from qmpd.settings import Settings
from qmpd.spec import MachineChanges, MachineSpec, changed
from qmpd.storage import furnish, mark_finished, mark_unfinished, settle
from qmpd.store import Unknown
from qmpd.takeover import startable
from qmpd.tokens import Tokens
from qmpd.upkeep import Upkeep
from qmpd.validation import disk_changes, problems, warnings
from qmpd.views import (
    BoardView,
    CheckReport,
    CommandView,
    DefinitionView,
    EmulatorView,
    EventPage,
    ExpectRequest,
    ExpectResult,
    HostShutdownRequest,
    JobList,
    JobView,
    MachineList,
    MachineView,
    QmpAnswer,
    QmpRequest,
    SendKeyRequest,
    ShutdownRequest,
    StartRequest,
    StopView,
    ValidationReport,
    Version,
)
from qmpd.worlds import Worlds


class Service:
    """Everything a client can ask for."""

    def __init__(
        self,
        *,
        settings: Settings,
        registry: Registry,
        worlds: Worlds,
        inventory: Inventory,
        journal: Journal,
        bus: Bus,
        jobs: Jobs,
        upkeep: Upkeep,
        tokens: Tokens,
        peering: Peering,
        history: HistoryDesk,
        migration: Migration,
        disk_moves: DiskMoves,
        successions: Successions,
        planning: Planning,
        audit: Audit,
        items: ItemDesk,
        host: HostShutdown,
    ) -> None:
        self.bus = bus
        #: Set when the API is offered.
        self.serving = asyncio.Event()
        self.tokens = tokens
        self.peering = peering
        self.history = history
        self.migration = migration
        self.disk_moves = disk_moves
        self.successions = successions
        self.audit = audit
        self.authority = Authority(settings.pki_dir, peering)
        self.items = items
        self.upkeep = upkeep
        self._settings = settings
        self._registry = registry
        self._worlds = worlds
        self._planning = planning
        self._inventory = inventory
        self.journal = journal
        self._jobs = jobs
        self.host = host
        self.rescue = Rescue(registry, inventory.catalogue, bus.publish, settings.run_dir)
        self._starting = asyncio.Semaphore(settings.parallel_starts)
        self._started_at = now()

    # The host.

    def version(self) -> Version:
        """The daemon itself."""
        return Version(version=__version__, pid=os.getpid(), started_at=self._started_at, machines_running=len(self._registry.running()))

    async def boards(self, arch: str | None = None) -> list[BoardView]:
        """The catalogue with what this host can run."""
        return await self._inventory.boards(arch)

    def board(self, board_id: str) -> NamedBoard:
        """One board."""
        return self._inventory.board(board_id)

    async def emulators(self) -> list[EmulatorView]:
        """The emulators of this host."""
        return await self._inventory.emulators()

    async def check(self) -> CheckReport:
        """What this host can do, and what would mend what it cannot."""
        return await self._inventory.check(self._settings)

    # Definitions.

    async def validate(self, spec: MachineSpec) -> ValidationReport:
        """Everything that is wrong with a definition, and what is odd about it."""
        named, world = await self._worlds.of(spec, self._registry.paths(spec.name))
        found = problems(spec, named, world)
        return ValidationReport(ok=not found, problems=tuple(found), warnings=tuple(warnings(spec, named, world)))

    async def command(self, spec: MachineSpec) -> CommandView:
        """The QEMU command of a definition. Raises Invalid with all problems."""
        launch = await self._planning.launch(spec)
        made = launch.plan
        argv = (made.binary, *(word for option in made.options_by_hand() for word in option.words()))
        return CommandView(
            argv=argv, text=made.by_hand(), emulator_version=launch.emulator_version, accel=made.accel, accel_reason=made.accel_reason
        )

    async def machine_command(self, name: str) -> CommandView:
        """The QEMU command of a stored definition."""
        return await self.command(self._registry.get(name).definition.spec)

    async def create(self, spec: MachineSpec, *, start: bool = False, paused: bool = False) -> MachineView:
        """Stores a definition and makes its disks; with `start` launches it as well. When it cannot be stored nothing is left."""
        if paused and not start:
            raise invalid([Problem(path="?paused", message="needs start=true")])
        async with AsyncExitStack() as reservation:
            await reservation.enter_async_context(self._registry.reserved(spec.name))
            complete, made = await self._planning.completed(spec)
            made = msgspec.structs.replace(made, paused=paused)
            if start and can_hurry(made) and not self._starting.locked():
                async with self._starting, hurried(self._registry, complete, made) as (machine, launch):
                    await reservation.aclose()
                    async with self._starts(machine):
                        await machine.start(launch)
                return machine.view()
            machine = await created(self._registry, complete, made)
        if start:
            await self._start(machine, made, paused=paused)
        return machine.view()

    async def replace(self, name: str, spec: MachineSpec, revision: int | None) -> MachineView:
        """Stores another definition for a machine at rest."""
        machine = self._registry.get(name)
        if revision is None:
            raise RevisionRequired(f"say which revision of machine {name!r} is replaced", revision=machine.revision)
        if spec.name != name:
            raise invalid([Problem(path="$.name", message=f"is {spec.name!r}, but the machine is {name!r}; names do not change")])
        async with machine.held("replace"):
            machine.require(AT_REST, "replace")
            self._registry.check_revision(machine, revision)
            kept = machine.definition
            changed = disk_changes(kept.spec, spec)
            if changed:
                raise invalid(changed)
            complete, made = await self._planning.completed(msgspec.structs.replace(spec, uuid=spec.uuid or kept.uuid))
            kept_disks = self._registry.disks_made(kept.spec)
            new = tuple(image for image in made.plan.blank_images if image.path not in kept_disks)
            state_dir = self._registry.paths(name).state
            try:
                if new:
                    await asyncio.to_thread(mark_unfinished, state_dir)
                await furnish(made.plan)
                await self._registry.replace(machine, complete, revision)
            except Unknown:
                raise  # it may be stored: the next daemon knows
            except BaseException:
                await asyncio.to_thread(settle, state_dir, self._registry.disks_made(machine.definition.spec))
                raise
            await asyncio.to_thread(mark_finished, state_dir)
        return machine.view()

    async def update(self, name: str, changes: MachineChanges, revision: int) -> MachineView:
        """Changes of a definition what no QEMU knows of, in any state of the machine. Raises Held while it moves to another host."""
        machine = self._registry.get(name)
        _check_stays(machine)
        await self._registry.update(machine, changed(machine.definition.spec, changes), revision)
        return machine.view()

    async def delete(self, name: str, revision: int | None) -> None:
        """Deletes a machine at rest with the disks qmpd made for it."""
        machine = self._registry.get(name)
        async with machine.held("delete"):
            machine.require(AT_REST, "delete")
            if revision is not None:
                self._registry.check_revision(machine, revision)
            await self._registry.delete(machine)

    def machines(self, labels: Mapping[str, str], state: State | None, caller: Caller = OURSELVES) -> MachineList:
        """The machines that exist for the caller, carry all `labels` and are in `state`, as their tasks know them."""
        wanted = (machine for machine in self._registry if labels.items() <= machine.definition.spec.labels.items())
        views = (machine.view() for machine in wanted if in_scope(machine.definition.spec.labels, caller))
        return MachineList(machines=tuple(view for view in views if state in (None, view.state)), event=self.bus.last)

    def machine(self, name: str) -> MachineView:
        """One machine."""
        return self._registry.get(name).view()

    def exists_for(self, caller: Caller, name: str | None) -> bool:
        """Whether a machine exists for this caller; None stands for the whole host, which exists for those who may see all machines."""
        if not caller.labels:
            return True
        return name is not None and any(
            machine.name == name and in_scope(machine.definition.spec.labels, caller) for machine in self._registry
        )

    def definition(self, name: str) -> DefinitionView:
        """What the user said about a machine."""
        machine = self._registry.get(name)
        stored = machine.definition
        return DefinitionView(spec=stored.spec, revision=machine.revision, created_at=stored.created_at, changed_at=stored.changed_at)

    # Lifecycle.

    async def start(self, name: str, request: StartRequest) -> MachineView:
        """Launches a machine at rest."""
        machine = self._registry.get(name)
        machine.require(AT_REST, "start")
        await self._start(machine, None, paused=request.paused)
        return machine.view()

    async def stop(self, name: str) -> StopView:
        """Ends a machine's QEMU in order."""
        machine = self._registry.get(name)
        async with machine.held("stop", instead_of=frozenset({"shutdown"})):
            ended = await power.stop(machine)
        return msgspec.structs.replace(ended, machine=machine.view())

    async def kill(self, name: str) -> StopView:
        """Ends a machine's QEMU at once, whoever holds the machine. Raises GivenAway where that would end nothing of its guest."""
        machine = self._registry.get(name)
        await self.rescue.recovery.look_again(machine)
        self.migration.check_here(machine)  # and nothing is waited for before it is asked to end: see `Giving.give`
        return await power.kill(machine)

    async def reset(self, name: str) -> MachineView:
        """Resets a machine."""
        return await self._held(name, "reset")

    async def pause(self, name: str) -> MachineView:
        """Halts a machine's CPUs."""
        return await self._held(name, "pause")

    async def resume(self, name: str) -> MachineView:
        """Lets a machine's CPUs run."""
        return await self._held(name, "resume")

    async def shutdown(self, name: str, request: ShutdownRequest) -> JobView:
        """Asks the guest to power off; the job ends when it has, or when its time is over."""
        machine = self._registry.get(name)
        machine.require(frozenset({State.RUNNING}), "shut down")

        async def work() -> StopView:
            async with machine.held("shutdown"):
                return await operating.shut_down(machine, request)

        if machine.operation is not None:
            async with machine.held("shutdown"):
                pass
        return await self._jobs.begin("shutdown", name, work)

    async def shutdown_host(self, request: HostShutdownRequest) -> JobView:
        """Ends all machines, as a job; until it has ended none can be started. Raises GoingDown when that is under way already."""
        self.host.refuse()
        first = self.migration.turned_away
        return await self._jobs.begin_reporting("host-shutdown", None, lambda report: self.host.run(request, report, first))

    async def wait(self, name: str, states: frozenset[State], timeout_s: float) -> MachineView:
        """Waits until a machine is in one of `states`. Raises NotYet with its state when it was not in time."""
        machine = self._registry.get(name)
        if not await machine.until(states, timeout_s):
            raise NotYet(f"machine {name!r} is {machine.state} after {timeout_s:g} s", state=str(machine.state), status=machine.status)
        return machine.view()

    # The running machine.

    async def qmp(self, name: str, request: QmpRequest, caller: Caller) -> QmpAnswer:
        """Passes a QMP command through, if this caller may."""
        machine = self._registry.get(name)
        if not only_reads(request.execute):
            _check_stays(machine, "copy")
            _check_begun(machine)
        known = msgspec.structs.replace(caller, unrestricted=caller.user is not None and caller.user in self._settings.qmp_users)
        return await operating.pass_through(machine, request, known)

    async def screenshot(self, name: str) -> bytes:
        """The display as PNG."""
        return await operating.screenshot(self._registry.get(name), self._registry.paths(name).run)

    async def send_key(self, name: str, request: SendKeyRequest) -> None:
        """Presses keys."""
        await operating.send_key(self._registry.get(name), request)

    def console(self, name: str, port: int | None) -> Console:
        """A serial port of a machine; None for its console."""
        machine = self._registry.get(name)
        return port_of(machine.consoles, port, machine.console_port, name)

    async def expect(self, name: str, request: ExpectRequest) -> ExpectResult:
        """Waits for a pattern on a serial port."""
        return await expect(self.console(name, request.port), request)

    # Events and jobs.

    async def events_page(self, since: int, limit: int, machine: str | None) -> EventPage:
        """Events after number `since`."""
        return await self.journal.page(since, limit, machine)

    async def jobs(self, machine: str | None = None) -> JobList:
        """The jobs, newest first."""
        return JobList(jobs=await self._jobs.jobs(machine))

    async def job(self, job_id: str) -> JobView:
        """One job."""
        return await self._jobs.job(job_id)

    async def cancel(self, job_id: str) -> JobView:
        """Cancels a job."""
        return await self._jobs.cancel(job_id)

    # How it is done.

    async def _start(self, machine: Machine, launch: Launch | None, *, paused: bool) -> None:
        async with self._starts(machine):
            launch = launch or await self._planning.launch(startable(machine.definition))
            async with self._starting:
                self.host.refuse()
                await machine.start(msgspec.structs.replace(launch, paused=paused))

    @asynccontextmanager
    async def _starts(self, machine: Machine) -> AsyncIterator[None]:
        """Holds a machine at rest that may be started."""
        async with machine.held("start"):
            machine.require(AT_REST, "start")
            machine.definition.check_owned()
            self.host.refuse()
            yield

    async def _held(self, name: str, verb: str) -> MachineView:
        machine = self._registry.get(name)
        verbs = {"reset": power.reset, "pause": power.pause, "resume": power.resume}
        async with machine.held(verb):
            await verbs[verb](machine)
        return machine.view()


def _check_begun(machine: Machine) -> None:
    """Raises MonitorUnavailable while the daemon itself is about to set a guest going: `stop` would be answered, and undone."""
    if machine.state in {State.STARTING, State.UNREACHABLE}:
        raise MonitorUnavailable(f"machine {machine.name!r} is {machine.state}: until that is over its QEMU is asked questions only")


def _check_stays(machine: Machine, *others: str) -> None:
    """Raises Held while a machine is on its way between two hosts, or one of the `others` holds it."""
    if (holder := machine.operation) in {"migrate", *others} and holder is not None:
        raise Held(f"machine {machine.name!r} is held by {holder!r}", holder=holder, state=str(machine.state))
