"""Events to many viewers at once: how many a second, and how long after it happened each is there."""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing
from datetime import datetime
from typing import Final

from qmpd_api.client import Client
from qmpd_api.streams_client import EventGap
from scripts.lib.bench_daemon import AT_A_TIME, Bench, at_a_time, small_pc
from scripts.lib.bench_figures import Row, paired, percentile, plain
from scripts.lib.progress import say

VIEWERS: Final = 50
#: Definitions created and deleted while the viewers watch: two durable events each.
DEFINITIONS: Final = 500
#: The last event is there within milliseconds; a viewer that does not have it by then has lost it.
DEADLINE_S: Final = 60.0


async def measure(bench: Bench) -> list[Row]:
    """The same changes without a viewer (the floor) and with many. Every viewer has to get every event, in order."""
    count = bench.repeat or DEFINITIONS
    async with bench.daemon() as daemon:
        client = daemon.client
        await _changes(client, AT_A_TIME)
        floor = 2 * count / await _changes(client, count)
        lags: list[float] = []
        last = (await client.events_page(limit=1)).last
        async with asyncio.timeout(DEADLINE_S + count), asyncio.TaskGroup() as group:
            ready = [asyncio.Event() for _ in range(VIEWERS)]
            for number, opened in enumerate(ready):
                own = Client(client.target)
                group.create_task(_view(own, last, 2 * count + 1, opened, lags), name=f"viewer:{number}")
            # The first event tells that all of them are there; it is not counted.
            first = asyncio.gather(*(opened.wait() for opened in ready))
            await client.create(small_pc("first"))
            await first
            lags.clear()
            began = time.perf_counter()
            await _changes(client, count)
        took = time.perf_counter() - began
    rate = 2 * count / took
    say(f"  {2 * count} events to {VIEWERS} viewers in {took:.2f} s; without viewers {floor:.0f} events/s")
    return [
        paired("events", f"events, each to {VIEWERS} viewers", ours=[rate], floor=[floor], unit="/s"),
        plain("events", "  until a viewer has it, p50", measured=percentile(lags, 50), unit="ms", samples=len(lags)),
        plain("events", "  until a viewer has it, p99", measured=percentile(lags, 99), unit="ms", samples=len(lags)),
    ]


async def _changes(client: Client, count: int) -> float:
    """Seconds to create and delete so many definitions."""

    async def change(name: str) -> None:
        await client.create(small_pc(name))
        await client.delete(name)

    began = time.perf_counter()
    await at_a_time([f"change{number}" for number in range(count)], change)
    return time.perf_counter() - began


async def _view(client: Client, since: int, count: int, opened: asyncio.Event, lags: list[float]) -> None:
    """Take `count` events after number `since`. Raises RuntimeError if one is missing."""
    async with client, aclosing(client.events(since)) as events:
        async for event in events:
            if isinstance(event, EventGap) or event.number != since + 1:
                raise RuntimeError(f"events are missing after {since}: {event}")
            since, count = event.number, count - 1
            lags.append((time.time() - datetime.fromisoformat(event.at).timestamp()) * 1e3)
            opened.set()
            if not count:
                return
