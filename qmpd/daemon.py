"""The daemon put together: opens what it owns in order, takes over the machines that live, and lets go in reverse."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Final

from qmpd.accelerator import Accelerators
from qmpd.audit import open_audit
from qmpd.autostart import start_in_order
from qmpd.bus import open_bus
from qmpd.capture import keep_trimmed
from qmpd.catalogue import Catalogue, load_cached, search_path
from qmpd.confinement import Confiner
from qmpd.database import open_database
from qmpd.errors import HostError, QmpdError
from qmpd.filewatch import watching
from qmpd.hostshutdown import HostShutdown
from qmpd.inventory import Inventory
from qmpd.jobs import open_jobs
from qmpd.journal import open_journal
from qmpd.migration.admission import Admissions
from qmpd.migration.diskmoves import DiskMoves
from qmpd.migration.history import HistoryDesk
from qmpd.migration.itemdesk import ItemDesk
from qmpd.migration.ledger import open_ledger
from qmpd.migration.ports import Ports
from qmpd.migration.succession import Successions
from qmpd.migration.verbs import Migration
from qmpd.peering import Peering, nowhere
from qmpd.peers import Dial, Peers
from qmpd.planning import Planning
from qmpd.probe import Emulators
from qmpd.record import LaunchRecord
from qmpd.recovery import Recovery
from qmpd.registry import Registry
from qmpd.restarting import Restarts
from qmpd.resuming import Resumes
from qmpd.sampling import Sampler
from qmpd.service import Service
from qmpd.settings import Settings
from qmpd.shortage import shortage
from qmpd.sqlite import open_store
from qmpd.tally import Tally
from qmpd.tasks import Tasks, background
from qmpd.tokens import Tokens
from qmpd.upkeep import Upkeep
from qmpd.views import StartRequest
from qmpd.worlds import Worlds

#: A few QEMUs have answered by then. The API does not wait for the others: they are known to live, and unreachable until they answer.
ADOPT_PATIENCE_S: Final = 0.05
#: So many are taken over at a time, and the first of them before the API is there.
ADOPTED_AT_ONCE: Final = 8
#: Who has no API, a test say, has everything taken over all the same.
SERVING_LIMIT_S: Final = 2.0

MIB: Final = 1024 * 1024

_log = logging.getLogger(__name__)


@asynccontextmanager
async def running(
    settings: Settings, environ: Mapping[str, str], dial: Dial = nowhere, awaiting: Sequence[socket.socket] = ()
) -> AsyncIterator[Service]:
    """A daemon without its API: a service whose machines are loaded and whose living processes are adopted.

    `dial` is how it reaches its peers. `awaiting` are the sockets at which their machines are awaited, if the daemon is to bind none.

    Leaving lets go of the machines and touches none: their QEMUs go on.

    Raises:
        Held: another daemon uses the state directory.
        QmpdError: the database or a directory cannot be used.
    """
    async with AsyncExitStack() as stack:
        await asyncio.to_thread(_make_directories, settings)
        database = await stack.enter_async_context(open_database(Path(settings.state_dir)))
        store = await stack.enter_async_context(open_store(database))
        journal = await stack.enter_async_context(open_journal(database, kept_events=settings.events_kept))
        bus = await stack.enter_async_context(open_bus(journal))
        jobs = await stack.enter_async_context(open_jobs(journal, bus.publish))
        catalogue = await asyncio.to_thread(_catalogue, settings, environ)
        emulators = Emulators(settings.cache_dir, settings.emulators)
        accelerators = Accelerators(settings.run_dir)
        confiner = Confiner(settings, environ)
        tally = Tally()
        registry = Registry(store, catalogue, settings, stack.enter_context(watching()), tally.counting(bus.publish))
        sampler = Sampler(registry)
        inventory = Inventory(catalogue, emulators, accelerators, settings.machines_cgroup)
        tokens = Tokens(store)
        worlds = Worlds(catalogue, emulators, accelerators, settings, confiner)
        planning = Planning(registry, worlds)
        peering = Peering(Peers(settings.peers), dial)
        ledger = await stack.enter_async_context(open_ledger(database))
        admissions = Admissions(registry, ledger, peering.peers)
        items = ItemDesk(await stack.enter_async_context(background()), admissions.item)
        going_down = HostShutdown(registry)
        migration = Migration(
            settings=settings,
            registry=registry,
            ledger=ledger,
            journal=journal,
            peering=peering,
            jobs=jobs,
            planning=planning,
            admissions=admissions,
            items=items,
            ports=Ports(awaiting),
            publish=bus.publish,
            refuse=going_down.refuse,
        )
        succession_tasks = await stack.enter_async_context(background())
        successions = Successions(registry=registry, planner=planning.launch, jobs=jobs, tasks=succession_tasks, publish=bus.publish)
        service = Service(
            settings=settings,
            successions=successions,
            tokens=tokens,
            peering=peering,
            migration=migration,
            disk_moves=DiskMoves(store, registry, jobs, settings.pools),
            audit=await stack.enter_async_context(open_audit(Path(settings.state_dir), settings.audit_log_mib * MIB)),
            items=items,
            host=going_down,
            history=HistoryDesk(bus, admissions.arrived),
            registry=registry,
            worlds=worlds,
            planning=planning,
            inventory=inventory,
            journal=journal,
            bus=bus,
            jobs=jobs,
            upkeep=Upkeep(
                settings=settings,
                registry=registry,
                inventory=inventory,
                journal=journal,
                bus=bus,
                jobs=jobs,
                sampler=sampler,
                tally=tally,
                peering=peering,
            ),
        )
        stack.push_async_callback(_let_go, registry)
        await registry.load()
        await tokens.load()
        migration.restore()
        await successions.restore()
        await asyncio.to_thread(confiner.sweep)
        await stack.enter_async_context(_housekeeping(settings, registry, service, tally, sampler))
        await stack.enter_async_context(migration.at_work())
        successions.go_on()
        yield service


def _make_directories(settings: Settings) -> None:
    for directory in (settings.state_dir, settings.run_dir, settings.cache_dir):
        try:
            Path(directory).mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise shortage(error) or HostError(f"the directory {directory} cannot be made: {error.strerror}") from error


def _catalogue(settings: Settings, environ: Mapping[str, str]) -> Catalogue:
    places = [*(Path(directory) for directory in settings.boards), *search_path(environ)]
    catalogue = load_cached(places, Path(settings.cache_dir))
    for problem in catalogue.problems:
        _log.warning("board file cannot be used", extra={"problem": str(problem)})
    return catalogue


async def _adopt_all(recovery: Recovery, tasks: Tasks, serving: asyncio.Event) -> None:
    """Takes over what lives. One that does not answer keeps nobody waiting: it is known, and unreachable until it does."""
    living, ended = await recovery.find()
    # Before anybody can start one of these machines again: its record is removed.
    await asyncio.gather(*_adopting(recovery, tasks, ended))
    first, others = living[:ADOPTED_AT_ONCE], living[ADOPTED_AT_ONCE:]
    if first:
        await asyncio.wait(_adopting(recovery, tasks, first), timeout=ADOPT_PATIENCE_S)
    await recovery.note_strays(others)
    if others:
        tasks.start(_adopt_rest(recovery, tasks, others, serving), "adopt")


async def _adopt_rest(recovery: Recovery, tasks: Tasks, found: Sequence[LaunchRecord], serving: asyncio.Event) -> None:
    """Takes over the others as soon as the API is there: a hundred of them would keep it busy before its first answer."""
    with suppress(TimeoutError):
        async with asyncio.timeout(SERVING_LIMIT_S):
            await serving.wait()
    for start in range(0, len(found), ADOPTED_AT_ONCE):
        await asyncio.wait(_adopting(recovery, tasks, found[start : start + ADOPTED_AT_ONCE]), timeout=ADOPT_PATIENCE_S)
    await recovery.note_strays()


def _adopting(recovery: Recovery, tasks: Tasks, found: Sequence[LaunchRecord]) -> list[asyncio.Task[None]]:
    return [tasks.start(recovery.adopt(record), f"adopt:{record.definition.spec.name}") for record in found]


@asynccontextmanager
async def _housekeeping(settings: Settings, registry: Registry, service: Service, tally: Tally, sampler: Sampler) -> AsyncIterator[None]:
    async def start(name: str) -> bool:
        try:
            await service.start(name, StartRequest())
        except QmpdError as error:
            _log.error("machine was not started", extra={"machine": name, "code": error.code, "error": error.message})
            return False
        return True

    async with background() as tasks:
        registry.on_end = Restarts(tasks, tally.restarting(start), lambda: not service.host.under_way).ended
        await _adopt_all(service.rescue.recovery, tasks, service.serving)
        await service.disk_moves.settle_all(tasks)
        tasks.start(service.rescue.recovery.watch_strays(), "strays")
        tasks.start(keep_trimmed(registry.capped_files), "trim-logs")
        tasks.start(sampler.run(), "figures")
        if settings.listen or settings.peers:
            tasks.start(service.authority.keep_current(service.serving), "revocations")
        tasks.start(Resumes(registry, tasks).run(), "room")
        wanted = [machine.definition.spec for machine in registry if machine.definition.spec.autostart and not machine.alive]
        tasks.start(start_in_order(wanted, start, lambda: not service.host.asked), "autostart")
        yield


async def _let_go(registry: Registry) -> None:
    async with asyncio.TaskGroup() as group:
        for machine in registry:
            group.create_task(machine.release(), name=f"release:{machine.name}")
