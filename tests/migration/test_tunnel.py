"""A migration through the API's connection: what goes in comes out, in both directions, and nobody else gets in."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import msgspec
import pytest

from qmpd.access import Caller
from qmpd.errors import Busy, Invalid, MigrationFailed, NotFound, PeerRefused, PeerUnavailable, WrongState
from qmpd.lifecycle import State
from qmpd.migration import mirror
from qmpd.migration.protocol import Channel
from qmpd.migration.qemu import PREFIX
from qmpd.migration.tunnel import CHUNK_BYTES, Meter, carry, entrances, explained, reached, tunnelling
from qmpd.migrationviews import DiskChoice, Goal, MigrateRequest
from qmpd.spec import BlankDisk, ImageDisk
from qmpd.views import JobView
from qmpd_api.dialling import dialled
from tests.api.lab import Daemon
from tests.guests.build import Guest
from tests.guests.ring import missing, read_ring
from tests.machines import copy_of, laden, spec_of
from tests.migration.test_moves import HUNG_S, LOOK_S, ended, known, moved, pair, printed
from tests.migration.test_moving_disks import written

MIB = 1024 * 1024
#: What a tunnel may hold of one direction: its own chunks and buffers, and those of the kernel's sockets.
HELD = 2 * MIB


class Pipe:
    """One end of a stream between daemons: pieces with their lengths before them, over a connection that may break."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    async def send(self, data: bytes) -> None:
        self._writer.write(len(data).to_bytes(4, "big") + data)
        await self._writer.drain()

    async def receive(self) -> bytes:
        try:
            return await self._reader.readexactly(int.from_bytes(await self._reader.readexactly(4), "big"))
        except asyncio.IncompleteReadError as error:
            raise ConnectionResetError("gone") from error

    def close(self) -> None:
        self._writer.transport.abort()


async def pipes() -> tuple[Pipe, Pipe]:
    one, other = [Pipe(*await asyncio.open_unix_connection(sock=end)) for end in socket.socketpair()]
    return one, other


async def carried(end: socket.socket, stream: Pipe, meter: Meter) -> bool:
    """As either daemon does it: the stream does not outlast the connection."""
    try:
        return await carry(await asyncio.open_unix_connection(sock=end), stream, meter)
    finally:
        stream.close()


class Through:
    """Two ends of QEMU's, and what lies between: the two daemons' halves of a tunnel."""

    def __init__(
        self, ends: tuple[socket.socket, socket.socket], meters: tuple[Meter, Meter], halves: tuple[asyncio.Task[bool], ...]
    ) -> None:
        self.here, self.there = ends
        self.meters = meters
        self.halves = halves


@asynccontextmanager
async def through() -> AsyncIterator[Through]:
    ours, theirs = zip(*(socket.socketpair() for _ in range(2)), strict=True)
    for end in ours:
        end.setblocking(False)
    meters = (Meter(), Meter())
    async with asyncio.TaskGroup() as group:
        streams = await pipes()
        halves = [group.create_task(carried(*half), name="half") for half in zip(theirs, streams, meters, strict=True)]
        yield Through(ours, meters, tuple(halves))
        for end in ours:
            end.close()


async def read_all(end: socket.socket) -> bytes:
    pieces = []
    while piece := await asyncio.get_running_loop().sock_recv(end, CHUNK_BYTES):
        pieces.append(piece)
    return b"".join(pieces)


async def test_what_goes_in_comes_out_and_who_has_said_all_still_hears() -> None:
    loop = asyncio.get_running_loop()
    said, answer = os.urandom(5 * MIB + 7), os.urandom(MIB + 3)
    async with asyncio.timeout(HUNG_S), through() as tunnel:

        async def speak() -> None:
            await loop.sock_sendall(tunnel.here, said)
            tunnel.here.shutdown(socket.SHUT_WR)

        speaking = asyncio.create_task(speak(), name="speak")
        assert await read_all(tunnel.there) == said
        await speaking
        await loop.sock_sendall(tunnel.there, answer)  # the other direction outlasts the first
        tunnel.there.shutdown(socket.SHUT_WR)
        assert await read_all(tunnel.here) == answer
        assert [await half for half in tunnel.halves] == [True, True]
    assert (tunnel.meters[0].sent, tunnel.meters[0].received) == (len(said), len(answer))
    assert (tunnel.meters[1].sent, tunnel.meters[1].received) == (len(answer), len(said))


async def press(end: socket.socket) -> None:
    """Writes far more than anybody may hold."""
    await asyncio.get_running_loop().sock_sendall(end, bytes(32 * MIB))


async def test_who_does_not_read_stops_who_writes_and_little_is_held_in_between() -> None:
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(HUNG_S), through() as tunnel:
        pressing = asyncio.create_task(press(tunnel.here), name="press")
        done, _ = await asyncio.wait([pressing], timeout=1)
        assert not done
        pressing.cancel()
        await asyncio.wait([pressing])
        assert tunnel.meters[0].sent < HELD
        # The other direction goes on all the same.
        await loop.sock_sendall(tunnel.there, b"answer")
        assert await loop.sock_recv(tunnel.here, 64) == b"answer"
        for end in (tunnel.here, tunnel.there):
            end.close()
        await asyncio.wait(tunnel.halves)


async def test_what_breaks_on_the_way_breaks_both_ends() -> None:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    stream, other = await pipes()
    meter = Meter()
    async with asyncio.timeout(HUNG_S):
        carrying = asyncio.create_task(carried(theirs, stream, meter), name="carry")
        other.close()
        assert await asyncio.get_running_loop().sock_recv(ours, 64) == b""
        assert not await carrying
    assert meter.problem
    ours.close()


async def test_a_failure_says_what_was_wrong_with_the_tunnel() -> None:
    async def fail() -> None:
        raise MigrationFailed("it failed")

    meter = Meter()
    with pytest.raises(MigrationFailed, match=r"^it failed$"):
        await explained(fail(), meter)
    meter.problem = "host gone"
    with pytest.raises(MigrationFailed, match=r"^it failed \(the tunnel: host gone\)$"):
        await explained(fail(), meter)


def mode_of(path: str) -> int | None:
    return Path(path).stat().st_mode & 0o777 if Path(path).exists() else None


async def test_only_the_qemu_that_is_meant_gets_in(short_directory: Path) -> None:
    path = str(short_directory / "t.sock")
    led: list[Channel] = []

    @asynccontextmanager
    async def dial(channel: Channel) -> AsyncIterator[Pipe]:
        led.append(channel)
        stream, other = await pipes()
        try:
            yield stream
        finally:
            stream.close()
            other.close()

    meter = Meter()
    stranger = "import socket, sys; s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); print(s.recv(1) == b'')"
    async with asyncio.timeout(HUNG_S), entrances({"memory": path}, os.getpid(), tunnelling(dial, meter), meter):
        assert mode_of(path) == 0o600
        asked = await asyncio.to_thread(subprocess.run, [sys.executable, "-c", stranger, path], capture_output=True, text=True, check=True)
        assert asked.stdout == "True\n"
        assert (led, meter.connections) == ([], 0)
        reader, writer = await asyncio.open_unix_connection(path)
        while not led:
            await asyncio.sleep(LOOK_S)
    assert await reader.read() == b""
    writer.close()
    assert (led, meter.connections) == (["memory"], 1)
    assert mode_of(path) is None


async def test_a_peer_that_does_not_open_the_tunnel_ends_the_connection_and_is_named(short_directory: Path) -> None:
    path = str(short_directory / "t.sock")

    @asynccontextmanager
    async def dial(_channel: Channel) -> AsyncIterator[Pipe]:
        raise PeerUnavailable("b is away")
        yield (await pipes())[0]

    meter = Meter()
    async with asyncio.timeout(HUNG_S), entrances({"memory": path}, os.getpid(), tunnelling(dial, meter), meter):
        for _ in range(2):
            reader, writer = await asyncio.open_unix_connection(path)
            assert await reader.read() == b""
            writer.close()
    assert (meter.problem, meter.connections) == ("b is away", 2)


async def test_a_qemu_that_does_not_listen_is_said_not_to(short_directory: Path) -> None:
    with pytest.raises(MigrationFailed, match="does not listen"):
        async with reached(str(short_directory / "nothing.sock")):
            pass


# Machines.


@pytest.fixture
def counting(guests: dict[str, Guest], short_directory: Path) -> Guest:
    return copy_of(guests["x86_64-q35"], short_directory)


@pytest.mark.qemu
@pytest.mark.parametrize("channels", [0, 3])
async def test_a_machine_moves_through_the_api_there_and_back(short_directory: Path, counting: Guest, channels: int) -> None:
    async with pair(short_directory) as (a, b):
        await a.service.create(spec_of(counting, "counter"), start=True)
        await printed(a, "counter", 300)
        for source, there in ((a, b), (b, a)):
            report = await moved(source, "counter", there.name, tunnel=True, channels=channels)
            assert (report.tunnelled, report.encrypted, report.owner) == (True, True, "destination")
            assert report.tunnelled_bytes >= report.transferred_bytes > 0
            await printed(there, "counter", 300)
        assert not [path for path in (short_directory / "a/r/m/counter").iterdir() if path.name.startswith(("to-", "in-"))]
        await a.service.kill("counter")


@pytest.mark.qemu
async def test_disks_come_through_the_api_too(short_directory: Path, guests: dict[str, Guest]) -> None:
    guest = copy_of(guests["x86_64-pc-blocks"], short_directory)
    target = short_directory / "there.raw"
    spec = spec_of(guest, "writer")
    async with pair(short_directory) as (a, b):
        await a.service.create(
            msgspec.structs.replace(spec, disks=(*spec.disks, BlankDisk(size_mib=8))),
            start=True,
        )
        await written(a, "writer", 30)
        report = await moved(a, "writer", "b", tunnel=True, disks=[{"disk": 0, "how": "copy", "path": str(target)}])
        assert [disk.how for disk in report.disks] == ["copied", "copied"]
        assert report.tunnelled_bytes > report.transferred_bytes + report.disks[0].bytes // 2  # what is all zeroes goes as a word
        last = await written(b, "writer", 30)
        await b.service.stop("writer")
        ring = read_ring(target)
        assert ring.newest >= last
        assert (ring.torn, missing(ring, last)) == ((), ())


async def slowly(a: Daemon, b: Daemon, name: str) -> tuple[JobView, str]:
    """Begins to move a laden machine through a tunnel, so slowly that it does not end: its job and id when memory is on its way."""
    job = await a.service.migration.migrate(name, MigrateRequest(peer=b.name, tunnel=True, goal=Goal(bandwidth_mib_s=1)))
    async with asyncio.timeout(HUNG_S):
        while not any(view.progress is not None and view.progress.transferred_bytes for view in a.service.migration.list().migrations):
            await asyncio.sleep(LOOK_S)
    return job, a.service.migration.list().migrations[0].id


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(HUNG_S):
        while not condition():
            await asyncio.sleep(LOOK_S)


@pytest.mark.qemu
async def test_a_peer_gets_into_its_own_tunnel_alone_and_not_more_often_than_needed(short_directory: Path, counting: Guest) -> None:
    async with pair(short_directory) as (a, b):
        await a.service.create(laden(spec_of(counting, "counter"), short_directory), start=True)
        job, migration = await slowly(a, b, "counter")
        for caller, wanted in (
            (Caller(user="peer:c", role="peer", peer="c"), migration),
            (Caller(user="peer:a", role="peer", peer="a"), "0" * 16),
        ):
            with pytest.raises(NotFound):
                async with b.service.migration.tunnelled(caller, wanted, "memory"):
                    pass
        source = Caller(user="peer:a", role="peer", peer="a")
        for channel in ("memory", "disks"):
            with pytest.raises(Busy):
                async with b.service.migration.tunnelled(source, migration, channel):
                    pass
        async with dialled(next(iter(a.service.peering.peers)), str(a.pki.directory)) as client:
            with pytest.raises(PeerRefused, match="are open already"):
                async with client.tunnel(migration, "memory"):
                    pass
            with pytest.raises(PeerRefused, match="WebSocket"):
                await client.connection.fetch("GET", f"/v1/peer/migrations/{migration}/tunnel", query={"channel": "memory"})
        await a.service.cancel(job.id)
        await until(lambda: known(b, "counter") is None)
        with pytest.raises(WrongState):
            async with b.service.migration.tunnelled(source, migration, "memory"):
                pass
        assert a.service.machine("counter").state is State.RUNNING
        await printed(a, "counter", 100)
        await a.service.kill("counter")


@pytest.mark.qemu
async def test_a_tunnel_that_breaks_leaves_the_machine_where_it_is(short_directory: Path, counting: Guest) -> None:
    async with pair(short_directory) as (a, b):
        await a.service.create(laden(spec_of(counting, "counter"), short_directory), start=True)
        job, migration = await slowly(a, b, "counter")
        assert a.service.migration._departures.under_way(migration) is not None
        (broken,) = [task for task in asyncio.all_tasks() if task.get_name() == "entrance:memory:1"]
        broken.cancel()
        view = await ended(a, job)
        assert view.error is not None
        assert view.error["code"] == "migration_failed"
        await until(lambda: known(b, "counter") is None)
        assert a.service.machine("counter").state is State.RUNNING
        await printed(a, "counter", 100)
        await moved(a, "counter", "b", tunnel=True)
        await b.service.kill("counter")


@pytest.mark.qemu
async def test_a_tunnel_full_of_a_disk_that_nobody_takes_is_broken_and_the_machine_stays(
    short_directory: Path, guests: dict[str, Guest], monkeypatch: pytest.MonkeyPatch
) -> None:
    """QEMU does not let go of a copy whose Unix socket is full: the tunnel is closed before it is asked to."""
    monkeypatch.setattr(mirror, "STALL_LIMIT_S", 3.0)
    guest = copy_of(guests["x86_64-pc-blocks"], short_directory)
    spec = spec_of(guest, "writer")
    disk = short_directory / "full.raw"
    disk.write_bytes(os.urandom(64 * MIB))
    async with pair(short_directory) as (a, b):
        await a.service.create(msgspec.structs.replace(spec, disks=(*spec.disks, ImageDisk(path=str(disk), format="raw"))), start=True)
        before = await nodes(a, "writer")
        targets = [{"disk": index, "how": "copy", "path": str(short_directory / f"there{index}.raw")} for index in range(2)]
        request = MigrateRequest(
            peer="b", tunnel=True, goal=Goal(bandwidth_mib_s=8), disks=msgspec.convert(targets, tuple[DiskChoice, ...])
        )
        job = await a.service.migration.migrate("writer", request)
        await until(lambda: any(view.progress and view.progress.disk_total_bytes for view in a.service.migration.list().migrations))
        frozen = b.service._registry.get("writer").session.process.identity.pid
        os.kill(frozen, signal.SIGSTOP)
        try:
            view = await ended(a, job)
            assert view.error is not None
            assert view.error["code"] == "migration_failed"
            assert await nodes(a, "writer") == before
            assert await a.service._registry.get("writer").session.execute("query-jobs") == []
            await written(a, "writer", 5)
        finally:
            with suppress(ProcessLookupError):  # its daemon has ended it
                os.kill(frozen, signal.SIGCONT)
        await until(lambda: known(b, "writer") is None)
        await a.service.kill("writer")


async def nodes(there: Daemon, name: str) -> list[str]:
    """The block nodes of a machine, but for a filter that QEMU 7.2 forgets now and then (`mirror.drop_all`)."""
    found = await there.service._registry.get(name).session.execute("query-named-block-nodes", {"flat": True})
    assert isinstance(found, list)
    nodes = (str(node["node-name"]) for node in found)
    return sorted(node for node in nodes if not (node.startswith(PREFIX) and node.endswith("-filter")))


@pytest.mark.qemu
async def test_what_cannot_go_through_a_tunnel_is_refused_before_anything_is_done(short_directory: Path, counting: Guest) -> None:
    async with pair(short_directory) as (a, b):
        await a.service.create(spec_of(counting, "counter"), start=True)
        with pytest.raises(Invalid, match="tunnel"):
            await a.service.migration.migrate("counter", MigrateRequest(peer="b", tunnel=True, goal=Goal(deadline_s=1, then="postcopy")))
        assert known(b, "counter") is None
        await a.service.kill("counter")
