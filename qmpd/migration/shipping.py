"""What the source does to the machine it sends: the offer that is made of it, and its QEMU's part of the migration."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext, suppress
from functools import partial
from typing import Final

import msgspec

from qmpd import power
from qmpd.credentials import directory
from qmpd.errors import CannotMove, MigrationFailed, MonitorUnavailable, Problem, QmpdError, WrongState, invalid
from qmpd.facts import MachinePaths, version_numbers
from qmpd.jobs import Report
from qmpd.lifecycle import AT_REST, State
from qmpd.machine import Machine
from qmpd.migration import outgoing
from qmpd.migration.addresses import Address, TcpAddress, UnixAddress
from qmpd.migration.answers import answered
from qmpd.migration.bases import Bases
from qmpd.migration.belongings import announced
from qmpd.migration.bitmaps import Bitmap, bitmaps, check_movable
from qmpd.migration.capabilities import Agreed
from qmpd.migration.consignment import check_bases, check_formats, packed
from qmpd.migration.convergence import Abilities, Abort, Decision, Pause, Postcopy, Set, Tuner, keeps_track, opening, unattainable
from qmpd.migration.diskoffers import disk_offers, node_of
from qmpd.migration.ledger import Entry
from qmpd.migration.measuring import sample_of
from qmpd.migration.media import media
from qmpd.migration.mirror import DiskCopy
from qmpd.migration.outgoing import Before, Outgoing, recall
from qmpd.migration.progress import Progress as Figures
from qmpd.migration.protocol import VERSION, Acceptance, Channel, DiskOffer, Offer
from qmpd.migration.relays import Relays
from qmpd.migration.tls import ClientTls
from qmpd.migration.tunnel import Meter, entrances, explained, tunnelling
from qmpd.migrationviews import Goal, MigrateRequest, MigrationProgress, MovedDisk
from qmpd.peers import PeerDaemon
from qmpd.settings import Peer
from qmpd.spec import BlankDisk, ImageDisk
from qmpd.views import Progress

MIB: Final = 1024 * 1024
#: States in which a machine has something that can be moved while it lives.
LIVE: Final = frozenset({State.RUNNING, State.PAUSED})
#: The journal keeps what is reported; a bar needs no more.
REPORT_S: Final = 0.5
#: The monitor of a QEMU that lives comes back within a second, unless its main loop is blocked.
MONITOR_S: Final = 30.0
#: Set on both sides alike, and so agreed on.
_POSTCOPY: Final = "postcopy-ram"
#: QEMU's run states on the way out, which say nothing of what the guest did before.
_LEAVING: Final = frozenset({"finish-migrate", "postmigrate"})

#: The sockets at which QEMU reaches what leads to the other host; no longer than the monitor's, whose length was checked.
_ENTRANCES: Final[dict[Channel, str]] = {"memory": "to-mem", "disks": "to-nbd"}
_NO_POSTCOPY: Final = (
    "memory that follows a guest which runs already cannot come through a tunnel: the guest would be lost with the daemon's connection"
)
#: Measured: QEMU 7.2 takes both capabilities, and ends halfway with a failed assertion; 10.0 refuses them; 11 can do it.
_ONE_LINE: Final = (
    "memory that follows a guest which runs already comes over one connection: with several (`channels`) QEMU 7.2 ends halfway"
)

_log = logging.getLogger(__name__)


class Shipment:
    """One machine's QEMU on its way, kept to its goal. `went`: the guest ran when it was halted to leave."""

    def __init__(self, machine: Machine, out: Outgoing, report: Report, tuner: Tuner, meter: Meter | None = None) -> None:
        self.went = machine.state is State.RUNNING
        self.figures = self.last_copied = Figures()
        self.tuner = tuner
        self.meter = meter
        self._machine = machine
        self._outgoing = out
        self._report = report
        self._halted = False
        self._began = asyncio.get_running_loop().time()
        self._reported = -REPORT_S

    @property
    def elapsed_s(self) -> float:
        """Seconds since it began."""
        return asyncio.get_running_loop().time() - self._began

    async def prepare(self) -> None:
        """Sets QEMU, and begins to copy disks."""
        await explained(self._outgoing.prepare(), self.meter)

    async def send(self) -> None:
        """Copies disks and memory; the guest is halted, and has arrived, when this returns.

        Raises:
            MigrationFailed: it failed, or the goal says to give up.
        """
        await explained(self._outgoing.send(self._progressed), self.meter)
        if self._machine.has_process:
            await answered(self._machine.session.process)
        await explained(self._outgoing.switch_over(), self.meter)

    @property
    def postcopy(self) -> bool:
        """The guest can run at the destination, and a part of its memory is still here: there is nothing whole to come back to."""
        return self._outgoing.postcopy

    async def change(self, goal: Goal) -> None:
        """Another goal from now on. Raises Invalid if it asks for what this migration began without."""
        try:
            decisions = self.tuner.change(goal, self.elapsed_s)
        except ValueError as error:
            raise invalid([Problem(path="$.then" if "postcopy" in str(error) else "$.auto_converge", message=str(error))]) from error
        for decision in decisions:
            await self._do(decision)

    async def measured(self) -> Figures:
        """What it took in the end; what was known last where QEMU does not say."""
        with suppress(QmpdError):
            self.figures = await self._outgoing.figures()
        return self.figures

    async def _progressed(self, figures: Figures) -> None:
        if self._machine.status not in _LEAVING and not self._halted:
            self.went = self._machine.state is State.RUNNING
        self.figures = figures
        if figures.disks:
            self.last_copied = figures
        for decision in self.tuner.decide(sample_of(figures, self.elapsed_s)):
            await self._do(decision)
        if self.elapsed_s - self._reported >= REPORT_S:
            self._reported = self.elapsed_s
            await self._report(progress_of(self.tuner.progress("memory" if figures.total_bytes else "disks")))

    async def _do(self, decision: Decision) -> None:
        _log.info("migration tuned", extra={"machine": self._machine.name, "decision": type(decision).__name__, "reason": decision.reason})
        match decision:
            case Set():
                await self._outgoing.tune(decision.parameters)
            case Pause():
                self._halted = True
                await self._machine.session.execute("stop")
            case Postcopy():
                self._report.point_of_no_return("the guest is going over to its destination, and its memory follows")
                await self._outgoing.start_postcopy()
            case Abort():
                raise MigrationFailed(decision.reason)


def progress_of(migration: MigrationProgress) -> Progress:
    """The figures of a migration as a job's progress."""
    total = migration.memory_total_bytes + migration.disk_total_bytes
    left = migration.memory_remaining_bytes + migration.disk_remaining_bytes
    return Progress(
        phase=migration.phase,
        done=float(total - left),
        total=float(total) or None,
        unit="bytes",
        rate=None if migration.bandwidth_mib_s is None else migration.bandwidth_mib_s * MIB,
        eta_s=migration.eta_s,
        migration=migration,
    )


class _Way(msgspec.Struct, frozen=True, kw_only=True):
    """Where QEMU sends to, and what leads on from there, if that is not the other host yet: `meter` counts on the way."""

    memory: Address
    disks_at: Address | None
    secret: str | None = None
    tls: ClientTls | None = None
    meter: Meter | None = None
    lead: AbstractAsyncContextManager[None] = nullcontext()


class Shipping:
    """Makes offers of machines, and sends their QEMUs' state."""

    def __init__(self, pki_dir: str, paths: Callable[[str], MachinePaths], bases: Bases, relays: Relays) -> None:
        self._pki_dir = pki_dir
        self._paths = paths
        self._bases = bases
        self._relays = relays

    async def offer(self, machine: Machine, request: MigrateRequest, migration: str) -> tuple[Offer, Before | None]:
        """What the peer is told of a machine, and how its QEMU is before anything is changed in it.

        Raises:
            CannotMove: a machine of this kind cannot be moved, or a bitmap of its disks not.
        """
        launch, definition = machine.launch, machine.definition
        if machine.state in AT_REST and definition.adoption is None:
            return await self._at_rest(machine, request, migration), None
        if launch is None or definition.adoption is not None:
            raise CannotMove(f"machine {machine.name!r} was started by somebody else: qmpd does not know all of it")
        disks = await self.disks(machine, request)
        noted = await bitmaps(machine.session)
        _check_bitmaps(noted, disks)
        offer = Offer(
            protocol=VERSION,
            id=migration,
            epoch=definition.epoch + 1,
            spec=msgspec.structs.replace(definition.spec, machine=launch.machine, accel=launch.accel),
            uuid=definition.uuid,
            created_at=definition.created_at,
            changed_at=definition.changed_at,
            state="running" if machine.state is State.RUNNING else "paused",
            machine=launch.machine,
            accel=launch.accel,
            emulator_version=launch.emulator_version,
            disks=disks,
            parcels=await asyncio.to_thread(announced, machine, self._paths(machine.name)),
            channels=request.channels,
            postcopy=request.goal.then == "postcopy",
            bitmaps=bool(noted),
            tunnel=request.tunnel,
            unlimited="limit-unkept" in request.accept,
        )
        return offer, await outgoing.look(machine.session)

    async def _at_rest(self, machine: Machine, request: MigrateRequest, migration: str) -> Offer:
        """The offer of a machine of which there are only files."""
        definition = machine.definition
        disks = await self.disks(machine, request)
        check_formats(definition.spec, disks)
        await asyncio.to_thread(check_bases, definition.spec, disks)
        left = [disk.index for disk in disks if disk.how == "shared" and isinstance(definition.spec.disks[disk.index], ImageDisk)]
        return Offer(
            protocol=VERSION,
            id=migration,
            epoch=definition.epoch + 1,
            spec=definition.spec,
            uuid=definition.uuid,
            created_at=definition.created_at,
            changed_at=definition.changed_at,
            state="stopped",
            machine=definition.spec.machine or "",
            disks=disks,
            parcels=await asyncio.to_thread(packed, machine, self._paths(machine.name), left, all_of_it=True),
            unlimited="limit-unkept" in request.accept,
        )

    async def disks(self, machine: Machine, request: MigrateRequest) -> tuple[DiskOffer, ...]:
        """How each disk is to go, as far as the source can say. Raises CannotMove where what one lies upon cannot be read."""
        return await disk_offers(machine, request, self._paths(machine.name), self._bases)

    @asynccontextmanager
    async def shipment(
        self, machine: Machine, entry: Entry, accepted: Acceptance, peer: Peer, link: PeerDaemon, goal: Goal, report: Report
    ) -> AsyncIterator[Shipment]:
        """The machine's QEMU on its way to where the peer listens. Leaving the block before the guest has arrived puts everything back."""
        if entry.before is None:
            raise CannotMove("how QEMU was set before is not known")
        abilities = abilities_of(machine, entry.before, postcopy=accepted.postcopy, bitmaps=accepted.bitmaps)
        if (obstacle := unattainable(goal, abilities)) is not None:
            raise CannotMove(obstacle)
        begun = opening(goal, abilities)
        copied = [disk for disk in accepted.disks if disk.how == "copy" and disk.export is not None]
        inserted = await media(machine.session)
        way = await self._way(machine, entry, accepted, peer, link)
        wanted = outgoing.Sending(
            memory=way.memory,
            secret=way.secret,
            disks_at=way.disks_at,
            disks=tuple(
                DiskCopy(
                    node=inserted[disk.index].node if disk.index in inserted else node_of(disk.index),
                    export=disk.export,
                    top=disk.base is not None,
                )
                for disk in copied
                if disk.export is not None
            ),
            tls=way.tls,
            agreed=Agreed(channels=accepted.channels, postcopy=accepted.postcopy, bitmaps=accepted.bitmaps),
            helping=tuple(name for name in begun.capabilities if name != _POSTCOPY),
            parameters=dict(begun.parameters),
            bytes_per_s=None if goal.bandwidth_mib_s is None else goal.bandwidth_mib_s * MIB,
        )
        # The lead inside: a QEMU is not called back while it still speaks into a tunnel that may be full (see `Mirrors`).
        async with Outgoing(machine.session, wanted, entry.before) as out, way.lead:
            yield Shipment(machine, out, report, Tuner(goal, abilities), way.meter)

    async def _way(self, machine: Machine, entry: Entry, accepted: Acceptance, peer: Peer, link: PeerDaemon) -> _Way:
        """How the data goes: over TLS of QEMU's own, or through the API."""
        endpoint = accepted.endpoint
        paths = {channel: self._paths(machine.name).socket(name) for channel, name in _ENTRANCES.items()}
        pid = machine.session.process.identity.pid
        if not entry.offer.tunnel and endpoint is not None:
            host = peer.migration_address or peer.host
            memory = TcpAddress(host=host, port=endpoint.port)
            way = _Way(
                memory=memory,
                secret=endpoint.secret,
                disks_at=None if endpoint.nbd_port is None else TcpAddress(host=host, port=endpoint.nbd_port),
                tls=ClientTls(directory=await asyncio.to_thread(directory, self._pki_dir), hostname=peer.owner),
            )
            if not accepted.channels:
                return way
            meter = Meter("one of its connections")
            lead = self._relays.entrance(paths["memory"], pid, memory, endpoint.secret, meter)
            return msgspec.structs.replace(way, memory=UnixAddress(path=paths["memory"]), secret=None, meter=meter, lead=lead)
        if entry.offer.tunnel and endpoint is None:
            meter = Meter()
            return _Way(
                memory=UnixAddress(path=paths["memory"]),
                disks_at=UnixAddress(path=paths["disks"]),
                meter=meter,
                lead=entrances(paths, pid, tunnelling(partial(link.tunnel, entry.id), meter), meter),
            )
        raise CannotMove("the peer named no port to send to" if endpoint is None else "the peer does not take it through a tunnel")

    async def recall(self, machine: Machine, entry: Entry, *, lost: bool = False) -> None:
        """Puts a machine's QEMU back to what it was before its migration began, from wherever that got to, and its guest with it."""
        await machine.when(lambda: machine.state in AT_REST or machine.state in {State.RUNNING, State.PAUSED}, MONITOR_S)
        if machine.state in AT_REST or entry.before is None:
            return
        if not machine.has_process:
            raise MonitorUnavailable(f"machine {machine.name!r} is {machine.state}")
        try:
            await recall(machine.session, entry.before)
        except WrongState:
            if not lost:
                raise  # a part of it is at the destination, and may run there
            # The other half went with the destination's QEMU, and this one is of no use.
            _log.error("guest was lost between two hosts", extra={"machine": machine.name})
            await power.kill(machine)


def no_postcopy(*, tunnel: bool, channels: int) -> str | None:
    """Why memory cannot follow a guest on this way; None if it can."""
    return _NO_POSTCOPY if tunnel else _ONE_LINE if channels else None


def check_answered(offer: Offer, accepted: Acceptance) -> None:
    """Raises CannotMove unless the peer said of every disk, and as was asked, how it goes: another guest must not run there."""
    answers = {disk.index: disk for disk in accepted.disks}
    if len(answers) != len(accepted.disks) or set(answers) != {disk.index for disk in offer.disks}:
        raise CannotMove("the peer did not say of each disk once how it goes")
    for disk in offer.disks:
        answer = answers[disk.index]
        how = "copy" if isinstance(offer.spec.disks[disk.index], BlankDisk) else disk.how
        exported = answer.how == "copy" and offer.state != "stopped"  # by its QEMU, to this one
        if how not in {"auto", answer.how} or exported is (answer.export is None):
            raise CannotMove(f"disk {disk.index} is offered as {how!r}, and the peer takes it as {answer.how!r}")
        if answer.base not in {None, disk.base.path if disk.base is not None and answer.how == "copy" else None}:
            raise CannotMove(f"the peer takes disk {disk.index} upon {answer.base}, which was not offered")


def moved(accepted: Acceptance, figures: Figures) -> tuple[MovedDisk, ...]:
    """What became of the disks."""
    sent = {disk.node: disk.done_bytes for disk in figures.disks}
    return tuple(
        MovedDisk(
            disk=disk.index,
            how="copied" if disk.how == "copy" else "shared",
            path=disk.path,
            bytes=sent.get(node_of(disk.index), 0) if disk.how == "copy" else 0,
            base=disk.base,
        )
        for disk in accepted.disks
    )


def abilities_of(machine: Machine, before: Before, *, postcopy: bool = False, bitmaps: bool = False) -> Abilities:
    """What a machine's QEMU can be told in a migration."""
    launch = machine.launch
    tracks = launch is not None and keeps_track(launch.accel, version_numbers(launch.emulator_version))
    return Abilities(auto_converge="auto-converge" in before.dials.capabilities, postcopy=postcopy, tracks=tracks, bitmaps=bitmaps)


def _check_bitmaps(noted: Mapping[str, tuple[Bitmap, ...]], disks: Iterable[DiskOffer]) -> None:
    """Raises CannotMove for a bitmap that cannot be sent, or that the image could not keep which its disk is copied to."""
    check_movable(noted)
    for disk in disks:
        if disk.format not in {None, "qcow2"} and any(bitmap.persistent for bitmap in noted.get(node_of(disk.index), ())):
            raise CannotMove(f"disk {disk.index} has bitmaps, which no {disk.format} image can keep: copy it as qcow2, or remove them")
