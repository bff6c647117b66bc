"""All machines of this daemon: their stored definitions, and which of them may be launched, changed or deleted."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final
from uuid import uuid4

import msgspec

from qmpd.catalogue import Catalogue
from qmpd.console import Console
from qmpd.endings import REBOOTED, UNSEEN, last
from qmpd.errors import AlreadyExists, Held, HostError, NotFound, Problem, StaleRevision, invalid
from qmpd.facts import MachinePaths
from qmpd.filewatch import FileWatch
from qmpd.lifecycle import AT_REST, Happening
from qmpd.machine import Machine, Publish, now
from qmpd.plan import console_port, mac_address, serial_ports
from qmpd.process import NotOurs, adopt, boot_id
from qmpd.record import Definition, LaunchRecord, read_record, remove_record
from qmpd.runlock import is_taken
from qmpd.settings import Settings
from qmpd.spec import MachineSpec, SerialConsole
from qmpd.storage import remove_machine_files
from qmpd.store import Lost, Store
from qmpd.tasks import undivided

#: Keys of the authority records.
PREFIX: Final = "machine/"
MIB: Final = 1024 * 1024
#: What QEMU prints: a debug log (`-d`) has no end, and its last part is what helps.
STDERR_CAP: Final = MIB
#: How often the locks of processes are looked at that nobody has a record of.
STRAY_LOOK_S: Final = 5.0

_log = logging.getLogger(__name__)


class Registry:
    """The machines by name. Reading is from memory; every change is a committed write first."""

    def __init__(self, store: Store, catalogue: Catalogue, settings: Settings, watch: FileWatch, publish: Publish) -> None:
        self._store = store
        self._catalogue = catalogue
        self._settings = settings
        self._watch = watch
        self.log_cap_bytes = settings.console_log_mib * MIB
        self._publish = publish
        self._machines: dict[str, Machine] = {}
        #: Names that are being created, with their UUIDs as soon as those are known.
        self._being_made: dict[str, str | None] = {}
        #: Names whose definitions cannot be read: their files are somebody's disks.
        self._damaged: set[str] = set()
        self.on_end: Callable[[Machine], None] = lambda _machine: None

    def __iter__(self) -> Iterator[Machine]:
        return iter([self._machines[name] for name in sorted(self._machines)])

    def get(self, name: str) -> Machine:
        """The machine of this name. Raises NotFound."""
        try:
            return self._machines[name]
        except KeyError:
            raise NotFound(f"there is no machine {name!r}", machine=name) from None

    def paths(self, name: str) -> MachinePaths:
        """Where the files of a machine of this name are."""
        return MachinePaths(run=f"{self._settings.run_dir}/m/{name}", state=f"{self._settings.state_dir}/machines/{name}")

    async def load(self) -> None:
        """Reads every stored definition; one that cannot be read is left alone and reported."""
        snapshot = await self._store.read(PREFIX)
        for key, record in snapshot.records.items():
            try:
                definition = msgspec.msgpack.decode(record.value, type=Definition)
            except (msgspec.DecodeError, msgspec.ValidationError, RecursionError) as error:
                _log.error("definition is damaged and was left alone", extra={"key": key, "error": str(error)})
                self._damaged.add(key.removeprefix(PREFIX))
                continue
            await self._add(definition, record.revision)

    async def find_processes(self) -> list[LaunchRecord]:
        """What earlier daemons launched, and what may live, from the run directory."""
        found = []
        for directory in await asyncio.to_thread(_run_directories, f"{self._settings.run_dir}/m"):
            try:
                record = await asyncio.to_thread(read_record, directory)
            except FileNotFoundError:
                continue
            except (ValueError, OSError) as error:
                _log.error("launch record cannot be read and was left alone", extra={"directory": directory, "error": str(error)})
                continue
            if Path(directory).name != record.definition.spec.name:
                _log.error("launch record is in another machine's directory and was left alone", extra={"directory": directory})
                continue
            found.append(record)
        return found

    async def adopt(self, record: LaunchRecord) -> None:
        """Takes over the process of a record if it still is that process.

        A record whose machine the database does not know brings its definition along, so a lost database loses no machine.
        """
        name = record.definition.spec.name
        try:
            process = await adopt(record.identity)
        except NotOurs as error:
            _log.info("machine ended while no daemon ran", extra={"machine": name, "reason": str(error)})
            if name in self._machines:
                rebooted = record.identity.boot_id != await asyncio.to_thread(boot_id)
                self._machines[name].ended_unseen(REBOOTED if rebooted else UNSEEN, rebooted=rebooted)
            await asyncio.to_thread(remove_record, record.run_dir)
            return
        if name not in self._machines:
            # A definition that is there and cannot be read is somebody's: it stays as it is, and the machine is known from its record.
            known = name in self._damaged
            revision = (
                0 if known else await self._store.commit({PREFIX + name: 0}, {PREFIX + name: msgspec.msgpack.encode(record.definition)})
            )
            await self._add(record.definition, revision)
        await self._machines[name].adopt(record, process, self.paths(name))

    async def note_strays(self) -> None:
        """Marks machines whose QEMU is alive without a record that could be used: they cannot be reached, and are not at rest."""
        for machine in self:
            if machine.state in AT_REST and await asyncio.to_thread(is_taken, self.paths(machine.name).state):
                _log.error("a QEMU is alive without a launch record", extra={"machine": machine.name})
                machine.lost()

    async def watch_strays(self) -> None:
        """For ever: sees when such a QEMU ends. Its pid is not known, so its lock is looked at."""
        while True:
            await asyncio.sleep(STRAY_LOOK_S)
            for machine in self:
                if machine.stray and not await asyncio.to_thread(is_taken, self.paths(machine.name).state):
                    machine.happen(Happening.DIED)

    def stderr_path(self, name: str) -> str:
        """Where what QEMU prints is kept."""
        return self.paths(name).log("stderr")

    @asynccontextmanager
    async def reserved(self, name: str) -> AsyncIterator[None]:
        """Keeps a name from being used by two who create at the same time.

        Raises:
            AlreadyExists: the name is taken.
            Held: a QEMU runs from the files of this name, although no machine of it is known.
        """
        if name in self._damaged:
            raise AlreadyExists(f"there is a machine {name!r} already, whose definition cannot be read", machine=name)
        if name in self._machines or name in self._being_made:
            raise AlreadyExists(f"there is a machine {name!r} already", machine=name)
        self._being_made[name] = None
        try:
            if await asyncio.to_thread(is_taken, self.paths(name).state):
                raise Held(f"a QEMU of an unknown machine {name!r} is alive: end it by hand", holder="a running QEMU")
            yield
        finally:
            del self._being_made[name]

    def complete(self, spec: MachineSpec, machine_type: str) -> MachineSpec:
        """The definition with what is decided once for the whole life of a machine: UUID, versioned machine type, MACs.

        Raises:
            AlreadyExists: another machine has the UUID.
            Invalid: it is another UUID than the machine of this name has.
        """
        known = self._machines.get(spec.name)
        if known is not None and spec.uuid != known.definition.uuid:
            raise invalid([Problem(path="$.uuid", message=f"must stay {known.definition.uuid}")])
        taken = {name: uuid for name, uuid in self._being_made.items() if uuid is not None}
        taken |= {machine.name: machine.definition.uuid for machine in self._machines.values()}
        for name, uuid in taken.items():
            if uuid == spec.uuid and name != spec.name:
                raise AlreadyExists(f"machine {name!r} has the UUID {uuid} already", machine=name)
        spec = msgspec.structs.replace(spec, uuid=spec.uuid or str(uuid4()), machine=machine_type)
        if spec.name in self._being_made:
            self._being_made[spec.name] = spec.uuid
        nics = tuple(msgspec.structs.replace(nic, mac=mac_address(spec, index)) for index, nic in enumerate(spec.nics))
        return msgspec.structs.replace(spec, nics=nics)

    async def create(self, spec: MachineSpec) -> Machine:
        """Stores a completed definition under a reserved name."""
        return await undivided(self._create(spec), f"create:{spec.name}")

    async def _create(self, spec: MachineSpec) -> Machine:
        moment = now()
        definition = Definition(spec=spec, uuid=spec.uuid or "", created_at=moment, changed_at=moment)
        key = PREFIX + spec.name
        try:
            revision = await self._store.commit({key: 0}, {key: msgspec.msgpack.encode(definition)})
        except Lost as error:
            raise AlreadyExists(f"there is a machine {spec.name!r} already", machine=spec.name) from error
        machine = await self._add(definition, revision, new=True)
        self._publish("machine.created", spec.name, {"board": spec.board, "revision": revision})
        return machine

    async def replace(self, machine: Machine, spec: MachineSpec, revision: int) -> None:
        """Stores a completed definition in place of revision `revision`. Raises StaleRevision."""
        await self._check_free(machine)
        self.check_revision(machine, revision)
        await undivided(self._replace(machine, spec, revision), f"replace:{machine.name}")

    async def _replace(self, machine: Machine, spec: MachineSpec, revision: int) -> None:
        definition = msgspec.structs.replace(machine.definition, spec=spec, changed_at=now())
        key = PREFIX + machine.name
        try:
            written = await self._store.commit({key: revision}, {key: msgspec.msgpack.encode(definition)})
        except Lost as error:
            raise StaleRevision(f"machine {machine.name!r} was changed meanwhile", revision=error.actual) from error
        machine.definition, machine.revision = definition, written
        self._equip(machine)
        await _look_at_logs(machine)
        self._publish("machine.replaced", machine.name, {"revision": written})

    def check_revision(self, machine: Machine, revision: int) -> None:
        """Raises StaleRevision when the definition is not of this revision any more."""
        if revision != machine.revision:
            raise StaleRevision(
                f"machine {machine.name!r} is at revision {machine.revision}, not {revision}: read it again", revision=machine.revision
            )

    async def delete(self, machine: Machine) -> None:
        """Deletes a machine at rest: its record first, then its files.

        Raises:
            StaleRevision: somebody changed it.
            HostError: it is deleted, but not all its files could be removed.
        """
        await self._check_free(machine)
        await undivided(self._delete(machine), f"delete:{machine.name}")

    async def _check_free(self, machine: Machine) -> None:
        if await asyncio.to_thread(is_taken, self.paths(machine.name).state):
            raise Held(f"a QEMU of machine {machine.name!r} is alive", holder="a running QEMU", state=str(machine.state))

    async def _delete(self, machine: Machine) -> None:
        key = PREFIX + machine.name
        try:
            await self._store.commit({key: machine.revision}, {key: None})
        except Lost as error:
            raise StaleRevision(f"machine {machine.name!r} was changed meanwhile", revision=error.actual) from error
        del self._machines[machine.name]
        machine.asked_to_end = True  # nobody shall start it again
        self._publish("machine.deleted", machine.name, {"uuid": machine.definition.uuid})
        async with self.reserved(machine.name):  # a new machine of this name must not lose its files to the old one
            paths = self.paths(machine.name)
            try:
                for directory in (paths.state, paths.run):
                    await asyncio.to_thread(remove_machine_files, directory)
            except OSError as error:
                raise HostError(f"machine {machine.name!r} is deleted, but not all its files: {error}") from error

    async def _add(self, definition: Definition, revision: int, *, new: bool = False) -> Machine:
        """A new machine has no past: neither an ending nor console logs to look at."""
        name = definition.spec.name
        machine = Machine(definition, revision, self._publish)
        machine.on_end = self._ended
        if not new:
            machine.exit = await asyncio.to_thread(last, self.paths(name).state)
        self._machines[name] = machine
        self._equip(machine)
        if not new:
            await _look_at_logs(machine)
        return machine

    def _ended(self, machine: Machine) -> None:
        self.on_end(machine)

    def _equip(self, machine: Machine) -> None:
        """Gives a machine its board and its consoles, as its definition says."""
        spec = machine.definition.spec
        try:
            machine.board = self._catalogue.get(spec.board).board
        except NotFound:
            _log.warning("machine has an unknown board", extra={"machine": spec.name, "board": spec.board})
            return
        paths, board = self.paths(spec.name), machine.board
        kept = [index for index, port in enumerate(serial_ports(spec, board)) if isinstance(port, SerialConsole)]
        delay = board.console.input_delay_ms / 1000
        machine.consoles = {index: Console(paths.log(f"serial{index}"), self._watch, input_delay_s=delay) for index in kept}
        machine.console_port = console_port(spec, board)

    def capped_files(self) -> dict[str, int]:
        """The logs of the machines that have a process, and how many bytes of each are kept."""
        files: dict[str, int] = {}
        for machine in self.running():
            paths = self.paths(machine.name)
            files[paths.log("stderr")] = STDERR_CAP
            files |= {console.piece: self.log_cap_bytes for console in machine.consoles.values() if console.piece is not None}
        return files

    def running(self) -> list[Machine]:
        """The machines that have a process."""
        return [machine for machine in self._machines.values() if machine.state not in AT_REST]


async def _look_at_logs(machine: Machine) -> None:
    for console in machine.consoles.values():
        await console.load()


def _run_directories(parent: str) -> list[str]:
    try:
        return sorted(str(path) for path in Path(parent).iterdir() if path.is_dir())
    except FileNotFoundError:
        return []
