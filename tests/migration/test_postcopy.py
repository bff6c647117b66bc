"""A guest moves first and its memory follows; the connection may break and be made anew."""

from __future__ import annotations

import asyncio

import pytest

from qmpd.errors import WrongState
from qmpd.migration import capabilities
from qmpd.migration.addresses import TcpAddress, TcpRange, UnixAddress
from qmpd.migration.capabilities import Agreed
from qmpd.migration.door import opened
from qmpd.migration.following import resume
from qmpd.migration.incoming import Listen, listen, recover, wait_loaded, wait_postcopy
from qmpd.migration.outgoing import Outgoing
from qmpd.migration.progress import Progress
from qmpd.migration.relays import Relays
from qmpd.migration.tls import ClientTls, ServerTls
from qmpd.tasks import background
from tests.migration.ends import End, Ends, at, go_on, outgoing_to, wait_status
from tests.process.emulator import PATIENCE_S

pytestmark = pytest.mark.qemu
AGREED = Agreed(postcopy=True)
#: So slow that it does not end by itself before the guest has moved, nor at once afterwards.
SLOW = 20_000
PORTS = TcpRange(host="127.0.0.1", first=29000, last=29999)


async def halfway(source: End, destination: End, address: UnixAddress, server: ServerTls | None, client: ClientTls | None) -> Outgoing:
    """The guest runs at the destination, most of its memory is still at the source."""
    endpoint = await listen(destination.monitor, Listen(memory=address, agreed=AGREED, tls=server))
    limits = {"max-postcopy-bandwidth": SLOW}
    outgoing = await outgoing_to(source, endpoint, client, agreed=AGREED, bytes_per_s=SLOW, parameters=limits)
    asked = False

    async def move_now(progress: Progress) -> None:
        nonlocal asked
        if progress.status == "active" and not asked:
            asked = True
            await outgoing.start_postcopy()

    await outgoing.prepare()
    await outgoing.send(move_now)
    await outgoing.switch_over()
    assert outgoing.postcopy
    await wait_postcopy(destination.monitor)
    await destination.monitor.execute("cont")
    return outgoing


async def ignored(_progress: Progress) -> None:
    """Nobody looks."""


@pytest.mark.parametrize("protected", [False, True])
async def test_memory_follows(ends: Ends, server_tls: ServerTls, client_tls: ClientTls, protected: bool) -> None:
    source, destination = await ends.source(), await ends.destination()
    launched = await capabilities.read(destination.monitor)
    credentials = (server_tls, client_tls) if protected else (None, None)
    outgoing = await halfway(source, destination, at(ends.directory), *credentials)
    async with asyncio.timeout(PATIENCE_S):
        await outgoing.tune({"max-postcopy-bandwidth": 0})
        assert await outgoing.follow(ignored)
    await wait_loaded(destination.monitor)
    await go_on(destination, launched)
    await ends.printed(destination, 400)
    trace = ends.trace(source, destination)
    assert (trace.whole, trace.boots) == (True, 1), trace


async def test_a_guest_that_is_halfway_is_not_called_back(ends: Ends) -> None:
    source, destination = await ends.source(), await ends.destination()
    outgoing = await halfway(source, destination, at(ends.directory), None, None)
    with pytest.raises(WrongState, match="postcopy"):
        await outgoing.cancel()
    await outgoing.tune({"max-postcopy-bandwidth": 0})
    assert await outgoing.follow(ignored)
    await ends.printed(destination, 400)
    assert ends.trace(source, destination).whole


@pytest.mark.parametrize("protected", [False, True])
async def test_a_broken_connection_is_made_anew(ends: Ends, server_tls: ServerTls, client_tls: ClientTls, protected: bool) -> None:
    source, destination = await ends.source(), await ends.destination()
    credentials = (server_tls, client_tls) if protected else (None, None)
    outgoing = await halfway(source, destination, at(ends.directory), *credentials)
    place = at(ends.directory, "again")
    async with background() as tasks:
        relays = Relays(tasks)
        for _ in range(2):
            await outgoing.interrupt()
            assert not await outgoing.follow(ignored)
            async with asyncio.timeout(PATIENCE_S):
                await wait_status(destination, "postcopy-paused")
            for _ in range(2):  # as after an answer that was lost
                await recover(destination.monitor, place)
            door = await relays.await_again("one", lambda: opened(PORTS), place.path)
            await resume(source.monitor, TcpAddress(host=PORTS.host, port=door.port), door.secret)
            async with asyncio.timeout(PATIENCE_S):
                await wait_status(source, "postcopy-active")
        await outgoing.tune({"max-postcopy-bandwidth": 0})
        assert await outgoing.follow(ignored)
        await wait_loaded(destination.monitor)
    await ends.printed(destination, 400)
    trace = ends.trace(source, destination)
    assert (trace.whole, trace.boots) == (True, 1), trace
