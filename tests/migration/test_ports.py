"""The ports at which machines are awaited: what was found to be free is had already, and QEMU gets it from the daemon."""

from __future__ import annotations

import socket
from contextlib import ExitStack

import pytest

from qmpd.errors import MigrationFailed
from qmpd.migration import capabilities
from qmpd.migration.addresses import TcpAddress, TcpRange
from qmpd.migration.incoming import Listen, listen, wait_loaded
from qmpd.migration.ports import bound, port_of
from qmpd.migration.tls import ClientTls, ServerTls
from qmpd.monitor import Monitor
from tests.migration.disks import NODE, Writers
from tests.migration.ends import attempt, go_on, outgoing_to

HOST = "127.0.0.1"
PORTS = TcpRange(host=HOST, first=28000, last=28999)


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


async def test_each_port_is_had_by_one_alone() -> None:
    with ExitStack() as kept:
        ports = [port_of(kept.enter_context(await bound(PORTS))) for _ in range(3)]
        assert len(set(ports)) == 3
        assert not any(is_free(port) for port in ports)
        with pytest.raises(MigrationFailed, match="in use"):
            await bound(TcpRange(host=HOST, first=ports[0], last=ports[0]))
    assert all(is_free(port) for port in ports)


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
