"""The ports at which machines are awaited: what was found to be free is had already, and QEMU gets it from the daemon."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from pathlib import Path

import pytest

from qmpd.errors import HostError, MigrationFailed
from qmpd.lifecycle import State
from qmpd.migration import capabilities, ports
from qmpd.migration.addresses import TcpAddress, TcpRange
from qmpd.migration.door import Door
from qmpd.migration.incoming import Listen, listen, receive_disks, wait_loaded
from qmpd.migration.ports import Ports, bound, passed_ports, port_of
from qmpd.migration.qemu import ask_map
from qmpd.migration.tls import ClientTls, ServerTls
from qmpd.migrationviews import Goal, MigrateRequest
from qmpd.monitor import Monitor
from qmpd_api.server import passed_sockets
from tests.api.lab import Daemon, authority, daemon, host, peer, port
from tests.conftest import end_machines
from tests.guests.build import Guest
from tests.guests.ring import missing, read_ring
from tests.machines import copy_of, spec_of
from tests.migration.disks import NODE, Writers
from tests.migration.ends import attempt, go_on, outgoing_to
from tests.migration.strangers import WORDS, says
from tests.migration.test_moves import FEW_PAGES, HUNG_S, LOOK_S, busy, ended, filled, moved, printed, set_to_work
from tests.migration.test_moving_disks import written
from tests.migration.test_tunnel import until

HOST = "127.0.0.1"
PORTS = TcpRange(host=HOST, first=28000, last=28999)
#: Of this process: what it lets go of stays free, whatever tests run in others.
OWN = TcpRange(host=HOST, first=20000 + os.getpid() % 400 * 16, last=20015 + os.getpid() % 400 * 16)
#: So few bytes that they are taken without anybody who reads them.
MOST = 64


def is_free(port: int) -> bool:
    """Whether somebody else could listen there."""
    with socket.socket() as rival:
        rival.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            rival.bind((HOST, port))
            rival.listen()
        except OSError:
            return False
        return True


def listening() -> socket.socket:
    """A socket as systemd would pass one."""
    return socket.create_server((HOST, 0))


def named(*names: str) -> dict[str, str]:
    return {"LISTEN_PID": "10", "LISTEN_FDS": str(len(names)), "LISTEN_FDNAMES": ":".join(names)}


async def test_each_port_is_had_by_one_alone() -> None:
    with ExitStack() as kept:
        numbers = [port_of(kept.enter_context(await bound(OWN))) for _ in range(3)]
        assert len(set(numbers)) == 3
        assert not any(is_free(number) for number in numbers)
        with pytest.raises(MigrationFailed, match="in use"):
            await bound(TcpRange(host=HOST, first=numbers[0], last=numbers[0]))
    assert all(is_free(number) for number in numbers)


@pytest.mark.qemu
async def test_nobody_gets_a_port_between_its_choice_and_qemu(
    writers: Writers, server_tls: ServerTls, client_tls: ClientTls, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = writers.image()
    copy = writers.image(like=disk)
    source, destination = await writers.source(disk), await writers.destination(copy)
    launched = await capabilities.read(destination.monitor)
    tried: list[int] = []
    hand = Monitor.hand

    async def meddled(monitor: Monitor, name: str, line: socket.socket) -> None:
        tried.append(port_of(line))
        assert not is_free(tried[-1])
        await hand(monitor, name, line)

    monkeypatch.setattr(Monitor, "hand", meddled)
    endpoint = await listen(destination.monitor, Listen(memory=PORTS, disks_at=PORTS, disks=(NODE,), tls=server_tls))
    assert endpoint.disks_at == TcpAddress(host=HOST, port=tried[0])
    assert not is_free(tried[0])
    await attempt(await outgoing_to(source, endpoint, client_tls))
    await wait_loaded(destination.monitor)
    await go_on(destination, launched)
    await writers.written(destination, 4)
    await destination.monitor.execute("stop")
    writers.check(copy, source, destination)


def test_only_what_was_passed_for_migrations_is_taken(short_directory: Path) -> None:
    assert passed_ports({}, 10) == []
    assert passed_ports(named("migration"), 11) == []
    with socket.socket(socket.AF_UNIX) as unix, listening() as tcp, socket.socket() as idle:
        assert passed_ports(named("api"), 10, tcp.fileno()) == []
        assert passed_sockets(named("migration"), 10, tcp.fileno()) == []
        for wrong in (unix, idle):
            with pytest.raises(HostError, match="no TCP socket"):
                passed_ports(named("migration"), 10, os.dup(wrong.fileno()))
        inherited = os.dup(tcp.fileno())
        os.set_inheritable(inherited, True)
        (taken,) = passed_ports(named("migration"), 10, inherited)
        with taken:
            assert port_of(taken) == port_of(tcp)
            assert not taken.get_inheritable()


async def test_a_socket_that_was_passed_is_lent_to_one_at_a_time() -> None:
    with listening() as one, listening() as two:
        ours = Ports([one, two])
        first, second = await asyncio.gather(ours.bound(PORTS), ours.bound(PORTS))
        assert {port_of(first), port_of(second)} == {port_of(one), port_of(two)}
        with pytest.raises(MigrationFailed, match="all 2 sockets"):
            await ours.bound(PORTS)
        first.close()
        with second, await ours.bound(PORTS) as again:
            assert port_of(again) != port_of(second)


@pytest.mark.qemu
async def test_a_socket_is_not_free_as_long_as_a_qemu_has_it(writers: Writers, server_tls: ServerTls) -> None:
    destination = await writers.destination(writers.image(like=writers.image()))
    wanted = Listen(memory=PORTS, disks_at=PORTS, disks=(NODE,), tls=server_tls)
    with listening() as listener:
        at = await receive_disks(destination.monitor, wanted, Ports([listener]).bound)
        assert at == TcpAddress(host=HOST, port=port_of(listener))
        with pytest.raises(MigrationFailed, match="all 1 sockets"):  # the next daemon knows it as well
            await Ports([listener]).bound(PORTS)
        await destination.monitor.execute("quit")
        await destination.emulator.process.wait()
        (await Ports([listener]).bound(PORTS)).close()


@asynccontextmanager
async def passing(directory: Path, count: int, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[Daemon, Daemon]]:
    """Two daemons, of which the second got so many sockets, and neither may bind one."""

    async def none(where: TcpRange) -> socket.socket:
        raise AssertionError(f"a port of {where} was bound")

    monkeypatch.setattr(ports, "bound", none)
    root = authority(directory / "ca")
    async with AsyncExitStack() as stack:
        doors = [stack.enter_context(port()) for _ in range(2)]
        awaiting = [stack.enter_context(listening()) for _ in range(count)]
        made = []
        for name, other, sockets in (("a", 1, ()), ("b", 0, awaiting)):
            pki = host(root, directory / name / "pki", name)
            known = (peer("ab"[other], doors[other][1]),)
            listener = doors[1 - other][0]
            made.append(await stack.enter_async_context(daemon(name, directory / name, pki, listener, known, awaiting=sockets)))
            stack.push_async_callback(end_machines, made[-1].service)
        yield made[0], made[1]


@pytest.mark.qemu
async def test_memory_that_was_cut_off_comes_again_to_a_socket_that_was_passed_past_strangers(
    short_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with AsyncExitStack() as strangers, passing(short_directory, 1, monkeypatch) as (a, b):
        relays, doors = b.service.migration._arrivals._reception._relays, list[int]()
        await_again = relays.await_again

        async def scanned(machine: str, open_door: Callable[[], Awaitable[Door]], path: str) -> Door:
            door = await await_again(machine, open_door, path)
            doors.append(door.port)
            for words in WORDS.values():
                says(words)((HOST, door.port))
                strangers.enter_context(socket.create_connection((HOST, door.port))).sendall(words[:MOST])
            return door

        monkeypatch.setattr(relays, "await_again", scanned)
        # Most of its memory the guest never asks for, so that it takes its time.
        await set_to_work(a, filled(busy(short_directory, FEW_PAGES), short_directory / "filling"), FEW_PAGES)
        goal = Goal(bandwidth_mib_s=1, downtime_ms=1, deadline_s=1.0, then="postcopy", auto_converge=False)
        job = await a.service.migration.migrate("busy", MigrateRequest(peer="b", goal=goal))
        await following(a, "busy")
        await a.service._registry.get("busy").session.execute_oob("migrate-pause")
        await until(lambda: len(doors) == 1)
        await following(a, "busy")
        (relay,) = [task for task in asyncio.all_tasks() if task.get_name() == "relay:busy"]
        relay.cancel()  # as when its daemon ends
        await until(lambda: len(doors) == 2)
        view = await ended(a, job)
        assert view.state == "succeeded", view.error
        await until(lambda: b.service.machine("busy").operation is None)
        assert b.service.machine("busy").state is State.RUNNING
        await b.service.kill("busy")


async def following(there: Daemon, name: str) -> None:
    """Returns when the memory of a machine follows it."""
    session = there.service._registry.get(name).session
    async with asyncio.timeout(HUNG_S):
        while (await ask_map(session, "query-migrate")).get("status") != "postcopy-active":
            await asyncio.sleep(LOOK_S)


@pytest.mark.qemu
async def test_machines_come_to_the_sockets_that_were_passed(
    short_directory: Path, guests: dict[str, Guest], monkeypatch: pytest.MonkeyPatch
) -> None:
    guest = copy_of(guests["x86_64-pc-blocks"], short_directory)
    there = short_directory / "there.raw"
    async with passing(short_directory, 2, monkeypatch) as (a, b):
        await a.service.create(spec_of(guest, "writer"), start=True)
        await written(a, "writer", 20)
        await moved(a, "writer", "b", disks=[{"disk": 0, "how": "copy", "path": str(there)}])
        last = await written(b, "writer", 20)
        # Its QEMU may have one of them still; the other one is free again.
        await a.service.create(spec_of(copy_of(guests["x86_64-q35"], short_directory), "counter"), start=True)
        await printed(a, "counter", 100)
        await moved(a, "counter", "b", channels=2)
        await printed(b, "counter", 100)
        await b.service.stop("writer")
        ring = read_ring(there)
        assert (ring.newest >= last, ring.torn, missing(ring, last)) == (True, (), ())
