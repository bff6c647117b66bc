"""Machines of peers come as many at a time as there are places, and none while either host goes down; for a refused one nothing is made."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
import pytest

from qmpd.access import Caller
from qmpd.errors import Busy, GoingDown
from qmpd.lifecycle import State
from qmpd.migration import vacancies
from qmpd.migration.protocol import VERSION, Offer
from qmpd.migrationviews import Goal, MigrateRequest
from qmpd.spec import MachineSpec
from qmpd.views import HostShutdownRequest, HostShutdownView, JobView
from tests.api.lab import Daemon
from tests.guests.build import Guest
from tests.machines import spec_of
from tests.migration.test_moves import HUNG_S, LOOK_S, busy, counting, ended, known, pair, set_to_work

__all__ = ["counting"]
pytestmark = pytest.mark.qemu

SOURCE = Caller(user="peer:a", role="peer", peer="a")
#: With a guest that changes its memory faster, it never ends.
SLOW = Goal(bandwidth_mib_s=1, auto_converge=False)


def offer(number: int) -> Offer:
    """A machine of a peer's that nothing is known of."""
    spec = MachineSpec(name=f"m{number}", board="x86_64-q35")
    return Offer(
        protocol=VERSION, id=f"{number:016x}", epoch=1, spec=spec, uuid=f"00000000-0000-4000-8000-{number:012}", created_at="c",
        changed_at="c", state="running", machine="pc-q35-7.2", accel="tcg", emulator_version="7.2.22",
    )  # fmt: skip


async def awaited(there: Daemon, name: str) -> None:
    """Returns when its QEMU waits for the machine."""
    async with asyncio.timeout(HUNG_S):
        while (view := known(there, name)) is None or view.state is not State.INCOMING:
            await asyncio.sleep(LOOK_S)


def untouched(there: Daemon, directory: Path, name: str) -> None:
    """Nothing was made for a machine, and nothing is written down of it."""
    assert known(there, name) is None
    assert not (directory / f"{there.name}/s/machines/{name}").exists()
    assert there.service.migration.list(name).migrations == ()


async def under_way(there: Daemon, guest: Guest) -> JobView:
    """The end of a host, which lasts as long as one of its guests likes."""
    await there.service.create(spec_of(guest, "stays", shutdown_timeout_s=3600), start=True)
    job = await there.service.shutdown_host(HostShutdownRequest())
    async with asyncio.timeout(HUNG_S):
        while there.service.machine("stays").operation != "host-shutdown":
            await asyncio.sleep(LOOK_S)
    return job


async def test_a_machine_waits_for_a_place(short_directory: Path, counting: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vacancies, "AWAITED_OF_PEER", 1)
    async with pair(short_directory) as (a, b):
        await set_to_work(a, busy(short_directory))
        await a.service.create(spec_of(counting, "second"), start=True)
        first = await a.service.migration.migrate("busy", MigrateRequest(peer="b", goal=SLOW))
        await awaited(b, "busy")
        for _ in range(3):
            with pytest.raises(Busy, match="1 machines of a") as refusal:
                await b.service.migration.offer(SOURCE, offer(1))
            assert refusal.value.code == "too_many_requests"
            untouched(b, short_directory, "m1")
        second = await a.service.migration.migrate("second", MigrateRequest(peer="b"))
        async with asyncio.timeout(HUNG_S):
            while not a.service.migration.list("second").migrations:
                await asyncio.sleep(LOOK_S)
        untouched(b, short_directory, "second")
        await a.service.cancel(first.id)
        assert (await ended(a, second)).state == "succeeded"
        later, earlier = b.service.migration.list().migrations
        assert (earlier.machine, earlier.phase, later.machine, later.phase) == ("busy", "discarded", "second", "arrived")
        assert earlier.ended_at is not None
        assert earlier.ended_at <= later.began_at
        assert a.service.machine("busy").state is State.RUNNING


async def test_so_many_come_at_a_time_from_all_peers(short_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vacancies, "AWAITED", 1)
    async with pair(short_directory) as (a, b):
        await set_to_work(a, busy(short_directory))
        job = await a.service.migration.migrate("busy", MigrateRequest(peer="b", goal=SLOW))
        await awaited(b, "busy")
        with pytest.raises(Busy, match="the most at a time"):
            await b.service.migration.offer(SOURCE, offer(1))
        untouched(b, short_directory, "m1")
        await a.service.cancel(job.id)


async def test_a_host_that_goes_down_takes_no_machine_in(short_directory: Path, guests: dict[str, Guest], counting: Guest) -> None:
    async with pair(short_directory) as (a, b):
        await a.service.create(spec_of(counting, "counter"), start=True)
        job = await under_way(b, guests["x86_64-microvm"])
        refused = await ended(a, await a.service.migration.migrate("counter", MigrateRequest(peer="b")))
        assert refused.error is not None
        assert refused.error["code"] == "cannot_move"
        assert "being shut down" in str(refused.error["message"])
        untouched(b, short_directory, "counter")
        view = a.service.machine("counter")
        assert (view.state, view.operation) == (State.RUNNING, None)
        await b.service.cancel(job.id)
        assert (await ended(a, await a.service.migration.migrate("counter", MigrateRequest(peer="b")))).state == "succeeded"


async def test_a_machine_that_is_ended_with_its_host_is_not_offered(
    short_directory: Path, guests: dict[str, Guest], counting: Guest
) -> None:
    async with pair(short_directory) as (a, b):
        await a.service.create(spec_of(counting, "counter", autostart_order=-1), start=True)
        await under_way(a, guests["x86_64-microvm"])
        with pytest.raises(GoingDown, match="moved"):
            await a.service.migration.migrate("counter", MigrateRequest(peer="b"))
        untouched(b, short_directory, "counter")


async def test_a_host_that_goes_down_turns_away_what_has_not_arrived(short_directory: Path) -> None:
    async with pair(short_directory) as (a, b):
        await set_to_work(a, busy(short_directory))
        moving = await a.service.migration.migrate("busy", MigrateRequest(peer="b", goal=SLOW))
        await awaited(b, "busy")
        down = await ended(b, await b.service.shutdown_host(HostShutdownRequest()))
        assert msgspec.convert(down.result, HostShutdownView) == HostShutdownView()
        assert known(b, "busy") is None
        job = await ended(a, moving)
        assert job.error is not None
        view = a.service.machine("busy")
        assert (view.state, view.operation) == (State.RUNNING, None)


async def test_a_daemon_that_ends_leaves_machines_to_its_successor(short_directory: Path) -> None:
    async with pair(short_directory) as (_, b):
        async with b.service.migration.at_work():
            pass
        with pytest.raises(Busy, match="successor"):
            await b.service.migration.offer(SOURCE, offer(1))
        untouched(b, short_directory, "m1")
