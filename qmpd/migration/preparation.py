"""Getting ready for a machine that may come: its name, its place, its images, and a QEMU that waits for it, if it comes while it runs."""

from __future__ import annotations

import asyncio
import contextlib

import msgspec

from qmpd.errors import HostError, QmpdError
from qmpd.journal import timestamp, utc_now
from qmpd.launching import Launch
from qmpd.migration.admission import Admissions
from qmpd.migration.arrangement import Arranged, bases_here
from qmpd.migration.arrival import Arrival, Endings
from qmpd.migration.bases import Bases
from qmpd.migration.ledger import Entry, Ledger
from qmpd.migration.likeness import DestinationFacts
from qmpd.migration.phases import FIRST, Step
from qmpd.migration.premises import Premises
from qmpd.migration.protocol import Acceptance, Offer
from qmpd.migration.reception import Reception, kept_ports, remove_made
from qmpd.migration.survey import surveyed
from qmpd.planning import Planning
from qmpd.record import Definition
from qmpd.registry import Registry
from qmpd.settings import Peer
from qmpd.spec import Limits
from qmpd.storage import claim, clear_unfinished, furnish, make_directory, make_place, replace


class Preparation:
    """Gets one host ready for machines. `arrivals` are those of `Arrivals`, by migration."""

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
        endings: Endings,
        arrivals: dict[str, Arrival],
    ) -> None:
        self._registry = registry
        self._ledger = ledger
        self._planning = planning
        self._premises = premises
        self._bases = bases
        self._reception = reception
        self._admissions = admissions
        self._endings = endings
        self._arrivals = arrivals

    async def prepare(self, peer: Peer, offer: Offer) -> tuple[Arrival, Acceptance]:
        """The machine, held and known in memory, and what its source is told. When this fails nothing is left.

        Raises as `Arrivals.offer`.
        """
        async with self._registry.reserved(offer.spec.name):
            spec = self._registry.complete(msgspec.structs.replace(offer.spec, uuid=offer.uuid), offer.machine)
            await asyncio.to_thread(self._registry.check_vacant, spec.name)
            facts = await self._premises.of(msgspec.structs.replace(offer, spec=spec))
            arranged = await self._reception.arranged(offer, spec, facts)
            place = self._registry.paths(spec.name).state
            await asyncio.to_thread(make_place, place)
            try:
                entry = await self._ledger.begin(_first(peer.name, offer, arranged))
            except BaseException:
                await asyncio.to_thread(clear_unfinished, place)
                raise
            launch = await self._made_room(entry, arranged, facts)
            arrival = self._arrivals[entry.id] = Arrival(entry.id, entry.peer, self._registry.expect(definition_of(entry)))
        if entry.at_rest:
            accepted = Acceptance(id=entry.id, endpoint=None, disks=arranged.disks, emulator_version=launch.emulator_version)
        else:
            accepted, facts = await self._launched(arrival, arranged, launch, facts, peer)
        arrival.acceptance = msgspec.structs.replace(accepted, facts=facts)
        return arrival, arrival.acceptance

    async def _launched(
        self, arrival: Arrival, arranged: Arranged, launch: Launch, facts: DestinationFacts, peer: Peer
    ) -> tuple[Acceptance, DestinationFacts]:
        """Has a QEMU wait for the machine's state."""
        machine, offer = arrival.machine, self._ledger.get(arrival.migration).offer
        try:
            await machine.start(msgspec.structs.replace(launch, plan=launch.plan.awaiting(), paused=True, incoming=arrival.migration))
            await self._bases.check(bases_here(offer))  # QEMU has them open by now
            await self._ledger.note(arrival.migration, before=await self._reception.look(machine))
            facts = msgspec.structs.replace(facts, qemu=await surveyed(machine.session))
            acceptance, arrival.awaited = await self._reception.listen(machine, offer, arranged, launch, peer)
        except BaseException as error:
            await self._endings.discard(arrival, error.message if isinstance(error, QmpdError) else repr(error))
            raise
        return acceptance, facts

    async def _made_room(self, entry: Entry, arranged: Arranged, facts: DestinationFacts) -> Launch:
        """Makes the images, and plans the launch; when that fails nothing is left."""
        try:
            for image in arranged.made:
                await asyncio.to_thread(claim, image.path)
                entry = await self._ledger.note(entry.id, made=(*entry.made, image.path))
                await asyncio.to_thread(replace, image)
            unlimited = entry.offer.unlimited and facts.limits_unkept  # where somebody took that upon himself
            spec = msgspec.structs.replace(arranged.spec, limits=Limits()) if unlimited else arranged.spec
            launch = await self._reception.launch(entry.offer, spec, self._planning)
            await self._reception.announced(self._admissions.delivery(entry, kept_ports(launch)))
            if not entry.at_rest:
                await furnish(launch.plan)
            elif launch.plan.tpm is not None:
                await asyncio.to_thread(make_directory, launch.plan.tpm.directory)
        except BaseException as error:  # perhaps a full file system, which takes no notes either
            await asyncio.to_thread(remove_made, entry.made)
            with contextlib.suppress(HostError):  # the next daemon removes what is marked
                await asyncio.to_thread(clear_unfinished, self._registry.paths(entry.machine).state)
            await self._ledger.step(entry.id, Step.DISCARD, reason=error.message if isinstance(error, QmpdError) else repr(error))
            await self._ledger.settle(entry.id)
            raise
        return launch


def _first(peer: str, offer: Offer, arranged: Arranged) -> Entry:
    moment = timestamp(utc_now())
    return Entry(
        id=offer.id,
        role="destination",
        machine=arranged.spec.name,
        uuid=offer.uuid,
        peer=peer,
        epoch=offer.epoch,
        phase=FIRST["destination"],
        offer=msgspec.structs.replace(offer, spec=arranged.spec, parcels=arranged.parcels),
        went=offer.state == "running",
        began_at=moment,
        changed_at=moment,
    )


def definition_of(entry: Entry) -> Definition:
    """What a migration brings here, as it will be stored."""
    offer = entry.offer
    return Definition(
        spec=offer.spec, uuid=entry.uuid, created_at=offer.created_at, changed_at=offer.changed_at, epoch=entry.epoch, arrived=entry.id
    )
