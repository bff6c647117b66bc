"""What every implementation of `Store` promises, held against the one on SQLite."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from qmpd.database import open_database
from qmpd.errors import Conflict, TooLarge
from qmpd.sqlite import KEPT_REVISIONS, SqliteStore, open_store
from qmpd.store import MAX_COMMIT_BYTES, MAX_KEY_BYTES, MAX_OPERATIONS, Change, Gap, Lost, Record, Store

#: For what must happen soon: an assertion that fails instead of a test that hangs.
PATIENCE_S = 20


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[SqliteStore]:
    async with open_database(tmp_path) as database, open_store(database) as opened:
        yield opened


async def take(changes: AsyncIterator[Change], count: int) -> list[Change]:
    async with asyncio.timeout(PATIENCE_S):
        return [await anext(changes) for _ in range(count)]


async def one_turn() -> None:
    """The loop runs once: tasks made before have begun."""
    await asyncio.sleep(0)


async def test_the_sqlite_store_is_a_store_that_nobody_else_writes_to(store: SqliteStore) -> None:
    as_interface: Store = store
    assert not as_interface.shared


async def test_an_empty_store_is_at_revision_0(store: SqliteStore) -> None:
    snapshot = await store.read("")
    assert (snapshot.revision, snapshot.records) == (0, {})


async def test_all_keys_of_a_commit_carry_its_revision(store: SqliteStore) -> None:
    revision = await store.commit({}, {"own/a": b"1", "spec/a": b"2"})
    snapshot = await store.read("")
    assert snapshot.revision == revision
    assert snapshot.records == {"own/a": Record(value=b"1", revision=revision), "spec/a": Record(value=b"2", revision=revision)}


async def test_a_read_gives_only_what_is_under_the_prefix(store: SqliteStore) -> None:
    await store.commit({}, {"own/a": b"", "own/b": b"", "own": b"", "ownership": b"", "own0": b"", "spec/a": b"", "own/~": b""})
    assert list((await store.read("own/")).records) == ["own/a", "own/b", "own/~"]
    assert list((await store.read("nothing/")).records) == []


async def test_revisions_rise_with_every_commit_that_writes(store: SqliteStore) -> None:
    first = await store.commit({}, {"a": b"1"})
    same_value = await store.commit({}, {"a": b"1"})
    assert same_value > first
    assert (await store.read("a")).records["a"].revision == same_value


async def test_a_deleted_key_is_absent(store: SqliteStore) -> None:
    await store.commit({}, {"a": b"1", "b": b"2"})
    deleted = await store.commit({}, {"a": None})
    snapshot = await store.read("")
    assert list(snapshot.records) == ["b"]
    assert snapshot.revision == deleted
    assert await store.commit({"a": 0}, {"a": b"again"}) > deleted


async def test_a_commit_that_has_nothing_to_write_only_checks_its_guards(store: SqliteStore) -> None:
    revision = await store.commit({}, {"a": b"1"})
    assert await store.commit({"a": revision}, {}) == revision
    assert await store.commit({}, {"never-there": None}) == revision
    with pytest.raises(Lost):
        await store.commit({"a": revision + 1}, {})


async def test_a_lost_commit_says_which_key_was_where_and_writes_nothing(store: SqliteStore) -> None:
    first = await store.commit({}, {"a": b"1", "b": b"1"})
    second = await store.commit({"a": first}, {"a": b"2"})
    with pytest.raises(Lost) as caught:
        await store.commit({"b": first, "a": first}, {"b": b"3", "c": b"3"})
    assert (caught.value.key, caught.value.expected, caught.value.actual) == ("a", first, second)
    assert isinstance(caught.value, Conflict)
    assert {key: record.value for key, record in (await store.read("")).records.items()} == {"a": b"2", "b": b"1"}


async def test_a_key_guarded_as_absent_can_be_made_once(store: SqliteStore) -> None:
    revision = await store.commit({"a": 0}, {"a": b"mine"})
    with pytest.raises(Lost) as caught:
        await store.commit({"a": 0}, {"a": b"also mine"})
    assert caught.value.actual == revision


async def test_of_many_concurrent_commits_with_one_guard_exactly_one_wins(store: SqliteStore) -> None:
    revision = await store.commit({}, {"a": b"0"})
    outcomes = await asyncio.gather(*(store.commit({"a": revision}, {"a": b"%d" % n}) for n in range(50)), return_exceptions=True)
    won = [n for n, outcome in enumerate(outcomes) if not isinstance(outcome, Lost)]
    assert len(won) == 1
    assert (await store.read("a")).records["a"].value == b"%d" % won[0]


async def test_the_arguments_of_a_commit_may_change_while_it_is_under_way(store: SqliteStore) -> None:
    writes: dict[str, bytes | None] = {"a": b"1"}
    guards = {"a": 0}
    commit = asyncio.ensure_future(store.commit(guards, writes))
    await one_turn()
    writes["a"], guards["a"] = b"2", 7
    await commit
    assert (await store.read("a")).records["a"].value == b"1"


@pytest.mark.parametrize("key", ["", "with blank", "tab\t", "ümlaut", "nul\0", "line\n"])
async def test_a_key_that_not_every_engine_takes_is_refused(store: SqliteStore, key: str) -> None:
    with pytest.raises(ValueError, match="cannot be a key"):
        await store.commit({}, {key: b""})
    with pytest.raises(ValueError, match="cannot be a key"):
        await store.commit({key: 0}, {})
    if key:
        with pytest.raises(ValueError, match="cannot be a key"):
            await store.read(key)
        with pytest.raises(ValueError, match="cannot be a key"):
            await anext(store.watch(key, 0))


async def test_a_guard_on_a_revision_that_cannot_be_is_refused(store: SqliteStore) -> None:
    with pytest.raises(ValueError, match="guarded by revision -1"):
        await store.commit({"a": -1}, {})


async def test_keys_values_and_operations_are_bounded(store: SqliteStore) -> None:
    await store.commit({}, {"k" * MAX_KEY_BYTES: b""})
    with pytest.raises(TooLarge):
        await store.commit({}, {"k" * (MAX_KEY_BYTES + 1): b""})
    await store.commit({}, {"a": bytes(MAX_COMMIT_BYTES - 1)})
    with pytest.raises(TooLarge):
        await store.commit({}, {"a": bytes(MAX_COMMIT_BYTES)})
    many = [f"k{n}" for n in range(MAX_OPERATIONS + 1)]
    with pytest.raises(TooLarge):
        await store.commit({}, dict.fromkeys(many, b""))
    with pytest.raises(TooLarge):
        await store.commit(dict.fromkeys(many, 0), {})
    await store.commit(dict.fromkeys(many[:-1], 0), dict.fromkeys(many[:-1], b""))


async def test_a_value_comes_back_byte_for_byte(store: SqliteStore) -> None:
    value = bytes(range(256)) * 3
    await store.commit({}, {"a": value, "empty": b""})
    records = (await store.read("")).records
    assert (records["a"].value, records["empty"].value) == (value, b"")


async def test_what_was_committed_is_there_after_reopening(tmp_path: Path) -> None:
    async with open_database(tmp_path) as database, open_store(database) as store:
        revision = await store.commit({}, {"a": b"1"})
    async with open_database(tmp_path) as database, open_store(database) as store:
        assert (await store.read("")).records == {"a": Record(value=b"1", revision=revision)}
        assert await store.commit({"a": revision}, {"a": b"2"}) > revision


async def test_a_watch_gives_every_change_after_a_revision_in_order(store: SqliteStore) -> None:
    first = await store.commit({}, {"own/a": b"1"})
    second = await store.commit({}, {"own/a": b"2", "own/b": b"2", "spec/a": b"2"})
    third = await store.commit({}, {"own/a": None})
    assert await take(store.watch("own/", 0), 4) == [
        Change(key="own/a", value=b"1", revision=first),
        Change(key="own/a", value=b"2", revision=second),
        Change(key="own/b", value=b"2", revision=second),
        Change(key="own/a", value=None, revision=third),
    ]
    assert await take(store.watch("", second), 1) == [Change(key="own/a", value=None, revision=third)]


async def test_a_watch_waits_for_what_is_still_to_come(store: SqliteStore) -> None:
    watch = store.watch("own/", 0)
    waiting = asyncio.ensure_future(take(watch, 1))
    await store.commit({}, {"spec/a": b"not watched"})
    revision = await store.commit({}, {"own/a": b"1"})
    assert await waiting == [Change(key="own/a", value=b"1", revision=revision)]


async def test_a_watch_misses_nothing_that_is_committed_while_it_reads(store: SqliteStore) -> None:
    total = 300

    async def commits() -> None:
        for n in range(total):
            await store.commit({}, {f"own/{n % 7}": b"%d" % n})

    committing = asyncio.ensure_future(commits())
    changes = await take(store.watch("own/", 0), total)
    await committing
    assert [change.value for change in changes] == [b"%d" % n for n in range(total)]


async def test_a_watch_sees_a_commit_whose_caller_was_cancelled(store: SqliteStore) -> None:
    waiting = asyncio.ensure_future(take(store.watch("", 0), 1))
    await store.read("")
    commit = asyncio.ensure_future(store.commit({}, {"a": b"1"}))
    await one_turn()
    commit.cancel()
    assert [change.value for change in await waiting] == [b"1"]


async def test_a_watch_gives_a_big_commit_whole(store: SqliteStore) -> None:
    keys = [f"k{n:03}" for n in range(MAX_OPERATIONS - 28)]
    for value in (b"1", b"2", b"3"):
        await store.commit({}, dict.fromkeys(keys, value))
    changes = await take(store.watch("", 0), 3 * len(keys))
    assert [(change.value, change.key) for change in changes] == [(value, key) for value in (b"1", b"2", b"3") for key in keys]


async def test_a_watch_from_before_what_is_kept_gets_a_gap(store: SqliteStore) -> None:
    for _ in range(12):
        await asyncio.gather(*(store.commit({}, {"a": b"%d" % n}) for n in range(100)))
    with pytest.raises(Gap) as caught:
        await anext(store.watch("", 0))
    first = caught.value.first
    assert first == 1200 - KEPT_REVISIONS + 1
    with pytest.raises(Gap):
        await anext(store.watch("", first - 2))
    assert (await take(store.watch("", first - 1), 1))[0].revision == first


async def test_an_idle_watch_does_not_fall_into_a_gap_by_changes_that_are_not_for_it(store: SqliteStore) -> None:
    waiting = asyncio.ensure_future(take(store.watch("own/", 0), 1))
    for _ in range(13):
        await asyncio.gather(*(store.commit({}, {"spec/a": b"%d" % n}) for n in range(100)))
    await store.commit({}, {"own/a": b"1"})
    assert [change.key for change in await waiting] == ["own/a"]


async def test_a_watch_from_a_revision_that_was_never_reached_gets_a_gap(store: SqliteStore) -> None:
    revision = await store.commit({}, {"a": b"1"})
    with pytest.raises(Gap):
        await anext(store.watch("", revision + 1))


async def test_watches_end_when_the_store_closes(tmp_path: Path) -> None:
    async with open_database(tmp_path) as database:
        async with open_store(database) as store:
            await store.commit({}, {"a": b"1"})
            watch = store.watch("", 0)
            await take(watch, 1)
            waiting = asyncio.ensure_future(anext(watch, None))
            await store.read("")
        async with asyncio.timeout(PATIENCE_S):
            assert await waiting is None
        assert [change async for change in store.watch("", 0)] == []
