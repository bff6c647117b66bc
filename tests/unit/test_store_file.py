"""Who may open a state directory, and what becomes of a database that is not as it should be."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from qmpd.database import open_database
from qmpd.errors import Held, QmpdError
from qmpd.sqlite import open_store
from qmpd.statefile import APPLICATION_ID, MIGRATIONS, DatabaseRefused, connect, migrate, prepare
from qmpd.store import Record


async def fill(state_dir: Path) -> None:
    async with open_database(state_dir) as database, open_store(database) as store:
        for n in range(50):
            await store.commit({}, {f"spec/{n}": os.urandom(500)})


async def refusal(state_dir: Path) -> str:
    with pytest.raises(DatabaseRefused) as caught:
        async with open_database(state_dir):
            raise AssertionError("a database that should be refused was opened")
    return caught.value.message


def modes(state_dir: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mode & 0o777 for path in (state_dir, *state_dir.iterdir())}


def names(state_dir: Path) -> list[str]:
    return sorted(path.name for path in state_dir.iterdir())


def contents(state_dir: Path) -> dict[str, tuple[int, bytes]]:
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in state_dir.iterdir() if path.name != "lock"}


async def one_turn() -> None:
    """The loop runs once: tasks made before have begun."""
    await asyncio.sleep(0)


async def test_the_state_directory_is_made_for_its_owner_alone(tmp_path: Path) -> None:
    state_dir = tmp_path / "made" / "on the way"
    async with open_database(state_dir):
        assert modes(state_dir) == {"on the way": 0o700, "lock": 0o600, "qmpd.db": 0o600, "qmpd.db-wal": 0o600}
    assert names(state_dir) == ["lock", "qmpd.db"]


async def test_a_database_that_others_could_read_is_closed_to_them(tmp_path: Path) -> None:
    await fill(tmp_path)
    (tmp_path / "qmpd.db").chmod(0o644)
    async with open_database(tmp_path):
        assert modes(tmp_path) == {tmp_path.name: 0o700, "lock": 0o600, "qmpd.db": 0o600, "qmpd.db-wal": 0o600}


@pytest.fixture
def open_to_others(tmp_path: Path) -> Path:
    tmp_path.chmod(0o755)
    return tmp_path


async def test_a_directory_that_others_may_enter_is_refused_and_its_mode_left_alone(open_to_others: Path) -> None:
    assert f"chmod 700 {open_to_others}" in await refusal(open_to_others)
    assert modes(open_to_others) == {open_to_others.name: 0o755}


async def test_a_state_directory_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "file cannot be used" in await refusal(tmp_path / "file")


async def test_a_second_daemon_is_told_the_pid_of_the_first(tmp_path: Path) -> None:
    async with open_database(tmp_path) as database, open_store(database) as store:
        with pytest.raises(Held, match=rf"in use by another qmpd, pid {os.getpid()}$") as caught:
            async with open_database(tmp_path):
                raise AssertionError("two daemons on one state directory")
        assert caught.value.details == {"holder": str(os.getpid())}
        await store.commit({}, {"a": b"the first is not disturbed"})
    async with open_database(tmp_path):
        pass


@pytest.fixture
def other_daemon(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    program = """
        import asyncio, sys
        from pathlib import Path
        from qmpd.database import open_database
        async def main():
            async with open_database(Path(sys.argv[1])):
                print("open", flush=True)
                sys.stdin.read()
        asyncio.run(main())
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "open\n"
        yield other


async def test_a_daemon_in_another_process_holds_the_directory_until_it_ends(tmp_path: Path, other_daemon: subprocess.Popen[str]) -> None:
    with pytest.raises(Held, match=f"pid {other_daemon.pid}$"):
        async with open_database(tmp_path):
            raise AssertionError("two daemons on one state directory")
    await asyncio.to_thread(other_daemon.communicate, "")
    async with open_database(tmp_path):
        pass


async def test_the_state_is_free_again_when_an_opening_was_cancelled(tmp_path: Path) -> None:
    async def open_and_wait() -> None:
        async with open_database(tmp_path):
            await asyncio.Event().wait()

    for turns in range(4):
        opening = asyncio.ensure_future(open_and_wait())
        for _ in range(turns):
            await one_turn()
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening
    async with open_database(tmp_path):
        pass


async def test_the_disk_is_synced_at_every_commit(tmp_path: Path) -> None:
    async with open_database(tmp_path) as database:
        settings = {
            name: await database.read(lambda connection, name=name: connection.execute(f"PRAGMA {name}").fetchone()[0])  # type: ignore[misc]
            for name in ("synchronous", "journal_mode", "locking_mode", "application_id", "user_version")
        }
    assert settings == {
        "synchronous": 2,
        "journal_mode": "wal",
        "locking_mode": "exclusive",
        "application_id": APPLICATION_ID,
        "user_version": len(MIGRATIONS),
    }


async def test_a_newer_database_is_refused_and_not_touched(tmp_path: Path) -> None:
    await fill(tmp_path)
    with closing(sqlite3.connect(tmp_path / "qmpd.db")) as connection:
        connection.execute(f"PRAGMA user_version={len(MIGRATIONS) + 1}")
    before = contents(tmp_path)
    assert f"schema version {len(MIGRATIONS) + 1}, but this qmpd knows up to {len(MIGRATIONS)}" in await refusal(tmp_path)
    assert contents(tmp_path) == before


async def test_a_newer_database_whose_daemon_was_killed_keeps_its_log(tmp_path: Path) -> None:
    """The version stands only in the write-ahead log, which must be neither missed nor folded into the file."""
    program = """
        import os, sys
        from pathlib import Path
        from qmpd.statefile import connect, prepare
        path = Path(sys.argv[1])
        prepare(path)
        connection = connect(path)
        connection.execute("PRAGMA user_version=99")
        os._exit(0)
    """
    await asyncio.to_thread(
        subprocess.run, [sys.executable, "-c", textwrap.dedent(program), str(tmp_path / "qmpd.db")], check=True, timeout=60
    )
    before = contents(tmp_path)
    assert set(before) == {"qmpd.db", "qmpd.db-wal"}
    assert "schema version 99" in await refusal(tmp_path)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (lambda data: b"", "empty"),
        (lambda data: b"not a database, but long enough to look like one" * 100, "damaged"),
        (lambda data: data[: len(data) // 2], "damaged"),
        (lambda data: data[:8192] + os.urandom(len(data) - 8192), "damaged"),
        (lambda data: data[:100] + bytes(len(data) - 100), "damaged"),
    ],
    ids=["empty", "another format", "cut short", "random pages", "zeroed"],
)
async def test_a_damaged_database_is_refused_by_name_and_not_touched(tmp_path: Path, damage: object, word: str) -> None:
    await fill(tmp_path)
    path = tmp_path / "qmpd.db"
    assert callable(damage)
    path.write_bytes(damage(path.read_bytes()))
    before = contents(tmp_path)
    message = await refusal(tmp_path)
    assert f"the database {path} is {word}" in message
    assert "move it away" in message
    assert contents(tmp_path) == before


async def test_the_database_of_another_program_is_refused(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "qmpd.db")) as connection:
        connection.execute("CREATE TABLE theirs (a)")
    before = contents(tmp_path)
    assert "is not a qmpd database" in await refusal(tmp_path)
    assert contents(tmp_path) == before


async def test_a_database_that_is_gone_while_its_log_is_not_is_no_first_start(tmp_path: Path) -> None:
    (tmp_path / "qmpd.db-wal").write_bytes(b"what is left")
    assert "put the database back" in await refusal(tmp_path)
    assert contents(tmp_path)["qmpd.db-wal"][1] == b"what is left"


async def test_a_database_another_program_has_locked_is_refused(tmp_path: Path) -> None:
    await fill(tmp_path)
    with closing(sqlite3.connect(tmp_path / "qmpd.db", isolation_level=None)) as connection:
        connection.execute("PRAGMA locking_mode=EXCLUSIVE")
        connection.execute("BEGIN IMMEDIATE")
        assert "locked" in await refusal(tmp_path)


async def test_what_a_killed_first_start_left_does_not_disturb_the_next(tmp_path: Path) -> None:
    (tmp_path / "qmpd.db.new").write_bytes(b"half made")
    (tmp_path / "qmpd.db.new-journal").write_bytes(b"half made")
    await fill(tmp_path)
    assert names(tmp_path) == ["lock", "qmpd.db"]


def test_a_database_has_no_rollback_journal_from_its_first_moment_on(tmp_path: Path) -> None:
    """One that was left behind could not be told from damage without writing to the file."""
    prepare(tmp_path / "qmpd.db")
    assert [path.name for path in tmp_path.iterdir()] == ["qmpd.db"]
    assert (tmp_path / "qmpd.db").read_bytes()[18:20] == b"\x02\x02"


def test_an_older_database_is_brought_forward_with_its_content(tmp_path: Path) -> None:
    path = tmp_path / "qmpd.db"
    first = ("CREATE TABLE thing (a)", "INSERT INTO thing VALUES (1)")
    prepare(path, (first,))
    prepare(path, (first, ("ALTER TABLE thing ADD COLUMN b", "UPDATE thing SET b = 2"), ("INSERT INTO thing VALUES (3, 4)",)))
    with closing(connect(path)) as connection:
        assert connection.execute("SELECT * FROM thing").fetchall() == [(1, 2), (3, 4)]
        assert connection.execute("PRAGMA user_version").fetchone() == (3,)


def test_a_migration_that_fails_leaves_the_version_before_it(tmp_path: Path) -> None:
    path = tmp_path / "qmpd.db"
    first = ("CREATE TABLE thing (a)",)
    prepare(path, (first,))
    with pytest.raises(QmpdError, match="no such table: missing"):
        prepare(path, (first, ("INSERT INTO thing VALUES (1)",), ("DELETE FROM thing", "INSERT INTO missing VALUES (1)")))
    with closing(connect(path)) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (2,)
        assert connection.execute("SELECT * FROM thing").fetchall() == [(1,)]
        migrate(connection, (first, (), ("INSERT INTO thing VALUES (2)",)))
        assert connection.execute("SELECT * FROM thing").fetchall() == [(1,), (2,)]


async def test_a_path_with_characters_that_mean_something_in_a_uri_is_just_a_path(tmp_path: Path) -> None:
    state_dir = tmp_path / "50%25 ?mode=memory&x#y"
    async with open_database(state_dir) as database, open_store(database) as store:
        revision = await store.commit({}, {"a": b"1"})
    assert (state_dir / "qmpd.db").stat().st_size > 0
    async with open_database(state_dir) as database, open_store(database) as store:
        assert (await store.read("")).records == {"a": Record(value=b"1", revision=revision)}
