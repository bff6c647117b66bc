"""A migration that does not reach its end leaves the source as it was: its guest, its settings, its disks, its objects."""

from __future__ import annotations

import signal

import pytest

from qmpd.errors import MigrationFailed
from qmpd.migration.capabilities import Agreed
from qmpd.migration.incoming import Endpoint, Listen, listen, wait_loaded
from qmpd.migration.outgoing import look, recall
from qmpd.migration.tls import ClientTls, ServerTls
from tests.migration.ends import End, Ends, GivenUpError, at, attempt, giving_up_at, outgoing_to, signalling_at, undisturbed

pytestmark = pytest.mark.qemu
#: So slow that a migration does not end by itself.
SLOW = 20_000
STATES = ("running", "paused", "prelaunch")


async def in_state(ends: Ends, state: str) -> End:
    """A source whose guest is in this state."""
    if state == "prelaunch":
        return await ends.start("-kernel", str(ends.kernel))
    source = await ends.source()
    if state == "paused":
        await source.monitor.execute("stop")
    return source


@pytest.mark.parametrize("channels", [0, 3])
@pytest.mark.parametrize("step", ["prepared", "active", "halted", "arrived"])
@pytest.mark.parametrize("state", STATES)
async def test_given_up(ends: Ends, server_tls: ServerTls, client_tls: ClientTls, state: str, step: str, channels: int) -> None:
    source, destination = await in_state(ends, state), await ends.destination()
    agreed = Agreed(channels=channels)
    async with undisturbed(ends, source):
        endpoint = await listen(destination.monitor, Listen(memory=at(ends.directory), tls=server_tls, agreed=agreed))
        limit = SLOW if step == "active" else None
        outgoing = await outgoing_to(source, endpoint, client_tls, agreed=agreed, bytes_per_s=limit, parameters={"downtime-limit": 77})
        with pytest.raises(GivenUpError):
            await attempt(outgoing, giving_up_at(step))
        if step == "arrived":
            await wait_loaded(destination.monitor)
            assert await destination.status() == ("prelaunch" if state == "prelaunch" else "paused")
            await outgoing.cancel()


async def test_taken_back_by_a_daemon_that_knows_only_how_it_was(ends: Ends, server_tls: ServerTls, client_tls: ClientTls) -> None:
    source, destination = await ends.source(), await ends.destination()
    async with undisturbed(ends, source):
        endpoint = await listen(destination.monitor, Listen(memory=at(ends.directory), tls=server_tls))
        before = await look(source.monitor)
        outgoing = await outgoing_to(source, endpoint, client_tls)
        await outgoing.prepare()
        await recall(source.monitor, before)
        await recall(source.monitor, before)


async def test_nobody_listens(ends: Ends) -> None:
    source = await ends.source()
    async with undisturbed(ends, source):
        with pytest.raises(MigrationFailed):
            await attempt(await outgoing_to(source, Endpoint(memory=at(ends.directory))))


@pytest.mark.parametrize("step", ["active", "halted"])
async def test_the_destination_is_killed(ends: Ends, step: str) -> None:
    source, destination = await ends.source(), await ends.destination()
    async with undisturbed(ends, source):
        endpoint = await listen(destination.monitor, Listen(memory=at(ends.directory)))
        outgoing = await outgoing_to(source, endpoint, bytes_per_s=SLOW if step == "active" else None)
        with pytest.raises(MigrationFailed):
            await attempt(outgoing, signalling_at(step, destination, signal.SIGKILL))
        with pytest.raises(MigrationFailed, match="ended"):
            await wait_loaded(destination.monitor)


@pytest.mark.parametrize("step", ["active", "halted"])
async def test_the_destination_stands_still(ends: Ends, step: str) -> None:
    """QEMU waits for it with its whole main loop; only breaking the connection helps."""
    source, destination = await ends.source(), await ends.destination()
    async with undisturbed(ends, source):
        endpoint = await listen(destination.monitor, Listen(memory=at(ends.directory)))
        limit = SLOW if step == "active" else None
        outgoing = await outgoing_to(source, endpoint, bytes_per_s=limit, stall_limit_s=3.0, switchover_limit_s=3.0)
        with pytest.raises(MigrationFailed):
            await attempt(outgoing, signalling_at(step, destination, signal.SIGSTOP))


async def test_ends_that_do_not_agree(ends: Ends) -> None:
    """QEMU itself would wait for ever."""
    source, destination = await ends.source(), await ends.destination()
    async with undisturbed(ends, source):
        endpoint = await listen(destination.monitor, Listen(memory=at(ends.directory), agreed=Agreed(channels=2)))
        with pytest.raises(MigrationFailed, match="no byte"):
            await attempt(await outgoing_to(source, endpoint, stall_limit_s=3.0))


async def test_a_qemu_without_a_capability_is_not_touched(ends: Ends) -> None:
    source = await ends.source()
    async with undisturbed(ends, source):
        with pytest.raises(MigrationFailed, match="teleport"):
            await attempt(await outgoing_to(source, Endpoint(memory=at(ends.directory)), helping=("teleport",)))
