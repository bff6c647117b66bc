"""A guest moves from one QEMU to another, with all it knows, and without losing a character of what it says."""

from __future__ import annotations

from pathlib import Path

import pytest

from qmpd.errors import MigrationFailed
from qmpd.migration import capabilities
from qmpd.migration.addresses import TcpRange
from qmpd.migration.capabilities import Agreed
from qmpd.migration.incoming import Listen, listen, wait_loaded
from qmpd.migration.tls import ClientTls, ServerTls
from tests.migration.ends import Ends, at, attempt, go_on, is_tidy, moved, outgoing_to

pytestmark = pytest.mark.qemu
PORTS = TcpRange(host="127.0.0.1", first=23000, last=23999)


async def test_a_guest_moves_through_a_socket(ends: Ends) -> None:
    source, destination = await ends.source(), await ends.destination()
    figures = await moved(source, destination, Listen(memory=at(ends.directory)))
    await ends.printed(destination, 400)
    trace = ends.trace(source, destination)
    assert (trace.whole, trace.boots) == (True, 1), trace
    assert await destination.status() == "running"
    assert figures.status == "completed"
    assert figures.transferred_bytes > 0


@pytest.mark.parametrize("channels", [0, 4])
async def test_a_guest_moves_over_tls(ends: Ends, server_tls: ServerTls, client_tls: ClientTls, channels: int) -> None:
    source, destination = await ends.source(), await ends.destination()
    launched = await destination.everything()
    agreed = Agreed(channels=channels)
    await moved(source, destination, Listen(memory=PORTS, tls=server_tls, agreed=agreed), client_tls)
    await ends.printed(destination, 400)
    trace = ends.trace(source, destination)
    assert (trace.whole, trace.boots) == (True, 1), trace
    assert await is_tidy(destination, launched)


@pytest.mark.parametrize("intruder", ["hostc", "stranger"])
async def test_nobody_else_is_admitted_and_the_right_one_is_still(
    ends: Ends, hosts: Path, server_tls: ServerTls, client_tls: ClientTls, intruder: str
) -> None:
    source, destination = await ends.source(), await ends.destination()
    untouched = await source.everything()
    launched = await capabilities.read(destination.monitor)
    endpoint = await listen(destination.monitor, Listen(memory=PORTS, tls=server_tls))
    wrong = await outgoing_to(source, endpoint, ClientTls(directory=str(hosts / intruder), hostname="hostb"))
    with pytest.raises(MigrationFailed):
        await attempt(wrong)
    assert await source.everything() == untouched
    assert await destination.status() == "inmigrate"
    await attempt(await outgoing_to(source, endpoint, client_tls))
    await wait_loaded(destination.monitor)
    await go_on(destination, launched)
    await ends.printed(destination, 400)
    assert ends.trace(source, destination).whole


async def test_a_source_believes_no_other_host(ends: Ends, hosts: Path, server_tls: ServerTls) -> None:
    source, destination = await ends.source(), await ends.destination()
    untouched = await source.everything()
    endpoint = await listen(destination.monitor, Listen(memory=PORTS, tls=server_tls))
    wrong = await outgoing_to(source, endpoint, ClientTls(directory=str(hosts / "hosta"), hostname="hostc"))
    with pytest.raises(MigrationFailed, match="hostname"):
        await attempt(wrong)
    assert await source.everything() == untouched
    await ends.printed(source, 200)
    assert ends.trace(source).whole
