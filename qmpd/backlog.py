"""Events between QEMU and their reader, bounded whatever the guest does.

A guest can make QEMU emit more than a thousand events a second, for ever. Three rules keep that cheap:

* an event equal to the newest one waiting is counted, not queued;
* what waits is bounded in number and bytes. When it overflows it is thrown away and replaced by one `EventsLost`, after which
  the newest events follow: the reader asks QEMU for everything, and still sees how the story ended;
* the reader is given a burst at once, then a trickle, so that a storm does not become its load either.

Who cannot wait for the trickle, because a guest stands still until it is served, may `hear` each event as it arrives.

Order is QEMU's order always: only neighbours are merged, because STOP, RESUME, STOP is not STOP, STOP, RESUME.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Final, Self, TypeAlias

import msgspec

#: Events that may wait. At the trickle below a full backlog is read in eight seconds.
EVENTS_LIMIT: Final = 64
#: Bytes that may wait: the largest real events (BLOCK_IO_ERROR, MEMORY_FAILURE) are below 1 KiB.
BYTES_LIMIT: Final = 256 * 1024
#: Items given to the reader at once: the events of a start, a stop or a migration all fit in.
BURST: Final = 64
#: Items per second given to the reader after the burst.
TRICKLE_HZ: Final = 8.0
#: Longest event name, and largest count of seconds in a time stamp, that is believed.
_NAME_LIMIT: Final = 128
_SECONDS_LIMIT: Final = 2**40

_log = logging.getLogger(__name__)


class QmpEvent(msgspec.Struct, frozen=True, kw_only=True):
    """An event QEMU emitted, `count` times in a row; `time` is that of the last, in seconds since the epoch."""

    name: str
    data: Mapping[str, object]
    time: float
    count: int = 1


class EventsLost(msgspec.Struct, frozen=True, kw_only=True):
    """Here `count` events were thrown away: what was learned from events before is stale, ask QEMU."""

    count: int


#: Called on the loop for each event as it arrives; must be quick.
Hearer: TypeAlias = Callable[[QmpEvent | EventsLost], None]


class Hearers:
    """Who wants to hear of each event as it arrives."""

    def __init__(self) -> None:
        self._takers: list[Hearer] = []

    @contextmanager
    def hearing(self, take: Hearer) -> Iterator[None]:
        """Calls `take` while the block lasts."""
        self._takers.append(take)
        try:
            yield
        finally:
            self._takers.remove(take)

    def tell(self, item: QmpEvent | EventsLost) -> None:
        """Calls everybody. Never raises."""
        for take in tuple(self._takers):
            try:
                take(item)
            except Exception:  # noqa: BLE001  the boundary to the reader: a mistake of one listener must not end the session of all
                _log.exception("mistake in a listener to events")


class EventBacklog:
    """The events of one session; an asynchronous iterator for one reader, which ends after `close` when all is read."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[QmpEvent | EventsLost, int]] = deque()
        self._bytes = 0
        self._arrived = asyncio.Event()
        self._closed = asyncio.Event()
        self._hearers = Hearers()
        #: Whether the reader has everything that came, and waits for more.
        self.read_out = False
        self._loop = asyncio.get_running_loop()
        self._allowance = float(BURST)
        self._allowance_at = self._loop.time()

    def put(self, message: Mapping[str, object], size: int) -> None:
        """Take an event message of `size` bytes. Never raises and never grows beyond the limits, whatever the message is."""
        event = _event(message)
        if event is None or size > BYTES_LIMIT:
            self._hearers.tell(EventsLost(count=1))
            self._lose(1)
            return
        self._hearers.tell(event)
        newest, newest_size = self._waiting[-1] if self._waiting else (None, 0)
        if isinstance(newest, QmpEvent) and _same(newest, event):
            self._waiting[-1] = (msgspec.structs.replace(event, count=newest.count + 1), newest_size)
            return
        if len(self._waiting) >= EVENTS_LIMIT or self._bytes + size > BYTES_LIMIT:
            self._lose(0)
        self._append(event, size)

    def hearing(self, take: Hearer) -> AbstractContextManager[None]:
        """Calls `take` for each event as it arrives, unmerged and unpaced, while the block lasts."""
        return self._hearers.hearing(take)

    def close(self) -> None:
        """No more events will come; those that wait are delivered without pacing."""
        self._closed.set()
        self._arrived.set()

    def _append(self, item: QmpEvent | EventsLost, size: int) -> None:
        self._waiting.append((item, size))
        self._bytes += size
        self.read_out = False
        self._arrived.set()

    def _lose(self, count: int) -> None:
        for item, _ in self._waiting:
            count += item.count
        self._waiting.clear()
        self._bytes = 0
        self._append(EventsLost(count=count), 0)

    def __aiter__(self) -> Self:
        """The backlog itself."""
        return self

    async def __anext__(self) -> QmpEvent | EventsLost:
        """The oldest item; ends when the session is closed and everything was read."""
        while not self._waiting:
            if self._closed.is_set():
                raise StopAsyncIteration
            self._arrived.clear()
            self.read_out = True
            await self._arrived.wait()
        self.read_out = False
        await self._pace()
        item, size = self._waiting.popleft()
        self._bytes -= size
        return item

    async def _pace(self) -> None:
        self._refill()
        if self._allowance < 1.0 and not self._closed.is_set():
            try:
                async with asyncio.timeout((1.0 - self._allowance) / TRICKLE_HZ):
                    await self._closed.wait()
            except TimeoutError:
                self._refill()
        self._allowance = max(0.0, self._allowance - 1.0)

    def _refill(self) -> None:
        now = self._loop.time()
        self._allowance = min(float(BURST), self._allowance + (now - self._allowance_at) * TRICKLE_HZ)
        self._allowance_at = now


def _same(one: QmpEvent, other: QmpEvent) -> bool:
    try:
        return one.name == other.name and one.data == other.data
    except RecursionError:  # nested as deep as the decoder allowed, and compared from a deeper stack
        return False


def _event(message: Mapping[str, object]) -> QmpEvent | None:
    name = message.get("event")
    if not isinstance(name, str) or len(name) > _NAME_LIMIT:
        return None
    data = message.get("data")
    return QmpEvent(name=name, data=data if isinstance(data, dict) else {}, time=_time(message.get("timestamp")))


def _time(stamp: object) -> float:
    match stamp:
        case {"seconds": int(seconds), "microseconds": int(micro)} if 0 <= seconds < _SECONDS_LIMIT and 0 <= micro < 1_000_000:
            return seconds + micro / 1e6
    return 0.0  # QEMU itself sends -1 when the clock fails
