"""Disks move along with their guest, and no block it was told is written is lost: where it arrives, and where it stays."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Mapping
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest

from qmpd.errors import MigrationFailed, QemuRefused
from qmpd.migration import capabilities, incoming, mirror
from qmpd.migration.addresses import Address, TcpAddress, TcpRange
from qmpd.migration.blockjobs import concluded
from qmpd.migration.incoming import Endpoint, Listen, listen, wait_loaded
from qmpd.migration.qemu import PREFIX, yank
from qmpd.migration.tls import ClientTls, ServerTls
from qmpd.migration.watch import watching
from qmpd.monitor import Monitor
from tests.migration.disks import DISK_BYTES, NODE, Writers
from tests.migration.ends import End, GivenUpError, at, attempt, giving_up_at, go_on, is_tidy, moved, outgoing_to, signalling_at, unchanged
from tests.process.emulator import PATIENCE_S, content

pytestmark = pytest.mark.qemu
PORTS = TcpRange(host="127.0.0.1", first=24000, last=24999)


async def test_a_disk_moves_with_its_guest(writers: Writers) -> None:
    disk = writers.image()
    copy = writers.image(like=disk)
    source, destination = await writers.source(disk), await writers.destination(copy)
    directory = writers.ends.directory
    await moved(source, destination, Listen(memory=at(directory), disks_at=at(directory, "disks"), disks=(NODE,)))
    await writers.written(destination, 4)
    await destination.monitor.execute("stop")
    writers.check(copy, source, destination)
    assert content(copy)[DISK_BYTES // 2 :] == content(disk)[DISK_BYTES // 2 :]


async def test_a_disk_moves_over_tls(writers: Writers, server_tls: ServerTls, client_tls: ClientTls) -> None:
    disk = writers.image()
    copy = writers.image(like=disk)
    source, destination = await writers.source(disk), await writers.destination(copy)
    launched = await destination.everything()
    await moved(source, destination, Listen(memory=PORTS, disks_at=PORTS, disks=(NODE,), tls=server_tls), client_tls)
    await writers.written(destination, 4)
    assert await is_tidy(destination, launched)
    assert await destination.monitor.execute("query-block-exports") == []
    await destination.monitor.execute("stop")
    writers.check(copy, source, destination)


#: While the disk is copied, while memory is, when the guest is halted, and when all of it has arrived.
STEPS = ("none", "active", "halted", "arrived")


#: So slow that the step is seen.
SPEEDS = {"none": 4_000_000, "active": 2_000_000}


async def listening(writers: Writers, source_disk: Path, name: str = "disks") -> tuple[End, Endpoint]:
    """A destination with an empty disk that waits for everything."""
    destination = await writers.destination(writers.image(like=source_disk))
    directory = writers.ends.directory
    wanted = Listen(memory=at(directory, f"{name}-memory"), disks_at=PORTS, disks=(NODE,))
    return destination, await listen(destination.monitor, wanted)


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands still is given up soon."""
    monkeypatch.setattr(mirror, "STALL_LIMIT_S", 3.0)


@pytest.mark.parametrize("step", STEPS)
async def test_given_up_with_a_disk(writers: Writers, step: str) -> None:
    disk = writers.image()
    source = await writers.source(disk)
    async with writers.undisturbed(source, disk):
        _, endpoint = await listening(writers, disk)
        outgoing = await outgoing_to(source, endpoint, bytes_per_s=SPEEDS.get(step))
        with pytest.raises(GivenUpError):
            await attempt(outgoing, giving_up_at(step))
        if step == "arrived":
            await outgoing.cancel()


@pytest.mark.timeout(900)  # on a busy host each takes as long as another test
@pytest.mark.parametrize("times", [5, pytest.param(30, marks=pytest.mark.slow)])
async def test_given_up_again_and_again_under_a_guest_that_always_writes(writers: Writers, times: int) -> None:
    """QEMU 7.2 corrupts its memory in one of five cancellations of a copy whose writes are done twice."""
    disk = writers.image()
    source = await writers.source(disk)
    async with writers.undisturbed(source, disk):
        for number in range(times):
            destination, endpoint = await listening(writers, disk, f"disks{number}")
            with pytest.raises(GivenUpError):
                await attempt(await outgoing_to(source, endpoint, bytes_per_s=SPEEDS["active"]), giving_up_at("active"))
            destination.emulator.process.signal(signal.SIGKILL)
            await writers.written(source, 1)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("step", ["none", "active", "halted"])
async def test_the_destination_of_a_disk_is_lost(writers: Writers, hasty: None, step: str, number: signal.Signals) -> None:
    disk = writers.image()
    source = await writers.source(disk)
    async with writers.undisturbed(source, disk):
        destination, endpoint = await listening(writers, disk)
        outgoing = await outgoing_to(source, endpoint, bytes_per_s=SPEEDS.get(step), stall_limit_s=3.0, switchover_limit_s=8.0)
        with pytest.raises(MigrationFailed):
            await attempt(outgoing, signalling_at(step, destination, number))


async def test_a_copy_that_ended_before_it_is_let_go_of(writers: Writers) -> None:
    disk = writers.image()
    source = await writers.source(disk)
    async with writers.undisturbed(source, disk):
        _, endpoint = await listening(writers, disk)
        job = f"{PREFIX}-0"

        async def step(name: str) -> None:
            if name == "halted":
                with watching(source.monitor) as watch:
                    await source.monitor.execute("block-job-cancel", {"device": job, "force": True})
                    assert await concluded(source.monitor, job, watch)

        with pytest.raises(MigrationFailed, match=f"{NODE!r} was not completed: "):
            await attempt(await outgoing_to(source, endpoint), step)


class Outrun:
    """A QEMU's answer to the first `query-yank` names a connection that has gone since."""

    def __init__(self, monitor: Monitor) -> None:
        self._monitor = monitor
        self._asked = 0

    async def execute_oob(self, command: str, arguments: Mapping[str, object] | None = None, **limit: float) -> object:
        answer = await self._monitor.execute_oob(command, arguments, **limit)
        if command == "query-yank":
            assert isinstance(answer, list)
            self._asked += 1
            return [*answer, {"type": "block-node", "node-name": f"{PREFIX}-9"}] if self._asked == 1 else answer
        return answer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._monitor, name)


async def test_what_ended_a_moment_ago_does_not_keep_the_others_from_being_broken(writers: Writers) -> None:
    disk = writers.image()
    source = await writers.source(disk)
    async with writers.undisturbed(source, disk):
        _, endpoint = await listening(writers, disk)
        broken: list[bool] = []

        async def step(name: str) -> None:
            if name == "active" and not broken:
                broken.append(await yank(Outrun(source.monitor)))

        with pytest.raises(MigrationFailed):
            await attempt(await outgoing_to(source, endpoint, bytes_per_s=SPEEDS["active"]), step)
        assert broken == [True]


async def test_a_frozen_destination_does_not_keep_qemu_waiting(writers: Writers) -> None:
    """Connecting to it, QEMU would wait with its whole main loop."""
    disk = writers.image()
    source = await writers.source(disk)
    async with writers.undisturbed(source, disk):
        destination, endpoint = await listening(writers, disk)
        destination.emulator.process.signal(signal.SIGSTOP)
        with pytest.raises(QemuRefused, match="timeout"):
            await attempt(await outgoing_to(source, endpoint))


async def test_a_disk_that_is_not_awaited(writers: Writers) -> None:
    disk = writers.image()
    source = await writers.source(disk)
    async with writers.undisturbed(source, disk):
        _, endpoint = await listening(writers, disk)
        with pytest.raises(QemuRefused):
            await attempt(await outgoing_to(source, msgspec.structs.replace(endpoint, disks=("d1",))))


async def test_nobody_awaits_disks(writers: Writers) -> None:
    disk = writers.image()
    source = await writers.source(disk)
    async with writers.undisturbed(source, disk):
        nowhere = Endpoint(memory=at(writers.ends.directory), disks_at=at(writers.ends.directory, "disks"), disks=(NODE,))
        with pytest.raises(QemuRefused, match="disks"):
            await attempt(await outgoing_to(source, nowhere))


@pytest.mark.parametrize("intruder", ["hostc", "stranger"])
async def test_nobody_else_writes_to_the_disks(
    writers: Writers, hosts: Path, server_tls: ServerTls, client_tls: ClientTls, intruder: str
) -> None:
    disk = writers.image()
    copy = writers.image(like=disk)
    source, destination = await writers.source(disk), await writers.destination(copy)
    launched = await capabilities.read(destination.monitor)
    endpoint = await listen(destination.monitor, Listen(memory=PORTS, disks_at=PORTS, disks=(NODE,), tls=server_tls))
    async with unchanged(source):
        with pytest.raises(QemuRefused):
            await attempt(await outgoing_to(source, endpoint, ClientTls(directory=str(hosts / intruder), hostname="hostb")))
    assert not any(content(copy))
    await attempt(await outgoing_to(source, endpoint, client_tls))
    await wait_loaded(destination.monitor)
    await go_on(destination, launched)
    await writers.written(destination, 4)
    await destination.monitor.execute("stop")
    writers.check(copy, source, destination)


async def test_callers_that_have_no_business_here_harm_nothing(writers: Writers, server_tls: ServerTls, client_tls: ClientTls) -> None:
    """A scan of the ports, and clients that say nothing, while a migration is awaited and under way."""
    disk = writers.image()
    copy = writers.image(like=disk)
    source, destination = await writers.source(disk), await writers.destination(copy)
    launched = await capabilities.read(destination.monitor)
    endpoint = await listen(destination.monitor, Listen(memory=PORTS, disks_at=PORTS, disks=(NODE,), tls=server_tls))
    async with AsyncExitStack() as silent:

        async def knock(step: str) -> None:
            for address in (endpoint.memory, endpoint.disks_at):
                for said in (b"", b"GET / HTTP/1.0\r\n\r\n", bytes(4096)):
                    await call(address, said)
            # QEMU waits for a silent one on its migration port with its whole main loop, until the one that it awaits has come.
            if step in {"active", "halted"}:
                silent.push_async_callback(ended, await opened(endpoint.memory))
            silent.push_async_callback(ended, await opened(endpoint.disks_at))

        await knock("awaited")
        await attempt(await outgoing_to(source, endpoint, client_tls, bytes_per_s=SPEEDS["active"]), knock)
        await wait_loaded(destination.monitor)
        await go_on(destination, launched)
        await writers.written(destination, 4)
    await destination.monitor.execute("stop")
    writers.check(copy, source, destination)


@pytest.mark.parametrize("leaves", [True, False], ids=["leaves", "stays"])
async def test_a_client_of_a_disk_that_has_arrived_is_waited_for_and_then_cut_off(
    writers: Writers, monkeypatch: pytest.MonkeyPatch, leaves: bool
) -> None:
    directory, copy = writers.ends.directory, writers.image()
    destination, client = await writers.destination(copy), await writers.ends.start()
    await listen(destination.monitor, Listen(memory=at(directory), disks_at=at(directory, "disks"), disks=(NODE,)))
    server = {"type": "unix", "path": str(directory / "disks")}
    await client.monitor.execute("blockdev-add", {"driver": "nbd", "node-name": "client", "server": server, "export": NODE})
    with pytest.raises(QemuRefused, match="still in use"):
        await destination.monitor.execute("block-export-del", {"id": f"{PREFIX}-{NODE}"})
    monkeypatch.setattr(incoming, "CLIENT_PATIENCE_S", PATIENCE_S if leaves else 3.0)
    async with asyncio.TaskGroup() as group:
        ending = group.create_task(incoming.end_exports(destination.monitor))
        if leaves:
            await asyncio.sleep(3 * incoming.CLIENT_AGAIN_S)
            assert not ending.done()
            await client.monitor.execute("blockdev-del", {"node-name": "client"})
    assert await destination.monitor.execute("query-block-exports") == []


async def opened(address: Address | None) -> asyncio.StreamWriter:
    """A caller that says nothing."""
    assert isinstance(address, TcpAddress)
    _, writer = await asyncio.open_connection(address.host, address.port)
    return writer


async def ended(writer: asyncio.StreamWriter) -> None:
    """It leaves."""
    writer.close()
    with suppress(ConnectionError):
        await writer.wait_closed()


async def call(address: Address | None, said: bytes) -> None:
    """A caller that says something, if somebody listens still, and leaves."""
    with suppress(ConnectionRefusedError):
        writer = await opened(address)
        writer.write(said)
        await ended(writer)
