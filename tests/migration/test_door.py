"""The door to a machine that is awaited: the peer is led to QEMU, and whoever else comes, and stays, holds nobody up."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from functools import partial
from pathlib import Path

import pytest

from qmpd.errors import MigrationFailed, QemuRefused
from qmpd.lifecycle import State
from qmpd.migration import capabilities, door, outgoing
from qmpd.migration.addresses import TcpAddress, TcpRange
from qmpd.migration.door import CALLERS, SECRET_BYTES, Door, knock, opened
from qmpd.migration.incoming import Endpoint, Listen, receive_disks, receive_from, wait_loaded
from qmpd.migration.tls import ClientTls, ServerTls
from qmpd.migrationviews import Goal, MigrateRequest
from qmpd.tasks import alongside
from tests.guests.build import Guest
from tests.machines import copy_of, spec_of
from tests.migration.disks import NODE, Writers
from tests.migration.ends import End, Ends, attempt, go_on, outgoing_to, unchanged
from tests.migration.test_moves import HUNG_S, LOOK_S, ended, pair, printed

HOST = "127.0.0.1"
#: Other processes that test this at the same time begin elsewhere: a port that was closed is not another's at once.
PORTS = TcpRange(host=HOST, first=29000 + os.getpid() % 2000, last=31999)


def at(there: Door) -> TcpAddress:
    """Where it is."""
    return TcpAddress(host=HOST, port=there.port)


@asynccontextmanager
async def answered(connections: int = 1) -> AsyncIterator[tuple[Door, asyncio.Task[None], list[socket.socket]]]:
    """A door behind which nobody is: what is led there is kept."""
    kept: list[socket.socket] = []

    @asynccontextmanager
    async def take(line: socket.socket) -> AsyncIterator[None]:
        kept.append(line.dup())
        yield

    there = await opened(PORTS)
    async with alongside(there.attend(take, connections), "attend") as attending:
        yield there, attending, kept
    for line in kept:
        line.close()


def visitor(there: Door, words: bytes = b"") -> socket.socket:
    """Somebody who says something, and stays."""
    caller = socket.create_connection((HOST, there.port), HUNG_S)
    caller.sendall(words)
    return caller


async def test_the_peer_gets_in_and_says_the_rest_to_qemu() -> None:
    async with answered() as (there, attending, kept):
        with await knock(at(there), there.secret) as line:
            await attending
            line.setblocking(True)
            line.sendall(b"for QEMU")
            kept[0].setblocking(True)
            assert kept[0].recv(100) == b"for QEMU"
            kept[0].sendall(b"from QEMU")
            assert line.recv(100) == b"from QEMU"
            assert line.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == door.SILENT_MS
        with pytest.raises(MigrationFailed, match="refused"):
            await knock(at(there), there.secret)


async def test_the_peer_gets_in_as_often_as_it_has_connections_and_in_its_order() -> None:
    async with answered(3) as (there, attending, kept):
        for number in range(3):
            with visitor(there, bytes(SECRET_BYTES)), await knock(at(there), there.secret) as line:
                assert kept[number].getpeername() == line.getsockname()
        await attending
        with pytest.raises(MigrationFailed, match="refused"):
            await knock(at(there), there.secret)


@pytest.mark.parametrize("words", [b"", b"\x16\x03\x01", b"GET / HTTP/1.0\r\n\r\n", bytes(SECRET_BYTES), bytes(4096)])
async def test_strangers_that_stay_keep_nobody_out_however_many_there_are(words: bytes) -> None:
    async with answered() as (there, attending, _):
        with ExitStack() as strangers:
            for _ in range(CALLERS + 5):
                strangers.enter_context(visitor(there, words))
                await asyncio.sleep(0)
            (await knock(at(there), there.secret)).close()
            await attending


async def test_a_stranger_hears_nothing_and_is_turned_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "SAYING_S", 0.05)
    async with answered() as (there, attending, _):
        for words in (b"", bytes(SECRET_BYTES), bytes.fromhex(there.secret)[:-1]):
            with visitor(there, words) as stranger:
                stranger.setblocking(False)
                async with asyncio.timeout(HUNG_S):
                    assert await asyncio.get_running_loop().sock_recv(stranger, 1) == b""
        assert not attending.done()


async def test_a_qemu_that_does_not_take_it_leaves_the_peer_without_an_answer() -> None:
    @asynccontextmanager
    async def take(_line: socket.socket) -> AsyncIterator[None]:
        raise QemuRefused("it does not")
        yield

    there = await opened(PORTS)
    async with alongside(there.attend(take), "attend") as attending:
        with pytest.raises(MigrationFailed, match="closed it"):
            await knock(at(there), there.secret)
        with pytest.raises(QemuRefused):
            await attending


async def test_one_who_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "ANSWER_S", 0.1)
    with socket.create_server((HOST, 0)) as silent, pytest.raises(MigrationFailed, match="not answered"):
        await knock(TcpAddress(host=HOST, port=silent.getsockname()[1]), "00" * SECRET_BYTES)


async def test_no_port_is_free() -> None:
    there = await opened(PORTS)
    with pytest.raises(MigrationFailed, match=f"ports {there.port} to {there.port}: Address already in use"):
        await opened(TcpRange(host=HOST, first=there.port, last=there.port))
    there.close()
    there.close()
    with pytest.raises(MigrationFailed, match="Cannot assign requested address"):
        await opened(TcpRange(host="192.0.2.1", first=1024, last=1025))


# With QEMUs.


@asynccontextmanager
async def awaited(destination: End, wanted: Listen) -> AsyncIterator[tuple[Door, Endpoint]]:
    """A destination behind a door."""
    disks_at = await receive_disks(destination.monitor, wanted)
    there = await opened(PORTS)
    async with alongside(there.attend(partial(receive_from, destination.monitor, wanted)), "attend"):
        yield there, Endpoint(memory=at(there), disks_at=disks_at, disks=wanted.disks)


@pytest.mark.qemu
async def test_a_guest_comes_through_the_door(ends: Ends, server_tls: ServerTls, client_tls: ClientTls) -> None:
    source, destination = await ends.source(), await ends.destination()
    launched = await capabilities.read(destination.monitor)
    async with awaited(destination, Listen(memory=PORTS, tls=server_tls)) as (there, endpoint):
        await attempt(await outgoing_to(source, endpoint, client_tls, secret=there.secret))
        await wait_loaded(destination.monitor)
        await source.monitor.execute("quit")
        await go_on(destination, launched)
    await ends.printed(destination, 400)
    assert ends.trace(source, destination).whole


@pytest.mark.qemu
async def test_a_guest_runs_on_while_nobody_answers_the_handshake(
    ends: Ends, client_tls: ClientTls, monkeypatch: pytest.MonkeyPatch
) -> None:
    """QEMU's own connection would keep it from running until the line breaks."""
    monkeypatch.setattr(outgoing, "CANCEL_PATIENCE_S", 1.0)
    source = await ends.source()
    async with answered() as (there, _, _), unchanged(source):
        out = await outgoing_to(source, Endpoint(memory=at(there)), client_tls, secret=there.secret, stall_limit_s=2.0)
        async with alongside(attempt(out), "attempt") as attempting:
            while out._line is None:
                await asyncio.sleep(LOOK_S)
            await ends.printed(source, 400)
            assert await source.status() == "running"
            with pytest.raises(MigrationFailed):
                await attempting
    await ends.printed(source, 400)


@pytest.mark.qemu
async def test_strangers_that_stay_on_all_ports_do_not_keep_disks_and_memory_from_coming(
    writers: Writers, server_tls: ServerTls, client_tls: ClientTls
) -> None:
    disk = writers.image()
    copy = writers.image(like=disk)
    source, destination = await writers.source(disk), await writers.destination(copy)
    launched = await capabilities.read(destination.monitor)
    async with (
        AsyncExitStack() as strangers,
        awaited(destination, Listen(memory=PORTS, disks_at=PORTS, disks=(NODE,), tls=server_tls)) as (there, endpoint),
    ):
        assert isinstance(endpoint.disks_at, TcpAddress)
        ports = (there.port, endpoint.disks_at.port)

        async def come(_step: str) -> None:
            for port in ports:
                for words in (b"", b"\x16\x03\x01"):
                    caller = socket.socket()
                    strangers.enter_context(caller)
                    if caller.connect_ex((HOST, port)) == 0:  # the door is closed after the peer
                        caller.sendall(words)

        await come("awaited")
        await attempt(await outgoing_to(source, endpoint, client_tls, secret=there.secret, bytes_per_s=2_000_000), come)
        await wait_loaded(destination.monitor)
        await go_on(destination, launched)
        await writers.written(destination, 4)
    await destination.monitor.execute("stop")
    writers.check(copy, source, destination)


@pytest.mark.qemu
async def test_a_machine_moves_past_strangers_at_its_door(short_directory: Path, guests: dict[str, Guest]) -> None:
    async with pair(short_directory) as (a, b):
        await a.service.create(spec_of(copy_of(guests["x86_64-q35"], short_directory), "counter"), start=True)
        await printed(a, "counter", 300)
        job = await a.service.migration.migrate("counter", MigrateRequest(peer="b", goal=Goal(bandwidth_mib_s=4)))
        arrivals = b.service.migration._arrivals._arrivals
        async with asyncio.timeout(HUNG_S):
            while not any(arrival.awaited is not None for arrival in arrivals.values()):
                await asyncio.sleep(0)
        (arrival,) = arrivals.values()
        assert arrival.awaited is not None
        assert arrival.awaited.door is not None
        with ExitStack() as strangers:
            for words in (b"", b"\x16\x03\x01", bytes(100)):
                strangers.enter_context(visitor(arrival.awaited.door, words))
            assert (await ended(a, job)).state == "succeeded"
            await printed(b, "counter", 300)
        assert b.service.machine("counter").state is State.RUNNING
        await b.service.kill("counter")
