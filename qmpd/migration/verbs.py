"""The verbs of migration: what a person asks this host for, and what another daemon does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import Final

from qmpd.access import Caller
from qmpd.errors import GoingDown, Held, NotFound, Problem, QmpdError, WrongState, invalid
from qmpd.jobs import Jobs
from qmpd.journal import Journal
from qmpd.machine import Machine, Publish
from qmpd.migration.admission import Admissions
from qmpd.migration.bases import Bases
from qmpd.migration.copies import VERB, Copies
from qmpd.migration.destination import Arrivals
from qmpd.migration.duplicates import Duplicates, check_wishes
from qmpd.migration.exposures import Exposures
from qmpd.migration.fingerprints import Fingerprints
from qmpd.migration.itemdesk import ItemDesk
from qmpd.migration.ledger import Entry, Ledger
from qmpd.migration.likeness import DestinationFacts
from qmpd.migration.phases import ENDED, KEEPABLE, UNOWNED, Phase
from qmpd.migration.ports import Ports
from qmpd.migration.premises import Premises
from qmpd.migration.protocol import Acceptance, Channel, DiscardRequest, Endpoint, Handover, Landed, LoadedRequest, Offer, Standing
from qmpd.migration.reception import Reception
from qmpd.migration.rehearsal import Rehearsals
from qmpd.migration.relays import Relays
from qmpd.migration.shipping import Shipping, no_postcopy
from qmpd.migration.source import MOVABLE, Departures
from qmpd.migration.trial import Trials
from qmpd.migration.tunnel import Meter, Near
from qmpd.migration.vacancies import Vacancies
from qmpd.migration.withdrawal import Withdrawals
from qmpd.migrationviews import CopyView, GoalChanges, MigrateRequest, MigrationList, MigrationView, Owner, ResolveRequest
from qmpd.peering import Peering
from qmpd.planning import Planning
from qmpd.registry import Registry
from qmpd.settings import Settings
from qmpd.tasks import Tasks
from qmpd.views import JobView

#: What was received is killed, and ends at once; a host that goes down does not wait for what hangs.
TURN_AWAY_S: Final = 30.0
#: Who owns the machine in each phase, by what this side knows.
_OWNERS: dict[Phase, Owner] = {
    Phase.BEGUN: "source",
    Phase.PREPARED: "source",
    Phase.PERFORMING: "source",
    Phase.GIVEN: "destination",
    Phase.MOVED: "destination",
    Phase.KEPT: "source",
    Phase.RELEASED: "source",
    Phase.COPIED: "source",
    Phase.AWAITING: "source",
    Phase.LOADED: "unknown",
    Phase.TAKEN: "destination",
    Phase.ARRIVED: "destination",
    Phase.DISCARDED: "source",
}


class Migration:
    """What `Service` answers with, one method for each verb."""

    def __init__(
        self,
        *,
        settings: Settings,
        registry: Registry,
        ledger: Ledger,
        journal: Journal,
        peering: Peering,
        jobs: Jobs,
        planning: Planning,
        admissions: Admissions,
        items: ItemDesk,
        ports: Ports,
        publish: Publish,
        refuse: Callable[[str], None],
    ) -> None:
        """`refuse` raises GoingDown while the host goes down, with what cannot be done with a machine meanwhile."""
        self._registry = registry
        self._ledger = ledger
        self._peering = peering
        self._jobs = jobs
        self._tasks = Tasks()
        self._refuse = refuse
        self._vacancies = Vacancies(ledger, refuse)
        bases = Bases(self._tasks, settings.pools, settings.cache_dir)
        relays = Relays(self._tasks)
        fingerprints, shipping = Fingerprints(settings.pools), Shipping(settings.pki_dir, registry.paths, bases, relays)
        duplicates, withdrawals = Duplicates(shipping, registry.paths), Withdrawals(ledger, peering, publish)
        rehearsals = Rehearsals(shipping, duplicates, fingerprints, registry.paths)
        premises = Premises(settings, registry, planning, fingerprints, bases)
        self._trials = Trials(planning, premises, settings.run_dir)
        self._arrivals = Arrivals(
            registry=registry,
            ledger=ledger,
            planning=planning,
            premises=premises,
            bases=bases,
            reception=Reception(settings, registry.paths, items, ports, relays, publish),
            admissions=admissions,
            peering=peering,
            tasks=self._tasks,
            publish=publish,
        )
        self._departures = Departures(
            registry=registry,
            ledger=ledger,
            journal=journal,
            peering=peering,
            shipping=shipping,
            rehearsals=rehearsals,
            withdrawals=withdrawals,
            tasks=self._tasks,
            publish=publish,
        )
        self._copies = Copies(
            registry=registry,
            ledger=ledger,
            peering=peering,
            duplicates=duplicates,
            rehearsals=rehearsals,
            exposures=Exposures(registry, ledger),
            carriage=self._departures.carriage,
            withdrawals=withdrawals,
            tasks=self._tasks,
            publish=publish,
        )

    # For people.

    async def migrate(self, name: str, request: MigrateRequest) -> JobView:
        """Moves a machine to a peer, or makes a copy of it there, as a job; or finds out what that would take.

        Raises:
            NotFound, Forbidden: there is no such peer, or it may not receive machines.
            WrongState, GivenAway: the machine cannot be moved now.
            GoingDown: it is about to be ended with its host.
            Invalid: what is asked for cannot be had together.
        """
        if request.goal.then == "postcopy" and (obstacle := no_postcopy(tunnel=request.tunnel, channels=request.channels)) is not None:
            raise invalid([Problem(path="$.goal.then", message=obstacle)])
        if request.copy is not None:
            check_wishes(request)
        machine = self._registry.get(name)
        self._peering.peers.receiver(request.peer)
        machine.definition.check_owned()
        machine.require(MOVABLE, "migrate" if request.copy is None else VERB)
        self._refuse("moved" if request.copy is None else "copied")
        if request.dry_run:
            return await self._jobs.begin_reporting(
                "migrate-dry-run", name, lambda report: self._departures.rehearse(machine, request, report)
            )
        if request.copy is not None:
            return await self._jobs.begin_reporting(VERB, name, lambda report: self._copies.copy(machine, request, report))
        return await self._jobs.begin_reporting("migrate", name, lambda report: self._departures.migrate(machine, request, report))

    def list(self, machine: str | None = None) -> MigrationList:
        """The migrations to and from this host, newest first."""
        return MigrationList(migrations=tuple(self._view(entry) for entry in self._ledger.all() if machine in (None, entry.machine)))

    async def tune(self, name: str, changes: GoalChanges) -> MigrationView:
        """Gives a migration that is under way another goal.

        Raises:
            WrongState: none of this machine is under way here.
            Invalid: the goal asks for what the migration began without.
        """
        migration = await self._departures.tune(self._registry.get(name), changes)
        return self._view(self._ledger.get(migration))

    async def resolve(self, name: str, request: ResolveRequest) -> MigrationView:
        """Does what a person has decided who knows what became of the other side.

        Raises:
            WrongState: there is nothing to decide.
            Invalid: `confirm` is not the machine's name.
        """
        machine = self._registry.get(name)
        if request.confirm != name:
            raise invalid([Problem(path="$.confirm", message=f"must be {name!r}, the name of the machine")])
        entry = self._ledger.of(name)
        if entry is None:
            raise WrongState(f"no migration of machine {name!r} is under way", state=str(machine.state), allowed=[])
        allowed = ["keep", "moved"] if entry.role == "source" else ["take", "discard"]
        if request.action not in allowed:
            raise WrongState(f"this host is the {entry.role}: {request.action!r} is for the other one", state=entry.role, allowed=allowed)
        if entry.is_copy and entry.role == "source":
            if request.action == "moved":
                message = "a copy leaves its original where it is: there is nothing to remove"
                raise WrongState(message, state=str(entry.phase), allowed=["keep"])
            await self._copies.give_up(entry)
        elif request.action == "keep":
            await self._departures.resolutions.keep(machine)
        elif request.action == "moved":
            await self._departures.resolutions.forget(machine)
        else:
            await self._arrivals.resolutions.resolve(machine, take=request.action == "take")
        return self._view(self._ledger.get(entry.id))

    def check_here(self, machine: Machine) -> None:
        """Raises GivenAway where the guest of this machine goes on elsewhere, whatever is done here, and Held where that is decided now."""
        machine.definition.check_owned()
        entry = self._ledger.of(machine.name)
        departure = self._departures.under_way(entry.id) if entry is not None else None
        if entry is not None and departure is not None and departure.machine is machine and departure.giving and entry.phase in KEEPABLE:
            raise Held(f"machine {machine.name!r} is just being given to {entry.peer}", holder="migrate", state=str(machine.state))

    # For peers.

    async def offer(self, caller: Caller, offer: Offer) -> Acceptance:
        """Gets ready for a machine of a peer that may send some.

        Raises:
            GoingDown, Busy: there is no place for it now; nothing was made for it. Otherwise as `Arrivals.offer`.
        """
        peer = self._peering.peers.sender(caller)
        try:
            with self._vacancies.taken(peer.name, offer):
                return await self._arrivals.offer(peer, offer)
        except GoingDown as refusal:
            with suppress(NotFound):  # nothing was begun
                await self._arrivals.discard(peer.name, offer.id, refusal.message)
            raise

    async def turned_away(self) -> None:
        """The host goes down: what has not arrived is discarded, so that its source keeps it, or takes it back.

        In postcopy the guest may be here in part, and nowhere as a whole: it is let come. Copies are given up: they hold machines.
        """
        for job in self._copies.beginning():
            with suppress(QmpdError):  # it has ended, or was decided meanwhile
                await self._jobs.cancel(job)
        coming = [entry for entry in self._ledger.unsettled("destination") if entry.phase in UNOWNED and not entry.offer.postcopy]
        reason = "the host of the destination goes down"
        ending = [self._tasks.start(self._arrivals.discard(one.peer, one.id, reason), f"turn-away:{one.machine}") for one in coming]
        if ending:
            await asyncio.wait(ending, timeout=TURN_AWAY_S)

    async def tried(self, caller: Caller, offer: Offer) -> DestinationFacts:
        """Tries a machine of a peer that may send some: what this host has for it, and what its QEMU would be made of here."""
        return await self._trials.tried(self._peering.peers.sender(caller), offer)

    def carried(self, caller: Caller, freight: bytes) -> Landed:
        """Throws away what a peer sends that may send machines, and measures the way."""
        self._peering.peers.sender(caller)
        return Landed(bytes=len(freight))

    async def loaded(self, caller: Caller, migration: str, request: LoadedRequest) -> Standing:
        """How far a machine of the peer's is, as soon as it is here as a whole or the time is over."""
        return await self._arrivals.loaded(self._peering.peers.asking(caller).name, migration, request.timeout_s)

    async def take(self, caller: Caller, migration: str, handover: Handover) -> Standing:
        """The peer has given a machine: it is taken."""
        return await self._arrivals.take(self._peering.peers.asking(caller).name, migration, handover)

    async def recover(self, caller: Caller, migration: str) -> Endpoint:
        """Memory that follows a guest here stopped to come: its QEMU listens again."""
        return await self._arrivals.recover(self._peering.peers.asking(caller), migration)

    async def discard(self, caller: Caller, migration: str, request: DiscardRequest) -> Standing:
        """The peer keeps a machine: what is here of it is removed."""
        return await self._arrivals.discard(self._peering.peers.asking(caller).name, migration, request.reason)

    def tunnelled(self, caller: Caller, migration: str, channel: Channel) -> AbstractAsyncContextManager[tuple[Near, Meter]]:
        """A connection to the QEMU that waits for what the peer sends through the API. Raises as `Arrivals.tunnelled`."""
        return self._arrivals.tunnelled(self._peering.peers.asking(caller).name, migration, channel)

    async def standing(self, caller: Caller, migration: str) -> Standing:
        """How far this host is with a migration to or from the peer that asks. Raises NotFound about any other."""
        peer = self._peering.peers.asking(caller)
        entry = self._ledger.get(migration)
        if entry.peer != peer.name:
            raise NotFound(f"there is no migration {migration!r}", migration=migration)
        return self._standing(entry) if entry.role == "source" else await self._arrivals.answer(entry)

    # After a restart of the daemon.

    def restore(self) -> None:
        """Before processes are taken over: holds the machines that were on their way."""
        self._departures.restore()
        self._copies.restore()
        self._arrivals.restore()

    @asynccontextmanager
    async def at_work(self) -> AsyncIterator[None]:
        """Goes on with what an earlier daemon began. At the end everything is left where it stands, for the next one."""
        await asyncio.to_thread(self._trials.sweep)
        self._departures.go_on()
        self._copies.go_on()
        self._arrivals.go_on()
        try:
            yield
        finally:
            self._vacancies.closing = True
            self._departures.close()
            self._copies.closing = True
            self._arrivals.close()
            await self._jobs.interrupt()
            await self._tasks.cancel()

    def _standing(self, entry: Entry) -> Standing:
        if entry.role == "destination":
            return self._arrivals.standing(entry)
        return (self._copies if entry.is_copy else self._departures).standing(entry)

    def _view(self, entry: Entry) -> MigrationView:
        problem = self._standing(entry).problem
        departure = (self._copies if entry.is_copy else self._departures).under_way(entry.id)
        of = entry.offer.copy_of
        tuner = departure.shipment.tuner if departure is not None and departure.shipment is not None else None
        undecided = entry.phase in {Phase.GIVEN, Phase.LOADED}
        return MigrationView(
            id=entry.id,
            machine=entry.machine,
            role=entry.role,
            peer=entry.peer,
            phase=str(entry.phase),
            owner="unknown" if undecided and problem else _OWNERS[entry.phase],
            cancellable=entry.role == "source" and entry.phase in KEEPABLE,
            doubt=problem or None,
            job=departure.job if departure is not None else None,
            goal=tuner.goal if tuner is not None else None,
            progress=tuner.progress(str(entry.phase)) if tuner is not None else None,
            began_at=entry.began_at,
            ended_at=entry.changed_at if entry.phase in ENDED else None,
            copy=CopyView(name=entry.offer.spec.name, uuid=entry.uuid, original=of.name) if of is not None else None,
        )
