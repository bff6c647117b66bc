"""What happened to a machine follows it from host to host: once, in order, with its time and where it was recorded."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import click
import msgspec
import pytest

from qmpctl.history import _print_event
from qmpd.access import Caller
from qmpd.bus import Bus, open_bus
from qmpd.database import open_database
from qmpd.errors import NotFound, PeerRefused, WrongState
from qmpd.journal import PAST, Journal, open_journal
from qmpd.migration.history import PIECE_EVENTS, HistoryDesk, tell
from qmpd.migration.parcels import TOLD_EVENTS, History, HistoryTaken
from qmpd.views import Event
from qmpd_api.dialling import dialled
from tests.api.lab import authority, daemon, host, peer, port

PATIENCE_S = 60.0
MIGRATION = "0123456789abcdef"


class Host:
    """A host with its journal, and a link to it for the others."""

    def __init__(self, name: str, journal: Journal, bus: Bus) -> None:
        self.name = name
        self.journal = journal
        self.bus = bus
        self.asked = 0
        self.refusing: str | None = None

    def linked(self, source: str) -> Link:
        return Link(self, source)

    async def happens(self, count: int, machine: str = "one") -> None:
        await asyncio.gather(*(self.bus.publish("machine.state", machine, {"step": step, "host": self.name}) for step in range(count)))

    async def story(self, machine: str = "one") -> list[tuple[str, object, object]]:
        """Where each event was, its number there and what it was, in the order of this host's numbers."""
        page = await self.journal.page(0, machine=machine)
        assert [event.number for event in page.events] == sorted(event.number for event in page.events)
        return [
            (str(event.data["host"]), event.data["number"], event.data["data"])
            if event.kind == PAST
            else (self.name, event.number, event.data)
            for event in page.events
        ]


class Link:
    """What `source` has of `there`."""

    def __init__(self, there: Host, source: str) -> None:
        self._there = there
        self._source = source
        self._desk = HistoryDesk(there.bus, lambda _caller, _migration: "one")

    async def tell_history(self, migration: str, history: History) -> HistoryTaken:
        self._there.asked += 1
        if self._there.refusing is not None and self._there.asked == 1:
            raise PeerRefused("no", error={"code": self._there.refusing})
        received = msgspec.msgpack.decode(msgspec.msgpack.encode(history), type=History)
        return await self._desk.take(Caller(role="peer", peer=self._source), migration, received)


@pytest.fixture
async def hosts(tmp_path: Path) -> AsyncIterator[dict[str, Host]]:
    async with AsyncExitStack() as stack:
        made = {}
        for name in "abc":
            database = await stack.enter_async_context(open_database(tmp_path / name))
            journal = await stack.enter_async_context(open_journal(database))
            made[name] = Host(name, journal, await stack.enter_async_context(open_bus(journal)))
        yield made


async def test_a_story_goes_on_with_the_numbers_it_had_and_is_told_once(hosts: dict[str, Host]) -> None:
    a, b, c = hosts["a"], hosts["b"], hosts["c"]
    await a.happens(3)
    await a.happens(2, "another")
    await b.happens(1, "another")
    assert await tell(b.linked("a"), a.journal, MIGRATION, "one") == 3
    assert await tell(b.linked("a"), a.journal, MIGRATION, "one") == 0
    own = [("a", number, {"step": number - 1, "host": "a"}) for number in (1, 2, 3)]
    assert await b.story() == own
    assert [event.at for event in (await b.journal.recent("one", 10))] == [event.at for event in await a.journal.recent("one", 10)]
    await b.happens(2)
    assert await tell(c.linked("b"), b.journal, MIGRATION, "one") == 5
    assert await c.story() == [*own, ("b", 5, {"step": 0, "host": "b"}), ("b", 6, {"step": 1, "host": "b"})]
    await a.happens(1)
    assert await tell(b.linked("a"), a.journal, MIGRATION, "one") == 1
    assert (await b.journal.page(0, machine="another")).events[0].data["host"] == "b"


async def test_a_machine_that_comes_home_does_not_double_what_its_host_knows(hosts: dict[str, Host]) -> None:
    a, b = hosts["a"], hosts["b"]
    await a.happens(3)
    await tell(b.linked("a"), a.journal, MIGRATION, "one")
    await b.happens(2)
    assert await tell(a.linked("b"), b.journal, MIGRATION, "one") == 2
    assert await tell(a.linked("b"), b.journal, MIGRATION, "one") == 0
    assert [where for where, _, _ in await a.story()] == ["a", "a", "a", "b", "b"]


async def test_the_newest_events_are_told_and_readers_are_not_cut(hosts: dict[str, Host]) -> None:
    a, b = hosts["a"], hosts["b"]
    for _ in range(4):
        await a.happens(400)
    async with b.bus.subscribe(machine="one") as live:
        assert await tell(b.linked("a"), a.journal, MIGRATION, "one") == TOLD_EVENTS
        await b.happens(1)
        seen: list[Event] = []
        async with asyncio.timeout(PATIENCE_S):
            while len(seen) < TOLD_EVENTS + 1:
                seen.append(await anext(live))
    assert [event.data["number"] for event in seen[:-1]] == list(range(601, 1601))
    assert [event.number for event in seen] == list(range(1, TOLD_EVENTS + 2))
    assert seen[-1].kind == "machine.state"
    assert b.asked == TOLD_EVENTS // PIECE_EVENTS
    assert b.bus.lost == 0


async def test_a_piece_that_is_beyond_the_other_ends_limits_is_left_out(hosts: dict[str, Host], caplog: pytest.LogCaptureFixture) -> None:
    a, b, c = hosts["a"], hosts["b"], hosts["c"]
    await a.bus.publish("machine.state", "one", {"text": "x" * 60_000})
    for _ in range(4):
        await a.bus.publish("machine.state", "one", {"text": "y" * 60_000})
    await a.bus.publish("machine.state", "one", {"text": "last"})
    b.refusing = "too_large"
    assert await tell(b.linked("a"), a.journal, MIGRATION, "one") == 2
    assert "was not told" in caplog.text
    assert [len(str(event.data)) > 60_000 for event in await b.journal.recent("one", 10)] == [True, False]
    c.refusing = "wrong_state"
    with pytest.raises(PeerRefused):
        await tell(c.linked("a"), a.journal, MIGRATION, "one")


async def test_only_a_peer_tells_and_only_of_a_machine_that_is_here(short_directory: Path) -> None:
    made = await asyncio.to_thread(authority, short_directory / "ca")
    async with AsyncExitStack() as stack:
        listener, number = stack.enter_context(port())
        pki = {name: await asyncio.to_thread(host, made, short_directory / f"{name}-pki", name) for name in ("a", "b")}
        there = await stack.enter_async_context(daemon("b", short_directory / "b", pki["b"], listener, [peer("a", 1)]))
        link = await stack.enter_async_context(dialled(peer("b", number), str(pki["a"].directory)))
        history = msgspec.convert({"events": [{"number": 7, "at": "2026-01-02T03:04:05.678Z", "kind": "qmp", "data": {"x": 1}}]}, History)
        with pytest.raises(PeerRefused, match="no migration"):
            await link.tell_history(MIGRATION, history)
        here = False

        def arrived(caller: Caller, migration: str) -> str:
            if migration != MIGRATION or caller.peer != "a":
                raise NotFound(migration)
            if not here:
                raise WrongState("it is on its way", state="awaiting", allowed=["arrived"])
            return "one"

        there.service.history = HistoryDesk(there.service.bus, arrived)
        with pytest.raises(PeerRefused, match="on its way"):
            await link.tell_history(MIGRATION, history)
        here = True
        assert (await link.tell_history(MIGRATION, history)).added == 1
        (event,) = (await there.service.events_page(0, 100, "one")).events
        assert (event.at, event.kind) == ("2026-01-02T03:04:05.678Z", PAST)
        assert event.data == {"host": "a", "number": 7, "kind": "qmp", "data": {"x": 1}}


def test_people_see_what_it_was_and_where(capsys: pytest.CaptureFixture[str]) -> None:
    data: dict[str, object] = {"host": "a", "number": 7, "kind": "machine.state", "data": {"state": "running"}}
    with click.Context(click.Command("events")).scope():
        _print_event(Event(number=12, at="2026-01-02T03:04:05.678Z", kind=PAST, machine="one", data=data))
    expected = '    12  2026-01-02T03:04:05.678Z  one  machine.state  {"state":"running"}  (number 7 of a)\n'
    assert capsys.readouterr().out == expected
