"""What a machine printed is read on its new host like on the old one: every byte once, under its number, from the first boot on."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest

from qmpd.access import Caller
from qmpd.errors import NotFound, WrongState
from qmpd.failpoint import arm
from qmpd.journal import PAST
from qmpd.lifecycle import State
from qmpd.migrationviews import MigrateRequest
from tests.api.lab import LOOPBACK, Daemon, authority, daemon, host, peer, reserved
from tests.conftest import end_machines
from tests.guests.build import Guest
from tests.guests.trace import check_trace
from tests.machines import copy_of, spec_of
from tests.migration.test_moves import HUNG_S, LOOK_S, known, moved, pair, printed

pytestmark = pytest.mark.qemu

WHOLE = 64 << 20


@pytest.fixture
def counting(guests: dict[str, Guest], short_directory: Path) -> Guest:
    """A guest that counts, on a disk of its own."""
    return copy_of(guests["x86_64-q35"], short_directory)


class Hosts:
    """Two daemons that are each other's peers, and can be restarted."""

    def __init__(self, directory: Path, ports: dict[str, int]) -> None:
        self._directory = directory
        root = authority(directory / "ca")
        self._ports = ports
        self._pki = {name: host(root, directory / name / "pki", name) for name in self._ports}
        self._stacks: dict[str, AsyncExitStack] = {}
        self.daemons: dict[str, Daemon] = {}

    async def start(self, name: str) -> Daemon:
        """Starts a daemon, which finds what one before it left."""
        stack = self._stacks[name] = AsyncExitStack()
        listener = stack.enter_context(socket.create_server((LOOPBACK, self._ports[name])))
        there = [peer(other, number) for other, number in self._ports.items() if other != name]
        self.daemons[name] = await stack.enter_async_context(daemon(name, self._directory / name, self._pki[name], listener, there))
        return self.daemons[name]

    async def stop(self, name: str) -> None:
        """Ends one."""
        await self._stacks.pop(name).aclose()

    async def restart(self, name: str) -> Daemon:
        """Ends one, and starts the next."""
        await self.stop(name)
        return await self.start(name)


@asynccontextmanager
async def hosts(directory: Path) -> AsyncIterator[Hosts]:
    """Both, running; no failpoint is armed afterwards."""
    with reserved() as first, reserved() as second:
        made = Hosts(directory, {"a": first, "b": second})
        try:
            for name in ("a", "b"):
                await made.start(name)
            yield made
        finally:
            arm("")
            for name, there in made.daemons.items():
                await end_machines(there.service)
                await made.stop(name)


def phase_at(there: Daemon) -> str:
    """How far the newest migration is here."""
    migrations = there.service.migration.list().migrations
    return migrations[0].phase if migrations else ""


async def owned(there: Daemon, name: str) -> None:
    """Returns when the machine runs here, and nothing is left to be done for it."""
    async with asyncio.timeout(HUNG_S):
        while (view := known(there, name)) is None or view.state is not State.RUNNING or view.operation is not None:
            await asyncio.sleep(LOOK_S)


async def gone(there: Daemon, name: str) -> None:
    """Returns when the machine is not known here any more, and its files are gone: its name is taken until then."""
    async with asyncio.timeout(HUNG_S):
        while name in there.service._registry.names:
            await asyncio.sleep(LOOK_S)


async def log_of(there: Daemon, name: str, port: int | None = None) -> tuple[int, bytes]:
    """All that is kept of a machine's log, and where it begins; there must be no gap in it."""
    console = there.service.console(name, port)
    begin = at = await console.start()
    pieces: list[bytes] = []
    while True:
        found, data = await console.read(at, WHOLE)
        if not data:
            return begin, b"".join(pieces)
        if not pieces:  # its head may have been dropped just now
            begin = at = found
        assert found == at
        pieces.append(data)
        at += len(data)


async def test_a_log_has_no_break_after_three_moves(short_directory: Path, counting: Guest) -> None:
    async with pair(short_directory) as (a, b):
        await a.service.create(spec_of(counting, "counter"), start=True)
        await printed(a, "counter", 500)
        data = b""
        for source, there in ((a, b), (b, a), (a, b)):
            await moved(source, "counter", there.name)
            assert not (short_directory / source.name / "s/machines/counter").exists()
            await printed(there, "counter", 100)
            before = data
            begin, data = await log_of(there, "counter")
            assert begin == 0
            assert data.startswith(before)
        trace = check_trace(data)
        assert (trace.boots, trace.breaks) == (1, ())
        assert trace.characters > 700
        assert len(list((short_directory / "b/s/machines/counter").glob("serial0.log.*"))) >= 2
        await b.service.kill("counter")


async def test_a_log_at_its_cap_goes_on_under_its_numbers(short_directory: Path, guests: dict[str, Guest]) -> None:
    guest = copy_of(guests["x86_64-q35-flood"], short_directory)
    cap = 64 * 1024
    async with pair(short_directory) as (a, b):
        for there in (a, b):
            there.service._registry.log_cap_bytes = cap
        await a.service.create(spec_of(guest, "flood"), start=True)
        await printed(a, "flood", 3 * cap)
        begin = end = 0
        for source, there in ((a, b), (b, a), (a, b)):
            await moved(source, "flood", there.name)
            await printed(there, "flood", 1000)
            await there.service.pause("flood")  # while it prints, there is always more to read
            begin, data = await log_of(there, "flood")
            await there.service.resume("flood")
            assert begin + len(data) > end
            assert check_trace(data).breaks == ()
            end = begin + len(data)
        assert begin > 0
        await b.service.kill("flood")


@pytest.mark.parametrize("point", ["migration-performing-written", "ownership-give", "ownership-given", "migration-moved-written"])
async def test_a_log_is_whole_when_the_source_is_restarted(short_directory: Path, counting: Guest, point: str) -> None:
    async with hosts(short_directory) as both:
        a, b = both.daemons["a"], both.daemons["b"]
        await a.service.create(spec_of(counting, "counter"), start=True)
        await printed(a, "counter", 300)
        arm(f"{point}:hang")
        await a.service.migration.migrate("counter", MigrateRequest(peer="b"))
        phase = {"ownership-give": "performing", "ownership-given": "given"}.get(point, point.split("-")[1])
        async with asyncio.timeout(HUNG_S):
            while phase_at(a) != phase or (point == "ownership-give" and phase_at(b) != "loaded"):
                await asyncio.sleep(LOOK_S)
        arm("")
        await both.stop("a")
        a = await both.start("a")
        kept = point in {"migration-performing-written", "ownership-give"}
        there, other = (a, b) if kept else (b, a)
        await gone(other, "counter")
        await owned(there, "counter")
        await printed(there, "counter", 100)
        begin, data = await log_of(there, "counter")
        assert (begin, check_trace(data).breaks) == (0, ())
        await there.service.kill("counter")


@pytest.mark.parametrize(
    "point",
    [
        "peer-answered:error@4",
        "migration-log-renumber:error@1",
        "migration-log-relink:error@1",
        "migration-log-place:error@1",
        "migration-log-write:error@1",
        "ownership-take:error@1",
    ],
)
async def test_a_log_is_whole_whatever_has_to_be_done_twice(short_directory: Path, counting: Guest, point: str) -> None:
    async with hosts(short_directory) as both:
        a, b = both.daemons["a"], both.daemons["b"]
        await a.service.create(spec_of(counting, "counter"), start=True)
        await printed(a, "counter", 300)
        arm(point)
        await moved(a, "counter", "b")
        await printed(b, "counter", 100)
        begin, data = await log_of(b, "counter")
        assert (begin, check_trace(data).breaks) == (0, ())
        await b.service.kill("counter")


async def test_nobody_hands_in_what_is_not_missing(short_directory: Path, counting: Guest) -> None:
    async with pair(short_directory) as (a, b):
        await a.service.create(spec_of(counting, "counter"), start=True)
        await printed(a, "counter", 200)
        report = await moved(a, "counter", "b")
        source = Caller(user="peer:a", role="peer", peer="a")
        before = await log_of(b, "counter")
        await b.service.items.put(source, report.id, "log-0", 100, b"x" * 50)
        await b.service.items.put(source, report.id, "log-0", 1 << 40, b"x" * 50)
        assert (await log_of(b, "counter"))[1].startswith(before[1])
        assert check_trace((await log_of(b, "counter"))[1]).breaks == ()
        with pytest.raises(NotFound):
            await b.service.items.put(source, report.id, "vars", 0, b"x")
        with pytest.raises(NotFound):
            await b.service.items.put(Caller(user="peer:c", role="peer", peer="c"), report.id, "log-0", 0, b"x")
        await moved(b, "counter", "a")
        with pytest.raises(WrongState):
            await b.service.items.put(source, report.id, "log-0", 0, b"x")
        await a.service.kill("counter")


async def test_what_happened_on_one_host_is_read_on_the_next(short_directory: Path, counting: Guest) -> None:
    async with pair(short_directory) as (a, b):
        await a.service.create(spec_of(counting, "counter"), start=True)
        await printed(a, "counter", 100)
        await moved(a, "counter", "b")
        await moved(b, "counter", "a")
        page = await a.service.events_page(0, 1000, "counter")
        told = [(event.data["host"], event.data["kind"]) for event in page.events if event.kind == PAST]
        assert ("b", "machine.arrived") in told
        await a.service.kill("counter")
