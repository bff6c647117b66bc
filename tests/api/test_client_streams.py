from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import msgspec
import pytest
from aiohttp import WSCloseCode, web

from qmpd import errors
from qmpd.errors import NotFound
from qmpd.views import (
    Event,
    EventPage,
    JobView,
    Progress,
)
from qmpd_api import streams_client
from qmpd_api.client import Client
from qmpd_api.connection import DaemonUnavailable
from qmpd_api.streams_client import ConsoleFrame, EventGap
from tests.api.standin import PATIENCE_S, Asked, StandIn, listening


@pytest.fixture
def path(short_directory: Path) -> Path:
    return short_directory / "s"


@pytest.fixture
async def daemon(path: Path) -> AsyncIterator[StandIn]:
    standin = StandIn()
    async with listening(standin, path):
        yield standin


@pytest.fixture
async def client(path: Path, daemon: StandIn) -> AsyncIterator[Client]:
    async with Client(str(path)) as opened:
        yield opened


async def test_a_job_is_waited_for_with_its_progress(client: Client, daemon: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qmpd_api.client.JOB_LOOK_S", 0)
    under_way = [JobView(id="j", kind="shutdown", state="running", created_at="", progress=Progress(done=done)) for done in (1, 2)]
    done = JobView(id="j", kind="shutdown", state="failed", created_at="", error={"code": "not_yet", "message": "no"})
    daemon.answers["GET /v1/jobs/j"] = [*under_way, done]
    seen: list[float] = []
    assert await client.wait_job("j", lambda job: seen.append(job.progress.done)) == done
    assert seen == [1, 2, 0]


async def test_a_log_slice_knows_where_it_begins(client: Client, daemon: StandIn) -> None:
    headers = {"X-Qmpd-Console-Start": "100", "X-Qmpd-Console-End": "900"}
    daemon.answers["GET /v1/machines/lab/log"] = lambda _: web.Response(body=b"abc", headers=headers)
    early, later = await client.log("lab"), await client.log("lab", since=400, limit=3)
    assert (early.offset, early.start, early.end, early.data) == (100, 100, 900, b"abc")
    assert later.offset == 400
    assert daemon.asked[-1].query == {"since": ["400"], "limit": ["3"]}


async def test_a_followed_log_ends_when_the_daemon_ends_it(client: Client, daemon: StandIn) -> None:
    daemon.answers["GET /v1/machines/lab/log"] = b"first second"
    assert b"".join([piece async for piece in client.follow_log("lab", since=0)]) == b"first second"
    assert daemon.asked[-1].query == {"since": ["0"], "follow": ["true"]}


class Guest:
    """A console: `hello`, then the given frames; what is typed is kept and echoed."""

    def __init__(self, *frames: ConsoleFrame, echo: bool = False) -> None:
        self.frames = frames
        self.echo = echo
        self.typed = b""

    async def __call__(self, socket: web.WebSocketResponse, _: Asked) -> None:
        await say(socket, ConsoleFrame(kind="hello"))
        for frame in self.frames:
            await say(socket, frame)
        if not self.echo:
            return
        async for message in socket:
            frame = msgspec.msgpack.decode(message.data, type=ConsoleFrame)
            assert frame.kind == "input"
            self.typed += frame.data
            await say(socket, ConsoleFrame(kind="output", data=frame.data))


async def say(socket: web.WebSocketResponse, frame: ConsoleFrame | Event) -> None:
    await socket.send_bytes(msgspec.msgpack.encode(frame))


async def test_a_console_ends_after_the_frame_that_says_that_the_machine_ended(client: Client, daemon: StandIn) -> None:
    shown = [ConsoleFrame(kind="output", offset=5, data=b"hi\xff"), ConsoleFrame(kind="ended", offset=8)]
    daemon.channels["/v1/machines/lab/console"] = Guest(*shown)
    async with client.console("lab", port=1, since=5) as console:
        frames = [frame async for frame in console]
    assert frames == [ConsoleFrame(kind="hello"), *shown]
    assert daemon.asked[-1].query == {"port": ["1"], "since": ["5"]}
    assert daemon.asked[-1].headers["Sec-WebSocket-Protocol"] == "qmpd.console.v1"


async def test_a_large_paste_arrives_whole_in_messages_the_daemon_takes(client: Client, daemon: StandIn) -> None:
    guest = Guest(echo=True)
    daemon.channels["/v1/machines/lab/console"] = guest
    paste = bytes(range(256)) * 300
    async with client.console("lab") as console:
        await console.write(paste)
        received = b""
        async for frame in console:
            received += frame.data
            assert len(frame.data) <= 64 * 1024
            if received == paste:
                break
    assert guest.typed == paste


async def test_a_console_that_is_there_when_its_absence_is_asked_about_is_opened(client: Client, daemon: StandIn) -> None:
    """aiohttp does not read the answer of a handshake that failed: the client asks why, and a machine may have been made meanwhile."""
    shown = ConsoleFrame(kind="ended")

    def absent_once(_: Asked) -> NotFound:
        daemon.channels["/v1/machines/lab/console"] = Guest(shown)
        return NotFound("there is no machine 'lab'")

    daemon.answers["GET /v1/machines/lab/console"] = absent_once
    async with client.console("lab") as console:
        assert [frame async for frame in console][-1] == shown
    assert len(daemon.asked) == 3


async def test_a_console_that_is_cut_says_why(client: Client, daemon: StandIn) -> None:
    closings = [(WSCloseCode.TRY_AGAIN_LATER, b"too_many_requests: slow"), (WSCloseCode.GOING_AWAY, b"the daemon ends")]

    async def cut(socket: web.WebSocketResponse, _: Asked) -> None:
        code, reason = closings.pop(0)
        await socket.close(code=code, message=reason)

    daemon.channels["/v1/machines/lab/console"] = cut
    async with client.console("lab") as console:
        with pytest.raises(errors.Busy, match="slow"):
            [frame async for frame in console]
    async with client.console("lab") as console:
        with pytest.raises(DaemonUnavailable, match="the daemon ends"):
            [frame async for frame in console]


async def test_a_refused_console_gives_the_daemons_error(client: Client, daemon: StandIn) -> None:
    daemon.answers["GET /v1/machines/lab/console"] = NotFound("no port 3", port=3)
    with pytest.raises(NotFound, match="no port 3") as caught:
        async with client.console("lab", port=3):
            pass
    assert caught.value.details == {"port": 3}


def event(number: int) -> Event:
    return Event(number=number, at="2026-01-02T03:04:05Z", kind="machine.state", machine="lab")


class History:
    """The events of a daemon: pages, and a stream that is closed after each batch of `live`."""

    def __init__(self, *live: list[Event], kept: tuple[Event, ...] = (), first: int = 1) -> None:
        self.live = list(live)
        self.kept = list(kept)
        self.first = first

    def page(self, asked: Asked) -> EventPage:
        since = int(asked.query.get("since", ["0"])[0])
        last = self.kept[-1].number if self.kept else self.first - 1
        later = tuple(kept for kept in self.kept if kept.number > since)
        return EventPage(events=later, first=self.first, last=last, gap=not self.first - 1 <= since <= last)

    async def __call__(self, socket: web.WebSocketResponse, asked: Asked) -> None:
        batch = self.live.pop(0) if self.live else []
        for happened in batch:
            self.kept.append(happened)
            if happened.number > int(asked.query["since"][0]):
                await say(socket, happened)
        if not self.live:
            async for _ in socket:
                pass


def install(daemon: StandIn, history: History) -> None:
    daemon.answers["GET /v1/events"] = history.page
    daemon.channels["/v1/events"] = history


async def take(client: Client, count: int, since: int | None = None) -> list[int]:
    numbers: list[int] = []
    async with aclosing(client.events(since, "lab")) as items:
        async for item in items:
            assert isinstance(item, Event)
            numbers.append(item.number)
            if len(numbers) == count:
                break
    return numbers


async def test_events_begin_now_unless_told_otherwise(client: Client, daemon: StandIn) -> None:
    install(daemon, History([event(3)], kept=(event(1), event(2))))
    assert await take(client, 1) == [3]
    assert {tuple(asked.query["machine"]) for asked in daemon.asked} == {("lab",)}


async def test_events_that_were_missed_come_first(client: Client, daemon: StandIn) -> None:
    install(daemon, History([event(4)], kept=(event(1), event(2), event(3))))
    assert await take(client, 3, since=1) == [2, 3, 4]


async def test_events_go_on_across_broken_connections_without_loss_or_repetition(
    client: Client, daemon: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams_client, "RECONNECT_EVERY_S", 0)
    install(daemon, History([event(1), event(2)], [], [event(3)], [event(4)]))
    assert await take(client, 4, since=0) == [1, 2, 3, 4]


async def test_events_wait_for_a_daemon_that_restarts(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams_client, "RECONNECT_EVERY_S", 0.01)
    daemon = StandIn()
    install(daemon, History([event(1)], [event(2)]))
    numbers: list[int] = []
    async with asyncio.timeout(PATIENCE_S), Client(str(path)) as client, asyncio.TaskGroup() as group:
        arrived = asyncio.Event()

        async def follow() -> None:
            async for item in client.events(0):
                assert isinstance(item, Event)
                numbers.append(item.number)
                arrived.set()
                if len(numbers) == 2:
                    return

        following: asyncio.Task[None] | None = None
        for _ in range(2):
            async with listening(daemon, path):
                following = following or group.create_task(follow())
                await arrived.wait()
                arrived.clear()
    assert numbers == [1, 2]


async def test_events_that_are_gone_are_reported_as_a_gap(client: Client, daemon: StandIn) -> None:
    install(daemon, History(kept=(event(8), event(9)), first=8))
    items = client.events(3)
    assert await anext(items) == EventGap(since=3, first=8)
    assert [await anext(items), await anext(items)] == [event(8), event(9)]


async def test_a_number_from_another_database_begins_again_with_the_oldest_event(client: Client, daemon: StandIn) -> None:
    install(daemon, History(kept=(event(1), event(2))))
    items = client.events(5000)
    assert await anext(items) == EventGap(since=5000, first=1)
    assert await anext(items) == event(1)


async def test_events_of_an_absent_daemon_fail_at_once(path: Path) -> None:
    async with Client(str(path)) as client:
        with pytest.raises(DaemonUnavailable):
            await anext(client.events())


async def test_events_give_up_on_a_daemon_that_stays_away(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams_client, "RECONNECT_EVERY_S", 0)
    monkeypatch.setattr(streams_client, "RECONNECT_LIMIT_S", 0.05)
    daemon = StandIn()
    install(daemon, History([event(1)]))
    async with Client(str(path)) as client:
        items = client.events(0)
        async with listening(daemon, path):
            assert await anext(items) == event(1)
        with pytest.raises(DaemonUnavailable):
            await anext(items)
