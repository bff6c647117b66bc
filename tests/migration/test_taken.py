"""What a destination was told when it took a machine outlives its daemon, also between the commit and the note of it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from qmpd.failpoint import arm
from qmpd.lifecycle import State
from qmpd.migrationviews import Goal, MigrateRequest
from tests.guests.build import Guest
from tests.guests.trace import check_trace
from tests.machines import copy_of, laden, spec_of
from tests.migration.test_moves import HUNG_S, LOOK_S, known, printed
from tests.migration.test_moving_logs import Hosts, gone, hosts, log_of, phase_at

pytestmark = pytest.mark.qemu
NAME = "counter"


async def taken_by_a_daemon_that_ends(both: Hosts) -> None:
    """A running machine is offered, and halted on its way; the destination's daemon ends before it has noted what it owns."""
    a, b = both.daemons["a"], both.daemons["b"]
    arm("migration-taken:hang")
    await a.service.migration.migrate(NAME, MigrateRequest(peer="b", goal=Goal(bandwidth_mib_s=1, auto_converge=False)))
    async with asyncio.timeout(HUNG_S):
        while phase_at(a) != "performing":
            await asyncio.sleep(LOOK_S)
        # As an action of its watchdog would do.
        await a.service._registry.get(NAME).session.execute("stop")
        while phase_at(b) != "loaded" or (found := b.service._registry.known(NAME)) is None or not found.revision:
            await asyncio.sleep(LOOK_S)
    arm("")
    await both.restart("b")


async def test_a_guest_that_was_halted_on_its_way_stays_halted(short_directory: Path, guests: dict[str, Guest]) -> None:
    async with hosts(short_directory) as both:
        spec = laden(spec_of(copy_of(guests["x86_64-q35"], short_directory), NAME), short_directory)
        await both.daemons["a"].service.create(spec, start=True)
        await printed(both.daemons["a"], NAME, 200)
        await taken_by_a_daemon_that_ends(both)
        await gone(both.daemons["a"], NAME)
        b = both.daemons["b"]
        async with asyncio.timeout(HUNG_S):
            while (view := known(b, NAME)) is None or view.operation is not None:
                await asyncio.sleep(LOOK_S)
        assert view.state is State.PAUSED
        begin, data = await log_of(b, NAME)
        assert (begin, check_trace(data).breaks) == (0, ())
        await b.service.resume(NAME)
        await printed(b, NAME, 100)
        await b.service.kill(NAME)
