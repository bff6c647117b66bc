"""Machines that are copied while they live: the images of one moment are made, noted, and removed again, whatever becomes of the copy."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Final

import msgspec

from qmpd.errors import MonitorUnavailable, QmpdError
from qmpd.jobs import Report
from qmpd.lifecycle import AT_REST, State
from qmpd.machine import Machine
from qmpd.migration.delivery import Departure
from qmpd.migration.items import targets
from qmpd.migration.ledger import Entry, Ledger
from qmpd.migration.phases import KEEPABLE
from qmpd.migration.shipping import LIVE
from qmpd.migration.stills import Exposure, check_room, make, planned, put_back, remove
from qmpd.registry import Registry
from qmpd.tasks import undivided

#: The monitor of a QEMU that lives comes back within a second, unless its main loop is blocked.
MONITOR_S: Final = 30.0


class Exposures:
    """Takes the disks of machines as they are at one moment. The ledger knows of each image before it is there (`made`), and whether the
    guest stands still for it (`went`: it is to go on)."""

    def __init__(self, registry: Registry, ledger: Ledger) -> None:
        self._registry = registry
        self._ledger = ledger

    async def take(self, departure: Departure, report: Report) -> float | None:
        """Makes the images that are sent in the place of the machine's own; for how many milliseconds its guest was halted.

        Raises:
            NoSpace, HostError: they cannot be made here.
            CannotMove, MigrationFailed, QemuError: a disk cannot be copied.
        """
        machine, entry = departure.machine, self._ledger.get(departure.migration)
        paths = self._registry.paths(machine.name)
        stills = await planned(machine, paths, entry.id)
        await asyncio.to_thread(check_room, stills)
        await self._ledger.note(entry.id, made=tuple(still.path for still in stills))
        await undivided(asyncio.to_thread(make, stills), f"stills:{machine.name}")
        exposure = Exposure(machine.session, stills, entry.id)
        await exposure.follow(report)
        await self._ledger.note(entry.id, went=machine.state is State.RUNNING)
        try:
            await exposure.finish()
        finally:
            await _seen(machine)
        parcels = await asyncio.to_thread(lambda: tuple(still.parcel() for still in stills))
        await self._ledger.note(entry.id, went=False, offer=msgspec.structs.replace(entry.offer, parcels=parcels))
        files = targets(entry.offer.spec, paths)
        departure.elsewhere = {still.item: msgspec.structs.replace(files[still.item], path=still.path) for still in stills}
        return exposure.halted_ms

    async def clear(self, entry: Entry) -> None:
        """Leaves nothing of it: no mirror in QEMU, no image; a guest that was halted for it goes on. May be repeated.

        Raises:
            MonitorUnavailable, MigrationFailed, QemuError: QEMU cannot be asked now.
        """
        entry = self._ledger.get(entry.id)
        if not entry.made and not entry.went:
            return
        machine = self._registry.known(entry.machine) if entry.phase in KEEPABLE else None  # later only files are left
        if machine is not None and entry.offer.copy_of is not None and machine.definition.uuid == entry.offer.copy_of.uuid:
            await self._put_back(machine, entry)
        await asyncio.to_thread(remove, entry.made)
        await self._ledger.note(entry.id, made=(), went=False)

    async def _put_back(self, machine: Machine, entry: Entry) -> None:
        await machine.when(lambda: machine.state in AT_REST or machine.state in LIVE, MONITOR_S)
        if machine.state in AT_REST:
            return
        if not machine.has_process:
            raise MonitorUnavailable(f"machine {machine.name!r} is {machine.state}")
        await put_back(machine.session, entry.id, halted=entry.went)
        await _seen(machine)


async def _seen(machine: Machine) -> None:
    """The state is the one that QEMU has now: many events of the mirrors may wait before the one that says that the guest goes on."""
    with suppress(QmpdError):
        await machine.session.ask_status(machine.session.monitor)
