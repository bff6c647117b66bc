"""What the destination does for a machine that comes: whether and how it could be here, its QEMU's part, and what follows its arrival."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Final

import msgspec

from qmpd.credentials import distinguished_name, server_directory
from qmpd.errors import CannotMove, QemuRefused, QmpdError
from qmpd.facts import MachinePaths
from qmpd.forwards import remake
from qmpd.launching import Launch
from qmpd.lifecycle import AT_REST, State
from qmpd.machine import Machine, Publish
from qmpd.migration import capabilities, incoming
from qmpd.migration.addresses import TcpAddress, TcpRange, UnixAddress
from qmpd.migration.arrangement import Arranged, arranged
from qmpd.migration.capabilities import Agreed, Dials
from qmpd.migration.door import Door, opened
from qmpd.migration.incoming import STAYS, Listen
from qmpd.migration.itemdesk import Delivery, ItemDesk
from qmpd.migration.items import targets
from qmpd.migration.likeness import DestinationFacts
from qmpd.migration.outgoing import Before
from qmpd.migration.ports import Ports
from qmpd.migration.progress import NONE
from qmpd.migration.protocol import Acceptance, Channel, ConsoleEnd, Endpoint, LogReceived, Offer
from qmpd.migration.qemu import ask_map, run_state
from qmpd.migration.relays import Relays
from qmpd.migration.tls import ServerTls
from qmpd.plan import SerialPipe, without_forwards
from qmpd.planning import Planning
from qmpd.power import EFFECT_DEADLINE_S
from qmpd.settings import Peer, Settings
from qmpd.spec import MachineSpec
from qmpd.storage import draft_of

MIB: Final = 1024 * 1024
#: As libvirt and others have it: enough for switches that learn slowly, gone within seconds (times in milliseconds).
_ANNOUNCEMENT: Final = {"initial": 50, "max": 550, "rounds": 5, "step": 100}
#: The source's QEMU lets go of a shared image's lock when it has said `completed`; on a network the lock may be seen later.
LOCK_PATIENCE_S: Final = 10.0
LOCK_AGAIN_S: Final = 0.05
#: In whatever QEMU says of a lock that it does not get.
_LOCKED: Final = "lock"
#: Renaming a few files either works or does not; the guest stands still meanwhile.
NUMBERING_ATTEMPTS: Final = 3
NUMBERING_AGAIN_S: Final = 0.2

#: The sockets at which QEMU waits for what is led on to it; no longer than the monitor's, whose length was checked.
_PLACES: Final[dict[Channel, str]] = {"memory": "in-mem", "disks": "in-nbd"}

#: Why a guest halts that nobody halted (`RunState`).
_STOPPED_ITSELF: Final = frozenset({"guest-panicked", "internal-error", "io-error", "shutdown", "watchdog"})

_log = logging.getLogger(__name__)


class Awaited:
    """What QEMU is to take in, and the door at which the peer comes, or None where it comes through a tunnel. Several connections are led
    on to where QEMU listens; one is handed to it."""

    def __init__(self, door: Door | None, wanted: Listen) -> None:
        self.door = door
        self.wanted = wanted

    def close(self) -> None:
        """The peer is not awaited any more."""
        if self.door is not None:
            self.door.close()


class Reception:
    """Receives machines on one host."""

    def __init__(
        self, settings: Settings, paths: Callable[[str], MachinePaths], desk: ItemDesk, ports: Ports, relays: Relays, publish: Publish
    ) -> None:
        self._settings = settings
        self._paths = paths
        self._desk = desk
        self._ports = ports
        self._relays = relays
        self._publish = publish

    async def arranged(self, offer: Offer, spec: MachineSpec, facts: DestinationFacts) -> Arranged:
        """How it would be here (`qmpd.migration.arrangement`), where `facts` is what is here for it. Raises CannotMove."""
        return await asyncio.to_thread(arranged, offer, spec, facts, self._paths(spec.name), self._settings.pools)

    async def launch(self, offer: Offer, spec: MachineSpec, planning: Planning) -> Launch:
        """How the machine is launched here, to take its state in. Its images must be there.

        Raises:
            CannotMove: it would be another machine here.
            Invalid: all that is wrong with its definition on this host.
        """
        if offer.accel is not None:
            spec = msgspec.structs.replace(spec, accel=offer.accel)
        known = targets(spec, self._paths(spec.name))
        coming = frozenset(known[parcel.item].path for parcel in offer.parcels if parcel.item in known)
        launch = await planning.launch(without_forwards(spec), coming=coming)
        if launch.machine != offer.machine:
            raise CannotMove(f"the machine is a {offer.machine} there, and would be a {launch.machine} here")
        return launch

    async def look(self, machine: Machine) -> Before:
        """How QEMU is before anything is changed in it."""
        return Before(dials=await capabilities.read(machine.session), run_state=await run_state(machine.session))

    async def listen(self, machine: Machine, offer: Offer, arranged: Arranged, launch: Launch, peer: Peer) -> tuple[Acceptance, Awaited]:
        """Has QEMU, or the daemon for it, wait for the peer, and for nobody else.

        Raises:
            MigrationFailed: no port is free, or this QEMU lacks something.
            HostError: the certificates are missing.
        """
        copied = tuple(disk.export for disk in arranged.disks if disk.export is not None)
        async with self._tls(machine, offer, launch, peer) as tls:
            wanted = Listen(
                memory=self._place(machine, "memory") if offer.tunnel or offer.channels else self._range,
                disks_at=(self._place(machine, "disks") if offer.tunnel else self._range) if copied else None,
                disks=copied,
                tls=tls,
                agreed=Agreed(channels=offer.channels, postcopy=offer.postcopy, bitmaps=offer.bitmaps),
                stays=STAYS in launch.features,
            )
            disks_at = await incoming.receive_disks(machine.session, wanted, self._ports.bound)
        door = endpoint = None
        if isinstance(wanted.memory, UnixAddress):  # what comes is led on to QEMU here
            await incoming.receive_memory(machine.session, wanted)
        if not offer.tunnel:
            door = await opened(self._range, self._ports.bound)
            nbd = disks_at.port if isinstance(disks_at, TcpAddress) else None
            endpoint = self._endpoint(door, peer, nbd)
        acceptance = Acceptance(
            id=offer.id,
            endpoint=endpoint,
            disks=arranged.disks,
            channels=offer.channels,
            postcopy=offer.postcopy,
            bitmaps=offer.bitmaps,
            emulator_version=launch.emulator_version,
        )
        return acceptance, Awaited(door, wanted)

    @property
    def _range(self) -> TcpRange:
        ports = self._settings.migration_port_range
        return TcpRange(host=self._settings.migration_host, first=ports.start, last=ports.stop - 1)

    def _endpoint(self, door: Door, peer: Peer, nbd_port: int | None = None) -> Endpoint:
        host = self._settings.migration_host
        return Endpoint(host=host, port=door.port, tls_name=peer.owner, secret=door.secret, nbd_port=nbd_port)

    def _place(self, machine: Machine, channel: Channel) -> UnixAddress:
        return UnixAddress(path=self.place(machine, channel))

    @asynccontextmanager
    async def _tls(self, machine: Machine, offer: Offer, launch: Launch, peer: Peer) -> AsyncIterator[ServerTls | None]:
        """What QEMU shows and whom it admits, while it reads that; nothing where all comes through the API."""
        if offer.tunnel:
            yield None
            return
        async with server_directory(self._settings.pki_dir, self._paths(machine.name).run, launch.emulator_version) as found:
            yield ServerTls(directory=found, admits=distinguished_name(peer))

    def place(self, machine: Machine, channel: Channel) -> str:
        """The Unix socket at which QEMU waits for what is led on to it: in a directory that is this user's alone."""
        return self._paths(machine.name).socket(_PLACES[channel])

    async def admit(self, machine: Machine, awaited: Awaited | None) -> None:
        """Leads the peer to QEMU when it comes to the door, if there is one."""
        if awaited is None or awaited.door is None:
            return
        wanted = awaited.wanted
        handing = partial(incoming.receive_from, machine.session, wanted)
        take = self._relays.to(wanted.memory.path, machine.name) if isinstance(wanted.memory, UnixAddress) else handing
        try:
            await awaited.door.attend(take, 1 + wanted.agreed.channels)
        except (QmpdError, OSError) as error:  # the source notices, and gives up
            _log.warning("the peer was not led to QEMU", extra={"machine": machine.name, "error": str(error)})

    async def received(self, machine: Machine, *, postcopy: bool) -> None:
        """Returns when the whole state is in, or with `postcopy` all that the guest needs to run while the rest of its memory follows.

        Raises:
            MigrationFailed: it did not come.
            MonitorUnavailable: QEMU cannot be asked at the moment.
        """
        await (incoming.wait_postcopy if postcopy else incoming.wait_loaded)(machine.session)

    async def recover(self, machine: Machine, peer: Peer) -> Endpoint:
        """Awaits the peer again, for a QEMU whose memory stopped to come. May be repeated.

        Raises:
            QemuRefused: it does not wait for any.
            MigrationFailed: no port is free.
        """
        place = self._place(machine, "memory")
        await incoming.recover(machine.session, place)
        door = await self._relays.await_again(machine.name, lambda: opened(self._range, self._ports.bound), place.path)
        return self._endpoint(door, peer)

    async def is_whole(self, delivery: Delivery) -> bool:
        """Whether all files of a machine at rest are here."""
        return await self._desk.whole(delivery)

    async def name_files(self, delivery: Delivery) -> tuple[str, ...]:
        """Gives the files of a machine at rest their names; those outside of its own directory. May be repeated.

        Raises:
            WrongState, AlreadyExists, HostError, NoSpace: it cannot be done now.
        """
        await self._desk.place(delivery)
        return tuple(target.path for target in delivery.targets().values() if not target.own)

    async def discard(self, delivery: Delivery) -> None:
        """Removes what came of a machine that does not come, outside of its own directory."""
        try:
            await self._desk.discard(delivery)
        except QmpdError as error:
            _log.error("what came of a migration cannot be removed", extra={"machine": delivery.spec.name, "error": error.message})

    async def is_receiving(self, machine: Machine) -> bool:
        """Whether anything has come yet. False for a machine without a QEMU, of which only the source knows how far it is."""
        if machine.state in AT_REST:
            return False
        try:
            status = (await ask_map(machine.session, "query-migrate")).get("status", NONE)
        except QmpdError:
            return True
        return status not in {NONE, "setup"}

    async def answers(self, machine: Machine) -> bool:
        """Whether QEMU is there: it is asked."""
        try:
            await run_state(machine.session)
        except QmpdError:
            return False
        return True

    async def announced(self, delivery: Delivery) -> None:
        """Whether what comes beside the memory fits, and what of it must be there before QEMU is.

        Raises:
            Invalid, AlreadyExists, Forbidden, NotFound, NoSpace: it does not.
        """
        await self._desk.prepare(delivery, self._settings.pools)

    async def unpack(self, machine: Machine, delivery: Delivery, ends: Sequence[ConsoleEnd]) -> None:
        """Puts what came where it belongs, before the guest runs. May be repeated.

        A guest is more than its log: one that cannot be numbered is left as it is.
        """
        pipes = [SerialPipe(id=name, path=path, log=delivery.paths.log(name)) for name, path in self._pipes(machine).items()]
        for attempt in range(NUMBERING_ATTEMPTS):
            if attempt:
                await asyncio.sleep(NUMBERING_AGAIN_S)
            try:
                await self._desk.number(delivery, pipes, ends)
                break
            except (QmpdError, OSError) as error:
                _log.error("console logs are not numbered", extra={"machine": machine.name, "error": str(error)})
        for port, console in machine.consoles.items():
            if (path := self._pipes(machine).get(f"serial{port}")) is not None:
                try:
                    await console.moved(path)
                except OSError as error:
                    _log.error("a console's log cannot be read", extra={"machine": machine.name, "error": str(error)})

    async def secure(self, delivery: Delivery) -> None:
        """What came outlives a crash of the host, as well as that can be had: the source removes its own next."""
        try:
            await self._desk.place(delivery)
        except (QmpdError, OSError) as error:
            _log.warning("files of a machine are not on disk yet", extra={"machine": delivery.spec.name, "error": str(error)})

    def _pipes(self, machine: Machine) -> Mapping[str, str]:
        return machine.launch.pipes if machine.launch is not None else {}

    async def logs(self, delivery: Delivery) -> tuple[LogReceived, ...]:
        """How much is here of the logs; nothing of those that cannot be read."""
        try:
            return await self._desk.logs(delivery)
        except (QmpdError, OSError) as error:
            _log.error("console logs cannot be read", extra={"machine": delivery.spec.name, "error": str(error)})
            return ()

    async def go(self, machine: Machine, *, run: bool, patience_s: float | None = None) -> str:
        """Sets the guest going if it ran at the source, and did not stop by itself at the last moment. Where the lock of an image is not
        free in time, the answer is what QEMU says of it; otherwise it is empty.

        Raises:
            QemuRefused: QEMU does not do it.
        """
        session = machine.session
        if not run or await run_state(session) in _STOPPED_ITSELF:
            await session.ask_status(session.monitor)
            return ""
        loop = asyncio.get_running_loop()
        until = loop.time() + (LOCK_PATIENCE_S if patience_s is None else patience_s)
        while True:
            try:
                await session.execute("cont")
                break
            except QemuRefused as error:
                if _LOCKED not in error.message or loop.time() > until:
                    await session.ask_status(session.monitor)
                    if _LOCKED in error.message:
                        return error.message
                    raise
            await asyncio.sleep(LOCK_AGAIN_S)
        await machine.until(frozenset({State.RUNNING}), EFFECT_DEADLINE_S)
        return ""

    async def settle_in(self, machine: Machine, before: Dials | None, *, postcopy: bool) -> None:
        """What may happen while the guest runs: the network is told where the machine is, and QEMU is as if it had never migrated. With
        `postcopy` when all of its memory is here."""
        for step in (self._announce, self._forward):
            try:
                await step(machine)
            except QmpdError as error:
                _log.warning("after a migration something was not done", extra={"machine": machine.name, "error": error.message})
        try:
            if postcopy:
                await incoming.wait_loaded(machine.session)
            if before is not None:
                await incoming.settle(machine.session, before)
        except QmpdError as error:
            _log.warning("after a migration something was not put back", extra={"machine": machine.name, "error": error.message})

    async def _announce(self, machine: Machine) -> None:
        await machine.session.execute("announce-self", _ANNOUNCEMENT)

    async def _forward(self, machine: Machine) -> None:
        for warning in (await remake(machine.session, machine.definition.spec)).warnings:
            _log.warning("port is not forwarded", extra={"machine": machine.name, "reason": warning})
            self._publish("machine.forward-lost", machine.name, {"reason": warning})


def kept_ports(launch: Launch) -> tuple[int, ...]:
    """The serial ports whose logs are kept here."""
    return tuple(int(name.removeprefix("serial")) for name in launch.plan.serial_pipes())


def remove_made(paths: tuple[str, ...]) -> None:
    """Removes images that were made for a machine that did not come, or were not made to their end. Blocks."""
    for path in map(Path, paths):
        try:
            draft_of(path).unlink(missing_ok=True)
            path.unlink(missing_ok=True)
        except OSError as error:
            _log.error("an image that was made for a machine that did not come is left", extra={"path": str(path), "error": str(error)})
