"""Random commits, alone and many at once, against a dictionary."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from qmpd.database import open_database
from qmpd.sqlite import SqliteStore, open_store
from qmpd.store import Lost, Record

KEYS = ("a", "a/b", "a/c", "b")

#: How far from the key's real revision a guard is: mostly right, sometimes stale, sometimes of the future.
Guards = Mapping[str, int]
Writes = Mapping[str, bytes | None]

guards = st.dictionaries(st.sampled_from(KEYS), st.sampled_from((0, 0, 0, 0, -1, 1)), max_size=2)
writes = st.dictionaries(st.sampled_from(KEYS), st.one_of(st.none(), st.binary(max_size=8)), max_size=3)


class Dictionary:
    """The promise of `Store.commit` in ten lines."""

    def __init__(self) -> None:
        self.revision = 0
        self.records: dict[str, Record] = {}

    def revision_of(self, key: str) -> int:
        return self.records[key].revision if key in self.records else 0

    def commit(self, guards: Guards, writes: Writes) -> int | tuple[str, int]:
        for key, expected in guards.items():
            if self.revision_of(key) != expected:
                return key, self.revision_of(key)
        effective = {key: value for key, value in writes.items() if value is not None or key in self.records}
        if effective:
            self.revision += 1
        for key, value in effective.items():
            self.records.pop(key, None)
            if value is not None:
                self.records[key] = Record(value=value, revision=self.revision)
        return self.revision


class StoreAndDictionary(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.model = Dictionary()
        self.directory = TemporaryDirectory()
        self.runner = asyncio.Runner()
        self.opened = AsyncExitStack()
        self.store = self.runner.run(self.open())

    async def open(self) -> SqliteStore:
        database = await self.opened.enter_async_context(open_database(Path(self.directory.name)))
        return await self.opened.enter_async_context(open_store(database))

    def absolute(self, guards: Guards) -> Guards:
        return {key: max(0, self.model.revision_of(key) + offset) for key, offset in guards.items()}

    @rule(commits=st.lists(st.tuples(guards, writes), min_size=1, max_size=6))
    def commit_together(self, commits: list[tuple[Guards, Writes]]) -> None:
        """Commits that wait together happen one after the other, in the order of the calls."""
        asked = [(self.absolute(guards), writes) for guards, writes in commits]

        async def together() -> list[int | tuple[str, int]]:
            return await asyncio.gather(*(outcome(self.store, guards, writes) for guards, writes in asked))

        assert self.runner.run(together()) == [self.model.commit(guards, writes) for guards, writes in asked]

    @rule(prefix=st.sampled_from(("", "a", "a/", "a/b", "b", "c")))
    def read(self, prefix: str) -> None:
        snapshot = self.runner.run(self.store.read(prefix))
        assert snapshot.revision == self.model.revision
        assert snapshot.records == {key: record for key, record in self.model.records.items() if key.startswith(prefix)}

    @rule()
    def reopen(self) -> None:
        self.runner.run(self.opened.aclose())
        self.store = self.runner.run(self.open())

    @invariant()
    def the_changes_lead_to_the_records(self) -> None:
        async def rebuilt() -> dict[str, Record]:
            records: dict[str, Record] = {}
            watch = self.store.watch("", 0)
            reached = 0
            while reached < self.model.revision or records != self.model.records:
                change = await anext(watch)
                reached = change.revision
                records.pop(change.key, None)
                if change.value is not None:
                    records[change.key] = Record(value=change.value, revision=change.revision)
            await watch.aclose()
            return records

        assert self.runner.run(asyncio.wait_for(rebuilt(), 20)) == self.model.records

    def teardown(self) -> None:
        self.runner.run(self.opened.aclose())
        self.runner.close()
        self.directory.cleanup()


async def outcome(store: SqliteStore, guards: Guards, writes: Writes) -> int | tuple[str, int]:
    try:
        return await store.commit(guards, writes)
    except Lost as lost:
        return lost.key, lost.actual


TestStoreAndDictionary = StoreAndDictionary.TestCase
TestStoreAndDictionary.settings = settings(
    max_examples=15, stateful_step_count=15, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
