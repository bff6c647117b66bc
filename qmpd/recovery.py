"""Machines whose QEMUs live without this daemon: taken over at the start, looked for again, given up.

What is known of a process comes from the run directory first, from the database second, and last from the process that holds the
machine's lock. Whose it is must be proven each time; what cannot be proven is `unreachable`, and left alone.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection
from pathlib import Path
from typing import Final

from qmpd.endings import REBOOTED, UNSEEN
from qmpd.errors import QmpdError
from qmpd.forgotten import is_forgotten, mark_forgotten
from qmpd.hostprocess import is_alive
from qmpd.lifecycle import AT_REST, IN_TROUBLE, Happening
from qmpd.machine import Machine
from qmpd.process import NotOurs, adopt, boot_id
from qmpd.record import LaunchRecord, read_record, record_of_adopted, remove_record, write_record
from qmpd.registry import Registry
from qmpd.runlock import is_taken
from qmpd.storage import is_unfinished
from qmpd.strays import Unidentified, record_of_holder, set_aside_damaged
from qmpd.tpm import dismiss_recorded

#: How often the locks of processes are looked at that nobody has a record of.
STRAY_LOOK_S: Final = 5.0

_log = logging.getLogger(__name__)


class Recovery:
    """Finds processes of earlier daemons and gives them to their machines."""

    def __init__(self, registry: Registry, run_dir: str) -> None:
        self._registry = registry
        self._run_dir = run_dir
        self._taking: set[str] = set()
        self._unreadable: dict[str, str] = {}

    async def find(self) -> tuple[list[LaunchRecord], list[LaunchRecord]]:
        """What earlier daemons launched or adopted, from the run directory and then from the definitions: what lives, and what does not.

        The machines whose processes live are not at rest from here on, whatever it takes until their QEMUs answer.
        """
        found = await asyncio.to_thread(self._read_all)
        names = {record.definition.spec.name for record in found}
        adopted = [await self._adopted(machine) for machine in self._registry if machine.name not in names]
        found += [record for record in adopted if record is not None]
        living = await asyncio.to_thread(lambda: [is_alive(record.identity) for record in found])
        pairs = list(zip(found, living, strict=True))
        for record, lives in pairs:
            machine = self._registry.known(record.definition.spec.name)
            if lives and machine is not None and machine.definition.uuid == record.definition.uuid:
                machine.found()
        return [record for record, lives in pairs if lives], [record for record, lives in pairs if not lives]

    def _read_all(self) -> list[LaunchRecord]:
        records = [self._read(directory) for directory in _run_directories(f"{self._run_dir}/m")]
        return [record for record in records if record is not None]

    async def adopt(self, record: LaunchRecord) -> None:
        """Takes over the process of a record if it still is that process.

        A record whose machine the database does not know brings its definition along, so a lost database loses no machine.
        """
        name = record.definition.spec.name
        if name in self._taking:
            return
        self._taking.add(name)
        try:
            await self._adopt(name, record)
        except (QmpdError, OSError) as error:
            # It may well be alive: its lock tells, and then it is unreachable, not stopped.
            _log.error("machine could not be taken over", extra={"machine": name, "error": str(error)})
            machine = self._registry.known(name)
            if machine is not None and (machine.state in AT_REST or machine.stray) and await self._taken(machine):
                machine.lost(f"it could not be taken over: {error}")
        finally:
            self._taking.discard(name)

    async def note_strays(self, later: Collection[LaunchRecord] = ()) -> None:
        """Takes over processes that live without a usable record, but for machines whose record will still be looked at.

        Those that cannot be identified are known to live, and no more.
        """
        busy = self._taking | {record.definition.spec.name for record in later}
        resting = [machine for machine in self._registry if machine.state in AT_REST and machine.name not in busy]
        states = [self._registry.paths(machine.name).state for machine in resting]
        locked = await asyncio.to_thread(lambda: [is_taken(state) for state in states])
        for machine, taken in zip(resting, locked, strict=True):
            if machine.state in AT_REST and (taken or await self._adopted(machine) is not None):
                _log.error("a QEMU is alive without a launch record", extra={"machine": machine.name})
                await self._identify(machine)

    async def watch_strays(self) -> None:
        """For ever: sees when a process ends that could not be identified. Its pid is not known, so its lock is looked at."""
        while True:
            await asyncio.sleep(STRAY_LOOK_S)
            for machine in self._registry:
                if machine.stray and not await self._taken(machine) and machine.stray:
                    machine.happen(Happening.DIED)

    async def look_again(self, machine: Machine) -> None:
        """For a process that is not identified: reads the record again, and looks for who holds the lock."""
        if not machine.stray:
            return
        if not await self._taken(machine):
            machine.happen(Happening.DIED)
            return
        record = await asyncio.to_thread(self._read, self._registry.paths(machine.name).run)
        if record is not None and await asyncio.to_thread(is_alive, record.identity):
            await self.adopt(record)
        if machine.stray:
            record = await self._adopted(machine)
            await (self.adopt(record) if record is not None else self._identify(machine))

    async def reattach(self, machine: Machine) -> None:
        """Tries now to reach a machine's QEMU again.

        Raises:
            WrongState: nothing is wrong with the connection.
            MonitorUnavailable, QemuSilent, QemuDied, NotProven: what it failed with; the machine is as before.
        """
        machine.require(IN_TROUBLE, "reattach")
        await self.look_again(machine)
        if machine.state in IN_TROUBLE:
            await machine.session.retry()

    async def forget(self, machine: Machine) -> None:
        """Gives up a machine whose process cannot be reached: its definition goes, its files stay, nothing is signalled.

        Raises:
            WrongState: the process answers, or there is none.
            NoSpace, HostError: that it is forgotten cannot be written down.
        """
        machine.require(IN_TROUBLE, "forget")
        await self.look_again(machine)
        machine.require(IN_TROUBLE, "forget")
        paths = self._registry.paths(machine.name)
        await asyncio.to_thread(mark_forgotten, paths.state, machine.definition)
        await self._registry.give_up(machine)
        await machine.release()
        await asyncio.to_thread(remove_record, paths.run)

    async def _adopt(self, name: str, record: LaunchRecord) -> None:
        machine, paths = self._registry.known(name), self._registry.paths(name)
        if machine is None and await asyncio.to_thread(is_forgotten, paths.state):
            _log.warning("the process of a forgotten machine was left alone", extra={"machine": name, "pid": record.identity.pid})
            return
        if machine is None and record.incoming is not None:
            _log.error(
                "the process of a machine that another host owns was left alone", extra={"machine": name, "pid": record.identity.pid}
            )
            return
        if machine is None and await asyncio.to_thread(is_unfinished, paths.state):
            _log.warning("a gate whose machine was never stored ends by itself", extra={"machine": name, "pid": record.identity.pid})
            return
        if machine is not None and machine.definition.uuid != record.definition.uuid:
            _log.error("launch record is that of an earlier machine and was left alone", extra={"machine": name})
            return
        try:
            process = await adopt(record.identity)
        except NotOurs as error:
            await self._ended(name, record, str(error))
            return
        try:
            machine = machine or await self._registry.admit(record.definition)
            if machine.has_process:
                process.close()
                return
        except BaseException:
            process.close()
            raise
        await machine.adopt(record, process, paths)

    async def _ended(self, name: str, record: LaunchRecord, reason: str) -> None:
        machine = self._registry.known(name)
        await dismiss_recorded(record.tpm)
        await asyncio.to_thread(remove_record, record.run_dir)
        if machine is None or await self._taken(machine):
            return  # another process of the machine lives, which is not the one that was recorded
        _log.info("machine ended while no daemon ran", extra={"machine": name, "reason": reason})
        rebooted = record.identity.boot_id != await asyncio.to_thread(boot_id)
        machine.ended_unseen(REBOOTED if rebooted else UNSEEN, rebooted=rebooted)

    async def _identify(self, machine: Machine) -> None:
        paths = self._registry.paths(machine.name)
        try:
            record = await asyncio.to_thread(record_of_holder, machine.definition, paths)
        except Unidentified as error:
            machine.lost(f"{self._unreadable.get(machine.name, 'it has no launch record')}; {error}")
            return
        if record.run_dir == paths.run:
            await asyncio.to_thread(_restore, record)
        await self.adopt(record)

    def _read(self, directory: str) -> LaunchRecord | None:
        name = Path(directory).name
        self._unreadable.pop(name, None)
        try:
            record = read_record(directory)
        except FileNotFoundError:
            return None
        except (ValueError, OSError) as error:
            self._unreadable[name] = f"its launch record cannot be read: {error}"
            _log.error("launch record cannot be read and was left alone", extra={"directory": directory, "error": str(error)})
            return None
        if record.definition.spec.name != name:
            self._unreadable[name] = "its launch record is that of another machine"
            _log.error("launch record is in another machine's directory and was left alone", extra={"directory": directory})
            return None
        return record

    async def _adopted(self, machine: Machine) -> LaunchRecord | None:
        """The record of a QEMU that was adopted and lives, from the definition."""
        adoption = machine.definition.adoption
        if adoption is None or not await asyncio.to_thread(is_alive, adoption.identity):
            return None
        return record_of_adopted(machine.definition, adoption, self._registry.paths(machine.name).run)

    async def _taken(self, machine: Machine) -> bool:
        """Whether a QEMU of the machine lives: it holds the lock, but for one that was adopted."""
        if await self._adopted(machine) is not None:
            return True
        return await asyncio.to_thread(is_taken, self._registry.paths(machine.name).state)


def _restore(record: LaunchRecord) -> None:
    try:
        set_aside_damaged(record.run_dir)
        Path(record.run_dir).mkdir(mode=0o700, parents=True, exist_ok=True)
        write_record(record.run_dir, record)
    except OSError as error:
        # The next daemon finds the process by its lock again.
        _log.warning("launch record was not written anew", extra={"directory": record.run_dir, "error": str(error)})


def _run_directories(parent: str) -> list[str]:
    try:
        return sorted(str(path) for path in Path(parent).iterdir() if path.is_dir())
    except FileNotFoundError:
        return []
