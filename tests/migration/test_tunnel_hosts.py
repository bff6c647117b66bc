"""Tunnels between daemons of their own: either may be killed while a machine goes through, and it is where it was."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import msgspec
import pytest

from qmpd.lifecycle import State
from qmpd.migrationviews import Goal, MigrateRequest
from qmpd_api.client import Client
from tests.migration.hosts import Hosts, hosts
from tests.migration.network import NoNetworks
from tests.migration.test_moves import busy
from tests.unavailable import unavailable

pytestmark = pytest.mark.qemu

NAME = "one"
LOOK_S = 0.05
#: Means that something hangs.
HUNG_S = 120.0


@pytest.fixture
async def two() -> AsyncIterator[Hosts]:
    try:
        async with hosts() as made:
            await made.start()
            yield made
    except NoNetworks as reason:
        unavailable(reason)
    assert not [one for host in made.each for one in host.daemon.qemus()]


async def under_way(client: Client, peer: str) -> str:
    """Begins to move the machine, slowly; its job when memory goes through the tunnel."""
    job = await client.migrate(NAME, MigrateRequest(peer=peer, tunnel=True, goal=Goal(bandwidth_mib_s=1)))
    async with asyncio.timeout(HUNG_S):
        while not any(view.progress is not None and view.progress.transferred_bytes for view in (await client.migrations()).migrations):
            await asyncio.sleep(LOOK_S)
    return job.id


@pytest.mark.timeout(300)
@pytest.mark.parametrize("killed", ["source", "destination"])
async def test_a_daemon_that_is_killed_breaks_the_tunnel_and_the_machine_stays(two: Hosts, killed: str) -> None:
    source, there = two.each
    async with source.client() as client:
        # With little memory to send it would be there before the daemon is killed.
        uuid = (await client.create(msgspec.structs.replace(busy(two.shared), name=NAME), start=True)).uuid
        two.onlooker.mind(uuid)
        job = await under_way(client, there.name)
        assert there.ports() == []  # QEMU waits at no port
    (pid,) = [one.pid for one in source.qemus(NAME)]
    await (source if killed == "source" else there).restart()
    async with source.client() as client, asyncio.timeout(HUNG_S):
        while (await client.migrations()).migrations[0].phase != "kept":
            await asyncio.sleep(LOOK_S)
        while (await client.machine(NAME)).state is not State.RUNNING:
            await asyncio.sleep(LOOK_S)
        assert (await client.job(job)).state in {"failed", "interrupted"}
        while there.qemus(NAME):
            await asyncio.sleep(LOOK_S)
        assert [one.pid for one in source.qemus(NAME)] == [pid]
        again = await client.migrate(NAME, MigrateRequest(peer=there.name, tunnel=True))
        while (await client.job(again.id)).state == "running":
            await asyncio.sleep(LOOK_S)
        assert (await client.job(again.id)).state == "succeeded"
    async with there.client() as client:
        assert (await client.machine(NAME)).state is State.RUNNING
        await client.kill(NAME)
    assert two.onlooker.overlaps(uuid) == []
