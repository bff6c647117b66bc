"""The source's part: a machine that goes to another host, from the request until that host owns it, or it has stayed here.

Until it commits *give* this host owns the machine, and whatever goes wrong it stays: the guest runs on here as before. With that
commit, and not before, the other host owns it. From then on this host does nothing with the machine but tell the other one, until
it has heard that the machine arrived (and removes what is left of it here), or that the other host has discarded it for good.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from contextlib import AsyncExitStack, suppress
from typing import Final

import msgspec

from qmpd.errors import Held, HostError, MigrationFailed, NotFound, PeerError, QmpdError, WrongState
from qmpd.jobs import Report
from qmpd.journal import Journal
from qmpd.lifecycle import AT_REST
from qmpd.machine import Machine, Publish
from qmpd.migration.carriage import Carriage, Carried
from qmpd.migration.convergence import revised
from qmpd.migration.delivery import DOUBT_S, Deliveries, Departure
from qmpd.migration.following import is_halfway
from qmpd.migration.giving import NOT_WRITTEN, Giving
from qmpd.migration.ledger import Entry, Ledger, first_entry
from qmpd.migration.phases import KEEPABLE, Phase, Step
from qmpd.migration.protocol import Standing
from qmpd.migration.rehearsal import Rehearsals
from qmpd.migration.resolution import SourceResolutions
from qmpd.migration.shipping import LIVE, Shipping
from qmpd.migration.withdrawal import Withdrawals, reason_of
from qmpd.migrationviews import DryRunReport, GoalChanges, MigrateRequest, MigrationReport
from qmpd.peering import Peering
from qmpd.peers import PeerDaemon
from qmpd.plan.disks import base_of
from qmpd.registry import Registry
from qmpd.settings import Peer
from qmpd.tasks import Tasks, undivided
from qmpd.views import Progress

#: States in which all of a machine can be moved: by its QEMU while it lives, as files while it does not.
MOVABLE: Final = LIVE | AT_REST

_log = logging.getLogger(__name__)


class Departures:
    """All machines that go to other hosts."""

    def __init__(
        self,
        *,
        registry: Registry,
        ledger: Ledger,
        journal: Journal,
        peering: Peering,
        shipping: Shipping,
        rehearsals: Rehearsals,
        withdrawals: Withdrawals,
        tasks: Tasks,
        publish: Publish,
    ) -> None:
        self._registry = registry
        self._ledger = ledger
        self._peering = peering
        self._shipping = shipping
        self._rehearsals = rehearsals
        self._tasks = tasks
        self._publish = publish
        self._departures: dict[str, Departure] = {}
        self._deliveries = Deliveries(
            registry=registry, ledger=ledger, journal=journal, shipping=shipping, publish=publish, departures=self._departures
        )

        self._withdrawals = withdrawals
        self._giving = Giving(registry, ledger, self._deliveries)
        self.carriage = Carriage(
            registry=registry, ledger=ledger, journal=journal, shipping=shipping, rehearsals=rehearsals, giving=self._giving
        )
        self.resolutions = SourceResolutions(ledger=ledger, peering=peering, deliveries=self._deliveries, departures=self._departures)

    def close(self) -> None:
        """The daemon ends: what cannot be done now is left to the next one."""
        self._deliveries.closing = True

    async def migrate(self, machine: Machine, request: MigrateRequest, report: Report) -> MigrationReport:
        """Moves a machine. Who cancels the task before the machine is given away keeps it here, as it was.

        Raises:
            NotFound, Forbidden: there is no such peer, or it may not receive machines.
            WrongState, Held: the machine cannot be moved now.
            CannotMove: the peer does not take it, or both sides are not alike enough.
            MigrationFailed, PeerError: it did not get there, and is here as it was.
        """
        peer = self._peering.peers.receiver(request.peer)
        departure = Departure(secrets.token_hex(8), machine)
        departure.job = report.job
        departure.hold()
        try:
            machine.require(MOVABLE, "migrate")
            if any(base_of(disk) is not None for disk in machine.definition.spec.disks):
                await report(Progress(phase="what its disks lie upon is read"))
            offer, before = await self._shipping.offer(machine, request, departure.migration)
            if offer.state == "stopped":
                await self._registry.check_free(machine)
            entry = await self._ledger.begin(first_entry(offer, machine.name, peer.name, before))
        except BaseException:
            departure.release()
            raise
        self._departures[entry.id] = departure
        self._publish("migration.began", machine.name, {"migration": entry.id, "peer": peer.name})
        async with AsyncExitStack() as stack:
            try:
                link = await stack.enter_async_context(self._peering.dial(peer))
            except BaseException as error:
                await undivided(self._kept(departure, reason_of(error)), f"keep:{machine.name}")
                raise
            carried = await self._shipped(departure, peer, link, request, report)
            if carried is None:
                return self._brought(departure, entry)
            outcome = await carried.reported(departure, entry)
            await self._deliveries.deliver(departure, link, peer)
        return outcome

    async def rehearse(self, machine: Machine, request: MigrateRequest, report: Report) -> DryRunReport:
        """Whether a machine could be moved, and what that would take. Changes nothing, on either side.

        Raises:
            NotFound, Forbidden: there is no such peer, or it may not receive machines.
            CannotMove, PeerError: the peer does not try it, or does not answer.
        """
        async with self._peering.dial(self._peering.peers.receiver(request.peer)) as link:
            return await self._rehearsals.rehearse(machine, request, link, report)

    async def tune(self, machine: Machine, changes: GoalChanges) -> str:
        """Gives a migration that is under way another goal; its id.

        Raises:
            WrongState: none is, or it has got too far.
            Invalid: the goal asks for what it began without.
        """
        departure = self._of(machine)
        if departure is None or departure.shipment is None or departure.giving:
            raise WrongState(f"no migration of machine {machine.name!r} can be tuned now", state=str(machine.state), allowed=[])
        await departure.shipment.change(revised(departure.shipment.tuner.goal, changes))
        return departure.migration

    def under_way(self, migration: str) -> Departure | None:
        """What is under way of a migration."""
        return self._departures.get(migration)

    def _of(self, machine: Machine) -> Departure | None:
        return next((one for one in self._departures.values() if one.machine is machine), None)

    def standing(self, entry: Entry) -> Standing:
        """How far this side is."""
        departure = self._departures.get(entry.id)
        if departure is None:
            return entry.standing()
        if entry.phase is not Phase.GIVEN:
            return entry.standing(departure.problem)
        if departure.machine.definition.given is None:  # it was taken back, and the note of it is not written yet
            return msgspec.structs.replace(entry.standing(departure.problem), phase=Phase.KEPT)
        return entry.standing(departure.problem, self._deliveries.handover(departure))

    # After a restart of the daemon.

    def restore(self) -> None:
        """Before processes are taken over: holds the machines that were on their way, so that nobody else touches them."""
        for entry in sorted(self._unsettled(), key=self._gave, reverse=True):
            machine = self._registry.known(entry.machine)
            if machine is None or machine.definition.uuid != entry.uuid or entry.phase is Phase.KEPT:
                continue
            departure = Departure(entry.id, machine)
            try:
                departure.hold()
            except Held:  # an older one that was never settled: only the newest, or the one that gave the machine away, is real
                _log.error("a machine has more than one migration", extra={"machine": machine.name, "migration": entry.id})
                continue
            self._departures[entry.id] = departure

    def _unsettled(self) -> list[Entry]:
        return [entry for entry in self._ledger.unsettled("source") if not entry.is_copy]

    def _gave(self, entry: Entry) -> tuple[bool, str]:
        machine = self._registry.known(entry.machine)
        given = machine.definition.given if machine is not None else None
        return (given is not None and given.migration == entry.id, entry.began_at)

    def go_on(self) -> None:
        """After processes were taken over: goes on with each where it stood."""
        for entry in self._unsettled():
            departure = self._departures.get(entry.id)
            if departure is not None:
                self._tasks.start(self._go_on(departure), f"departure:{entry.machine}")
            elif entry.phase in {Phase.KEPT, *KEEPABLE}:
                self._tasks.start(self._withdrawals.told(entry), f"tell:{entry.machine}")
            else:
                self._tasks.start(self._ledger.settle(entry.id), f"settle:{entry.machine}")

    async def _go_on(self, departure: Departure) -> None:
        await self._deliveries.persist(departure, lambda: self._gone_on(departure), "to go on with its migration")

    async def _gone_on(self, departure: Departure) -> None:
        async with departure.lock:
            if departure.decided.is_set():
                return  # a person has decided, and what follows is done
        entry, given = self._ledger.get(departure.migration), departure.machine.definition.given
        mine = given is not None and given.migration == entry.id
        if entry.phase in KEEPABLE and not mine:
            await self._keep(departure, "the daemon of the source was restarted")
        elif entry.phase is Phase.GIVEN and not mine:  # it was taken back, and the note of it was not written
            await self._deliveries.take_back(departure, entry.reason)
        elif entry.phase is Phase.MOVED:
            with suppress(NotFound, HostError):  # it is no peer any more: it has the machine all the same
                async with self._peering.dial(self._peering.peers.get(entry.peer)) as link:
                    await self._deliveries.follow(departure, link)
            await undivided(self._deliveries.clear(departure), f"clear:{entry.machine}")
        else:
            if entry.phase in KEEPABLE:  # it was committed, and the note of it was not written
                await self._ledger.step(entry.id, Step.GIVE)
            await self._delivered_again(departure)

    async def _is_halfway(self, departure: Departure) -> bool:
        machine = departure.machine
        while not self._deliveries.closing and self._ledger.get(departure.migration).offer.postcopy:
            try:
                return await is_halfway(machine)
            except QmpdError as error:
                departure.problem = f"QEMU does not say where its guest is: {error.message}"
                await machine.until(AT_REST, DOUBT_S)
        return False

    async def _through(self, departure: Departure) -> None:
        """Goes on with a guest that was halfway when the daemon ended: the only way is forward, unless the destination lost its part."""
        entry = self._ledger.get(departure.migration)
        async with self._peering.dial(self._peering.peers.get(entry.peer)) as link:
            try:
                await self._giving.loaded(departure, link, halfway=True)
            except (MigrationFailed, PeerError) as error:  # its destination has lost it, or somebody has ended this half
                await self._kept(departure, error.message, lost=True)
                return
        if entry.phase is not Phase.GIVEN:
            await self._giving.give(departure, went=entry.went, halfway=True)
        await self._delivered_again(departure)

    async def _delivered_again(self, departure: Departure) -> None:
        peer = self._peering.peers.get(self._ledger.get(departure.migration).peer)
        async with self._peering.dial(peer) as link:
            try:
                await self._deliveries.deliver(departure, link, peer)
            except MigrationFailed as error:
                _log.warning("migration did not come to its end", extra={"machine": departure.machine.name, "reason": error.message})

    # Until it is given away.

    async def _shipped(self, departure: Departure, peer: Peer, link: PeerDaemon, request: MigrateRequest, report: Report) -> Carried | None:
        """Everything up to the commit that gives the machine away. If it fails before, the machine is here as it was.

        None: its guest was halfway when something failed, and has been brought through all the same, all of the way.
        """
        machine = departure.machine
        try:
            carried = await self.carriage.carry(departure, peer, link, request, report)
            report.point_of_no_return(f"machine {machine.name!r} is being given to {peer.name}")
            await self._giving.give(departure, went=carried.went, halfway=carried.halfway)
        except BaseException as error:
            undecided = departure.giving and not isinstance(error, NOT_WRITTEN)
            through = None
            if machine.definition.given is None and not undecided:
                through = await undivided(self._keep(departure, reason_of(error)), f"keep:{machine.name}")
            if through is None or not isinstance(error, QmpdError):
                raise
            _log.warning("a guest is brought through", extra={"machine": machine.name, "reason": error.message})
            await asyncio.shield(through)
            if self._ledger.get(departure.migration).phase is not Phase.MOVED:
                raise
            return None
        return carried

    def _brought(self, departure: Departure, entry: Entry) -> MigrationReport:
        return MigrationReport(
            id=entry.id,
            machine=entry.machine,
            peer=entry.peer,
            owner="destination",
            owner_name=entry.peer,
            epoch=entry.epoch,
            postcopy=True,
            findings=departure.findings,
        )

    async def _keep(self, departure: Departure, reason: str) -> asyncio.Task[None] | None:
        """The machine stays, but for one that is halfway: of that nothing whole is left to keep, and the only way is forward. Who does
        that, as a task."""
        if await self._is_halfway(departure):
            if self._deliveries.closing:
                return None
            return self._tasks.start(self._go_through(departure), f"through:{departure.machine.name}")
        await self._kept(departure, reason)
        return None

    async def _go_through(self, departure: Departure) -> None:
        await self._deliveries.persist(departure, lambda: self._through(departure), "to bring its guest to its destination")

    async def _kept(self, departure: Departure, reason: str, *, lost: bool = False) -> None:
        """Its QEMU is put back to what it was, and the peer is told until it has heard. Of a guest that is `lost` nothing is left."""
        machine, entry = departure.machine, self._ledger.get(departure.migration)

        async def kept() -> Entry:
            await self._shipping.recall(machine, entry, lost=lost)
            now = self._ledger.get(entry.id)
            return await self._ledger.step(entry.id, Step.KEEP, reason=reason) if now.phase in KEEPABLE else now

        entry = await self._deliveries.persist(departure, kept, "to make it as it was")
        self._departures.pop(entry.id, None)
        departure.release()
        self._publish("migration.kept", machine.name, {"migration": entry.id, "peer": entry.peer, "reason": reason})
        self._tasks.start(self._withdrawals.told(entry), f"tell:{machine.name}")
