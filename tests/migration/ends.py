"""The two ends of a migration: real QEMUs, their guests, and all of a source that a failed migration must leave as it was."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from qmpd.errors import QemuSilent
from qmpd.migration import capabilities
from qmpd.migration.addresses import UnixAddress
from qmpd.migration.capabilities import Dials
from qmpd.migration.incoming import Endpoint, Listen, listen, settle, wait_loaded
from qmpd.migration.mirror import DiskCopy
from qmpd.migration.outgoing import Outgoing, Sending, look
from qmpd.migration.progress import Progress
from qmpd.migration.qemu import PREFIX
from qmpd.migration.tls import ClientTls
from qmpd.monitor import Monitor
from tests.guests.build import Guest
from tests.guests.trace import Trace, check_trace
from tests.process.emulator import PATIENCE_S, QEMU, Emulator, Emulators

#: The machine type that every QEMU from 7.2 on has.
MACHINE: Final = "pc-i440fx-7.2"
UUID: Final = "6f1f5d4c-7d0a-4d5c-9b0e-0d6f3a2b1c00"
#: A QEMU that has not answered by then lost what its first client said (see tests/qmp/conftest.py): another one is started.
FIRST_ANSWER_S: Final = 20.0
STARTS: Final = 3


@dataclass(frozen=True)
class End:
    """One of the two."""

    emulator: Emulator
    monitor: Monitor
    serial: Path

    async def status(self) -> str:
        """QEMU's run state."""
        answer = await self.monitor.execute("query-status")
        assert isinstance(answer, dict)
        return str(answer["status"])

    async def everything(self) -> dict[str, object]:
        """All that a migration changes in a QEMU, for comparison."""
        asked = ("query-migrate-capabilities", "query-migrate-parameters", "query-jobs", "query-block-jobs", "query-status")
        found = {command: await self.monitor.execute(command) for command in asked}
        found["objects"] = await self.monitor.execute("qom-list", {"path": "/objects"})
        nodes = await self.monitor.execute("query-named-block-nodes", {"flat": True})
        assert isinstance(nodes, list)
        # QEMU 7.2 forgets a filter now and then (`mirror.drop_all`): out of the guest's way, and no test can have it otherwise.
        own = [node for node in nodes if not (node["node-name"].startswith(PREFIX) and node["node-name"].endswith("-filter"))]
        found["nodes"] = sorted((node["node-name"], node["drv"], node.get("active")) for node in own)
        return found


async def is_tidy(destination: End, launched: dict[str, object]) -> bool:
    """Whether nothing of a migration is left in a destination but its guest."""
    now = await destination.everything()
    changing = ("query-status", "nodes")  # the guest runs, and its disks are its own
    return {**now, **dict.fromkeys(changing)} == {**launched, **dict.fromkeys(changing)}


class Ends:
    """Starts them, in one directory."""

    def __init__(self, directory: Path, emulators: Emulators, owned: AsyncExitStack, guest: Guest) -> None:
        self.directory = directory
        self.kernel = guest.file
        self._emulators = emulators
        self._owned = owned
        self._count = 0

    async def start(self, *options: str, program: str = QEMU) -> End:
        """A QEMU that is halted before its first instruction."""
        self._count += 1
        serial = self.directory / f"serial{self._count}"
        further = ("-serial", f"file:{serial}", "-uuid", UUID, *options)
        for attempt in range(STARTS):
            emulator = await self._emulators.start(*further, machine=MACHINE, program=program)
            with suppress(QemuSilent):
                limit = PATIENCE_S if attempt == STARTS - 1 else FIRST_ANSWER_S
                return End(emulator, await self._owned.enter_async_context(emulator.session(deadline_s=limit)), serial)
            emulator.process.signal(signal.SIGKILL)  # it has the locks of the disks that the next one opens
            await emulator.process.wait()
        raise AssertionError("no QEMU answered")

    async def source(self, *options: str, program: str = QEMU) -> End:
        """A QEMU whose guest counts."""
        started = await self.start("-kernel", str(self.kernel), *options, program=program)
        await started.monitor.execute("cont")
        await self.printed(started, 400)
        return started

    async def destination(self, *options: str, program: str = QEMU) -> End:
        """A QEMU that waits for one."""
        return await self.start("-kernel", str(self.kernel), "-incoming", "defer", *options, program=program)

    async def printed(self, end: End, count: int) -> None:
        """Waits until the guest of this end has printed so many more bytes."""
        before = _size(end.serial)
        async with asyncio.timeout(PATIENCE_S):
            while _size(end.serial) < before + count:
                await asyncio.sleep(0.02)

    def trace(self, *ends: End) -> Trace:
        """What the guest printed at these ends, one after the other."""
        return check_trace(b"".join(end.serial.read_bytes() for end in ends))


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


async def moved(source: End, destination: End, wanted: Listen, tls: ClientTls | None = None, **further: object) -> Progress:
    """The whole way, as two daemons go it: the destination's guest runs at the end, the source's does not."""
    launched = await capabilities.read(destination.monitor)
    endpoint = await listen(destination.monitor, wanted)
    outgoing = await outgoing_to(source, endpoint, tls, agreed=wanted.agreed, **further)
    await attempt(outgoing)
    await wait_loaded(destination.monitor)
    figures = await outgoing.figures()
    await source.monitor.execute("quit")
    await go_on(destination, launched)
    return figures


async def go_on(destination: End, launched: Dials) -> None:
    """What a destination does once the machine is its own."""
    await destination.monitor.execute("cont")
    await settle(destination.monitor, launched)


def at(directory: Path, name: str = "migration") -> UnixAddress:
    """A socket to migrate through."""
    return UnixAddress(path=str(directory / name))


@asynccontextmanager
async def ends_in(directory: Path, emulators: Emulators, guest: Guest) -> AsyncIterator[Ends]:
    """Ends that are gone after the block."""
    async with AsyncExitStack() as owned:
        yield Ends(directory, emulators, owned, guest)


class GivenUpError(Exception):
    """Somebody changed their mind."""


Step = Callable[[str], Awaitable[None]]


async def no_matter(_step: str) -> None:
    """Nothing happens at any step."""


def giving_up_at(wanted: str) -> Step:
    """The mind is changed at this step."""

    async def step(name: str) -> None:
        if name == wanted:
            raise GivenUpError

    return step


def signalling_at(wanted: str, end: End, number: signal.Signals) -> Step:
    """A process gets a signal at this step."""

    async def step(name: str) -> None:
        if name == wanted:
            end.emulator.process.signal(number)

    return step


async def outgoing_to(source: End, endpoint: Endpoint, tls: ClientTls | None = None, **further: object) -> Outgoing:
    """A migration to there, of all disks that are awaited."""
    disks = tuple(DiskCopy(node=name, export=name) for name in endpoint.disks)
    plain = Sending(memory=endpoint.memory, disks_at=endpoint.disks_at, disks=disks, tls=tls)
    return Outgoing(source.monitor, msgspec.structs.replace(plain, **further), await look(source.monitor))


async def attempt(outgoing: Outgoing, step: Step = no_matter) -> None:
    """A source's whole way. `step` is told `prepared`, each state of QEMU's, `halted` and `arrived`."""

    async def report(progress: Progress) -> None:
        await step(progress.status)

    async with outgoing:
        await outgoing.prepare()
        await step("prepared")
        await outgoing.send(report)
        await step("halted")
        await outgoing.switch_over()
        await step("arrived")


@asynccontextmanager
async def unchanged(source: End) -> AsyncIterator[None]:
    """Whatever happens in the block, afterwards the source is what it was."""
    state = await source.status()
    was = await source.everything()
    yield
    now = await source.everything()
    if state != "running" and await source.status() == "postmigrate":
        # Until 9.0 QEMU does not remember that the guest was not running; `cont` is possible all the same.
        now["query-status"] = was["query-status"]
    assert now == was
    if state != "running":
        await source.monitor.execute("cont")


@asynccontextmanager
async def undisturbed(ends: Ends, source: End) -> AsyncIterator[None]:
    """The same, and its guest has lost nothing and goes on."""
    async with unchanged(source):
        yield
    await ends.printed(source, 400)
    trace = ends.trace(source)
    assert (trace.whole, trace.boots) == (True, 1), trace


async def wait_status(end: End, wanted: str) -> None:
    """Waits until the migration is in this state."""
    while True:
        answer = await end.monitor.execute("query-migrate")
        assert isinstance(answer, dict)
        if answer.get("status") == wanted:
            return
        await asyncio.sleep(0.02)
