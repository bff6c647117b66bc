"""All machines of this daemon: their stored definitions, and which of them may be launched, changed or deleted."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final
from uuid import uuid4

import msgspec

from qmpd.catalogue import Catalogue
from qmpd.console import Console
from qmpd.endings import last
from qmpd.errors import AlreadyExists, Held, HostError, NotFound, Problem, Protected, QmpdError, StaleRevision, invalid
from qmpd.facts import MachinePaths
from qmpd.failpoint import passing
from qmpd.filewatch import FileWatch
from qmpd.forgotten import is_forgotten
from qmpd.lifecycle import AT_REST
from qmpd.machine import Machine, Publish, now
from qmpd.plan import console_port, mac_address, serial_ports
from qmpd.record import Definition
from qmpd.runlock import is_taken
from qmpd.settings import Settings
from qmpd.spec import BlankDisk, MachineSpec, SerialConsole
from qmpd.storage import clear_unfinished, mark_finished, mark_unfinished, remove_machine_files, settle, unfinished
from qmpd.store import Lost, Store, Unknown
from qmpd.tasks import undivided
from qmpd.views import ExitView

#: Keys of the authority records.
PREFIX: Final = "machine/"
MIB: Final = 1024 * 1024
#: What QEMU prints: a debug log (`-d`) has no end, and its last part is what helps.
STDERR_CAP: Final = MIB

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

    @property
    def names(self) -> frozenset[str]:
        """The names in use: of machines, and of those that are being made."""
        return frozenset(self._machines) | frozenset(self._being_made)

    @property
    def damaged(self) -> frozenset[str]:
        """The names whose definitions cannot be read."""
        return frozenset(self._damaged)

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
            self._add(definition, record.revision)
        await self.look_back(list(self._machines.values()))
        for own in await asyncio.to_thread(unfinished, f"{self._settings.state_dir}/machines"):
            try:
                await asyncio.to_thread(self._tidy, Path(own).name)
            except OSError as error:
                _log.error("what an earlier daemon did not finish was not cleared up", extra={"directory": own, "error": str(error)})

    def _tidy(self, name: str) -> None:
        """Clears up what a daemon left that was killed while it created, replaced or deleted this machine. Blocks."""
        paths = self.paths(name)
        if name in self._machines:
            settle(paths.state, self.disks_made(self._machines[name].definition.spec))
        elif name not in self._damaged and not is_taken(paths.state):
            _log.warning("files of a machine that was not finished are removed", extra={"machine": name})
            for directory in (paths.run, paths.state):
                remove_machine_files(directory)

    def known(self, name: str) -> Machine | None:
        """The machine of this name, if there is one."""
        return self._machines.get(name)

    async def admit(self, definition: Definition) -> Machine:
        """A new machine whose process runs already. Its definition is stored, unless there is one of this name that cannot be read:
        that is somebody's, stays as it is, and the machine is known from its process.

        Raises:
            Lost: somebody else stored one.
        """
        known = definition.spec.name in self._damaged
        revision = 0 if known else await self._commit(PREFIX + definition.spec.name, 0, msgspec.msgpack.encode(definition))
        await self.look_back([machine := self._add(definition, revision)])
        return machine

    async def give_up(self, machine: Machine) -> None:
        """Removes a machine's definition, and nothing else. Raises StaleRevision when somebody changed it."""
        await undivided(self._give_up(machine), f"forget:{machine.name}")

    async def _give_up(self, machine: Machine) -> None:
        if machine.revision:
            try:
                await self._commit(PREFIX + machine.name, machine.revision, None)
            except Lost as error:
                raise StaleRevision(f"machine {machine.name!r} was changed meanwhile", revision=error.actual) from error
        del self._machines[machine.name]
        machine.asked_to_end = True  # nobody shall start it again
        self._publish("machine.forgotten", machine.name, {"uuid": machine.definition.uuid, "pid": machine.view().pid})

    def disks_made(self, spec: MachineSpec) -> set[str]:
        """The images that qmpd made for a definition."""
        paths = self.paths(spec.name)
        return {paths.disk(index, disk.format) for index, disk in enumerate(spec.disks) if isinstance(disk, BlankDisk)}

    def stderr_path(self, name: str) -> str:
        """Where what QEMU prints is kept."""
        return self.paths(name).log("stderr")

    @asynccontextmanager
    async def reserved(self, name: str) -> AsyncIterator[None]:
        """Keeps a name from being used by two who create at the same time. Raises AlreadyExists when it is taken."""
        if name in self._damaged or name in self.names:
            unreadable = ", whose definition cannot be read" if name in self._damaged else ""
            raise AlreadyExists(f"there is a machine {name!r} already{unreadable}", machine=name)
        self._being_made[name] = None
        try:
            yield
        finally:
            del self._being_made[name]

    def check_vacant(self, name: str) -> None:
        """Whether a machine of a reserved name may have its files. Blocks.

        Raises:
            Held: a QEMU runs from the files of this name, although no machine of it is known, or they are a forgotten machine's.
        """
        state = self.paths(name).state
        if is_forgotten(state):
            raise Held(f"the files of a forgotten machine {name!r} are in {state}: move them away first", holder="a forgotten machine")
        if is_taken(state):
            raise Held(f"a QEMU of an unknown machine {name!r} is alive: end it by hand", holder="a running QEMU")

    def complete(self, spec: MachineSpec, machine_type: str) -> MachineSpec:
        """The definition with what is decided once for the whole life of a machine: UUID, versioned machine type, MACs.

        Raises:
            AlreadyExists: another machine has the UUID.
            Invalid: it is another UUID than the machine of this name has.
        """
        known = self._machines.get(spec.name)
        if known is not None and spec.uuid != known.definition.uuid:
            raise invalid([Problem(path="$.uuid", message=f"must stay {known.definition.uuid}")])
        taken = self._being_made | {machine.name: machine.definition.uuid for machine in self._machines.values()}
        for name, uuid in taken.items():
            if uuid is not None and uuid == spec.uuid and name != spec.name:
                raise AlreadyExists(f"machine {name!r} has the UUID {uuid} already", machine=name)
        spec = msgspec.structs.replace(spec, uuid=spec.uuid or str(uuid4()), machine=machine_type)
        if spec.name in self._being_made:
            self._being_made[spec.name] = spec.uuid
        nics = tuple(msgspec.structs.replace(nic, mac=mac_address(spec, index)) for index, nic in enumerate(spec.nics))
        return msgspec.structs.replace(spec, nics=nics)

    async def create(self, definition: Definition, *, marked: bool = False) -> Machine:
        """Stores a new definition under a reserved name. Its directory stays `marked` as unfinished where the caller takes care of that."""
        return await undivided(self._create(definition, marked=marked), f"create:{definition.spec.name}")

    async def _create(self, definition: Definition, *, marked: bool) -> Machine:
        spec = definition.spec
        key = PREFIX + spec.name
        try:
            revision = await self._commit(key, 0, msgspec.msgpack.encode(definition))
        except Lost as error:
            raise AlreadyExists(f"there is a machine {spec.name!r} already", machine=spec.name) from error
        except Unknown:
            self._damaged.add(spec.name)  # the next daemon knows whether there is one
            raise
        if not marked:
            await asyncio.to_thread(mark_finished, self.paths(spec.name).state)
        machine = self._add(definition, revision)
        self._publish("machine.created", spec.name, {"board": spec.board, "revision": revision})
        return machine

    async def replace(self, machine: Machine, spec: MachineSpec, revision: int) -> None:
        """Stores a completed definition in place of revision `revision`. Raises StaleRevision."""
        await self.check_free(machine)
        self.check_revision(machine, revision)
        await undivided(self._replace(machine, spec, revision), f"replace:{machine.name}")

    async def _replace(self, machine: Machine, spec: MachineSpec, revision: int) -> None:
        await self._change(machine, spec, revision)
        self._equip(machine)
        await self.look_back([machine])
        self._publish("machine.replaced", machine.name, {"revision": machine.revision})

    async def update(self, machine: Machine, spec: MachineSpec, revision: int) -> None:
        """Stores a definition that differs in what no QEMU knows of, whether there is one or not. Raises StaleRevision."""
        self.check_revision(machine, revision)
        if spec != machine.definition.spec:
            await undivided(self._update(machine, spec, revision), f"update:{machine.name}")

    async def _update(self, machine: Machine, spec: MachineSpec, revision: int) -> None:
        await self._change(machine, spec, revision)
        self._publish("machine.updated", machine.name, {"revision": machine.revision})

    async def _change(self, machine: Machine, spec: MachineSpec, revision: int) -> None:
        await self.store(machine, msgspec.structs.replace(machine.definition, spec=spec, changed_at=now(), adoption=None), revision)

    async def store(self, machine: Machine, definition: Definition, revision: int) -> None:
        """Commits a definition in place of the one at `revision` (0: there is none), and nothing else. One that is there already will do.

        Raises:
            StaleRevision: somebody changed it.
            Unknown: it may be stored; the same again tells.
        """
        key, value = PREFIX + machine.name, msgspec.msgpack.encode(definition)
        try:
            written = await self._commit(key, revision, value)
        except Lost as error:
            found = (await self._store.read(key)).records.get(key)
            if found is None or found.value != value:
                raise StaleRevision(f"machine {machine.name!r} was changed meanwhile", revision=error.actual) from error
            written = found.revision
        machine.definition, machine.revision = definition, written

    def expect(self, definition: Definition) -> Machine:
        """A machine that another host owns, and that may come here: known in memory, and stored nowhere. Its name must be reserved."""
        machine = self._add(definition, 0)
        machine.awaited = machine.asked_to_end = True
        return machine

    async def dismiss(self, machine: Machine) -> None:
        """Removes a machine at rest that this host does not own, and what was made for it here."""
        await undivided(self._forget(machine, "machine.dismissed", clear_unfinished), f"dismiss:{machine.name}")

    async def depart(self, machine: Machine) -> None:
        """Removes a machine at rest that another host owns now: its record first, then its files here. Raises as `delete` does."""
        await self.check_free(machine)
        await undivided(self._delete(machine, machine.revision, "machine.departed"), f"depart:{machine.name}")

    def check_revision(self, machine: Machine, revision: int) -> None:
        """Raises StaleRevision when the definition is not of this revision any more."""
        if revision != machine.revision:
            message = f"machine {machine.name!r} is at revision {machine.revision}, not {revision}: read it again"
            raise StaleRevision(message, revision=machine.revision)

    async def delete(self, machine: Machine) -> None:
        """Deletes a machine at rest: its record first, then its files.

        Raises:
            Protected: its definition says that it must not be deleted.
            StaleRevision: somebody changed it.
            HostError: it is deleted, but not all its files could be removed.
        """
        await self.check_free(machine)
        if machine.definition.spec.protected:
            raise Protected(f"machine {machine.name!r} is protected and cannot be deleted", field="protected")
        await undivided(self._delete(machine, machine.revision), f"delete:{machine.name}")

    async def check_free(self, machine: Machine) -> None:
        """Raises Held where a QEMU of the machine is alive, whatever else is known of it."""
        if await asyncio.to_thread(is_taken, self.paths(machine.name).state):
            raise Held(f"a QEMU of machine {machine.name!r} is alive", holder="a running QEMU", state=str(machine.state))

    async def _delete(self, machine: Machine, revision: int, event: str = "machine.deleted") -> None:
        own = self.paths(machine.name).state
        try:
            await asyncio.to_thread(mark_unfinished, own)
        except QmpdError as error:
            # Deleting makes room: it must not fail because there is none.
            _log.warning("a deletion was not marked", extra={"machine": machine.name, "error": error.message})
        try:
            await self._commit(PREFIX + machine.name, revision, None)
        except Unknown:
            raise  # it may be gone: the next daemon sees what the mark means
        except QmpdError as error:
            if not (isinstance(error, Lost) and error.actual == 0):
                await asyncio.to_thread(mark_finished, own)
                if isinstance(error, Lost):
                    raise StaleRevision(f"machine {machine.name!r} was changed meanwhile", revision=error.actual) from error
                raise
        await self._forget(machine, event, remove_machine_files)

    async def _forget(self, machine: Machine, event: str, remove: Callable[[str], None]) -> None:
        """Follows the record that is gone: memory, and then files."""
        del self._machines[machine.name]
        machine.asked_to_end = True  # nobody shall start it again
        self._publish(event, machine.name, {"uuid": machine.definition.uuid})
        async with self.reserved(machine.name):  # a new machine of this name must not lose its files to the old one
            await asyncio.to_thread(self.check_vacant, machine.name)
            paths = self.paths(machine.name)
            try:
                await asyncio.to_thread(remove_machine_files, paths.run)
                await asyncio.to_thread(remove, paths.state)
            except OSError as error:
                raise HostError(f"machine {machine.name!r} is deleted, but not all its files: {error}") from error

    async def _commit(self, key: str, revision: int, value: bytes | None) -> int:
        """Writes a definition whose record is at `revision`; the new revision. A doubt is settled by committing the same again.

        Raises:
            Lost: somebody else wrote it.
            Unknown: the second attempt did not settle it either.
        """
        await passing("definition-commit")
        write = self._store.commit
        try:
            written = await write({key: revision}, {key: value})
        except Unknown:
            try:
                written = await write({key: revision}, {key: value})
            except Lost as lost:
                found = (await self._store.read(key)).records.get(key)
                if (None if found is None else found.value) != value:
                    raise
                written = lost.actual  # the first attempt had happened
        await passing("definition-committed")
        return written

    def _add(self, definition: Definition, revision: int) -> Machine:
        machine = Machine(definition, revision, self._publish)
        machine.on_end = self._ended
        self._machines[machine.name] = machine
        self._equip(machine)
        return machine

    async def look_back(self, machines: Sequence[Machine]) -> None:
        """What earlier daemons left of these machines: how they ended, and how long their console logs are. One step for all of them."""
        states = {machine: self.paths(machine.name).state for machine in machines}
        consoles = [console for machine in machines for console in machine.consoles.values()]

        def look() -> tuple[list[ExitView | None], list[tuple[int, bytes] | None]]:
            return [last(state) for state in states.values()], [console.look() for console in consoles]

        endings, logs = await asyncio.to_thread(look)
        for machine, ending in zip(states, endings, strict=True):
            machine.exit = ending
        for console, seen in zip(consoles, logs, strict=True):
            console.note(seen)

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
            files |= dict.fromkeys(self.paths(machine.name).said(tpm=machine.definition.spec.tpm is not None), STDERR_CAP)
            files |= {console.piece: self.log_cap_bytes for console in machine.consoles.values() if console.piece is not None}
        return files

    def running(self) -> list[Machine]:
        """The machines that have a process."""
        return [machine for machine in self if machine.state not in AT_REST]
