"""A machine that was given away and that its new owner does not take yet: where people, and daemons that start anew, have to decide."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from qmpd.errors import PeerUnavailable, QemuSilent
from qmpd.migration.arrival import Arrival
from qmpd.migration.protocol import Handover
from qmpd.migrationviews import MigrateRequest, MigrationView
from qmpd.settings import Peer
from qmpd.views import JobView
from tests.api.lab import Daemon
from tests.guests.build import Guest
from tests.machines import spec_of
from tests.migration.test_moves import HUNG_S, LOOK_S, pair, printed

#: The machine's name.
NAME = "counter"


def withholds(there: Daemon, patch: pytest.MonkeyPatch) -> None:
    """A host takes nothing, whoever tells it to."""

    async def not_yet(_arrival: Arrival, _handover: Handover) -> None:
        raise QemuSilent("it does not take it yet")

    patch.setattr(there.service.migration._arrivals._endings, "take", not_yet)


def keeps_silent(there: Daemon, patch: pytest.MonkeyPatch) -> None:
    """A host tells nobody that it takes anything; what it does by itself it does."""

    async def not_yet(_peer: str, _migration: str, _handover: Handover) -> None:
        raise QemuSilent("it does not say")

    patch.setattr(there.service.migration._arrivals, "take", not_yet)


def cuts_off(there: Daemon, patch: pytest.MonkeyPatch) -> None:
    """A host reaches no other any more."""

    def nobody(peer: Peer) -> None:
        raise PeerUnavailable(f"{peer.name} is not there")

    patch.setattr(there.service.peering, "dial", nobody)


def view(there: Daemon) -> MigrationView:
    """What a host says of the machine's migration."""
    return there.service.migration.list(NAME).migrations[0]


async def until(there: Daemon, phase: str) -> None:
    """Returns when a host has got so far."""
    async with asyncio.timeout(HUNG_S):
        while view(there).phase != phase:
            await asyncio.sleep(LOOK_S)


@asynccontextmanager
async def given(
    directory: Path, guest: Guest, patch: pytest.MonkeyPatch, withholding: Callable[[Daemon, pytest.MonkeyPatch], None] = withholds
) -> AsyncIterator[tuple[Daemon, Daemon, JobView]]:
    """Two hosts, and a machine of the first that was given to the second, which holds it and does not take it; the job."""
    async with pair(directory) as (a, b):
        await a.service.create(spec_of(guest, NAME), start=True)
        await printed(a, NAME, 100)
        withholding(b, patch)
        job = await a.service.migration.migrate(NAME, MigrateRequest(peer="b"))
        async with asyncio.timeout(HUNG_S):
            while not (found := a.service.migration.list(NAME).migrations) or found[0].doubt is None:
                await asyncio.sleep(LOOK_S)
        yield a, b, job
