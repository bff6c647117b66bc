"""The ports at which a daemon awaits a machine of a peer: a scan of them, at the worst moment, harms no migration."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import pytest

from qmpd.lifecycle import State
from qmpd.migrationviews import MigrateRequest
from qmpd.pki.directory import Pki
from tests.guests.build import Guest
from tests.machines import spec_of
from tests.migration.baggage import PRINTED
from tests.migration.crashes import Sides, asked, ended
from tests.migration.hosts import Hosts, hosts, stopped
from tests.migration.network import NoNetworks
from tests.migration.strangers import WORDS, breaks_off, impostors, says
from tests.migration.traveller import PATIENCE_S, Traveller
from tests.unavailable import unavailable

pytestmark = pytest.mark.qemu

#: The peer has made ready, and nobody has come to it yet.
READY = "peer-answered:stop@1"
LIMIT_S = 600


@pytest.fixture
async def three() -> AsyncIterator[Hosts]:
    """A machine goes from the first to the second; the third is a peer as well, and not the one that is awaited."""
    try:
        async with hosts(3) as made:
            await made.start()
            yield made
    except NoNetworks as reason:
        unavailable(reason)


@pytest.mark.timeout(LIMIT_S)
@pytest.mark.parametrize("channels", [0, 2])
async def test_a_scan_between_the_consent_and_the_peer_lets_the_peer_in(
    three: Hosts, guests: dict[str, Guest], tmp_path: Path, channels: int
) -> None:
    world = three
    machine = Traveller(world, spec_of(guests["x86_64-microvm"], "one"))
    sides = Sides(source=world[0], destination=world[1], machine=machine)
    await machine.begin(world[0])
    await machine.grown(world[0], PRINTED)
    await world[0].armed(READY)
    async with world[0].client() as client:  # a daemon answers before it has taken its machines over
        await client.wait(machine.name, [State.RUNNING], PATIENCE_S)
    asking = asyncio.create_task(asked(sides, MigrateRequest(peer=world[1].name, channels=channels)), name="asking")
    assert await stopped(world[0]) is world[0]
    addresses = [(world[1].station.address, port) for port in await asyncio.to_thread(world[1].ports)]
    assert len(addresses) == 1
    authority = Pki(world[0].certificates.parent / "authority")
    papers = impostors(tmp_path, authority, "host0", world[0].station.address)
    scan = {**{name: says(words) for name, words in WORDS.items()}, "reset": breaks_off, **papers}
    for address, visit in itertools.product(addresses, scan.values()):
        await asyncio.to_thread(world[2].station.inside, partial(visit, address))
    world[0].thaw()
    job = await ended(sides, await asking)
    assert job.state == "succeeded", job.error
    host, view = await machine.at_home()
    await asyncio.to_thread(machine.visit, host)
    assert (host.name, str(view.state)) == ("host1", "running")
    await machine.grown(host, PRINTED)
    assert machine.trace().whole
    assert machine.twice() == []
