"""The state directory and the database file in it: who may open it, whether it is sound, and what its schema is.

Everything here blocks and is called from the database's own thread (`qmpd.database`).

Rules:

* One daemon per state directory: an flock on `lock`, which the kernel drops when the daemon dies in whatever way.
* A database is created under another name and renamed when it is complete. So an empty or half-made `qmpd.db` is damage, never
  a first start, and definitions cannot vanish without anybody being told.
* A database that is damaged, foreign or from a newer qmpd is refused and left byte for byte as it was. It is looked at over
  SQLite's lockless read-only VFS, which writes neither a checkpoint nor an index file; the flock stands in for its locks.
* The connection holds SQLite's exclusive lock: no other program can write between our transactions, and there is no shared
  memory file, which on a full disk would be the first thing to fail.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Final
from urllib.parse import quote

from qmpd.errors import Held, NoSpace, QmpdError
from qmpd.failpoint import failpoint

DATABASE_NAME: Final = "qmpd.db"
LOCK_NAME: Final = "lock"
#: "qmpd" in ASCII, in the file's header: tells our database from any other program's.
APPLICATION_ID: Final = 0x716D7064

_FULL: Final = (errno.ENOSPC, errno.EDQUOT)
#: What the write-ahead log may keep of the disk after a checkpoint; more is given back to the file system.
_LOG_KEPT_BYTES: Final = 16 << 20
#: Somebody may just be looking into the file as the daemon starts.
_LOCK_WAIT_S: Final = 1.0

#: Entry n, a list of statements, takes a database from schema version n to n + 1. Entries are only ever added.
MIGRATIONS: Final[tuple[tuple[str, ...], ...]] = (
    (
        "CREATE TABLE record (key TEXT PRIMARY KEY, value BLOB NOT NULL, revision INTEGER NOT NULL) STRICT",
        "CREATE TABLE change (revision INTEGER NOT NULL, key TEXT NOT NULL, value BLOB, PRIMARY KEY (revision, key)) STRICT",
        "CREATE TABLE event (number INTEGER PRIMARY KEY, at TEXT NOT NULL, kind TEXT NOT NULL, machine TEXT, data BLOB NOT NULL) STRICT",
        "CREATE INDEX event_of_machine ON event (machine, number) WHERE machine IS NOT NULL",
        "CREATE TABLE job (number INTEGER PRIMARY KEY, id TEXT UNIQUE, machine TEXT, running INTEGER NOT NULL, view BLOB NOT NULL) STRICT",
        "CREATE INDEX job_running ON job (running) WHERE running",
        "CREATE TABLE answer (number INTEGER PRIMARY KEY, key TEXT UNIQUE, fingerprint TEXT, response BLOB, expires INTEGER) STRICT",
        "CREATE INDEX answer_by_expiry ON answer (expires)",
    ),
    ("CREATE TABLE migration (number INTEGER PRIMARY KEY, id TEXT UNIQUE, settled INTEGER NOT NULL, entry BLOB NOT NULL) STRICT",),
)


class DatabaseRefused(QmpdError):
    """The state directory or the database in it cannot be used as it is; nothing was changed. The message says what to do."""

    code = "database_refused"


def is_full(error: sqlite3.Error) -> bool:
    """Whether SQLite gave up because there is no space. It has then undone the transaction."""
    return getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL


@contextmanager
def owned(state_dir: Path) -> Iterator[Path]:
    """Hold the state directory (made with mode 0700 if it is missing) for this process; yields the path of its database.

    Raises:
        Held: another daemon holds it; the message names its pid.
        DatabaseRefused: it cannot be made or opened, or others may enter it.
        NoSpace: there is no space to make it.
    """
    try:
        state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        _check_mode(state_dir)
        descriptor = os.open(state_dir / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise _refusal(state_dir, error) from error
    with os.fdopen(descriptor, "r+b", buffering=0) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = lock.read(32).decode("ascii", "replace").strip() or "unknown"
            raise Held(f"the state directory {state_dir} is in use by another qmpd, pid {holder}", holder=holder) from error
        # The pid is for people; on a full disk the lock has to do without it.
        with contextlib.suppress(OSError):
            lock.truncate()
            lock.write(f"{os.getpid()}\n".encode())
        yield state_dir / DATABASE_NAME


def prepare(path: Path, migrations: Sequence[Sequence[str]] = MIGRATIONS) -> None:
    """See that there is a sound database of the newest schema at `path`: create it, check it, migrate it.

    Raises:
        DatabaseRefused: it is damaged, foreign, newer than this qmpd or cannot be opened; it was not changed.
        NoSpace: there is no space to create or migrate it; an existing one is as it was.
    """
    try:
        if path.exists():
            _inspect(path, len(migrations))
            path.chmod(0o600)
            with closing(connect(path)) as connection:
                migrate(connection, migrations)
        else:
            _create(path, migrations)
    except OSError as error:
        raise _refusal(path, error) from error
    except sqlite3.Error as error:
        if is_full(error):
            raise NoSpace(f"no space left for the database {path}") from error
        raise DatabaseRefused(f"the database {path} cannot be used: {error}") from error


def connect(path: Path) -> sqlite3.Connection:
    """Open an existing database for good: exclusive, write-ahead log, synced at every commit. The caller closes it."""
    connection = sqlite3.connect(_uri(path, "mode=rw"), uri=True, isolation_level=None, timeout=_LOCK_WAIT_S)
    try:
        connection.execute("PRAGMA locking_mode=EXCLUSIVE")
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute(f"PRAGMA journal_size_limit={_LOG_KEPT_BYTES}")
        connection.execute("PRAGMA temp_store=MEMORY")
        connection.execute("PRAGMA trusted_schema=OFF")
        # Takes the lock now, so that a program that has the file open is a clear refusal to start.
        connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()
    except BaseException:
        connection.close()
        raise
    return connection


def migrate(connection: sqlite3.Connection, migrations: Sequence[Sequence[str]] = MIGRATIONS) -> None:
    """Bring the schema forward, one transaction per version: each happens entirely or not at all."""
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    for reached, statements in enumerate(migrations[version:], start=version + 1):
        connection.execute("BEGIN IMMEDIATE")
        try:
            for statement in statements:
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version={reached}")
            failpoint("database-migrate")
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise


def _create(path: Path, migrations: Sequence[Sequence[str]]) -> None:
    """Make the database beside its place and rename it when it is complete and synced."""
    log = path.with_name(f"{path.name}-wal")
    if log.exists():
        raise DatabaseRefused(f"{log} is there but {path} is not: put the database back, or move {log.name} away to start with none")
    draft = path.with_name(f"{path.name}.new")
    # What a first start that was killed left behind.
    for leftover in ("", "-journal", "-wal"):
        draft.with_name(f"{draft.name}{leftover}").unlink(missing_ok=True)
    os.close(os.open(draft, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    with closing(sqlite3.connect(_uri(draft, "mode=rw"), uri=True, isolation_level=None)) as connection:
        connection.execute(f"PRAGMA application_id={APPLICATION_ID}")
        migrate(connection, migrations)
        # Before it has its name: a switch that is cut short leaves a rollback journal, which a look without writing cannot undo.
        connection.execute("PRAGMA journal_mode=WAL")
    failpoint("database-named")
    draft.rename(path)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _inspect(path: Path, newest: int) -> None:
    """Refuse a database that is damaged, foreign or too new, without writing a byte."""
    aside = "Restore it from a backup, or move it away together with its -wal file to start with no definitions"
    try:
        with closing(sqlite3.connect(_uri(path, "mode=ro&vfs=unix-none"), uri=True, isolation_level=None)) as connection:
            connection.execute("PRAGMA locking_mode=EXCLUSIVE")
            (application,) = connection.execute("PRAGMA application_id").fetchone()
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            findings = [finding for (finding,) in connection.execute("PRAGMA quick_check(5)")]
    except sqlite3.Error as error:
        raise DatabaseRefused(f"the database {path} is damaged: {error}. {aside}") from error
    if findings != ["ok"]:
        raise DatabaseRefused(f"the database {path} is damaged: {'; '.join(findings)}. {aside}")
    if application != APPLICATION_ID:
        what = "empty" if not path.stat().st_size else "not a qmpd database"
        raise DatabaseRefused(f"the database {path} is {what}. {aside}")
    if version > newest:
        raise DatabaseRefused(f"the database {path} has schema version {version}, but this qmpd knows up to {newest}: run a newer one")


def _check_mode(state_dir: Path) -> None:
    mode = state_dir.stat().st_mode & 0o7777
    if mode & 0o077:
        # Not mended here: somebody who names the wrong directory must not find its mode changed.
        raise DatabaseRefused(f"the state directory {state_dir} is open to others (mode {mode:04o}): chmod 700 {state_dir}")


def _refusal(path: Path, error: OSError) -> QmpdError:
    if error.errno in _FULL:
        return NoSpace(f"no space left for {path}")
    return DatabaseRefused(f"{path} cannot be used: {error.strerror}")


def _uri(path: Path, options: str) -> str:
    return f"file:{quote(str(path.absolute()))}?{options}"
