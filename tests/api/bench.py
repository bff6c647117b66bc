"""A small service for tests of the transport: real events, real consoles, and machines that are nothing but their names."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, cast
from uuid import uuid4

from qmpd import segments
from qmpd.access import Caller
from qmpd.audit import Audit, open_audit
from qmpd.bus import Bus, open_bus
from qmpd.console import Console
from qmpd.database import open_database
from qmpd.errors import AlreadyExists, NotFound, WrongState
from qmpd.filewatch import FileWatch, watching
from qmpd.journal import Journal, open_journal
from qmpd.lifecycle import State
from qmpd.spec import MachineSpec
from qmpd.views import (
    EventPage,
    MachineList,
    MachineView,
    QmpAnswer,
    QmpRequest,
    StartRequest,
    StopView,
    ValidationReport,
    Version,
)
from tests.api.wire import PATIENCE_S

if TYPE_CHECKING:
    from qmpd.service import Service


class Guest:
    """What QEMU is to a serial port: it appends what the guest prints to the log, and takes what is typed from the FIFO."""

    def __init__(self, piece: Path, fifo: Path) -> None:
        self._piece = piece
        self._fifo = os.open(fifo, os.O_RDWR | os.O_NONBLOCK)
        self._typed = b""
        self._came = asyncio.Event()
        asyncio.get_running_loop().add_reader(self._fifo, self._take)

    async def prints(self, data: bytes) -> None:
        """The guest writes to its port."""
        with self._piece.open("ab") as log:
            log.write(data)

    def unplug(self) -> None:
        """QEMU is gone."""
        asyncio.get_running_loop().remove_reader(self._fifo)
        os.close(self._fifo)

    async def reads(self, count: int) -> bytes:
        """What was typed, once so much was."""
        async with asyncio.timeout(PATIENCE_S):
            while len(self._typed) < count:
                self._came.clear()
                await self._came.wait()
        taken, self._typed = self._typed[:count], self._typed[count:]
        return taken

    def _take(self) -> None:
        self._typed += os.read(self._fifo, 65_536)
        self._came.set()


class Bench:
    """`gate` holds every `start` until it is set; `calls` counts what reached the service; `bug` is raised where it is set."""

    def __init__(self, journal: Journal, bus: Bus, watch: FileWatch, directory: Path, audit: Audit) -> None:
        self.audit = audit
        self.journal = journal
        self.bus = bus
        self.gate = asyncio.Event()
        self.gate.set()
        self.calls: list[str] = []
        self.callers: list[Caller] = []
        self.bug: Exception | None = None
        self.log = segments.begin(str(directory / "console.log"), 0)
        self.port = Console(str(directory / "console.log"), watch)
        self._serial = directory / "serial"
        for end in (".out", ".in"):
            # A bench may be opened in the directory of an earlier one, as a daemon is.
            self._serial.with_suffix(end).unlink(missing_ok=True)
        self._serial.with_suffix(".out").symlink_to(self.log)
        os.mkfifo(self._serial.with_suffix(".in"))
        self._machines: dict[str, MachineView] = {}

    def version(self) -> Version:
        if self.bug is not None:
            raise self.bug
        return Version(version="0", pid=1, started_at="2000-01-01T00:00:00.000Z", machines_running=0)

    async def validate(self, spec: MachineSpec) -> ValidationReport:
        self.calls.append(f"validate {spec.name}")
        return ValidationReport(ok=True)

    async def create(self, spec: MachineSpec, *, start: bool = False, paused: bool = False) -> MachineView:
        self.calls.append(f"create {spec.name}")
        await self.gate.wait()
        if self.bug is not None:
            raise self.bug
        if spec.name in self._machines:
            raise AlreadyExists(f"there is a machine {spec.name!r} already")
        state = State.PAUSED if paused else State.RUNNING if start else State.STOPPED
        self._machines[spec.name] = view_of(spec, state)
        return self._machines[spec.name]

    def machines(self, labels: Mapping[str, str], state: State | None, _caller: Caller) -> MachineList:
        self.calls.append(f"machines {dict(labels)} {state}")
        return MachineList(machines=tuple(self._machines.values()), event=self.bus.last)

    def machine(self, name: str) -> MachineView:
        if name not in self._machines:
            raise NotFound(f"there is no machine {name!r}")
        return self._machines[name]

    async def replace(self, name: str, spec: MachineSpec, revision: int | None) -> MachineView:
        self.calls.append(f"replace {name} {revision}")
        return self.machine(name)

    async def delete(self, name: str, revision: int | None) -> None:
        self.calls.append(f"delete {name} {revision}")
        self.machine(name)
        del self._machines[name]

    async def start(self, name: str, request: StartRequest) -> MachineView:
        self.calls.append(f"start {name} {request.paused}")
        await self.gate.wait()
        raise WrongState("it runs", state="running", allowed=["stopped"])

    async def kill(self, name: str) -> StopView:
        self.calls.append(f"kill {name}")
        return StopView(machine=self.machine(name), method="already-stopped", clean=True)

    async def qmp(self, name: str, request: QmpRequest, caller: Caller) -> QmpAnswer:
        self.calls.append(f"qmp {name} {request.execute}")
        self.callers.append(caller)
        return QmpAnswer(result={"text": "a\ud800b", "arguments": request.arguments})

    def console(self, name: str, port: int | None) -> Console:
        if port not in {None, 0}:
            raise NotFound("there is no such port")
        return self.port

    async def events_page(self, since: int, limit: int, machine: str | None) -> EventPage:
        return await self.journal.page(since, limit, machine)

    @property
    def upkeep(self) -> Bench:
        return self

    async def metrics(self) -> bytes:
        return b"qmpd_machines 0\n"

    def fill(self, count: int) -> None:
        """Puts so many machines there."""
        for index in range(count):
            spec = MachineSpec(name=f"machine-{index:04}", board="riscv64-virt", labels={"row": str(index)})
            self._machines[spec.name] = view_of(spec, State.RUNNING)

    @asynccontextmanager
    async def guest(self) -> AsyncIterator[Guest]:
        """A machine that runs: its serial port is connected. Leaving the block stops it."""
        guest = Guest(self.log, self._serial.with_suffix(".in"))
        try:
            async with self.port.connected(str(self._serial)):
                yield guest
        finally:
            guest.unplug()

    def as_service(self) -> Service:
        """The same, for who wants the type; what is missing here is not called by the tests that use it."""
        return cast("Service", self)


def view_of(spec: MachineSpec, state: State) -> MachineView:
    """What a machine of this definition looks like."""
    return MachineView(
        name=spec.name,
        uuid=str(uuid4()),
        board=spec.board,
        arch="riscv64",
        machine="virt",
        revision=7,
        state=state,
        since="2000-01-01T00:00:00.000Z",
        cpus=spec.cpu.count or 1,
        memory_mib=spec.memory_mib or 128,
        labels=dict(spec.labels),
    )


@asynccontextmanager
async def opened_bench(directory: Path, *, kept_events: int = 1000) -> AsyncIterator[Bench]:
    """A bench whose database is in `directory`."""
    async with AsyncExitStack() as stack:
        database = await stack.enter_async_context(open_database(directory))
        journal = await stack.enter_async_context(open_journal(database, kept_events=kept_events))
        bus = await stack.enter_async_context(open_bus(journal))
        audit = await stack.enter_async_context(open_audit(directory, 1 << 20))
        yield Bench(journal, bus, stack.enter_context(watching()), directory, audit)
