"""The destination's part: machines that may come here, from the offer until they are this host's own, or are discarded.

Until it has committed *take*, this host runs nothing of what it received: the QEMU is halted, and the machine known in memory only. It
takes when the source says that it has given, or when it asks and the source's own record says so. It may discard at any time before,
and does so by itself when the source keeps the machine, when its own QEMU ends, and when nothing ever came.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Final

import msgspec

from qmpd.errors import Busy, CannotMove, Held, MigrationFailed, MonitorUnavailable, NotFound, QmpdError, WrongState
from qmpd.lifecycle import AT_REST, State
from qmpd.machine import Publish
from qmpd.migration.admission import Admissions
from qmpd.migration.arrangement import bases_here
from qmpd.migration.arrival import ANSWER_S, Arrival, Endings, last_words
from qmpd.migration.bases import Bases
from qmpd.migration.ledger import Entry, Ledger
from qmpd.migration.persistence import persist
from qmpd.migration.phases import UNOWNED, Phase, Step
from qmpd.migration.premises import Premises
from qmpd.migration.preparation import Preparation, definition_of
from qmpd.migration.protocol import VERSION, Acceptance, Channel, Endpoint, Handover, Offer, Standing
from qmpd.migration.reception import Reception
from qmpd.migration.resolution import DestinationResolutions
from qmpd.migration.shipping import no_postcopy
from qmpd.migration.tunnel import Meter, Near, reached
from qmpd.migration.wondering import ASK_S, Wondering
from qmpd.peering import Peering
from qmpd.planning import Planning
from qmpd.registry import Registry
from qmpd.settings import Peer
from qmpd.tasks import Tasks, alongside, undivided

#: After a restart of the daemon every QEMU that answers has been taken over by then.
FOUND_S: Final = 60.0
_FOUND: Final = AT_REST | {State.RUNNING, State.PAUSED, State.INCOMING}

_log = logging.getLogger(__name__)


class Arrivals:
    """All machines that may come here. Every verb of a peer may be repeated."""

    def __init__(
        self,
        *,
        registry: Registry,
        ledger: Ledger,
        planning: Planning,
        premises: Premises,
        bases: Bases,
        reception: Reception,
        admissions: Admissions,
        peering: Peering,
        tasks: Tasks,
        publish: Publish,
    ) -> None:
        self._registry = registry
        self._ledger = ledger
        self._bases = bases
        self._reception = reception
        self._admissions = admissions
        self._peering = peering
        self._tasks = tasks
        self._publish = publish
        self._arrivals: dict[str, Arrival] = {}
        self._endings = Endings(
            registry=registry,
            ledger=ledger,
            reception=reception,
            admissions=admissions,
            tasks=tasks,
            publish=publish,
            arrivals=self._arrivals,
        )
        self._preparation = Preparation(
            registry=registry,
            ledger=ledger,
            planning=planning,
            premises=premises,
            bases=bases,
            reception=reception,
            admissions=admissions,
            endings=self._endings,
            arrivals=self._arrivals,
        )
        self._wondering = Wondering(ledger=ledger, endings=self._endings, reception=reception, peering=peering, publish=publish)
        self.resolutions = DestinationResolutions(ledger=ledger, peering=peering, endings=self._endings, arrivals=self._arrivals)
        #: What an earlier daemon left of migrations whose machine something else holds, or is another one by now.
        self._stale: list[Entry] = []
        #: Offers for which a QEMU is being started.
        self._preparing: set[str] = set()

    # What a peer asks for.

    async def offer(self, peer: Peer, offer: Offer) -> Acceptance:
        """Gets ready for a machine: its QEMU waits when this returns. A repeated offer gets the same answer.

        Raises:
            Busy: the same offer is being looked at.
            CannotMove: this host cannot take it, or has discarded it before.
            Invalid: all that is wrong with the definition here.
            AlreadyExists, Held: its name or UUID is taken.
            LaunchFailed: QEMU did not take it.
        """
        known = self._arrivals.get(offer.id)
        if known is not None and known.peer == peer.name and known.acceptance is not None:
            return known.acceptance
        if offer.id in self._preparing:
            raise Busy("the same offer is being looked at")
        self._check(offer)
        self._preparing.add(offer.id)
        try:
            return await undivided(self._prepare(peer, offer), f"arrive:{offer.spec.name}")
        finally:
            self._preparing.discard(offer.id)

    async def loaded(self, peer: str, migration: str, timeout_s: float) -> Standing:
        """How far it is, as soon as the whole state is here or the time is over. Raises HostError, NoSpace where it cannot be noted."""
        entry = self._entry(peer, migration)
        arrival = self._arrivals.get(migration)
        if arrival is not None and entry.at_rest:  # the question says that all was sent
            await undivided(self._whole(arrival, entry), f"whole:{entry.machine}")
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while arrival is not None and self._ledger.get(entry.id).phase is Phase.AWAITING:
                    await arrival.changed.wait()
        return self.standing(self._ledger.get(entry.id))

    async def take(self, peer: str, migration: str, handover: Handover) -> Standing:
        """The source has given: makes the machine this host's own and lets it go on.

        Raises:
            WrongState: its state is not here yet, which no source that has given can say.
            QemuSilent, NoSpace, Unknown: not done; the same may be asked again.
        """
        entry = self._entry(peer, migration)
        arrival = self._arrivals.get(migration)
        if arrival is not None:
            await undivided(self._endings.take(arrival, handover), f"take:{entry.machine}")
        return await self.answer(self._ledger.get(migration))

    async def recover(self, peer: Peer, migration: str) -> Endpoint:
        """Memory that follows its guest stopped to come: QEMU listens again.

        Raises:
            WrongState: the guest is not here, or has ended.
            QemuRefused: it has all of its memory, or its connection.
        """
        entry = self._entry(peer.name, migration)
        machine = self._registry.known(entry.machine)
        if machine is None or machine.definition.arrived != entry.id or not machine.alive or entry.phase in UNOWNED:
            raise WrongState("there is no guest here that waits for its memory", state=str(entry.phase), allowed=[str(Phase.ARRIVED)])
        return await self._reception.recover(machine, peer)

    async def discard(self, peer: str, migration: str, reason: str) -> Standing:
        """The source keeps the machine: removes what is here of it, unless it is this host's own already."""
        self._entry(peer, migration)
        arrival = self._arrivals.get(migration)
        if arrival is not None:
            await undivided(self._endings.discard(arrival, reason or "the source keeps the machine"), f"discard:{arrival.machine.name}")
        return self.standing(self._ledger.get(migration))

    @asynccontextmanager
    async def tunnelled(self, peer: str, migration: str, channel: Channel) -> AsyncIterator[tuple[Near, Meter]]:
        """A connection to the QEMU that waits for what the peer sends through the API, while the block lasts.

        Raises:
            WrongState: this migration is none of that kind, or needs nothing any more.
            Busy: it has all the connections that it needs.
            MigrationFailed: QEMU does not listen (any more).
        """
        entry = self._entry(peer, migration)
        arrival = self._arrivals.get(migration)
        if arrival is None or arrival.acceptance is None or not entry.offer.tunnel or entry.phase is not Phase.AWAITING:
            state = str(entry.phase) if entry.offer.tunnel else "not tunnelled"
            raise WrongState(f"nothing is awaited through a tunnel for migration {migration}", state=state, allowed=[str(Phase.AWAITING)])
        copied = sum(disk.how == "copy" for disk in arrival.acceptance.disks)
        most = 1 + entry.offer.channels if channel == "memory" else 2 * copied  # a disk's may be made anew before the old one is gone
        with arrival.led_in(channel, most):
            async with reached(self._reception.place(arrival.machine, channel)) as near:
                yield near, arrival.meter

    async def answer(self, entry: Entry) -> Standing:
        """How far this side is, and how much of the logs of a machine that it has taken is here."""
        return msgspec.structs.replace(self.standing(entry), logs=await self._endings.logs(entry))

    def standing(self, entry: Entry) -> Standing:
        """How far this side is."""
        arrival = self._arrivals.get(entry.id)
        return entry.standing(arrival.problem if arrival is not None else "")

    # After a restart of the daemon.

    def restore(self) -> None:
        """Before processes are taken over: makes the machines known that an earlier daemon was receiving, under their names."""
        for entry in self._ledger.unsettled("destination"):
            machine = self._registry.known(entry.machine)
            if machine is not None and machine.definition.arrived != entry.id:
                _log.error("a migration is about another machine of this name", extra={"machine": entry.machine, "migration": entry.id})
                self._stale.append(entry)
                continue
            try:
                self._arrivals[entry.id] = Arrival(entry.id, entry.peer, machine or self._registry.expect(definition_of(entry)))
            except Held:
                _log.error("a machine has more than one migration", extra={"machine": entry.machine, "migration": entry.id})
                self._stale.append(entry)

    def go_on(self) -> None:
        """After processes were taken over: goes on with each where it stood."""
        for arrival in list(self._arrivals.values()):
            self._tasks.start(self._go_on(arrival), f"arrival:{arrival.machine.name}")
        while self._stale:
            entry = self._stale.pop()
            self._tasks.start(self._put_right(entry), f"put-right:{entry.machine}")

    async def _put_right(self, entry: Entry) -> None:
        """Goes on with a machine as soon as nothing else holds it; of another one only says that nothing comes of the migration."""
        machine = self._registry.known(entry.machine)
        if machine is not None and machine.definition.arrived == entry.id:
            while not await machine.when(lambda: machine.operation is None, FOUND_S):
                pass
            arrival = self._arrivals[entry.id] = Arrival(entry.id, entry.peer, machine)
            await self._go_on(arrival)
            return
        if entry.phase in UNOWNED:
            await self._ledger.step(entry.id, Step.DISCARD, reason="another machine has its name by now")
        await self._ledger.settle(entry.id)

    async def _go_on(self, arrival: Arrival) -> None:
        await persist(
            lambda: self._gone_on(arrival),
            what="to go on with its migration",
            say=arrival.say,
            ending=lambda: self._endings.closing,
        )

    def close(self) -> None:
        """The daemon ends: what cannot be done now is left to the next one."""
        self._endings.closing = True

    async def _gone_on(self, arrival: Arrival) -> None:
        entry = self._ledger.get(arrival.migration)
        if arrival.machine.revision and entry.phase is Phase.LOADED:  # it was committed, and the note of it was not
            entry = await self._ledger.step(entry.id, Step.TAKE)
        if entry.phase is Phase.LOADED:
            await self._wondering.wonder(arrival)
        elif entry.phase is Phase.TAKEN:
            await arrival.machine.until(_FOUND, FOUND_S)
            async with arrival.lock:
                await self._endings.set_going(arrival)
        elif entry.phase is Phase.ARRIVED:
            await arrival.machine.until(_FOUND, FOUND_S)
            await self._endings.settle_in(arrival)
        else:
            await self._endings.discard(arrival, "the daemon of the destination was restarted before the whole state was there")

    # How it is done.

    def _entry(self, peer: str, migration: str) -> Entry:
        entry = self._ledger.get(migration)
        if entry.peer != peer or entry.role != "destination":
            raise NotFound(f"there is no migration {migration!r} of {peer}", migration=migration)
        return entry

    def _check(self, offer: Offer) -> None:
        if offer.protocol != VERSION:
            raise CannotMove(f"the source speaks version {offer.protocol} of the migration protocol, this host version {VERSION}")
        if offer.postcopy and (obstacle := no_postcopy(tunnel=offer.tunnel, channels=offer.channels)) is not None:
            raise CannotMove(obstacle)
        try:
            entry = self._ledger.get(offer.id)
        except NotFound:
            return
        raise CannotMove(f"migration {offer.id} is known here already: it is {entry.phase} {entry.reason}".rstrip())

    async def _prepare(self, peer: Peer, offer: Offer) -> Acceptance:
        await self._supersede(peer.name, offer)
        arrival, acceptance = await self._preparation.prepare(peer, offer)
        self._publish("migration.awaited", arrival.machine.name, {"migration": offer.id, "peer": peer.name})
        attend = self._wondering.wonder if offer.state == "stopped" else self._attend
        self._tasks.start(attend(arrival), f"arrival:{arrival.machine.name}")
        return acceptance

    async def _supersede(self, peer: str, offer: Offer) -> None:
        """An owner that offers a machine again has kept it before, whether or not that was heard here."""
        for arrival in list(self._arrivals.values()):
            same = arrival.peer == peer and arrival.machine.definition.uuid == offer.uuid
            if same and self._ledger.get(arrival.migration).phase in {*UNOWNED, Phase.DISCARDED}:  # or waits until that is done
                await self._endings.discard(arrival, f"the source offered the machine again, as migration {offer.id}")

    async def _whole(self, arrival: Arrival, entry: Entry) -> None:
        """All of a machine at rest was sent."""
        try:
            if entry.phase is Phase.AWAITING:
                await self._bases.check(bases_here(entry.offer))
        except CannotMove as error:
            await self._endings.discard(arrival, error.message)
        else:
            await self._endings.note_whole(arrival)

    async def _attend(self, arrival: Arrival) -> None:
        """Stays with it until the whole state is here, or it is discarded."""
        self._tasks.start(self._wondering.wonder(arrival), f"wonder:{arrival.machine.name}")
        try:
            async with alongside(self._reception.admit(arrival.machine, arrival.awaited), f"admit:{arrival.machine.name}"):
                await self._received(arrival)
            offer = self._ledger.get(arrival.migration).offer
            if not offer.postcopy:  # there the guest would be lost, which has begun to leave
                await self._bases.check(bases_here(offer))
            async with arrival.lock:
                if self._ledger.get(arrival.migration).phase is not Phase.AWAITING:
                    return
                await self._ledger.step(arrival.migration, Step.LOAD)
            arrival.tell()
        except QmpdError as error:
            # A QEMU that ends says why on its standard error, a moment after its monitor is gone.
            ended = isinstance(error, MigrationFailed) and await arrival.machine.until(AT_REST, ANSWER_S)
            await self._endings.discard(arrival, last_words(arrival.machine) if ended else error.message)

    async def _received(self, arrival: Arrival) -> None:
        machine = arrival.machine
        while True:
            try:
                await self._reception.received(machine, postcopy=self._ledger.get(arrival.migration).offer.postcopy)
            except MonitorUnavailable:
                if await machine.until(AT_REST, ASK_S):
                    raise
            else:
                return
