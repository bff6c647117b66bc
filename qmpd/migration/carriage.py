"""What a source does between the consent of its peer and the commit that gives a machine away: everything is brought there.

A machine that runs is carried by its QEMU, while what belongs to it goes beside it. Of one at rest there are only files.
"""

from __future__ import annotations

import asyncio
from typing import Final, Protocol

from qmpd.errors import MigrationFailed
from qmpd.jobs import Report
from qmpd.journal import Journal
from qmpd.migration.belongings import Belongings
from qmpd.migration.consignment import Consignment
from qmpd.migration.delivery import Departure, insisted
from qmpd.migration.giving import Giving
from qmpd.migration.items import targets
from qmpd.migration.ledger import Entry, Ledger
from qmpd.migration.phases import Step
from qmpd.migration.protocol import Acceptance
from qmpd.migration.rehearsal import Rehearsals
from qmpd.migration.shipping import Shipment, Shipping, check_answered, moved
from qmpd.migrationviews import MigrateRequest, MigrationReport, MovedDisk
from qmpd.peers import PeerDaemon
from qmpd.registry import Registry
from qmpd.settings import Peer
from qmpd.tasks import alongside

MIB: Final = 1024 * 1024


class Carried(Protocol):
    """A machine whose whole state is at the destination. `went`: its guest ran; `halfway`: memory follows it."""

    went: bool
    halfway: bool

    async def reported(self, departure: Departure, entry: Entry) -> MigrationReport:
        """What it took."""


class Carriage:
    """Carries machines to peers."""

    def __init__(
        self, *, registry: Registry, ledger: Ledger, journal: Journal, shipping: Shipping, rehearsals: Rehearsals, giving: Giving
    ) -> None:
        self._registry = registry
        self._ledger = ledger
        self._journal = journal
        self._shipping = shipping
        self._rehearsals = rehearsals
        self._giving = giving

    async def carry(self, departure: Departure, peer: Peer, link: PeerDaemon, request: MigrateRequest, report: Report) -> Carried:
        """Returns when the destination holds all of the machine.

        Raises:
            CannotMove: the peer does not take it, or both sides are not alike enough.
            MigrationFailed, PeerError: it did not get there.
        """
        machine, offer = departure.machine, self._ledger.get(departure.migration).offer
        async with alongside(self._rehearsals.look(machine, offer), f"look:{machine.name}") as looking:
            accepted = await insisted(lambda: link.offer(offer))
            check_answered(offer, accepted)
            departure.findings = self._rehearsals.checked(machine, request, offer, await looking, accepted.facts)
        entry = await self._ledger.step(departure.migration, Step.ACCEPTED)
        if entry.at_rest:
            return await self._files(departure, entry, link, accepted, request, report)
        return await self._live(departure, entry, peer, link, accepted, request, report)

    async def _live(
        self,
        departure: Departure,
        entry: Entry,
        peer: Peer,
        link: PeerDaemon,
        accepted: Acceptance,
        request: MigrateRequest,
        report: Report,
    ) -> Carried:
        machine = departure.machine
        async with self._shipping.shipment(machine, entry, accepted, peer, link, request.goal, report) as shipment:
            departure.shipment = shipment
            belongings = departure.belongings = Belongings(machine, self._registry.paths(machine.name), entry.id, link, self._journal)
            async with belongings.following():
                await shipment.prepare()
                await self._ledger.step(entry.id, Step.PERFORM)
                await shipment.send()
        async with alongside(belongings.settle(runs=shipment.went), f"belongings:{machine.name}") as settling:
            await self._giving.loaded(departure, link, halfway=shipment.postcopy)
            await settling
        return _Guest(shipment, accepted)

    async def _files(
        self, departure: Departure, entry: Entry, link: PeerDaemon, accepted: Acceptance, request: MigrateRequest, report: Report
    ) -> Carried:
        machine = departure.machine
        left = {f"disk-{disk.index}" for disk in accepted.disks if disk.how == "shared"}
        parcels = tuple(parcel for parcel in entry.offer.parcels if parcel.item not in left)
        paths = self._registry.paths(machine.name)
        files = targets(entry.offer.spec, paths, tuple(machine.consoles)) | departure.elsewhere
        consignment = Consignment(machine, files, entry.id, parcels, link, request.goal.bandwidth_mib_s)
        await self._ledger.step(entry.id, Step.PERFORM)
        limit = asyncio.timeout(request.goal.deadline_s if request.goal.then == "abort" else None)
        try:
            async with limit:
                await consignment.send(report)
        except TimeoutError as error:
            if not limit.expired():
                raise
            raise MigrationFailed(f"not all of it was sent within {request.goal.deadline_s:g} s") from error
        await self._giving.loaded(departure, link, halfway=False)
        return _Files(consignment, accepted)


class _Guest:
    """A machine that came with its QEMU's state."""

    def __init__(self, shipment: Shipment, accepted: Acceptance) -> None:
        self.went = shipment.went
        self.halfway = shipment.postcopy
        self._shipment = shipment
        self._accepted = accepted

    async def reported(self, departure: Departure, entry: Entry) -> MigrationReport:
        """What it took, as QEMU measured it."""
        shipment = self._shipment
        figures = await shipment.measured()
        return MigrationReport(
            id=entry.id,
            machine=entry.machine,
            peer=entry.peer,
            owner="destination",
            owner_name=entry.peer,
            epoch=entry.epoch,
            total_ms=float(figures.total_ms),
            setup_ms=float(figures.setup_ms),
            downtime_ms=float(figures.downtime_ms),
            transferred_bytes=figures.transferred_bytes,
            passes=figures.passes,
            postcopy=shipment.postcopy,
            tunnelled=entry.offer.tunnel,
            tunnelled_bytes=0 if shipment.meter is None else shipment.meter.sent + shipment.meter.received,
            tuned=tuple(shipment.tuner.tuned),
            findings=departure.findings,
            disks=moved(self._accepted, shipment.last_copied),
        )


class _Files:
    """A machine at rest, whose files are there."""

    went = False
    halfway = False

    def __init__(self, consignment: Consignment, accepted: Acceptance) -> None:
        self._consignment = consignment
        self._accepted = accepted
        self._total_ms = consignment.elapsed_s * 1000

    async def reported(self, departure: Departure, entry: Entry) -> MigrationReport:
        """What it took, as it was sent."""
        sent = self._consignment.sent
        disks = [
            MovedDisk(
                disk=disk.index,
                how="copied" if disk.how == "copy" else "shared",
                path=disk.path,
                bytes=sent.get(f"disk-{disk.index}", 0),
                base=disk.base,
            )
            for disk in self._accepted.disks
        ]
        transferred = sum(sent.values())
        return MigrationReport(
            id=entry.id,
            machine=entry.offer.spec.name,
            peer=entry.peer,
            owner="destination",
            owner_name=entry.peer,
            epoch=entry.epoch,
            total_ms=self._total_ms,
            transferred_bytes=transferred,
            bandwidth_mib_s=transferred / MIB / max(self._total_ms / 1000, 0.001),
            tunnelled=True,
            tunnelled_bytes=transferred,
            findings=departure.findings,
            disks=tuple(disks),
        )
