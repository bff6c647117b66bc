"""The source's part: a machine that goes to another host, from the request until that host owns it, or it has stayed here.

Until it commits *give* this host owns the machine, and whatever goes wrong it stays: the guest runs on here as before. With that
commit, and not before, the other host owns it. From then on this host does nothing with the machine but tell the other one, until
it has heard that the machine arrived (and removes what is left of it here), or that the other host has discarded it for good.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from contextlib import suppress
from functools import partial
from typing import Final

import msgspec

from qmpd.errors import (
    Busy,
    HostError,
    MigrationFailed,
    NoSpace,
    NotFound,
    PeerError,
    QmpdError,
    StaleRevision,
    WrongState,
)
from qmpd.failpoint import passing
from qmpd.jobs import Report
from qmpd.journal import Journal, timestamp, utc_now
from qmpd.lifecycle import AT_REST, State
from qmpd.machine import Machine, Publish
from qmpd.migration.belongings import Belongings
from qmpd.migration.convergence import revised
from qmpd.migration.delivery import AGAIN_S, DOUBT_S, LONGEST_AGAIN_S, Deliveries, Departure, asked, code_of, insisted
from qmpd.migration.following import is_halfway
from qmpd.migration.ledger import Entry, Ledger
from qmpd.migration.outgoing import Before
from qmpd.migration.phases import FIRST, KEEPABLE, Phase, Step
from qmpd.migration.protocol import Acceptance, DiscardRequest, LoadedRequest, Offer, Standing
from qmpd.migration.rehearsal import Rehearsals
from qmpd.migration.shipping import Shipment, Shipping, moved
from qmpd.migrationviews import DryRunReport, GoalChanges, MigrateRequest, MigrationReport
from qmpd.peering import Peering
from qmpd.peers import PeerDaemon
from qmpd.record import Given
from qmpd.registry import Registry
from qmpd.settings import Peer
from qmpd.store import Unknown
from qmpd.tasks import Tasks, alongside, undivided

#: States in which a machine has something that can be moved while it lives.
MOVABLE: Final = frozenset({State.RUNNING, State.PAUSED})
#: The destination has everything when the source's QEMU says `completed`; it only has to read what is in its socket, and note it.
LOADED_DEADLINE_S: Final = 60.0
#: A question in which the peer waits for that itself.
LOADED_WAIT_S: Final = 10.0

#: Refusals of a write that say that nothing was written.
_NOT_WRITTEN: Final = (NoSpace, StaleRevision, Busy)

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
        tasks: Tasks,
        publish: Publish,
    ) -> None:
        self._registry = registry
        self._journal = journal
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
            offer, before = await self._shipping.offer(machine, request, departure.migration)
            entry = await self._ledger.begin(_first(offer, before, peer.name))
        except BaseException:
            departure.release()
            raise
        self._departures[entry.id] = departure
        self._publish("migration.began", machine.name, {"migration": entry.id, "peer": peer.name})
        async with self._peering.dial(peer) as link:
            accepted, shipment = await self._shipped(departure, peer, link, request, report)
            figures = await shipment.measured()
            await self._deliveries.deliver(departure, link, peer)
        return MigrationReport(
            id=entry.id,
            machine=entry.machine,
            peer=peer.name,
            owner="destination",
            owner_name=peer.name,
            epoch=entry.epoch,
            total_ms=float(figures.total_ms),
            setup_ms=float(figures.setup_ms),
            downtime_ms=float(figures.downtime_ms),
            transferred_bytes=figures.transferred_bytes,
            passes=figures.passes,
            postcopy=shipment.postcopy,
            tunnelled=shipment.meter is not None,
            tunnelled_bytes=0 if shipment.meter is None else shipment.meter.sent + shipment.meter.received,
            tuned=tuple(shipment.tuner.tuned),
            findings=departure.findings,
            disks=moved(accepted, shipment.last_copied),
        )

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

    async def resolve(self, machine: Machine) -> None:
        """Takes a machine back that was given away, on the word of somebody who knows that the other host does not run it.

        Raises:
            WrongState: it was not given away.
        """
        departure = self._of(machine)
        if departure is None or self._ledger.get(departure.migration).phase is not Phase.GIVEN:
            raise WrongState(f"machine {machine.name!r} was not given away", state=str(machine.state), allowed=[str(Phase.GIVEN)])
        departure.decided.set()
        await undivided(self._deliveries.take_back(departure, "an operator decided so"), f"take-back:{machine.name}")

    def standing(self, entry: Entry) -> Standing:
        """How far this side is."""
        departure = self._departures.get(entry.id)
        handover = None
        if departure is not None and entry.phase is Phase.GIVEN:
            handover = self._deliveries.handover(departure)
        return Standing(
            id=entry.id,
            machine=entry.machine,
            role=entry.role,
            phase=entry.phase,
            epoch=entry.epoch,
            reason=entry.reason,
            problem=departure.problem if departure is not None else "",
            handover=handover,
        )

    # After a restart of the daemon.

    def restore(self) -> None:
        """Before processes are taken over: holds the machines that were on their way, so that nobody else touches them."""
        for entry in self._ledger.unsettled("source"):
            machine = self._registry.known(entry.machine)
            if machine is None or machine.definition.uuid != entry.uuid or entry.phase is Phase.KEPT:
                continue
            departure = self._departures[entry.id] = Departure(entry.id, machine)
            departure.hold()

    def go_on(self) -> None:
        """After processes were taken over: goes on with each where it stood."""
        for entry in self._ledger.unsettled("source"):
            departure = self._departures.get(entry.id)
            if departure is not None:
                self._tasks.start(self._go_on(departure), f"departure:{entry.machine}")
            elif entry.phase in {Phase.KEPT, *KEEPABLE}:
                self._tasks.start(self._told(entry), f"tell:{entry.machine}")
            else:
                self._tasks.start(self._ledger.settle(entry.id), f"settle:{entry.machine}")

    async def _go_on(self, departure: Departure) -> None:
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
        while self._ledger.get(departure.migration).offer.postcopy:
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
                await self._loaded(departure, link, halfway=True)
            except MigrationFailed as error:
                await self._kept(departure, error.message)
                return
        await self._give(departure, went=entry.went)
        await self._delivered_again(departure)

    async def _delivered_again(self, departure: Departure) -> None:
        peer = self._peering.peers.get(self._ledger.get(departure.migration).peer)
        async with self._peering.dial(peer) as link:
            try:
                await self._deliveries.deliver(departure, link, peer)
            except MigrationFailed as error:
                _log.warning("machine came back", extra={"machine": departure.machine.name, "reason": error.message})

    # Until it is given away.

    async def _shipped(
        self, departure: Departure, peer: Peer, link: PeerDaemon, request: MigrateRequest, report: Report
    ) -> tuple[Acceptance, Shipment]:
        """Everything up to the commit that gives the machine away. If it fails before, the machine is here as it was."""
        machine, migration = departure.machine, departure.migration
        try:
            offer = self._ledger.get(migration).offer
            accepted = await insisted(lambda: link.offer(offer))
            departure.findings = await self._rehearsals.checked(machine, request, offer, accepted.facts)
            entry = await self._ledger.step(migration, Step.ACCEPTED)
            async with self._shipping.shipment(machine, entry, accepted, peer, link, request.goal, report) as shipment:
                departure.shipment = shipment
                belongings = departure.belongings = Belongings(machine, migration, link, self._journal)
                async with belongings.following():
                    await shipment.prepare()
                    await self._ledger.step(migration, Step.PERFORM)
                    await shipment.send()
            async with alongside(belongings.settle(), f"belongings:{machine.name}") as settling:
                await self._loaded(departure, link, halfway=shipment.postcopy)
                await settling
            report.point_of_no_return(f"machine {machine.name!r} is being given to {peer.name}")
            await self._give(departure, went=shipment.went)
        except BaseException as error:
            undecided = departure.giving and not isinstance(error, _NOT_WRITTEN)
            if machine.definition.given is None and not undecided:
                await undivided(self._keep(departure, _words(error)), f"keep:{machine.name}")
            raise
        return accepted, shipment

    async def _loaded(self, departure: Departure, link: PeerDaemon, *, halfway: bool) -> None:
        """Returns when the destination says that it holds the whole state, or of a guest that is `halfway` all that it needs to run: then
        there is no way back, and no limit."""
        migration = departure.migration
        loop = asyncio.get_running_loop()
        until = loop.time() + LOADED_DEADLINE_S
        while True:
            try:
                found = await asked(lambda: link.loaded(migration, LoadedRequest(timeout_s=LOADED_WAIT_S)))
            except PeerError as error:
                if not halfway and loop.time() > until:
                    raise
                departure.problem = f"whether the destination has the guest is not known: {error.message}"
                await asyncio.sleep(AGAIN_S)
                continue
            departure.problem = ""
            if found.phase is Phase.LOADED:
                return
            if found.phase is not Phase.AWAITING or (not halfway and loop.time() > until):
                raise MigrationFailed(f"the destination does not hold the machine: it is {found.phase}. {found.reason}".rstrip())

    async def _give(self, departure: Departure, *, went: bool) -> None:
        """The commit by which the other host becomes the owner. Until its outcome is known nothing else may be done."""
        machine, entry = departure.machine, self._ledger.get(departure.migration)
        given = msgspec.structs.replace(machine.definition, given=Given(peer=entry.peer, migration=entry.id, epoch=entry.epoch))
        departure.giving = True
        await passing("ownership-give")
        while True:
            # The note of it shares the transaction wherever it can.
            stored = self._registry.store(machine, given, machine.revision)
            noted = self._ledger.step(entry.id, Step.GIVE, went=went)
            committed, written = await asyncio.gather(stored, noted, return_exceptions=True)
            if isinstance(committed, Unknown):
                departure.problem = f"whether the machine was given away is not certain yet: {committed.message}"
                await asyncio.sleep(DOUBT_S)
                continue
            if isinstance(committed, BaseException):
                raise committed
            if isinstance(written, BaseException):
                _log.error("a step of a migration was not noted", extra={"machine": machine.name, "error": str(written)})
            break
        departure.problem = ""
        await passing("ownership-given")

    async def _keep(self, departure: Departure, reason: str) -> None:
        """The machine stays, but for one that is halfway: of that nothing whole is left to keep, and the only way is forward."""
        if await self._is_halfway(departure):
            if not self._deliveries.closing:
                self._tasks.start(self._through(departure), f"through:{departure.machine.name}")
            return
        await self._kept(departure, reason)

    async def _kept(self, departure: Departure, reason: str) -> None:
        """Its QEMU is put back to what it was, and the peer is told until it has heard."""
        machine, entry = departure.machine, self._ledger.get(departure.migration)
        while entry.phase in KEEPABLE:
            try:
                await self._shipping.recall(machine, entry)
                entry = await self._ledger.step(entry.id, Step.KEEP, reason=reason)
                break
            except QmpdError as error:
                departure.problem = f"it stays here, and is not as it was yet: {error.message}"
                _log.error("machine is not as before its migration", extra={"machine": machine.name, "error": error.message})
                if self._deliveries.closing:
                    return
            await asyncio.sleep(DOUBT_S)
        self._departures.pop(entry.id, None)
        departure.release()
        self._publish("migration.kept", machine.name, {"migration": entry.id, "peer": entry.peer, "reason": reason})
        self._tasks.start(self._told(entry), f"tell:{machine.name}")

    async def _told(self, entry: Entry) -> None:
        """Tells the peer that it will not get the machine, until it has heard it."""
        if entry.phase in KEEPABLE:
            entry = await self._ledger.step(entry.id, Step.KEEP, reason="the machine is not known here any more")
        try:
            peer = self._peering.peers.get(entry.peer)
        except QmpdError:
            await self._ledger.settle(entry.id)  # it is no peer any more: nothing it says or hears counts
            return
        pause = AGAIN_S
        async with self._peering.dial(peer) as link:
            while True:
                try:
                    await asked(partial(link.discard, entry.id, DiscardRequest(reason=entry.reason)))
                    break
                except PeerError as error:
                    if code_of(error) == "not_found":
                        break  # it never heard of it
                await asyncio.sleep(pause)
                pause = min(2 * pause, LONGEST_AGAIN_S)
        await self._ledger.settle(entry.id)


def _first(offer: Offer, before: Before, peer: str) -> Entry:
    moment = timestamp(utc_now())
    return Entry(
        id=offer.id,
        role="source",
        machine=offer.spec.name,
        uuid=offer.uuid,
        peer=peer,
        epoch=offer.epoch,
        phase=FIRST["source"],
        offer=offer,
        went=offer.state == "running",
        before=before,
        began_at=moment,
        changed_at=moment,
    )


def _words(error: BaseException) -> str:
    if isinstance(error, asyncio.CancelledError):
        return "it was cancelled"
    return error.message if isinstance(error, QmpdError) else repr(error)
