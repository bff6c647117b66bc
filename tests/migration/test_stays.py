"""While a machine is on its way nobody moves its state by QMP, and who decides about it without the other host is refused by that host."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from qmpd.access import OURSELVES, Caller
from qmpd.errors import Held, QmpdError, WrongState
from qmpd.lifecycle import State
from qmpd.machine import Machine
from qmpd.migrationviews import Goal, MigrateRequest, ResolveRequest
from qmpd.record import Definition
from qmpd.views import JobView, QmpRequest
from tests.api.lab import Daemon
from tests.guests.build import Guest
from tests.machines import spec_of
from tests.migration.doubtful import NAME, cuts_off, until
from tests.migration.test_moves import HUNG_S, LOOK_S, busy, counting, ended, known, pair, printed, set_to_work

__all__ = ["counting"]
pytestmark = pytest.mark.qemu

TAKE = ResolveRequest(action="take", confirm=NAME)
#: What would set a guest going, halt or end it, or move it or its disks.
MOVING = (
    "cont",
    "stop",
    "quit",
    "system_reset",
    "system_powerdown",
    "migrate",
    "migrate-incoming",
    "migrate_cancel",
    "migrate-continue",
    "migrate-pause",
    "migrate-recover",
    "migrate-set-capabilities",
    "blockdev-add",
    "block-job-cancel",
    "block-export-del",
    "nbd-server-stop",
    "device_del",
    "human-monitor-command",
    "yank",
    "x-exit-preconfig",
)


@asynccontextmanager
async def loaded(directory: Path, guest: Guest, patch: pytest.MonkeyPatch) -> AsyncIterator[tuple[Daemon, Daemon, JobView, asyncio.Event]]:
    """Two hosts, and a machine of the first that the second holds as a whole; it is given when the event is set. And the job."""
    async with pair(directory) as (a, b):
        await a.service.create(spec_of(guest, NAME), start=True)
        await printed(a, NAME, 100)
        registry, may_go_on = a.service._registry, asyncio.Event()
        store = registry.store

        async def slow(machine: Machine, definition: Definition, revision: int) -> None:
            await may_go_on.wait()
            await store(machine, definition, revision)

        patch.setattr(registry, "store", slow)
        job = await a.service.migration.migrate(NAME, MigrateRequest(peer="b"))
        async with asyncio.timeout(HUNG_S):
            while known(b, NAME) is None:
                await asyncio.sleep(LOOK_S)
        await until(b, "loaded")
        yield a, b, job, may_go_on


async def test_while_it_moves_qmp_only_reads(short_directory: Path) -> None:
    async with pair(short_directory) as (a, b):
        await set_to_work(a, busy(short_directory))
        slow = Goal(bandwidth_mib_s=1, auto_converge=False)
        job = await a.service.migration.migrate("busy", MigrateRequest(peer="b", goal=slow))
        async with asyncio.timeout(HUNG_S):
            while (found := known(b, "busy")) is None or found.state is not State.INCOMING:
                await asyncio.sleep(LOOK_S)
        for there in (a, b):
            for command in MOVING:
                for oob in (False, True):
                    with pytest.raises(Held, match="held by 'migrate'"):
                        await there.service.qmp("busy", QmpRequest(execute=command, oob=oob), OURSELVES)
            assert (await there.service.qmp("busy", QmpRequest(execute="query-status"), Caller(uid=1))).result is not None
        await a.service.cancel(job.id)
        assert a.service.machine("busy").state is State.RUNNING


async def test_nothing_is_taken_that_its_source_has_not_given(
    short_directory: Path, counting: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with loaded(short_directory, counting, monkeypatch) as (a, b, job, may_go_on):
        with pytest.raises(WrongState, match="a answers, and has not given the machine away: there it is performing"):
            await b.service.migration.resolve(NAME, TAKE)
        assert b.service.machine(NAME).state is not State.RUNNING
        may_go_on.set()
        assert (await ended(a, job)).state == "succeeded"
        await printed(b, NAME, 100)
        await b.service.kill(NAME)


async def test_a_word_does_where_the_source_does_not_answer(
    short_directory: Path, counting: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with loaded(short_directory, counting, monkeypatch) as (a, b, job, may_go_on):
        cuts_off(b, monkeypatch)
        assert (await b.service.migration.resolve(NAME, TAKE)).phase in {"taken", "arrived"}
        await printed(b, NAME, 100)
        with pytest.raises(QmpdError):
            await a.service.resume(NAME)
        may_go_on.set()
        assert (await ended(a, job)).state == "succeeded"
        assert known(a, NAME) is None
        await until(b, "arrived")
        await b.service.kill(NAME)
