"""The hosts of the migration tests are hosts: daemons that know each other, that stop and go on, and leave nothing behind."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from tests.guests.build import Guest
from tests.machines import spec_of
from tests.migration.hosts import Hosts, hosts, stopped
from tests.migration.network import NoNetworks, leftovers
from tests.migration.onlooker import Onlooker
from tests.unavailable import unavailable

pytestmark = pytest.mark.qemu

NAME = "one"


@pytest.fixture
async def two() -> AsyncIterator[Hosts]:
    try:
        async with hosts() as made:
            await made.start()
            yield made
    except NoNetworks as reason:
        unavailable(reason)
    assert not leftovers()
    assert not [one for host in made.each for one in host.daemon.qemus()]


async def ran(onlooker: Onlooker, uuid: str, count: int) -> list[int]:
    """The pids of a machine's QEMUs that run, once there are so many."""
    while len(found := await asyncio.to_thread(onlooker.running, uuid)) != count:
        await asyncio.sleep(0.02)
    return [life.pid for life in found]


@pytest.mark.timeout(240)
async def test_hosts_know_each_other_and_only_through_their_line(two: Hosts) -> None:
    for host in two.each:
        async with host.client() as client:
            health = await client.peer_health(two.other(host).name)
        assert health.reachable, health
        assert host.ports() == []
    two.network.cut()
    async with two[0].client() as client:
        assert not (await client.peer_health(two[1].name)).reachable
    two.network.heal()
    async with two[0].client() as client:
        assert (await client.peer_health(two[1].name)).reachable


@pytest.mark.timeout(240)
async def test_a_host_stands_still_dies_and_comes_back_under_its_machine(two: Hosts, guests: dict[str, Guest]) -> None:
    here = two[0]
    async with here.client() as client:
        uuid = (await client.create(spec_of(guests["x86_64-microvm"], NAME), start=True)).uuid
    two.onlooker.mind(uuid)
    pids = await ran(two.onlooker, uuid, 1)
    assert [one.pid for one in here.qemus(NAME)] == pids
    here.freeze()
    assert await stopped(here) is here
    assert not here.up
    here.thaw()
    await here.restart()
    assert here.up
    assert await ran(two.onlooker, uuid, 1) == pids
    assert here.kill_qemu(NAME) == 1
    await ran(two.onlooker, uuid, 0)
    assert two.onlooker.overlaps(uuid) == []


@pytest.mark.timeout(240)
async def test_a_failpoint_stops_a_host_at_one_instant(two: Hosts, guests: dict[str, Guest]) -> None:
    here = two[0]
    await here.restart("guest-cont:stop")
    async with here.client() as client:
        start = asyncio.create_task(client.create(spec_of(guests["x86_64-microvm"], NAME), start=True), name="start")
        assert await stopped(*two.each) is here
        (one,) = here.qemus(NAME)
        assert not start.done()
        here.thaw()
        assert (await start).pid == one.pid
