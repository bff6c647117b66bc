"""What earlier versions left on the disk is read by this one, and what a later one left is refused and not touched."""

from __future__ import annotations

import asyncio
import hashlib
import sqlite3
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

import msgspec
import pytest

from qmpd.daemon import running
from qmpd.database import open_database
from qmpd.endings import ENDING_NAME, last
from qmpd.journal import open_journal
from qmpd.record import FORMAT, RECORD_NAME, read_record
from qmpd.settings import Settings
from qmpd.sqlite import open_store
from qmpd.statefile import MIGRATIONS, connect, prepare
from tests.process.test_serve import Place, started
from tests.stored import DATA, restored

STORED = sorted(DATA.glob("database-*.sql"))


def number(path: Path) -> int:
    return int(path.stem.rpartition("-")[2])


def content(path: Path) -> dict[str, object]:
    """What is in a stored file, as it was written."""
    return msgspec.json.decode(path.with_suffix(".json").read_bytes(), type=dict[str, object])


def part(found: object, expected: object) -> object:
    """Of what was found, what the older version knew: fields that are new since are left out."""
    if isinstance(found, Mapping) and isinstance(expected, Mapping):
        return {name: part(found.get(name), value) for name, value in expected.items()}
    if isinstance(found, list) and isinstance(expected, list) and len(found) == len(expected):
        return [part(one, other) for one, other in zip(found, expected, strict=True)]
    return found


def plain(value: object) -> object:
    """As it is in JSON."""
    return msgspec.json.decode(msgspec.json.encode(value))


def hashes(directory: Path) -> dict[str, str]:
    """Every file there; the lock's content is the pid of whoever asked last."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir() if path.name != "lock"}


def schema(path: Path) -> list[tuple[str, str]]:
    with closing(sqlite3.connect(path)) as connection:
        return sorted(connection.execute("SELECT name, sql FROM sqlite_schema WHERE sql IS NOT NULL"))


def made(directory: Path) -> Path:
    """The directory as a daemon makes it."""
    directory.mkdir(mode=0o700)
    return directory


@pytest.fixture
def private(tmp_path: Path) -> Path:
    tmp_path.chmod(0o700)
    return tmp_path


def test_there_is_a_stored_database_of_every_schema_version() -> None:
    """Who adds a migration adds the database that it makes (`python -m tests.stored`), so that the next one has it to start from."""
    assert [number(path) for path in STORED] == list(range(1, len(MIGRATIONS) + 1))


@pytest.mark.parametrize("dump", STORED, ids=lambda path: path.stem)
def test_a_stored_database_has_the_schema_of_its_version(private: Path, dump: Path) -> None:
    """So a migration that was published is never changed."""
    prepare(private / "made.db", MIGRATIONS[: number(dump)])
    path = restored(dump, private)
    assert schema(path) == schema(private / "made.db")
    with closing(connect(path)) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (number(dump),)


@pytest.mark.parametrize("dump", STORED, ids=lambda path: path.stem)
async def test_everything_in_an_older_database_is_found(private: Path, dump: Path) -> None:
    restored(dump, private)
    expected = content(dump)
    async with open_database(private) as database, open_journal(database) as journal:
        events = plain((await journal.page(0)).events)
        jobs = plain([await journal.job(str(job["id"])) for job in expected["jobs"]])  # type: ignore[attr-defined]
        answer = await journal.recall(expected["answer"]["key"])  # type: ignore[index]
        assert (await journal.append("machine.created", "machine-1", {})).number == len(expected["events"]) + 1  # type: ignore[arg-type]
        version = await database.read(lambda connection: connection.execute("PRAGMA user_version").fetchone())
    assert version == (len(MIGRATIONS),)
    assert part(events, expected["events"]) == expected["events"]
    then = expected["jobs"]
    assert isinstance(jobs, list)
    assert isinstance(then, list)
    assert part(jobs[:-1], then[:-1]) == then[:-1]
    assert (jobs[-1]["id"], jobs[-1]["state"], then[-1]["state"]) == (then[-1]["id"], "interrupted", "running")
    assert answer is not None
    assert {"fingerprint": answer.fingerprint, "response": answer.response.hex(), "key": "0:a key"} == expected["answer"]


@pytest.mark.parametrize("dump", STORED, ids=lambda path: path.stem)
async def test_every_definition_of_an_older_database_is_a_machine(settings: Settings, dump: Path) -> None:
    state = restored(dump, made(Path(settings.state_dir))).parent
    expected = content(dump)["definitions"]
    assert isinstance(expected, dict)
    async with running(settings, {}) as service:
        for name, definition in expected.items():
            found = plain(service.definition(name))
            assert part(found, {"spec": definition["spec"]}) == {"spec": definition["spec"]}
            assert service.machine(name).uuid == definition["uuid"]
            await service.delete(name, service.machine(name).revision)
    async with open_database(state) as database, open_store(database) as store:
        assert (await store.read("machine/")).records == {}


@pytest.mark.parametrize("version", range(1, FORMAT + 1))
def test_a_launch_record_of_an_older_daemon_is_read(tmp_path: Path, version: int) -> None:
    stored = DATA / f"launch-{version}.msgpack"
    (tmp_path / RECORD_NAME).write_bytes(stored.read_bytes())
    expected = content(stored)
    del expected["format"]
    assert part(plain(read_record(str(tmp_path))), expected) == expected


def test_the_last_exit_that_an_older_daemon_kept_is_read(tmp_path: Path) -> None:
    stored = DATA / "last-exit-1.msgpack"
    (tmp_path / ENDING_NAME).write_bytes(stored.read_bytes())
    assert part(plain(last(str(tmp_path))), content(stored)) == content(stored)


@pytest.mark.parametrize("killed", [False, True], ids=["that ended", "that was killed"])
async def test_a_database_of_a_newer_daemon_is_refused_and_not_a_byte_changes(short_directory: Path, killed: bool) -> None:
    place = Place(short_directory)
    state = made(short_directory / "s")
    path = restored(STORED[-1], state)
    newer = len(MIGRATIONS) + 1
    kept = connect(path)
    try:
        kept.execute(f"PRAGMA user_version={newer}")
        before = hashes(state)
        if killed:  # what was committed stands in the write-ahead log alone
            assert set(before) == {"qmpd.db", "qmpd.db-wal"}
            for name in before:
                (state / f"{name}.copy").write_bytes((state / name).read_bytes())
    finally:
        kept.close()
    if killed:
        for name in before:
            (state / f"{name}.copy").rename(state / name)
    before = hashes(state)
    async with started(place) as daemon:
        assert await daemon.ended() == 1
    assert daemon.log == (
        f"qmpd: the database {path} has schema version {newer}, but this qmpd knows up to {len(MIGRATIONS)}: run a newer one\n"
    )
    assert await asyncio.to_thread(hashes, state) == before
    assert set(before) == ({"qmpd.db", "qmpd.db-wal"} if killed else {"qmpd.db"})
