"""Who kills a machine that moves is told the truth: its guest has ended, or it goes on elsewhere and nothing was done."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from qmpd.errors import GivenAway, Held
from qmpd.lifecycle import AT_REST, State
from qmpd.machine import Machine
from qmpd.migration.arrival import Arrival, Endings
from qmpd.migrationviews import Goal, MigrateRequest
from qmpd.record import Definition
from qmpd.spec import RestartPolicy
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


async def test_a_machine_that_dies_while_it_is_taken_has_crashed_and_is_started_again(
    short_directory: Path, counting: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its QEMU has answered, and the commit that makes it this host's own is next."""
    ready_to_run, dead = Endings._ready_to_run, list[int]()

    async def dies(self: Endings, arrival: Arrival) -> bool:
        ready, machine = await ready_to_run(self, arrival), arrival.machine
        if ready and not dead:
            dead.append(machine.session.process.identity.pid)
            os.kill(dead[0], signal.SIGKILL)
            assert await machine.until(AT_REST, HUNG_S)
            assert machine.state is State.STOPPED
        return ready

    monkeypatch.setattr(Endings, "_ready_to_run", dies)
    async with pair(short_directory) as (a, b):
        await a.service.create(spec_of(counting, NAME, restart=RestartPolicy(when="on-failure", backoff_s=0.1)), start=True)
        await printed(a, NAME, 100)
        await ended(a, await a.service.migration.migrate(NAME, MigrateRequest(peer="b")))
        async with asyncio.timeout(HUNG_S):
            while (view := known(b, NAME)) is None or view.state is not State.RUNNING:
                await asyncio.sleep(LOOK_S)
        assert known(a, NAME) is None
        assert view.pid not in dead
        states = [event.data["state"] for event in (await b.service.events_page(0, 1000, NAME)).events if event.kind == "machine.state"]
        assert "crashed" in states
        await b.service.kill(NAME)
