"""A guest is more than its log and the notes about it: what cannot be read or written at its arrival does not keep it from running."""

from __future__ import annotations

import asyncio
import errno
from pathlib import Path

import msgspec
import pytest

from qmpd.lifecycle import State
from qmpd.record import LaunchRecord, read_record, write_record
from tests.guests.build import Guest
from tests.machines import spec_of
from tests.migration.doubtful import NAME
from tests.migration.test_moves import HUNG_S, LOOK_S, counting, moved, pair, printed

__all__ = ["counting"]
pytestmark = pytest.mark.qemu


@pytest.mark.parametrize(
    "broken", ["qmpd.migration.itemdesk.ItemDesk.logs", "qmpd.migration.itemdesk.ItemDesk.number", "qmpd.console.Console.moved"]
)
async def test_a_machine_arrives_whose_log_cannot_be_read(
    short_directory: Path, counting: Guest, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    async def fails(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    async with pair(short_directory) as (a, b):
        await a.service.create(spec_of(counting, NAME), start=True)
        await printed(a, NAME, 100)
        monkeypatch.setattr(broken, fails)
        assert (await moved(a, NAME, "b")).owner == "destination"
        assert b.service.machine(NAME).state is State.RUNNING
        monkeypatch.undo()
        await b.service.kill(NAME)


async def test_a_launch_record_is_written_anew_as_soon_as_there_is_room(
    short_directory: Path, counting: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = [True]

    def once_full(run_dir: str, record: LaunchRecord) -> None:
        if full:
            full.pop()
            raise OSError(errno.ENOSPC, "No space left on device")
        write_record(run_dir, record)

    monkeypatch.setattr("qmpd.migration.arrival.write_record", once_full)
    async with pair(short_directory) as (a, b):
        await a.service.create(spec_of(counting, NAME), start=True)
        await moved(a, NAME, "b")
        async with asyncio.timeout(HUNG_S):
            while b.service.machine(NAME).operation is not None:
                await asyncio.sleep(LOOK_S)
        assert full == []
        found = await asyncio.to_thread(read_record, str(short_directory / "b/r/m" / NAME))
        assert msgspec.structs.asdict(found)["incoming"] is None
        await b.service.kill(NAME)
