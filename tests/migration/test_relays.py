"""Several connections, and one that is made anew: QEMU listens at no port for them, and the daemons pass on what it says."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest

from qmpd.errors import Invalid, MigrationFailed
from qmpd.migration import capabilities, relays
from qmpd.migration.addresses import TcpAddress, TcpRange, UnixAddress
from qmpd.migration.capabilities import Agreed
from qmpd.migration.door import Door, knock, opened
from qmpd.migration.incoming import Endpoint, Listen, receive_disks, receive_memory, wait_loaded
from qmpd.migration.ports import Ports, port_of
from qmpd.migration.relays import Relays, relayed
from qmpd.migration.tls import ClientTls, ServerTls
from qmpd.migration.tunnel import CHUNK_BYTES, Meter
from qmpd.migrationviews import Goal, MigrateRequest
from qmpd.tasks import alongside, background
from tests.guests.build import Guest
from tests.machines import spec_of
from tests.migration.ends import End, Ends, at, attempt, go_on, outgoing_to, undisturbed
from tests.migration.test_moves import HUNG_S, LOOK_S, counting, known, moved, pair, printed
from tests.migration.test_postcopy import ignored

__all__ = ["counting"]
HOST = "127.0.0.1"
PORTS = TcpRange(host=HOST, first=30000, last=30999)
MIB = 1024 * 1024
CHANNELS = 3


async def read_all(end: socket.socket) -> bytes:
    pieces = []
    while piece := await asyncio.get_running_loop().sock_recv(end, CHUNK_BYTES):
        pieces.append(piece)
    return b"".join(pieces)


@asynccontextmanager
async def between() -> AsyncIterator[tuple[socket.socket, socket.socket, asyncio.Task[None]]]:
    """Two ends, and what is between them."""
    (here, ours), (theirs, there) = socket.socketpair(), socket.socketpair()
    with here, ours, theirs, there:
        for end in (here, ours, theirs, there):
            end.setblocking(False)
        async with asyncio.timeout(HUNG_S), alongside(relayed(ours, theirs), "relay") as relaying:
            yield here, there, relaying


async def test_what_one_says_the_other_hears_and_who_has_said_all_still_hears() -> None:
    loop = asyncio.get_running_loop()
    said, answer = os.urandom(5 * MIB + 7), os.urandom(MIB // 16 + 3)
    async with between() as (here, there, relaying):

        async def speak() -> None:
            await loop.sock_sendall(here, said)
            here.shutdown(socket.SHUT_WR)

        async with alongside(speak(), "speak") as speaking:
            assert await read_all(there) == said
            await speaking
        await loop.sock_sendall(there, answer)
        there.shutdown(socket.SHUT_WR)
        assert await read_all(here) == answer
        await relaying


@pytest.mark.parametrize("cancelled", [False, True])
async def test_what_breaks_on_one_side_is_broken_on_the_other(cancelled: bool) -> None:
    async with between() as (here, there, relaying):
        pressing = asyncio.create_task(asyncio.get_running_loop().sock_sendall(there, bytes(32 * MIB)), name="press")
        done, _ = await asyncio.wait([pressing], timeout=1)
        assert not done  # little is held in between
        if cancelled:
            relaying.cancel()
        else:
            here.close()
        with pytest.raises(OSError, match=r"Broken pipe|reset"):
            await pressing
        await asyncio.wait([relaying])


async def test_one_who_is_awaited_again_is_not_awaited_where_it_was(short_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with background() as tasks:
        passing = Relays(tasks)
        path = str(short_directory / "nothing")
        doors = [await passing.await_again("one", lambda: opened(PORTS), path) for _ in range(2)]
        assert doors[0].secret != doors[1].secret
        with pytest.raises(MigrationFailed):
            await knock(TcpAddress(host=HOST, port=doors[0].port), doors[0].secret)
        assert is_open(doors[1])
        monkeypatch.setattr(relays, "AGAIN_S", LOOK_S)
        last = await passing.await_again("one", lambda: opened(PORTS), path)
        async with asyncio.timeout(HUNG_S):
            while is_open(last):
                await asyncio.sleep(LOOK_S)


async def test_one_who_is_awaited_again_needs_no_second_socket(short_directory: Path) -> None:
    with socket.create_server((HOST, 0)) as passed:
        passed.setblocking(False)
        ours = Ports([passed])
        async with background() as tasks:
            passing = Relays(tasks)
            for _ in range(3):
                door = await passing.await_again("one", lambda: opened(PORTS, ours.bound), str(short_directory / "nothing"))
                assert door.port == port_of(passed)


def is_open(door: Door) -> bool:
    with socket.socket() as caller:
        return caller.connect_ex((HOST, door.port)) == 0


# With QEMUs.


class World:
    """A destination that awaits several connections, and the way to it."""

    def __init__(self, door: Door, endpoint: Endpoint, meter: Meter) -> None:
        self.door, self.endpoint, self.meter = door, endpoint, meter


@asynccontextmanager
async def several(ends: Ends, source: End, destination: End, tls: ServerTls, door_too: bool = True) -> AsyncIterator[World]:
    """As two daemons do it. `door_too`: the destination's daemon lets the source in."""
    wanted = Listen(memory=at(ends.directory, "in"), tls=tls, agreed=Agreed(channels=CHANNELS))
    await receive_disks(destination.monitor, wanted)
    await receive_memory(destination.monitor, wanted)
    assert isinstance(wanted.memory, UnixAddress)
    out, meter = at(ends.directory, "out"), Meter("one of its connections")
    async with background() as tasks:
        passing = Relays(tasks)
        door = await opened(PORTS)
        if door_too:
            tasks.start(door.attend(passing.to(wanted.memory.path, "one"), 1 + CHANNELS), "attend")
        place = TcpAddress(host=HOST, port=door.port)
        async with passing.entrance(out.path, source.emulator.process.identity.pid, place, door.secret, meter):
            yield World(door, Endpoint(memory=out), meter)
        door.close()


@pytest.mark.qemu
async def test_a_guest_comes_over_several_connections_past_strangers(ends: Ends, server_tls: ServerTls, client_tls: ClientTls) -> None:
    source, destination = await ends.source(), await ends.destination()
    launched = await capabilities.read(destination.monitor)
    async with AsyncExitStack() as strangers, several(ends, source, destination, server_tls) as world:
        for words in (b"", b"\x16\x03\x01", bytes(64)):
            stranger = strangers.enter_context(socket.create_connection((HOST, world.door.port), HUNG_S))
            stranger.sendall(words)
        await attempt(await outgoing_to(source, world.endpoint, client_tls, agreed=Agreed(channels=CHANNELS)))
        await wait_loaded(destination.monitor)
        assert world.meter.connections == 1 + CHANNELS
        await source.monitor.execute("quit")
        await go_on(destination, launched)
        await ends.printed(destination, 400)
    assert ends.trace(source, destination).whole


@pytest.mark.qemu
async def test_a_peer_that_lets_nobody_in_is_named_and_the_guest_stays(ends: Ends, server_tls: ServerTls, client_tls: ClientTls) -> None:
    source, destination = await ends.source(), await ends.destination()
    async with undisturbed(ends, source), several(ends, source, destination, server_tls, door_too=False) as world:
        world.door.close()
        with pytest.raises(MigrationFailed):
            await attempt(await outgoing_to(source, world.endpoint, client_tls, agreed=Agreed(channels=CHANNELS)))
    assert "refused" in world.meter.problem


@pytest.mark.qemu
async def test_a_failure_cuts_what_a_guest_that_waits_is_connected_to(ends: Ends, server_tls: ServerTls, client_tls: ClientTls) -> None:
    """QEMU waits with its main loop for the answer to the handshake on a connection that it made, until somebody cuts that."""
    source, destination = await ends.source(), await ends.destination()
    agreed, way = Agreed(channels=CHANNELS), Endpoint(memory=at(ends.directory, "out"))
    out = await outgoing_to(source, way, client_tls, agreed=agreed, stall_limit_s=2.0)

    async def sent() -> None:
        async with out, several(ends, source, destination, server_tls):
            destination.emulator.process.signal(signal.SIGSTOP)
            await out.prepare()
            await out.send(ignored)

    async with undisturbed(ends, source), asyncio.timeout(HUNG_S):
        with pytest.raises(MigrationFailed, match="no byte"):
            await sent()


# With two daemons.


@pytest.mark.qemu
async def test_machines_go_there_and_back_over_several_connections(short_directory: Path, counting: Guest) -> None:
    async with pair(short_directory) as (a, b):
        await a.service.create(spec_of(counting, "counter"), start=True)
        await printed(a, "counter", 300)
        for source, there in ((a, b), (b, a)):
            report = await moved(source, "counter", there.name, channels=CHANNELS)
            assert (report.tunnelled, report.tunnelled_bytes, report.encrypted, report.owner) == (False, 0, True, "destination")
            await printed(there, "counter", 300)
        assert not [path for path in (short_directory / "a/r/m/counter").iterdir() if path.name.startswith("to-")]
        await a.service.kill("counter")


@pytest.mark.qemu
async def test_several_connections_are_refused_for_memory_that_is_to_follow(short_directory: Path, counting: Guest) -> None:
    """QEMU 7.2 takes both, and ends halfway."""
    async with pair(short_directory) as (a, b):
        await a.service.create(spec_of(counting, "counter"), start=True)
        with pytest.raises(Invalid, match="over one connection"):
            await a.service.migration.migrate("counter", MigrateRequest(peer="b", channels=2, goal=Goal(deadline_s=1, then="postcopy")))
        assert known(b, "counter") is None
        await a.service.kill("counter")
