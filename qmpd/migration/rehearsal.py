"""Whether a machine can go where it is to go, found out at its source: the facts of both sides, compared, and what it would take.

Nothing of the machine is changed by it: its QEMU is asked, and compares samples of its memory for a second. Of a machine at rest only
files are looked at.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from typing import Final, TypeAlias

import msgspec

from qmpd.errors import CannotMove, PeerError
from qmpd.facts import MachinePaths
from qmpd.jobs import Report
from qmpd.lifecycle import AT_REST
from qmpd.machine import Machine
from qmpd.migration.comparison import accepted, compared, possible
from qmpd.migration.convergence import keeps_track
from qmpd.migration.delivery import insisted
from qmpd.migration.duplicates import Duplicates
from qmpd.migration.fingerprints import Fingerprints
from qmpd.migration.identity import copy_findings, mended_for_copy
from qmpd.migration.items import targets
from qmpd.migration.likeness import DestinationFacts, MachineFacts, SourceDisk, SourceFacts
from qmpd.migration.prediction import predicted, predicted_at_rest
from qmpd.migration.premises import forwarded, needed_bytes
from qmpd.migration.protocol import VERSION, Offer
from qmpd.migration.shipping import Shipping
from qmpd.migration.stills import room_findings
from qmpd.migration.survey import dirty_mib_s, surveyed
from qmpd.migrationviews import DryRunReport, MigrateRequest, MigrationFinding, Prediction
from qmpd.peers import PeerDaemon
from qmpd.tasks import alongside
from qmpd.views import Progress

MIB: Final = 1024 * 1024
Paths: TypeAlias = Callable[[str], MachinePaths]
#: Long enough to get past the slow beginning of a connection, short enough to disturb nobody.
MEASURED_S: Final = 0.5
MOST_MEASURED_BYTES: Final = 32 * MIB
#: Requests under way at a time, because each waits for its answer: together they fill a way of some delay.
SENDERS: Final = 4
#: What one request carries: half of what a body may have. Before that each sender makes its connection, which is not measured.
_FREIGHT: Final = bytes(512 * 1024)
_FIRST: Final = bytes(1024)


class Rehearsals:
    """Compares the machines of one host with what others have for them."""

    def __init__(self, shipping: Shipping, duplicates: Duplicates, fingerprints: Fingerprints, paths: Paths) -> None:
        self._shipping = shipping
        self._duplicates = duplicates
        self._paths = paths
        self._fingerprints = fingerprints

    async def rehearse(self, machine: Machine, request: MigrateRequest, link: PeerDaemon, report: Report) -> DryRunReport:
        """Has the peer try the machine, and says what came of that.

        Raises:
            CannotMove: a machine of this kind cannot be moved, or the peer does not try it.
            PeerError: the peer does not answer.
        """
        await report(Progress(phase="the destination tries it"))
        offer = await self._offered(machine, request)
        async with alongside(_changing_mib_s(machine, offer), f"dirty-rate:{machine.name}") as changing:
            there = await insisted(lambda: link.tried(offer))
            here = _together(await self.look(machine, offer), offer, there)
            await report(Progress(phase="the way is measured"))
            prediction = await _predicted(link, request, here, there, offer, changing)
        short = await self._shortages(machine, request, offer)
        findings = accepted((*_judged(machine, request, offer, here, there), *short), request.accept)
        return DryRunReport(
            machine=machine.name,
            peer=request.peer,
            possible=possible(findings),
            findings=findings,
            prediction=prediction,
        )

    def checked(
        self, machine: Machine, request: MigrateRequest, offer: Offer, here: MachineFacts, there: DestinationFacts | None
    ) -> tuple[MigrationFinding, ...]:
        """What is worth knowing of a machine, `here` as `look` says, that the destination waits for.

        Raises:
            CannotMove: something is in the way that nobody took upon himself.
        """
        if there is None:
            raise CannotMove("the destination does not say what it has for the machine")
        findings = accepted(_judged(machine, request, offer, _together(here, offer, there), there), request.accept)
        if not possible(findings):
            errors = [finding.message for finding in findings if finding.severity == "error"]
            more = f", and {len(errors) - 1} more" if len(errors) > 1 else ""
            what = "moved" if request.copy is None else "copied"
            raise CannotMove(f"machine {machine.name!r} cannot be {what}: {errors[0]}{more}", findings=msgspec.to_builtins(findings))
        return findings

    async def _offered(self, machine: Machine, request: MigrateRequest) -> Offer:
        migration = secrets.token_hex(8)
        if request.copy is not None:
            return await self._duplicates.offer(machine, request, migration)
        offer, _ = await self._shipping.offer(machine, request, migration)
        return offer

    async def _shortages(self, machine: Machine, request: MigrateRequest, offer: Offer) -> tuple[MigrationFinding, ...]:
        """What this host has no room for: images of a machine that is copied while it lives are made beside its own."""
        if request.copy is None or machine.state in AT_REST:
            return ()
        files = targets(machine.definition.spec, self._paths(machine.name))
        return await asyncio.to_thread(lambda: tuple(room_findings(files, offer.parcels)))

    async def look(self, machine: Machine, offer: Offer) -> MachineFacts:
        """What a machine is like here, but for its disks, of which its destination has a say."""
        spec = offer.spec
        facts = MachineFacts(
            name=spec.name,
            uuid=offer.uuid,
            macs=tuple(nic.mac for nic in spec.nics if nic.mac is not None),
            protocol=VERSION,
            firmware=await asyncio.to_thread(self._fingerprints.of, spec),
            forwards=forwarded(spec),
        )
        if offer.state == "stopped":
            return facts
        return SourceFacts(
            **msgspec.structs.asdict(facts),
            works=machine.board.migration if machine.board is not None else "untested",
            alias=machine.definition.spec.machine or "",
            qemu=await surveyed(machine.session),
            channels=offer.channels,
            postcopy=offer.postcopy,
            bitmaps=offer.bitmaps,
        )


def _together(here: MachineFacts, offer: Offer, there: DestinationFacts) -> MachineFacts:
    """What a machine is like here, with each disk as it would go there."""
    how = {disk.index: disk.how for disk in there.disks}
    disks = [
        SourceDisk(
            index=wanted.index,
            how=how.get(wanted.index, "copy"),
            format=offer.spec.disks[wanted.index].format,
            bytes=wanted.virtual_bytes,
            used_bytes=needed_bytes(wanted, based=True),
            base_bytes=needed_bytes(wanted, based=False) - needed_bytes(wanted, based=True),
        )
        for wanted in offer.disks
    ]
    return msgspec.structs.replace(here, disks=tuple(disks))


def _judged(
    machine: Machine, request: MigrateRequest, offer: Offer, here: MachineFacts, there: DestinationFacts
) -> tuple[MigrationFinding, ...]:
    findings = compared(here, there)
    if request.copy is not None:
        findings = (*mended_for_copy(findings), *copy_findings(machine.definition.spec, offer.spec))
    return findings


async def _changing_mib_s(machine: Machine, offer: Offer) -> float | None:
    """How much memory the guest changes per second; a guest that stands still changes none."""
    return await dirty_mib_s(machine.session) if offer.state == "running" else 0.0


async def _predicted(
    link: PeerDaemon,
    request: MigrateRequest,
    here: MachineFacts,
    there: DestinationFacts,
    offer: Offer,
    changing: asyncio.Task[float | None],
) -> Prediction | None:
    """What it would take; None where the way could not be measured."""
    dirty = await changing
    try:
        speed = await way_mib_s(link, SENDERS if isinstance(here, SourceFacts) else 1)  # files are sent piece by piece
    except PeerError:
        return None
    if not isinstance(here, SourceFacts):
        left = {f"disk-{disk.index}" for disk in there.disks if disk.how == "shared"}
        coming = sum(parcel.allocated for parcel in offer.parcels if parcel.item not in left)
        return predicted_at_rest(sent_bytes=coming, bandwidth_mib_s=speed, goal=request.goal)
    copied = {disk.index: disk for disk in there.disks if disk.how == "copy"}
    return predicted(
        memory_bytes=here.qemu.memory_bytes,
        disk_bytes=sum(needed_bytes(wanted, based=copied[wanted.index].based) for wanted in offer.disks if wanted.index in copied),
        bandwidth_mib_s=speed,
        dirty_mib_s=dirty,
        goal=request.goal,
        tracks=keeps_track(here.qemu.accelerator, here.qemu.version),
    )


async def way_mib_s(link: PeerDaemon, senders: int = SENDERS) -> float:
    """How fast bytes get to a peer through the API, which is encrypted as a migration is. QEMU may be faster, and is hardly slower.

    Raises:
        PeerError: the peer does not answer.
    """
    await asyncio.gather(*(link.carried(_FIRST) for _ in range(senders)))
    loop = asyncio.get_running_loop()
    began, sent = loop.time(), 0

    async def send() -> None:
        nonlocal sent
        while sent < MOST_MEASURED_BYTES and loop.time() - began < MEASURED_S:
            sent += len(_FREIGHT)
            await link.carried(_FREIGHT)

    await asyncio.gather(*(send() for _ in range(senders)))
    return sent / MIB / (loop.time() - began)
