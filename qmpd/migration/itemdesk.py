"""Where a machine's items are handed in: whether they fit, how far each is, and what becomes of them.

Which items a migration may bring, and whether it may still, is for whoever owns the ledger to say (`Admission`). What is here of an item
is known from files alone, so everything goes on after a restart of either daemon.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Final

import msgspec

from qmpd.access import Caller
from qmpd.errors import AlreadyExists, Forbidden, HostError, NoSpace, NotFound, WrongState
from qmpd.facts import MachinePaths
from qmpd.migration.arrivingfiles import Arriving, ArrivingFile, ArrivingVariables, sync
from qmpd.migration.consolelogs import ArrivingLog, settle_numbering
from qmpd.migration.extents import fingerprint
from qmpd.migration.items import Target, check_parcels, log_item, targets
from qmpd.migration.parcels import ItemStanding, Parcel
from qmpd.migration.protocol import ConsoleEnd, LogReceived
from qmpd.plan import SerialPipe
from qmpd.spec import MachineSpec
from qmpd.storage import examine
from qmpd.tasks import Tasks, undivided

#: How long a question waits for a digest that is being made: below any deadline of who asks, and long enough for a few gigabytes.
DIGEST_WAIT_S: Final = 10.0
#: What stays free of a file system that items come to: other machines write there.
SPARE_BYTES: Final = 16 * 1024 * 1024


class Delivery(msgspec.Struct, frozen=True, kw_only=True):
    """What one migration brings here, and where it belongs.

    `spec` is the definition with this host's paths, `serial_ports` those whose logs are kept. `live`: it comes while it runs, and its QEMU
    has its files open already. `log_ends` says where its logs ended at the source, once that is known. `arrived`: it is this host's own,
    and nothing but what is missing of its logs may still come.
    """

    migration: str
    spec: MachineSpec
    paths: MachinePaths
    parcels: tuple[Parcel, ...]
    log_cap_bytes: int
    serial_ports: tuple[int, ...] = ()
    live: bool = False
    log_ends: Mapping[int, int] = {}
    arrived: bool = False

    def targets(self) -> dict[str, Target]:
        """Where the items that were announced belong."""
        known = targets(self.spec, self.paths, self.serial_ports)
        return {parcel.item: known[parcel.item] for parcel in self.parcels if parcel.item in known}

    def sizes(self) -> dict[str, int]:
        """How long they are."""
        return {parcel.item: parcel.size for parcel in self.parcels}

    def log_end(self, item: str) -> int | None:
        """Where this log ended at the source, if it is a log and that is known."""
        return next((end for port, end in self.log_ends.items() if log_item(port) == item), None)


#: Says what a peer may hand in for a migration at the moment. Raises NotFound where this peer has no such migration to this host, and
#: WrongState where it is over, or not so far yet.
Admission = Callable[[Caller, str], Delivery]


def nobody(_caller: Caller, migration: str) -> Delivery:
    """The admission of a daemon that receives no machines."""
    raise NotFound(f"there is no migration {migration!r}", migration=migration)


class _Slot:
    """One item that somebody asked about: who writes, and its digest."""

    def __init__(self, arriving: Arriving, size: int, file: Path | None) -> None:
        self.arriving = arriving
        self.size = size
        self.file = file
        self.writing = asyncio.Lock()
        self.digest: asyncio.Task[str | HostError] | None = None


class ItemDesk:
    """The items of all machines that come to this host."""

    def __init__(self, tasks: Tasks, admission: Admission = nobody) -> None:
        self._tasks = tasks
        self._admission = admission
        self._slots: dict[tuple[str, str], _Slot] = {}

    # For peers.

    async def put(self, caller: Caller, migration: str, item: str, offset: int, data: bytes) -> ItemStanding:
        """Takes a piece of an item. The same piece may come again. Where all of the log of a machine that is this host's own has come, the
        answer says that it outlives a crash of the host.

        Raises:
            NotFound: the peer has no such migration, or did not announce this item.
            WrongState: it may not be handed in now.
            Invalid: it goes beyond the size that was announced.
            NoSpace, HostError: it could not be written.
        """
        delivery = self._admission(caller, migration)
        slot = self._slot(delivery, item)
        if delivery.arrived and not isinstance(slot.arriving, ArrivingLog):
            raise WrongState("the machine is here already, and its files are its own", state="arrived", allowed=["awaiting"])
        # A thread goes on when its caller has left: nobody else may write before it has ended.
        end = delivery.log_end(item) if delivery.arrived else None
        received = await undivided(_written(slot, offset, data, end), f"item:{migration}:{item}")
        return ItemStanding(item=item, received=received, size=slot.size)

    async def item(self, caller: Caller, migration: str, item: str) -> ItemStanding:
        """How much of an item is here; with its digest when all is, though perhaps not at the first question.

        Raises:
            NotFound, WrongState: as in `put`.
            HostError: it cannot be read.
        """
        slot = self._slot(self._admission(caller, migration), item)
        async with slot.writing:
            received = await asyncio.to_thread(slot.arriving.received)
            whole = await asyncio.to_thread(_whole, slot) if received == slot.size else None
            if whole is not None and slot.digest is None:
                slot.digest = self._tasks.start(_digest(whole), f"digest:{migration}:{item}")
            making = slot.digest
        if making is None:
            return ItemStanding(item=item, received=received, size=slot.size)
        await asyncio.wait([making], timeout=DIGEST_WAIT_S)
        digest = making.result() if making.done() and not making.cancelled() else None
        if isinstance(digest, HostError):
            slot.digest = None
            raise digest
        return ItemStanding(item=item, received=received, size=slot.size, digest=digest)

    # For whoever owns the migration.

    async def prepare(self, delivery: Delivery, pools: Sequence[str]) -> None:
        """Whether everything that was announced fits; makes what must be there before QEMU is launched.

        Raises:
            Invalid: the definition has no such item, or not of this size.
            AlreadyExists: a file is in the way.
            Forbidden: a path is outside of the pools.
            NoSpace: there is no room.
        """
        check_parcels(delivery.parcels, targets(delivery.spec, delivery.paths, delivery.serial_ports))
        await asyncio.to_thread(_look, delivery, pools)
        for item, target in delivery.targets().items():
            if delivery.live and target.kind == "vars":
                await asyncio.to_thread(ArrivingVariables(target.path, delivery.sizes()[item]).make)

    async def number(self, delivery: Delivery, pipes: Sequence[SerialPipe], ends: Sequence[ConsoleEnd]) -> None:
        """Numbers the logs of a machine that runs here next (`consolelogs.settle_numbering`); `delivery` says where they ended.

        Raises:
            HostError, NoSpace: a log cannot be numbered now.
        """
        async with AsyncExitStack() as stack:  # who hands in a piece meanwhile waits, and then it is another log
            for item, target in delivery.targets().items():
                if target.kind == "log":
                    await stack.enter_async_context(self._slot(delivery, item).writing)
            await asyncio.to_thread(settle_numbering, pipes, ends, delivery.log_cap_bytes)

    async def logs(self, delivery: Delivery) -> tuple[LogReceived, ...]:
        """How much is here of each log that was announced."""
        known = delivery.targets()
        ports = [port for port in delivery.serial_ports if log_item(port) in known]
        logs = [self._slot(delivery, log_item(port)).arriving for port in ports]
        received = await asyncio.to_thread(lambda: [log.received() for log in logs])
        return tuple(LogReceived(port=port, received=count) for port, count in zip(ports, received, strict=True))

    async def whole(self, delivery: Delivery) -> bool:
        """Whether all of every file is here that was announced, and outlives a crash of the host: whoever sent them gives the machine away
        next, and nobody compares them again. Of a log as much is here as there is.

        Raises:
            HostError, NoSpace: a file cannot be written for good.
        """
        slots = [self._slot(delivery, item) for item, target in delivery.targets().items() if target.kind != "log"]
        return await asyncio.to_thread(_secured, slots)

    async def place(self, delivery: Delivery) -> None:
        """Gives everything its name: the machine is this host's. May be repeated.

        Raises:
            WrongState: something is not whole.
            AlreadyExists: a file is in the way.
            HostError, NoSpace: it cannot be done now.
        """
        for item, target in delivery.targets().items():
            slot = self._slot(delivery, item)
            async with slot.writing:
                await asyncio.to_thread(_place, slot, target, delivery)
        self._forget(delivery.migration)

    async def discard(self, delivery: Delivery) -> None:
        """Removes what came, but for what lies in the machine's own directory under its own name: that goes with the directory.

        Raises:
            HostError: something cannot be removed.
        """
        for item in delivery.targets():
            slot = self._slot(delivery, item)
            async with slot.writing:
                if isinstance(slot.arriving, ArrivingFile):
                    await asyncio.to_thread(slot.arriving.discard)
        self._forget(delivery.migration)

    def _slot(self, delivery: Delivery, item: str) -> _Slot:
        target = delivery.targets().get(item)
        if target is None:
            raise NotFound(f"migration {delivery.migration!r} brings no {item!r}", migration=delivery.migration, item=item)
        key = (delivery.migration, item)
        slot = self._slots.get(key)
        if slot is None:
            slot = self._slots[key] = _opened(delivery, item, target)
        elif target.kind == "log":
            slot.arriving = _arriving(delivery, item, target)  # where it ends may be known by now
        return slot

    def _forget(self, migration: str) -> None:
        for key in [key for key in self._slots if key[0] == migration]:
            digest = self._slots.pop(key).digest
            if digest is not None:
                digest.cancel()


async def _written(slot: _Slot, offset: int, data: bytes, end: int | None) -> int:
    """Writes a piece. The last one of a log that ended at `end` is written for good."""
    async with slot.writing:
        if slot.digest is not None:
            slot.digest.cancel()  # of what was there before
            slot.digest = None
        received = await asyncio.to_thread(slot.arriving.write, offset, data)
        if end is not None and offset + len(data) >= end and isinstance(slot.arriving, ArrivingLog):
            await asyncio.to_thread(slot.arriving.secure)
        return received


async def _digest(whole: Path) -> str | HostError:
    try:
        # Here, where somebody waits for hours if he must: much may not be on the disk yet.
        await undivided(asyncio.to_thread(sync, whole), f"sync:{whole}")
        return await fingerprint(str(whole))
    except OSError as error:
        return HostError(f"{whole} cannot be read again: {error}", path=str(whole))


def _secured(slots: Sequence[_Slot]) -> bool:
    if not all(slot.arriving.received() == slot.size and _whole(slot) is not None for slot in slots):
        return False
    for slot in slots:
        if isinstance(slot.arriving, ArrivingFile):
            slot.arriving.secure()
    return True


def _whole(slot: _Slot) -> Path | None:
    """The file of an item that has one, if it is there: one without bytes may be whole and not be there yet."""
    whole = slot.arriving.whole if isinstance(slot.arriving, ArrivingFile) else slot.file
    return whole if whole is not None and whole.exists() else None


def _opened(delivery: Delivery, item: str, target: Target) -> _Slot:
    file = None if target.kind == "log" else Path(target.path)
    return _Slot(_arriving(delivery, item, target), delivery.sizes()[item], file)


def _arriving(delivery: Delivery, item: str, target: Target) -> Arriving:
    size = delivery.sizes()[item]
    if target.kind == "log":
        return ArrivingLog(target.path, delivery.log_cap_bytes, end=delivery.log_end(item))
    if target.kind == "vars" and delivery.live:
        return ArrivingVariables(target.path, size)
    return ArrivingFile(target.path, delivery.migration, size)


def _place(slot: _Slot, target: Target, delivery: Delivery) -> None:
    if isinstance(slot.arriving, ArrivingFile):
        slot.arriving.place()
    elif isinstance(slot.arriving, ArrivingVariables):
        slot.arriving.secure()
    elif isinstance(slot.arriving, ArrivingLog):
        if not delivery.live:
            slot.arriving.place(slot.size)
        slot.arriving.secure()


def _look(delivery: Delivery, pools: Sequence[str]) -> None:
    """Whether what is announced may come to where it belongs, and has room there."""
    known = delivery.targets()
    outside = [target.path for target in known.values() if not target.own]
    for path, facts in examine(outside, pools).items():
        if facts.kind in {"denied", "special", "directory"}:
            raise Forbidden(f"{path} cannot be written here: {facts.refusal or facts.kind}", path=path)
        if facts.kind != "missing":
            raise AlreadyExists(f"{path} exists already: name another path for it", path=path)
        if not Path(path).parent.is_dir():
            raise NotFound(f"{path} cannot be written here: there is no directory {Path(path).parent}", path=path)
    needed: dict[int, tuple[Path, int]] = {}
    for parcel in delivery.parcels:
        place = _existing(Path(known[parcel.item].path).parent)
        device = place.stat().st_dev
        missing = max(0, parcel.allocated - _opened(delivery, parcel.item, known[parcel.item]).arriving.received())
        needed[device] = (place, needed.get(device, (place, 0))[1] + missing)
    _check_room(needed.values())


def _existing(directory: Path) -> Path:
    return next(place for place in (directory, *directory.parents) if place.is_dir())


def _check_room(needed: Iterable[tuple[Path, int]]) -> None:
    for place, size in needed:
        there = os.statvfs(place)
        free = there.f_bavail * there.f_frsize
        if size and size + SPARE_BYTES > free:
            raise NoSpace(f"{size} bytes are to come to {place}, and {free} are free", path=str(place), needed=size, free=free)
