"""Events reach every subscriber in order, once, and only after they are durable."""

from __future__ import annotations

import asyncio
import logging
import random
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from pathlib import Path

import pytest

from qmpd.bus import EVENTS_LOST, QUEUE_EVENTS, REPLAY_PAGE, Bus, SlowReader, Subscription, open_bus
from qmpd.database import Database, open_database
from qmpd.errors import Busy, Conflict, EventsGone
from qmpd.journal import KEPT_EVENTS, Journal, open_journal
from qmpd.views import Event

PATIENCE_S = 60
#: As many requests as may wait for the database, in a test that fills it.
FEW = 200


class World:
    def __init__(self, database: Database, journal: Journal, bus: Bus) -> None:
        self.database = database
        self.journal = journal
        self.bus = bus

    async def publish(self, count: int, machine: str | None = None) -> None:
        await asyncio.gather(*(self.bus.publish("tick", machine) for _ in range(count)))

    @contextmanager
    def stuck(self) -> Iterator[None]:
        """Nothing becomes durable until the block ends."""
        go = threading.Event()
        with ExitStack() as on_exit:
            on_exit.callback(go.set)
            self.database.enqueue(lambda _: go.wait(PATIENCE_S))
            yield


@asynccontextmanager
async def opened(state_dir: Path, kept_events: int = KEPT_EVENTS) -> AsyncIterator[World]:
    async with (
        open_database(state_dir) as database,
        open_journal(database, kept_events=kept_events) as journal,
        open_bus(journal) as bus,
    ):
        yield World(database, journal, bus)


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with opened(tmp_path) as made:
        yield made


async def take(stream: AsyncIterator[Event], count: int) -> list[int]:
    async with asyncio.timeout(PATIENCE_S):
        return [(await anext(stream)).number for _ in range(count)]


async def rest(stream: AsyncIterator[Event]) -> list[int]:
    async with asyncio.timeout(PATIENCE_S):
        return [event.number async for event in stream]


async def one_turn() -> None:
    """The loop runs once: tasks made before have begun."""
    await asyncio.sleep(0)


def span(first: int, last: int) -> list[int]:
    return list(range(first, last + 1))


async def test_every_subscriber_gets_every_event_in_order(world: World) -> None:
    async with world.bus.subscribe() as one, world.bus.subscribe() as other:
        await world.publish(100)
        assert await take(one, 100) == span(1, 100)
        assert await take(other, 100) == span(1, 100)


async def test_an_event_has_what_was_published(world: World) -> None:
    async with world.bus.subscribe() as stream:
        published = await world.bus.publish("machine-state", "vm1", {"state": "running"})
        assert (published.kind, published.machine, published.data) == ("machine-state", "vm1", {"state": "running"})
        assert await anext(stream) == published
        assert (await world.journal.page(0)).events == (published,)


async def test_who_waited_for_an_event_finds_it_in_every_queue(world: World) -> None:
    async with world.bus.subscribe() as stream:
        event = await world.bus.publish("tick")
        assert world.bus.last == event.number
        coming = asyncio.ensure_future(anext(stream))
        await one_turn()
        assert coming.done()


async def test_an_event_is_seen_only_when_it_is_durable(world: World) -> None:
    async with world.bus.subscribe() as stream:
        coming = asyncio.ensure_future(anext(stream))
        with world.stuck():
            published = world.bus.publish("tick")
            await one_turn()
            assert not published.done()
            assert not coming.done()
        event = await published
        assert await coming == event


async def test_publishing_keeps_the_order_of_the_calls_without_waiting(world: World) -> None:
    async with world.bus.subscribe() as stream:
        for n in range(300):
            world.bus.publish("tick", None, {"call": n})
        async with asyncio.timeout(PATIENCE_S):
            assert [(await anext(stream)).data["call"] for _ in range(300)] == list(range(300))


async def test_a_publisher_that_gives_up_waiting_does_not_unpublish(world: World) -> None:
    async with world.bus.subscribe() as stream:
        with world.stuck():
            published = world.bus.publish("tick")
            published.cancel()
        assert await take(stream, 1) == [1]


async def test_a_new_subscriber_gets_only_what_comes(world: World) -> None:
    await world.publish(5)
    async with world.bus.subscribe() as stream:
        await world.publish(2)
        assert await take(stream, 2) == [6, 7]


async def test_a_subscriber_gets_what_it_missed_and_then_what_comes(world: World) -> None:
    await world.publish(2 * REPLAY_PAGE + 10)
    async with world.bus.subscribe(since=5) as stream:
        assert await take(stream, 2 * REPLAY_PAGE) == span(6, 2 * REPLAY_PAGE + 5)
        await world.publish(10)
        assert await take(stream, 15) == span(2 * REPLAY_PAGE + 6, 2 * REPLAY_PAGE + 20)


async def test_what_was_missed_over_a_restart_is_replayed(tmp_path: Path) -> None:
    async with opened(tmp_path) as world:
        await world.publish(7)
    async with opened(tmp_path) as world:
        assert world.bus.last == 7
        async with world.bus.subscribe(since=4) as stream:
            await world.publish(1)
            assert await take(stream, 4) == [5, 6, 7, 8]


async def test_nothing_is_missing_or_doubled_where_the_replay_goes_live(world: World) -> None:
    """Subscribers come at any time while others publish; every stream is one unbroken row of numbers."""
    total, chance = 2000, random.Random(1)

    async def publish() -> None:
        while world.bus.last < total:
            burst = [world.bus.publish("tick") for _ in range(chance.randint(1, 40))]
            await burst[-1]

    async def follow(since: int) -> list[int]:
        async with world.bus.subscribe(since=since) as stream:
            return await take(stream, total - since)

    publishing = asyncio.ensure_future(publish())
    following: list[tuple[int, asyncio.Future[list[int]]]] = []
    while not publishing.done():
        await world.bus.publish("tick")
        if len(following) < 40:
            since = chance.randint(0, min(world.bus.last, total))
            following.append((since, asyncio.ensure_future(follow(since))))
    for since, numbers in following:
        assert await numbers == span(since + 1, total)
    await publishing


async def test_a_subscriber_leaves_the_journal_as_soon_as_its_queue_goes_on_from_there(world: World) -> None:
    """Also on a bus that is never quiet, where the journal always has one more page."""
    await world.publish(5)
    async with world.bus.subscribe(since=0) as stream:
        await world.publish(5)
        with world.stuck():
            assert await take(stream, 10) == span(1, 10)
    async with world.bus.subscribe(since=0) as stream:
        await world.publish(2)
        with world.stuck():
            assert await take(stream, 12) == span(1, 12)


async def test_a_subscriber_may_ask_for_one_machine_only(world: World) -> None:
    for n in range(2 * REPLAY_PAGE):
        world.bus.publish("tick", f"vm{n % 2}")
    await world.publish(1)
    async with world.bus.subscribe(since=0, machine="vm1") as replayed, world.bus.subscribe(machine="vm1") as live:
        await world.publish(1, "vm0")
        await world.publish(1, "vm1")
        newest = world.bus.last
        assert await take(replayed, REPLAY_PAGE + 1) == [*range(2, 2 * REPLAY_PAGE + 1, 2), newest]
        assert await take(live, 1) == [newest]


async def test_what_is_not_for_a_subscriber_does_not_fill_its_queue(world: World) -> None:
    async with world.bus.subscribe(machine="vm1") as stream:
        await world.publish(1, "vm1")
        await world.publish(2 * QUEUE_EVENTS, "vm2")
        await world.publish(1, "vm1")
        assert await take(stream, 2) == [1, 2 * QUEUE_EVENTS + 2]


async def test_a_subscriber_for_whom_nothing_happens_still_keeps_up(tmp_path: Path) -> None:
    async with opened(tmp_path, kept_events=50) as world, world.bus.subscribe(machine="vm1") as stream:
        await world.publish(200, "vm2")
        assert stream.position == 200
        # Were it still at 0, this would send it to events that are gone.
        await world.journal.append("unseen", "vm1", {})
        await world.publish(1, "vm1")
        assert await take(stream, 2) == [201, 202]
        async with world.bus.subscribe(since=200, machine="vm2") as replayed:
            assert replayed.position == 202


async def test_a_slow_reader_is_cut_and_told_where_to_come_back(world: World) -> None:
    async with world.bus.subscribe() as slow, world.bus.subscribe() as quick:
        reading = asyncio.ensure_future(take(quick, QUEUE_EVENTS + 11))
        await world.publish(10)
        assert await take(slow, 10) == span(1, 10)
        await world.publish(1)
        for _ in range(QUEUE_EVENTS // 100 + 1):
            await world.publish(100)
        with pytest.raises(SlowReader) as caught:
            await anext(slow)
        assert isinstance(caught.value, Conflict)
        assert (caught.value.last, caught.value.details) == (10, {"last": 10})
        assert await reading == span(1, QUEUE_EVENTS + 11)
        async with world.bus.subscribe(since=caught.value.last) as again:
            assert await take(again, 5) == span(11, 15)
        with pytest.raises(SlowReader):
            await anext(slow)


async def test_a_full_queue_is_not_yet_an_overflow(world: World) -> None:
    async with world.bus.subscribe() as stream:
        await world.publish(QUEUE_EVENTS)
        assert await take(stream, QUEUE_EVENTS) == span(1, QUEUE_EVENTS)
        await world.publish(QUEUE_EVENTS + 1)
        with pytest.raises(SlowReader):
            await anext(stream)


async def test_a_reader_that_is_still_catching_up_is_not_cut(world: World) -> None:
    await world.publish(10)
    async with world.bus.subscribe(since=0) as stream:
        assert await take(stream, 1) == [1]
        for _ in range(3):
            await world.publish(QUEUE_EVENTS)
        assert await take(stream, 9 + 3 * QUEUE_EVENTS) == span(2, 10 + 3 * QUEUE_EVENTS)
        await world.publish(1)
        assert await take(stream, 1) == [11 + 3 * QUEUE_EVENTS]


async def test_asking_for_events_that_are_gone_says_which_are_kept(tmp_path: Path) -> None:
    async with opened(tmp_path, kept_events=10) as world:
        await world.publish(50)
        with pytest.raises(EventsGone) as caught:
            async with world.bus.subscribe(since=39):
                raise AssertionError("subscribed to what is gone")
        assert caught.value.details == {"first": 41, "last": 50}
        assert caught.value.code == "events_gone"
        async with world.bus.subscribe(since=40) as stream:
            assert await take(stream, 10) == span(41, 50)


async def test_asking_for_a_number_that_was_never_reached_says_which_are_kept(world: World) -> None:
    await world.publish(3)
    with pytest.raises(EventsGone):
        async with world.bus.subscribe(since=4):
            raise AssertionError("subscribed to another database's numbers")
    async with world.bus.subscribe(since=3) as stream:
        await world.publish(1)
        assert await take(stream, 1) == [4]


async def test_a_reader_overtaken_by_retention_while_catching_up_is_told(tmp_path: Path) -> None:
    async with opened(tmp_path, kept_events=2 * REPLAY_PAGE) as world:
        await world.publish(2 * REPLAY_PAGE)
        async with world.bus.subscribe(since=0) as stream:
            await world.publish(3 * REPLAY_PAGE)
            assert await take(stream, REPLAY_PAGE) == span(1, REPLAY_PAGE)
            with pytest.raises(EventsGone):
                await anext(stream)


async def test_an_event_recorded_past_the_bus_is_found_with_the_next(world: World) -> None:
    """As when the outcome of recording it was unknown, and it turns out to be there."""
    async with world.bus.subscribe() as idle, world.bus.subscribe() as waiting:
        coming = asyncio.ensure_future(take(waiting, 4))
        await world.publish(1)
        await world.journal.append("unseen", None, {})
        await world.publish(2)
        assert await coming == [1, 2, 3, 4]
        assert await take(idle, 4) == [1, 2, 3, 4]
        await world.publish(1)
        assert await take(idle, 1) == [5]


async def test_a_slow_reader_stays_cut_when_events_were_recorded_past_the_bus(world: World) -> None:
    async with world.bus.subscribe() as stream:
        await world.publish(QUEUE_EVENTS + 1)
        await world.journal.append("unseen", None, {})
        await world.publish(2)
        with pytest.raises(SlowReader):
            await anext(stream)


async def test_events_that_cannot_be_recorded_are_counted_and_said(
    world: World, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qmpd.database.MAX_WAITING", FEW)
    async with world.bus.subscribe(since=0) as stream:
        with world.stuck():
            for _ in range(FEW - 1):
                world.bus.publish("tick")
            refused = [world.bus.publish("tick") for _ in range(5)]
            with pytest.raises(Busy):
                await refused[0]
        taken = await take(stream, FEW - 1)
        await world.bus.publish("tick")
        lost = await anext(stream)
        assert (lost.kind, lost.data) == (EVENTS_LOST, {"count": 5})
        assert [*taken, lost.number, *await take(stream, 1)] == span(1, FEW + 1)
    assert [record.levelno for record in caplog.records] == [logging.ERROR]


async def test_streams_end_when_the_bus_closes_and_give_what_was_published_before(tmp_path: Path) -> None:
    async with open_database(tmp_path) as database, open_journal(database) as journal:
        async with open_bus(journal) as bus:
            live, behind = bus.subscribe(), bus.subscribe(since=0)
            async with live as waiting, behind as replaying:
                streams = [asyncio.ensure_future(rest(waiting)), asyncio.ensure_future(rest(replaying))]
                await bus.publish("tick")
                bus.publish("tick")
                await bus.close()
                assert await asyncio.gather(*streams) == [[1, 2], [1, 2]]
        async with bus.subscribe() as late:
            assert await rest(late) == []
        assert (await bus.publish("tick")).number == 3


async def test_a_stream_that_is_behind_ends_when_the_bus_closes(world: World) -> None:
    await world.publish(REPLAY_PAGE + 1)
    async with world.bus.subscribe(since=0) as stream:
        await world.bus.close()
        assert await rest(stream) == span(1, REPLAY_PAGE)
        assert stream.position == REPLAY_PAGE


async def test_a_stream_can_be_left_and_taken_up_again_by_position(world: World) -> None:
    await world.publish(5)
    async with world.bus.subscribe(since=0) as stream:
        await take(stream, 3)
    async with world.bus.subscribe(since=stream.position) as again:
        assert await take(again, 2) == [4, 5]


async def test_a_reader_that_is_cancelled_while_it_waits_loses_nothing(world: World) -> None:
    async with world.bus.subscribe(since=0) as stream:
        for number in range(1, 20):
            coming = asyncio.ensure_future(anext(stream))
            await one_turn()
            coming.cancel()
            published = world.bus.publish("tick")
            if number % 2:
                await published
            assert await take(stream, 1) == [number]


async def test_a_subscription_that_was_left_is_given_nothing_more(world: World) -> None:
    left: Subscription
    async with world.bus.subscribe() as left:
        pass
    await world.publish(1)
    assert left.position == 0
