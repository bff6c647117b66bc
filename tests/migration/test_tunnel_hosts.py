"""Daemons that pass a machine's memory on: either may be killed meanwhile, and the machine is where it was, or gets what is missing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Final

import msgspec
import pytest

from qmpd.lifecycle import State
from qmpd.migrationviews import Goal, MigrateRequest
from qmpd_api.client import Client
from tests.migration.emulators import emulators
from tests.migration.hosts import Hosts, hosts
from tests.migration.network import NoNetworks
from tests.migration.test_moves import FEW_PAGES, busy, filled
from tests.unavailable import unavailable

pytestmark = pytest.mark.qemu

NAME = "one"
LOOK_S = 0.05
#: An event follows a command within this, unless the host is very busy.
HEARD_S = 1.0
WAYS: Final = {"tunnel": MigrateRequest(peer="", tunnel=True), "several connections": MigrateRequest(peer="", channels=2)}
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


async def under_way(client: Client, request: MigrateRequest) -> str:
    """Begins to move the machine, slowly; its job when memory is on its way."""
    job = await client.migrate(NAME, msgspec.structs.replace(request, goal=Goal(bandwidth_mib_s=1)))
    async with asyncio.timeout(HUNG_S):
        while not any(view.progress is not None and view.progress.transferred_bytes for view in (await client.migrations()).migrations):
            await asyncio.sleep(LOOK_S)
    return job.id


@pytest.mark.timeout(300)
@pytest.mark.parametrize("killed", ["source", "destination"])
@pytest.mark.parametrize("way", WAYS)
async def test_a_daemon_that_is_killed_breaks_the_way_and_the_machine_stays(two: Hosts, killed: str, way: str) -> None:
    source, there = two.each
    request = msgspec.structs.replace(WAYS[way], peer=there.name)
    async with source.client() as client:
        # With little memory to send it would be there before the daemon is killed.
        uuid = (await client.create(msgspec.structs.replace(busy(two.shared), name=NAME), start=True)).uuid
        two.onlooker.mind(uuid)
        job = await under_way(client, request)
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
        again = await client.migrate(NAME, request)
        while (await client.job(again.id)).state == "running":
            await asyncio.sleep(LOOK_S)
        assert (await client.job(again.id)).state == "succeeded"
    async with there.client() as client:
        assert (await client.machine(NAME)).state is State.RUNNING
        await client.kill(NAME)
    assert two.onlooker.overlaps(uuid) == []


@pytest.mark.timeout(300)
async def test_memory_that_a_killed_daemon_passed_on_follows_its_guest_in_the_end(two: Hosts) -> None:
    source, there = two.each
    # Most of its memory the guest never asks for, so that it takes its time.
    spec = msgspec.structs.replace(filled(busy(two.shared, FEW_PAGES), two.shared / "filling"), name=NAME)
    async with source.client() as client:
        uuid = (await client.create(spec, start=True)).uuid
        two.onlooker.mind(uuid)
        goal = Goal(bandwidth_mib_s=1, downtime_ms=1, deadline_s=1.0, then="postcopy", auto_converge=False)
        job = await client.migrate(NAME, MigrateRequest(peer=there.name, goal=goal))

        async def follows() -> bool:
            answer = await client.qmp(NAME, "query-migrate")
            return isinstance(answer, dict) and answer.get("status") == "postcopy-active"

        await until(follows)
        (pid,) = [one.pid for one in source.qemus(NAME)]
        said, heard = (emulators().pages / f"{uuid}.{pid}.{end}" for end in ("out", "in"))

        async def interrupted() -> bool:
            """Not by the API, which lets only the migration do so; and QEMU 7.2 does not hear each monitor at once."""
            if "postcopy-paused" not in said.read_text():
                assert await follows()
                heard.write_text('{"execute":"migrate-pause"}')
                await asyncio.sleep(HEARD_S)
            return "postcopy-paused" in said.read_text()

        await until(interrupted)

        async def recovered() -> bool:
            return "postcopy-recover" in said.read_text() and await follows()

        await until(recovered)
        assert there.ports() == []
        await there.restart()
        async with asyncio.timeout(HUNG_S):
            assert (await client.wait_job(job.id)).state == "succeeded"
        assert source.qemus(NAME) == []
    async with there.client() as client:
        assert (await client.machine(NAME)).state is State.RUNNING
        await client.kill(NAME)
    assert two.onlooker.overlaps(uuid) == []


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(HUNG_S):
        while not await condition():
            await asyncio.sleep(LOOK_S)
