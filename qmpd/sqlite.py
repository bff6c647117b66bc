"""The reference implementation of `Store`, on the tables `record` and `change` of the host's own database.

`change` is the log that watches read: a watch holds no queue, it remembers how far it came and is woken after every commit. So a
watch that nobody iterates costs nothing, and one that is too far behind gets a `Gap`.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from functools import partial
from typing import Final

from qmpd.database import Database
from qmpd.store import Change, Gap, Lost, Record, Snapshot, check_commit, check_key

#: Revisions whose changes a watch can go back to: watches live in this process, and are never far behind.
KEPT_REVISIONS: Final = 1_000
#: Old changes are deleted at every so many revisions instead of at each.
_TRIM_EVERY: Final = 100
#: A watch fetches whole revisions until it has this many changes.
_WATCH_CHANGES: Final = 256


class SqliteStore:
    """`Store` for one host. Open one per database, with `open_store`: it sees only the commits that went through it."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._advanced = asyncio.Event()
        self._closed = False

    @property
    def shared(self) -> bool:
        """No: this host is the only one."""
        return False

    async def read(self, prefix: str) -> Snapshot:
        """See `Store.read`."""
        if prefix:
            check_key(prefix)
        return await self._database.read(partial(_read, prefix=prefix))

    async def commit(self, guards: Mapping[str, int], writes: Mapping[str, bytes | None]) -> int:
        """See `Store.commit`."""
        check_commit(guards, writes)
        future = self._database.enqueue(partial(_commit, guards=dict(guards), writes=dict(writes)))
        # On the future, not after waiting for it: a commit whose caller has gone must be seen too.
        future.add_done_callback(self._advance)
        return await self._database.answer(future)

    async def watch(self, prefix: str, after: int) -> AsyncGenerator[Change, None]:
        """See `Store.watch`."""
        if prefix:
            check_key(prefix)
        while not self._closed:
            advanced = self._advanced
            changes, after = await self._database.read(partial(_changes, prefix=prefix, after=after))
            for change in changes:
                yield change
            if not changes:
                await advanced.wait()

    def close(self) -> None:
        """End the watches."""
        self._closed = True
        self._advanced.set()

    def _advance(self, _: object) -> None:
        advanced, self._advanced = self._advanced, asyncio.Event()
        advanced.set()


@asynccontextmanager
async def open_store(database: Database) -> AsyncIterator[SqliteStore]:
    """The database's records; watches end when it closes."""
    store = SqliteStore(database)
    try:
        yield store
    finally:
        store.close()


def _read(connection: sqlite3.Connection, prefix: str) -> Snapshot:
    rows = connection.execute(
        # Keys are printable ASCII: DEL sorts behind all of them.
        "SELECT key, value, revision FROM record WHERE key >= ?1 AND key < ?1 || char(127) ORDER BY key",
        (prefix,),
    )
    records = {key: Record(value=value, revision=revision) for key, value, revision in rows}
    return Snapshot(revision=_kept(connection)[1], records=records)


def _commit(connection: sqlite3.Connection, guards: Mapping[str, int], writes: Mapping[str, bytes | None]) -> int:
    for key, expected in guards.items():
        row = connection.execute("SELECT revision FROM record WHERE key = ?", (key,)).fetchone()
        actual = row[0] if row else 0
        if actual != expected:
            raise Lost(key, expected, actual)
    before = _kept(connection)[1]
    revision = before + 1
    changed = [key for key, value in writes.items() if _put(connection, key, value, revision)]
    if not changed:
        return before
    connection.executemany("INSERT INTO change VALUES (?, ?, ?)", [(revision, key, writes[key]) for key in changed])
    if revision % _TRIM_EVERY == 0:
        connection.execute("DELETE FROM change WHERE revision <= ?", (revision - KEPT_REVISIONS,))
    return revision


def _put(connection: sqlite3.Connection, key: str, value: bytes | None, revision: int) -> bool:
    """Write or delete one record; whether there was anything to do."""
    if value is None:
        return connection.execute("DELETE FROM record WHERE key = ?", (key,)).rowcount > 0
    connection.execute("REPLACE INTO record VALUES (?, ?, ?)", (key, value, revision))
    return True


def _kept(connection: sqlite3.Connection) -> tuple[int, int]:
    """First and last revision of the kept changes. The newest is always kept, so the last one is the store's revision."""
    first, last = connection.execute("SELECT (SELECT min(revision) FROM change), (SELECT max(revision) FROM change)").fetchone()
    return first or 1, last or 0


def _changes(connection: sqlite3.Connection, prefix: str, after: int) -> tuple[list[Change], int]:
    """The next changes under `prefix`, and the revision up to which they are all there are."""
    first, last = _kept(connection)
    if not first - 1 <= after <= last:
        raise Gap(first)
    changes: list[Change] = []
    rows = connection.execute(
        "SELECT revision, key, value FROM change WHERE revision > ?1 AND key >= ?2 AND key < ?2 || char(127) ORDER BY revision, key",
        (after, prefix),
    )
    for revision, key, value in rows:
        if len(changes) >= _WATCH_CHANGES and revision != changes[-1].revision:
            return changes, changes[-1].revision
        changes.append(Change(key=key, value=value, revision=revision))
    return changes, last
