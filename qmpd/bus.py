"""Fan-out of events: durable first, then to everybody who listens, in the order of their numbers.

Theory: a subscription is a position in the journal. Its queue holds what the bus gave it since it subscribed, or since the queue
last had to drop what it held. While the position is before that, the subscription is `behind` and reads pages of the journal; from
there on it takes the queue. Both are one sequence of numbers, so the seam neither loses nor repeats: what is not in the queue is in
the journal, and what the journal has already given is skipped in the queue.

A subscriber whose queue overflows while it is not behind reads too slowly: it is cut, and told up to where it got, so that it can
come back with `since`. Nobody else waits for it.

When the journal cannot take an event (the disk is full) it is lost: nobody sees it, and the next event that can be recorded comes
after one of kind `events-lost` with their `count`.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Final

from qmpd.errors import Conflict, EventsGone
from qmpd.journal import Journal, PastEvent
from qmpd.views import Event

#: Events a subscriber may lag behind: seconds of a busy host, and a few hundred KiB at most times.
QUEUE_EVENTS: Final = 1024
#: Events fetched at once from the journal: a page must not keep writers waiting.
REPLAY_PAGE: Final = 256
#: At shutdown the last events get this long to be recorded; a disk that is stuck must not keep the daemon from ending.
SETTLE_LIMIT_S: Final = 10.0
#: Kind of the event that stands for those that could not be recorded.
EVENTS_LOST: Final = "events-lost"

_log = logging.getLogger(__name__)


class SlowReader(Conflict):
    """The subscriber reads more slowly than events come; `last` is the number to come back with as `since`."""

    code = "slow_reader"

    def __init__(self, last: int) -> None:
        super().__init__(f"more than {QUEUE_EVENTS} events were waiting to be read; the last one given was {last}", last=last)
        self.last = last


class Subscription:
    """The events of one subscriber: an async iterator for one task at a time, made by `Bus.subscribe`.

    Iterating ends when the bus closes, and raises:
        SlowReader: more than `QUEUE_EVENTS` were waiting to be read.
        EventsGone: the journal no longer keeps what comes next.
        Unknown: the journal did not answer; events after `position` can still be had.
    """

    def __init__(self, journal: Journal, machine: str | None, *, position: int, newest: int) -> None:
        self._journal = journal
        self._machine = machine
        self._position = position
        #: Events up to this number are not in the queue; all later ones are.
        self._dropped = newest
        self._behind = position < newest
        self._page: deque[Event] = deque()
        self._queue: deque[Event] = deque()
        self._cut = False
        self._ended = False
        self._woken = asyncio.Event()

    @property
    def position(self) -> int:
        """Everything up to this number was given, or is not for this subscriber."""
        return self._position

    def offer(self, event: Event) -> None:
        """Take an event from the bus."""
        if self._cut:
            return
        if self._machine is not None and event.machine != self._machine:
            if not (self._behind or self._page or self._queue):
                # Keeps up with what is not for it, or its position would one day be older than anything kept.
                self._position = event.number
            return
        if len(self._queue) < QUEUE_EVENTS:
            self._queue.append(event)
        elif self._behind or self._page:
            self.fall_behind(event.number)
        else:
            self._cut = True
            self._queue.clear()
        self._woken.set()

    def fall_behind(self, number: int) -> None:
        """Events up to `number` do not come through the queue: get them from the journal."""
        self._behind = True
        self._dropped = number
        self._queue.clear()
        self._woken.set()

    def end(self) -> None:
        """No more will come. What is queued can still be read."""
        self._ended = True
        self._woken.set()

    async def catch_up(self) -> None:
        """Fetch a page of the journal, and go live if the queue has what comes after it.

        Raises:
            EventsGone: what comes next is no longer kept.
        """
        page = await self._journal.page(self._position, REPLAY_PAGE, self._machine)
        if page.gap:
            message = f"events after {self._position} are not kept, only {page.first} to {page.last}"
            raise EventsGone(message, first=page.first, last=page.last)
        self._page.extend(page.events)
        if page.events:
            reached = page.events[-1].number
        else:
            reached = self._position = page.last
        self._behind = reached < self._dropped

    def __aiter__(self) -> Subscription:
        """Itself."""
        return self

    async def __anext__(self) -> Event:
        """The next event."""
        while True:
            event = self._next_ready()
            if event is not None:
                self._position = event.number
                return event
            if self._cut:
                raise SlowReader(self._position)
            if self._ended:
                raise StopAsyncIteration
            if self._behind:
                await self.catch_up()
            else:
                self._woken.clear()
                await self._woken.wait()

    def _next_ready(self) -> Event | None:
        if self._page:
            return self._page.popleft()
        while self._queue and not self._behind:
            event = self._queue.popleft()
            if event.number > self._position:
                return event
        return None


class Bus:
    """Where events are published and subscribed to. Made by `open_bus`."""

    def __init__(self, journal: Journal, last: int) -> None:
        self._journal = journal
        self._last = last
        self._lost = 0
        #: How many events could not be recorded since the bus was made.
        self.lost = 0
        self._subscriptions: set[Subscription] = set()
        self._under_way: set[asyncio.Future[Event] | asyncio.Future[tuple[Event, ...]]] = set()
        self._closed = False

    @property
    def last(self) -> int:
        """The number of the newest event that subscribers were given."""
        return self._last

    @property
    def pending(self) -> int:
        """How many events wait for the journal."""
        return len(self._under_way)

    @property
    def subscribers(self) -> int:
        """How many subscriptions there are."""
        return len(self._subscriptions)

    def publish(self, kind: str, machine: str | None = None, data: Mapping[str, object] | None = None) -> asyncio.Future[Event]:
        """Record an event and give it to the subscribers. Returns at once; events keep the order of the calls.

        Whoever needs it may wait for the future: then the event is durable and in every queue, or could not be recorded
        (`NoSpace`, `Busy`, `Unknown`). Nobody has to: errors are logged and counted here, cancelling changes nothing.
        """
        if self._lost:
            lost, self._lost = self._lost, 0
            self._track(self._journal.enqueue(EVENTS_LOST, None, {"count": lost}), lost)
        recorded = self._journal.enqueue(kind, machine, data or {})
        self._track(recorded, 1)
        answer = asyncio.shield(recorded)
        answer.add_done_callback(_retrieve)
        return answer

    async def relate(self, machine: str, events: Sequence[PastEvent]) -> tuple[Event, ...]:
        """Record what happened to a machine on other hosts, in this order, and give it to the subscribers. Returns those that are new here.

        Raises:
            NoSpace, Busy, Unknown: they were not recorded, or that is not known; the same may be told again.
        """
        recorded = self._journal.enqueue_past(machine, events)
        self._under_way.add(recorded)
        recorded.add_done_callback(self._related)
        return await asyncio.shield(recorded)

    @asynccontextmanager
    async def subscribe(self, since: int | None = None, machine: str | None = None) -> AsyncIterator[Subscription]:
        """The events from now on, or those after number `since`, only of `machine` if one is given.

        Raises:
            EventsGone: events after `since` are no longer kept, or `since` was never reached; details carry `first` and `last`.
            Unknown: the journal did not answer.
        """
        position = self._last if since is None else since
        subscription = Subscription(self._journal, machine, position=position, newest=self._last)
        self._subscriptions.add(subscription)
        try:
            if since is not None:
                await subscription.catch_up()
            if self._closed:
                subscription.end()
            yield subscription
        finally:
            self._subscriptions.discard(subscription)

    async def close(self) -> None:
        """Wait until what was published is settled, then end all subscriptions."""
        if self._under_way:
            await asyncio.wait(self._under_way, timeout=SETTLE_LIMIT_S)
        self._closed = True
        for subscription in self._subscriptions:
            subscription.end()

    def _track(self, recorded: asyncio.Future[Event], count: int) -> None:
        self._under_way.add(recorded)
        recorded.add_done_callback(partial(self._settled, count=count))

    def _settled(self, recorded: asyncio.Future[Event], count: int) -> None:
        self._under_way.discard(recorded)
        error = recorded.exception()
        if error is None:
            self._give(recorded.result())
            return
        if not self._lost:
            _log.error("events cannot be recorded and are lost: %s", error)
        self._lost += count
        self.lost += count

    def _related(self, recorded: asyncio.Future[tuple[Event, ...]]) -> None:
        self._under_way.discard(recorded)
        if recorded.exception() is None and recorded.result():
            self._last = recorded.result()[-1].number
            for subscription in self._subscriptions:
                # So many at once would look like a reader that is too slow.
                subscription.fall_behind(self._last)

    def _give(self, event: Event) -> None:
        if event.number != self._last + 1:
            # One whose outcome was unknown was recorded after all: it is in the journal, so have everybody look there.
            for subscription in self._subscriptions:
                subscription.fall_behind(event.number)
        else:
            for subscription in self._subscriptions:
                subscription.offer(event)
        self._last = event.number


def _retrieve(answer: asyncio.Future[Event]) -> None:
    """Nobody has to look at the answer; asyncio shall not complain about that."""
    if not answer.cancelled():
        answer.exception()


@asynccontextmanager
async def open_bus(journal: Journal) -> AsyncIterator[Bus]:
    """The bus of a journal; on leaving, what was published is settled and all streams end."""
    bus = Bus(journal, await journal.last())
    try:
        yield bus
    finally:
        await bus.close()
