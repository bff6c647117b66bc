from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import msgspec
import pytest

from qmpd import backlog as module
from qmpd.backlog import BURST, BYTES_LIMIT, EVENTS_LIMIT, EventBacklog, EventsLost, QmpEvent
from tests.process.emulator import PATIENCE_S

STAMP = {"seconds": 10, "microseconds": 250_000}


def put(backlog: EventBacklog, name: str, *, size: int = 100, **data: object) -> None:
    backlog.put({"event": name, "data": data, "timestamp": STAMP}, size)


def named(item: QmpEvent | EventsLost) -> tuple[str, int]:
    return (item.name if isinstance(item, QmpEvent) else "lost", item.count)


async def rest(backlog: EventBacklog) -> list[tuple[str, int]]:
    """What is left, as names and counts."""
    backlog.close()
    async with asyncio.timeout(PATIENCE_S):
        return [named(item) async for item in backlog]


@pytest.fixture
async def backlog() -> AsyncIterator[EventBacklog]:
    backlog = EventBacklog()
    yield backlog
    backlog.close()


async def test_an_event_arrives_with_its_data_and_qemus_time(backlog: EventBacklog) -> None:
    put(backlog, "RESET", guest=True)
    assert await anext(backlog) == QmpEvent(name="RESET", data={"guest": True}, time=10.25)


async def test_a_reader_that_was_there_first_gets_the_event(backlog: EventBacklog) -> None:
    reader = asyncio.create_task(anext(backlog), name="reader")
    await asyncio.sleep(0)
    put(backlog, "STOP")
    assert named(await reader) == ("STOP", 1)


async def test_equal_neighbours_are_counted(backlog: EventBacklog) -> None:
    for _ in range(100_000):
        put(backlog, "RESET", guest=True)
    put(backlog, "RESET", guest=False)
    assert await rest(backlog) == [("RESET", 100_000), ("RESET", 1)]


async def test_order_is_kept_so_only_neighbours_are_merged(backlog: EventBacklog) -> None:
    for name in ("STOP", "RESUME", "STOP"):
        put(backlog, name)
    assert await rest(backlog) == [("STOP", 1), ("RESUME", 1), ("STOP", 1)]


async def test_an_overflow_becomes_one_mark_and_the_newest_events_survive(backlog: EventBacklog) -> None:
    for number in range(EVENTS_LIMIT * 10):
        put(backlog, "JOB_STATUS_CHANGE", number=number)
    put(backlog, "SHUTDOWN")
    items = await rest(backlog)
    assert items[0][0] == "lost"
    assert "lost" not in [name for name, _ in items[1:]]
    assert items[-1] == ("SHUTDOWN", 1)
    assert len(items) <= EVENTS_LIMIT
    assert sum(count for _, count in items) == EVENTS_LIMIT * 10 + 1


async def test_large_events_overflow_by_their_bytes(backlog: EventBacklog) -> None:
    for number in range(3):
        put(backlog, "DUMP_COMPLETED", size=BYTES_LIMIT // 2, number=number)
    assert await rest(backlog) == [("lost", 2), ("DUMP_COMPLETED", 1)]


async def test_reading_makes_room(backlog: EventBacklog) -> None:
    for number in range(8):
        put(backlog, "DUMP_COMPLETED", size=BYTES_LIMIT, number=number)
        assert isinstance(await anext(backlog), QmpEvent)


@pytest.mark.parametrize(
    "message",
    [{"event": None}, {"event": ["RESET"]}, {"event": "X" * 1000}, {"event": "RESET", "big": True}],
    ids=["none", "list", "long name", "large"],
)
async def test_what_is_not_an_event_counts_as_lost(backlog: EventBacklog, message: dict[str, object]) -> None:
    backlog.put(message, BYTES_LIMIT + 1 if "big" in message else 10)
    assert await anext(backlog) == EventsLost(count=1)


@pytest.mark.parametrize(
    "stamp", [None, 1, {}, {"seconds": -1, "microseconds": -1}, {"seconds": 2**70, "microseconds": 0}, {"seconds": "1", "microseconds": 0}]
)
async def test_a_time_that_makes_no_sense_is_zero(backlog: EventBacklog, stamp: object) -> None:
    backlog.put({"event": "RESET", "data": [], "timestamp": stamp}, 10)
    assert await anext(backlog) == QmpEvent(name="RESET", data={}, time=0.0)


async def test_events_nested_too_deep_to_compare_are_both_kept(backlog: EventBacklog) -> None:
    def deep() -> dict[str, object]:
        value: dict[str, object] = {}
        for _ in range(100_000):
            value = {"a": value}
        return value

    put(backlog, "RESET", value=deep())
    put(backlog, "RESET", value=deep())
    assert await rest(backlog) == [("RESET", 1), ("RESET", 1)]


async def test_what_comes_while_the_reader_is_held_back_is_counted(backlog: EventBacklog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TRICKLE_HZ", 0.001)
    for number in range(BURST):
        put(backlog, "RESET", number=number)
        await anext(backlog)
    put(backlog, "RESET", guest=True)
    held_back = asyncio.create_task(anext(backlog), name="reader")
    await asyncio.sleep(0)
    put(backlog, "RESET", guest=True)
    await asyncio.sleep(0)
    assert not held_back.done()
    backlog.close()
    assert named(await held_back) == ("RESET", 2)


async def test_after_a_burst_the_reader_is_given_a_trickle(backlog: EventBacklog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TRICKLE_HZ", 50.0)
    for number in range(BURST + 5):
        put(backlog, "RESET", number=number)
        assert named(await anext(backlog)) == ("RESET", 1)


async def test_a_storm_reaches_its_reader_as_few_items(backlog: EventBacklog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TRICKLE_HZ", 0.001)
    items: list[QmpEvent | EventsLost] = []

    async def read() -> None:
        items.extend([item async for item in backlog])

    reader = asyncio.create_task(read(), name="reader")
    for _ in range(1000):
        put(backlog, "RESET", guest=True)
        await asyncio.sleep(0)
        await asyncio.sleep(0)  # a reader that is always quick enough
    backlog.close()
    await reader
    assert sum(item.count for item in items) == 1000
    assert len(items) <= BURST + 2


async def test_the_reader_sees_everything_that_came_before_the_end_at_once(backlog: EventBacklog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TRICKLE_HZ", 0.001)
    for number in range(BURST):
        put(backlog, "RESET", number=number)
        await anext(backlog)
    put(backlog, "STOP")
    put(backlog, "SHUTDOWN")
    reader = asyncio.create_task(anext(backlog), name="reader")
    await asyncio.sleep(0)
    backlog.close()
    assert named(await reader) == ("STOP", 1)
    assert await rest(backlog) == [("SHUTDOWN", 1)]


async def test_a_reader_that_goes_away_loses_nothing(backlog: EventBacklog) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0):
            await anext(backlog)
    put(backlog, "STOP")
    assert await rest(backlog) == [("STOP", 1)]


def test_events_can_be_stored() -> None:
    event = QmpEvent(name="RESET", data={"guest": True}, time=1.0)
    assert msgspec.json.decode(msgspec.json.encode(event), type=QmpEvent) == event


async def test_who_listens_hears_every_event_at_once_however_slowly_it_is_read(backlog: EventBacklog) -> None:
    heard: list[tuple[str, int]] = []
    with backlog.hearing(lambda item: heard.append(named(item))):
        for _ in range(3 * EVENTS_LIMIT):
            put(backlog, "RESET")
        put(backlog, "MIGRATION", status="completed")
        put(backlog, "STOP", size=BYTES_LIMIT + 1)
    put(backlog, "RESUME")
    assert heard == [*[("RESET", 1)] * (3 * EVENTS_LIMIT), ("MIGRATION", 1), ("lost", 1)]


async def test_a_mistake_of_one_listener_is_nobody_elses(backlog: EventBacklog, caplog: pytest.LogCaptureFixture) -> None:
    heard: list[str] = []

    def mistaken(_item: QmpEvent | EventsLost) -> None:
        raise ZeroDivisionError

    with backlog.hearing(mistaken), backlog.hearing(lambda item: heard.append(named(item)[0])):
        put(backlog, "STOP")
    assert heard == ["STOP"]
    assert named(await anext(backlog)) == ("STOP", 1)
    assert "mistake in a listener" in caplog.text
