"""A daemon starts whatever the ledger has: rows that cannot be read, and migrations that were never settled and are nobody's any more."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import msgspec
import pytest

from qmpd.daemon import running
from qmpd.database import open_database
from qmpd.migration.ledger import Entry, open_ledger
from qmpd.migration.phases import Phase
from qmpd.migration.verbs import Migration
from qmpd.pki.directory import Pki
from qmpd.service import Service
from qmpd.settings import Settings
from qmpd.spec import MachineSpec
from qmpd.statefile import DATABASE_NAME
from qmpd.views import MachineView
from tests.api.lab import settings
from tests.migration.test_vacancies import offer

#: Only a hang takes so long.
HUNG_S = 30.0
LOOK_S = 0.02


@pytest.fixture
def there(short_directory: Path) -> Settings:
    return settings(short_directory, Pki(short_directory / "pki"), [])


def entry(number: int, machine: MachineView, **changes: object) -> Entry:
    """A migration of a machine that was begun and never went on."""
    offered = msgspec.structs.replace(offer(number), uuid=machine.uuid, spec=MachineSpec(name=machine.name, board="x86_64-q35"))
    begun = Entry(
        id=offered.id, role="source", machine=machine.name, uuid=machine.uuid, peer="b", epoch=1, phase=Phase.BEGUN, offer=offered,
        went=True, began_at=f"2026-01-0{number}T00:00:00.000Z", changed_at="c",
    )  # fmt: skip
    return msgspec.structs.replace(begun, **changes)


async def haunted(there: Settings, ghosts: Callable[[MachineView], list[Entry]], arrived: str | None = None) -> MachineView:
    """A daemon that had a machine, which some migration brought, perhaps, and whose ledger has these entries of it."""
    async with running(there, {}) as service:
        made = await service.create(MachineSpec(name="web", board="x86_64-q35"))
        machine = service._registry.get("web")
        await service._registry.store(machine, msgspec.structs.replace(machine.definition, arrived=arrived), machine.revision)
    async with open_database(Path(there.state_dir)) as database, open_ledger(database) as ledger:
        for ghost in ghosts(made):
            await ledger.begin(ghost)
    return made


async def at_rest(service: Service) -> None:
    """Returns when the machine is nobody's any more, and nothing is left to be done."""
    async with asyncio.timeout(HUNG_S):
        while service.machine("web").operation is not None or unsettled(service.migration):
            await asyncio.sleep(LOOK_S)


def unsettled(migration: Migration) -> list[Entry]:
    return [*migration._ledger.unsettled("source"), *migration._ledger.unsettled("destination")]


GHOSTS: dict[str, Callable[[MachineView], list[Entry]]] = {
    "begun twice": lambda made: [entry(1, made), entry(2, made, phase=Phase.PERFORMING)],
    "begun, and came back": lambda made: [entry(1, made), entry(2, made, role="destination", phase=Phase.ARRIVED)],
    "came twice": lambda made: [entry(number, made, role="destination", phase=Phase.TAKEN) for number in (1, 2)],
    "was awaited under the name of another": lambda made: [
        entry(1, made, role="destination", phase=Phase.AWAITING, made=("/nonexistent/disk.raw",))
    ],
    "was loaded under the name of another": lambda made: [entry(1, made, role="destination", phase=Phase.LOADED)],
    "is given, and the machine is not": lambda made: [entry(1, made, phase=Phase.GIVEN)],
    "moved, and is another one now": lambda made: [entry(1, made, phase=Phase.MOVED, uuid="00000000-0000-4000-8000-00000000000f")],
    "kept, and nobody was told": lambda made: [entry(1, made, phase=Phase.KEPT)],
}


@pytest.mark.parametrize("ghosts", GHOSTS.values(), ids=GHOSTS)
async def test_a_daemon_starts_with_migrations_that_are_nobodys(there: Settings, ghosts: Callable[[MachineView], list[Entry]]) -> None:
    made = await haunted(there, ghosts)
    for _ in range(2):
        async with running(there, {}) as service:
            await at_rest(service)
            view = service.machine("web")
            assert (view.uuid, view.state) == (made.uuid, made.state)
            assert service._registry.get("web").definition.given is None
    async with running(there, {}) as service:
        await service.delete("web", None)


@pytest.mark.parametrize("phase", [Phase.TAKEN, Phase.ARRIVED])
async def test_what_came_back_goes_on_as_soon_as_the_ghost_is_gone(there: Settings, phase: Phase) -> None:
    await haunted(there, lambda made: [entry(1, made), entry(2, made, role="destination", phase=phase)], arrived=offer(2).id)
    async with running(there, {}) as service:
        await at_rest(service)
        assert [view.phase for view in service.migration.list("web").migrations] == ["arrived", "kept"]
        await service.delete("web", None)


ROWS = {
    "garbage": b"\xc1garbage",
    "nothing": b"",
    "another document": msgspec.msgpack.encode({"id": 1}),
    "nested too deep": b"\x91" * 100_000,
    "a phase of a later version": msgspec.msgpack.encode({"id": "0" * 16, "phase": "teleported"}),
}


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
async def test_a_row_that_cannot_be_read_is_left_alone(there: Settings, row: bytes, caplog: pytest.LogCaptureFixture) -> None:
    await haunted(there, lambda made: [entry(1, made)])
    path = Path(there.state_dir) / DATABASE_NAME
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("INSERT INTO migration VALUES (NULL, ?, 0, ?)", ("f" * 16, row))
    for _ in range(2):
        async with running(there, {}) as service:
            await at_rest(service)
            assert service.machine("web").operation is None
    assert "damaged and was left alone" in caplog.text
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT entry FROM migration WHERE id = ?", ("f" * 16,)).fetchall() == [(row,)]
