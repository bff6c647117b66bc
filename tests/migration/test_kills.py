"""Who kills a machine that moves is told the truth: its guest has ended, or it goes on elsewhere and nothing was done."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from qmpd.errors import GivenAway, Held
from qmpd.lifecycle import AT_REST
from qmpd.machine import Machine
from qmpd.migrationviews import Goal, MigrateRequest
from qmpd.record import Definition
from tests.guests.build import Guest
from tests.machines import spec_of
from tests.migration.doubtful import NAME, given
from tests.migration.test_moves import HUNG_S, LOOK_S, busy, counting, ended, known, pair, printed, set_to_work

__all__ = ["counting"]
pytestmark = pytest.mark.qemu


async def test_a_machine_that_was_given_away_is_not_killed_where_it_was(
    short_directory: Path, counting: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with given(short_directory, counting, monkeypatch) as (a, b, job):
        before = a.service.machine(NAME)
        with pytest.raises(GivenAway, match="given to b") as refusal:
            await a.service.kill(NAME)
        assert refusal.value.details["peer"] == "b"
        after = a.service.machine(NAME)
        assert (after.pid, after.state) == (before.pid, before.state)
        monkeypatch.undo()
        assert (await ended(a, job)).state == "succeeded"
        await printed(b, NAME, 100)
        assert (await b.service.kill(NAME)).method == "sigkill"


async def test_a_machine_is_not_killed_while_it_is_given(short_directory: Path, counting: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    async with pair(short_directory) as (a, b):
        await a.service.create(spec_of(counting, NAME), start=True)
        registry, giving, may_go_on = a.service._registry, asyncio.Event(), asyncio.Event()
        store = registry.store

        async def slow(machine: Machine, definition: Definition, revision: int) -> None:
            if definition.given is not None:
                giving.set()
                await may_go_on.wait()
            await store(machine, definition, revision)

        monkeypatch.setattr(registry, "store", slow)
        job = await a.service.migration.migrate(NAME, MigrateRequest(peer="b"))
        async with asyncio.timeout(HUNG_S):
            await giving.wait()
        with pytest.raises(Held, match="being given to b"):
            await a.service.kill(NAME)
        may_go_on.set()
        assert (await ended(a, job)).state == "succeeded"
        await printed(b, NAME, 100)
        await b.service.kill(NAME)


async def test_a_machine_that_is_on_its_way_is_killed_and_given_to_nobody(short_directory: Path) -> None:
    async with pair(short_directory) as (a, b):
        await set_to_work(a, busy(short_directory))
        slow = Goal(bandwidth_mib_s=1, auto_converge=False)
        job = await a.service.migration.migrate("busy", MigrateRequest(peer="b", goal=slow))
        async with asyncio.timeout(HUNG_S):
            while known(b, "busy") is None:
                await asyncio.sleep(LOOK_S)
        assert (await a.service.kill("busy")).method == "sigkill"
        assert (await ended(a, job)).state == "failed"
        assert a.service.machine("busy").state in AT_REST
        async with asyncio.timeout(HUNG_S):
            while known(b, "busy") is not None:
                await asyncio.sleep(LOOK_S)
