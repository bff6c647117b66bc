"""The database's thread: what shares a transaction, what fails for itself, and what is said when nothing is known."""

from __future__ import annotations

import asyncio
import logging
import resource
import sqlite3
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from qmpd.database import MAX_BATCH, MAX_WAITING, Database, open_database
from qmpd.errors import Busy
from qmpd.sqlite import open_store
from qmpd.store import Lost, Unknown

PATIENCE_S = 20


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    async with open_database(tmp_path) as opened:
        yield opened


@contextmanager
def stuck(database: Database) -> Iterator[None]:
    """The thread waits inside a transaction, as on a disk that does not answer, until the block ends."""
    go = threading.Event()
    with ExitStack() as on_exit:
        on_exit.callback(go.set)
        database.enqueue(lambda _: go.wait(PATIENCE_S))
        yield


async def traced(database: Database) -> list[str]:
    """From here on, the SQL that begins and ends transactions."""
    statements: list[str] = []

    def note(statement: str) -> None:
        if statement.split()[0] in {"BEGIN", "COMMIT", "ROLLBACK"}:
            statements.append(statement)

    await database.read(lambda connection: connection.set_trace_callback(note))
    return statements


def insert(key: str, value: bytes | None = b"") -> Callable[[sqlite3.Connection], int]:
    return lambda connection: connection.execute("INSERT INTO record VALUES (?, ?, 1)", (key, value)).rowcount


async def one_turn() -> None:
    """The loop runs once: tasks made before have begun."""
    await asyncio.sleep(0)


async def test_commits_that_wait_share_one_transaction_and_keep_their_order(database: Database) -> None:
    statements = await traced(database)
    async with open_store(database) as store:
        with stuck(database):
            commits = [asyncio.ensure_future(store.commit({}, {"a": b"%d" % n})) for n in range(50)]
            await one_turn()
        revisions = await asyncio.gather(*commits)
    assert revisions == list(range(1, 51))
    assert statements.count("COMMIT") <= 2


async def test_guards_see_what_earlier_commits_of_the_same_transaction_wrote(database: Database) -> None:
    async with open_store(database) as store:
        outcomes = await asyncio.gather(
            store.commit({"a": 0}, {"a": b"1"}),
            store.commit({"a": 0}, {"a": b"2"}),
            store.commit({"a": 1}, {"a": b"3"}),
            return_exceptions=True,
        )
        assert outcomes[0] == 1
        assert isinstance(outcomes[1], Lost)
        assert outcomes[2] == 2


async def test_a_request_that_fails_takes_back_what_it_wrote_and_leaves_its_neighbours_alone(database: Database) -> None:
    class Mistake(Exception):
        pass

    def write_and_raise(connection: sqlite3.Connection) -> None:
        connection.execute("INSERT INTO record VALUES ('wrong', x'', 1)")
        raise Mistake

    def keys(connection: sqlite3.Connection) -> list[str]:
        return [key for (key,) in connection.execute("SELECT key FROM record ORDER BY key")]

    statements = await traced(database)
    outcomes = await asyncio.gather(
        database.enqueue(insert("a")), database.enqueue(write_and_raise), database.enqueue(insert("b")), return_exceptions=True
    )
    assert [outcomes[0], outcomes[2]] == [1, 1]
    assert isinstance(outcomes[1], Mistake)
    assert await database.read(keys) == ["a", "b"]
    assert statements.count("COMMIT") == 1


async def test_when_sqlite_refuses_the_transaction_every_request_gets_its_own(database: Database, caplog: pytest.LogCaptureFixture) -> None:
    statements = await traced(database)
    outcomes = await asyncio.gather(
        database.enqueue(insert("a")), database.enqueue(insert("b", None)), database.enqueue(insert("c")), return_exceptions=True
    )
    assert [outcomes[0], outcomes[2]] == [1, 1]
    assert isinstance(outcomes[1], Unknown)
    assert (statements.count("BEGIN IMMEDIATE"), statements.count("COMMIT")) == (4, 2)
    assert [record.levelno for record in caplog.records] == [logging.ERROR]


async def test_a_write_that_lingers_shares_the_transaction_of_the_next_that_does_not(database: Database) -> None:
    statements = await traced(database)
    lingering = [database.enqueue(insert("a"), linger_s=2 * PATIENCE_S), database.enqueue(insert("b"), linger_s=2 * PATIENCE_S)]
    await one_turn()
    assert statements == []
    async with asyncio.timeout(PATIENCE_S):
        await database.write(insert("c"))
        assert await asyncio.gather(*lingering) == [1, 1]
    assert statements.count("COMMIT") == 1


async def test_a_read_takes_along_what_lingers(database: Database) -> None:
    lingering = database.enqueue(insert("a"), linger_s=2 * PATIENCE_S)
    async with asyncio.timeout(PATIENCE_S):
        assert await database.read(lambda connection: connection.execute("SELECT count(*) FROM record").fetchone()) == (1,)
    assert lingering.result() == 1


async def test_what_lingers_is_written_when_nothing_else_comes_also_at_the_end(tmp_path: Path) -> None:
    async with open_database(tmp_path) as database:
        async with asyncio.timeout(PATIENCE_S):
            assert await database.enqueue(insert("a"), linger_s=0.001) == 1
        last = database.enqueue(insert("b"), linger_s=0.001)
    assert last.result() == 1


async def test_a_read_sees_the_writes_asked_for_before_it(database: Database) -> None:
    async with open_store(database) as store:
        commit = asyncio.ensure_future(store.commit({}, {"a": b"1"}))
        snapshot = await store.read("")
        assert list(snapshot.records) == ["a"]
        await commit


async def test_a_read_that_sqlite_refuses_is_unknown(database: Database) -> None:
    with pytest.raises(Unknown, match="no such table: missing"):
        await database.read(lambda connection: connection.execute("SELECT * FROM missing").fetchall())


async def test_no_transaction_grows_without_bound(database: Database) -> None:
    statements = await traced(database)
    with stuck(database):
        requests = [database.enqueue(lambda connection: connection.execute("DELETE FROM record").rowcount) for _ in range(3 * MAX_BATCH)]
    await asyncio.gather(*requests)
    assert statements.count("COMMIT") >= 3


async def test_a_disk_that_does_not_answer_is_unknown_and_the_write_may_still_happen(tmp_path: Path) -> None:
    async with open_database(tmp_path, answer_limit_s=0.05) as database, open_store(database) as store:
        with stuck(database):
            with pytest.raises(Unknown, match=r"did not answer within 0\.05 s"):
                await store.commit({}, {"a": b"late"})
            with pytest.raises(Unknown):
                await store.read("")
        await database.enqueue(lambda _: None)
        assert (await store.read("")).records["a"].value == b"late"


async def test_a_stuck_disk_does_not_fill_the_memory(database: Database) -> None:
    async with open_store(database) as store:
        with stuck(database):
            waiting = [database.enqueue(lambda _: None) for _ in range(MAX_WAITING - 1)]
            with pytest.raises(Busy):
                await store.commit({}, {"a": b"one too many"})
            with pytest.raises(Busy):
                await database.enqueue(lambda _: None)
        await asyncio.gather(*waiting)
        assert (await store.read("")).records == {}
        await store.commit({}, {"a": b"again"})


async def test_what_was_queued_is_written_when_the_database_closes(tmp_path: Path) -> None:
    async with open_database(tmp_path) as database, open_store(database) as store:
        commits = [asyncio.ensure_future(store.commit({}, {f"k{n}": b""})) for n in range(MAX_BATCH + 10)]
        await one_turn()
    await asyncio.gather(*commits)
    async with open_database(tmp_path) as database, open_store(database) as store:
        assert len((await store.read("")).records) == MAX_BATCH + 10


async def test_a_closed_database_says_so(tmp_path: Path) -> None:
    async with open_database(tmp_path) as database, open_store(database) as store:
        pass
    with pytest.raises(Busy, match="closed"):
        await store.commit({}, {"a": b""})
    with pytest.raises(Busy, match="closed"):
        await store.read("")


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Writes beyond this size fail with an error that is not "no space"."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


async def test_after_a_failed_commit_nothing_is_known_until_it_is_read_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with open_database(tmp_path) as database, open_store(database) as store:
        revision = await store.commit({}, {"a": b"old"})
        with file_size_limit((tmp_path / "qmpd.db-wal").stat().st_size + 4096):
            outcomes = await asyncio.gather(
                store.commit({"a": revision}, {"a": b"x" * 100_000}),
                store.commit({"a": revision}, {"a": b"this depends on the one before"}),
                store.commit({}, {"b": b"small"}),
                return_exceptions=True,
            )
            assert [type(outcome) for outcome in outcomes] == [Unknown, Unknown, Unknown]
            snapshot = await store.read("")
        assert {key: record.value for key, record in snapshot.records.items()} == {"a": b"old"}
        settled = await store.commit({"a": revision}, {"a": b"new"})
        assert settled > revision
    async with open_database(tmp_path) as database, open_store(database) as store:
        assert {key: record.value for key, record in (await store.read("")).records.items()} == {"a": b"new"}
    assert "outcome unknown" in caplog.text


async def test_a_database_that_cannot_be_reopened_is_unknown_until_it_can(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "qmpd.db"
    async with open_database(tmp_path) as database, open_store(database) as store:
        revision = await store.commit({}, {"a": b"old"})
        with file_size_limit((tmp_path / "qmpd.db-wal").stat().st_size), pytest.raises(Unknown):
            await store.commit({}, {"a": b"new"})
        hidden = await asyncio.to_thread(path.rename, tmp_path / "hidden")
        outcomes = await asyncio.gather(store.commit({}, {"b": b""}), store.commit({}, {"c": b""}), store.read(""), return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [Unknown, Unknown, Unknown]
        await asyncio.to_thread(hidden.rename, path)
        assert await store.commit({"a": revision}, {"a": b"new"}) > revision
    assert "unable to open" in caplog.text
