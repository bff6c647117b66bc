"""Events as they are streamed."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import aiohttp
import msgspec
import pytest

from qmpd.views import Event
from qmpd_api.application import create
from qmpd_api.limits import Limits
from qmpd_api.server import serve
from qmpd_api.streams import EVENTS_PROTOCOL
from tests.api.bench import Bench, opened_bench
from tests.api.conftest import Server
from tests.api.wire import HANDSHAKE, PATIENCE_S, answer, ask, closing, connected, ended, request, session_on


async def published(bench: Bench, count: int, machine: str = "lab") -> None:
    for index in range(count):
        await bench.bus.publish("test.happened", machine, {"index": index})


async def test_a_page_of_events(client: aiohttp.ClientSession, bench: Bench) -> None:
    await published(bench, 3)
    async with client.get("/v1/events?since=1&limit=1") as reply:
        page = await reply.json()
    assert [event["number"] for event in page["events"]] == [2]
    assert (page["first"], page["last"], page["gap"]) == (1, 3, False)


@pytest.mark.parametrize("protocols", [(), (EVENTS_PROTOCOL,)])
async def test_events_over_a_websocket(client: aiohttp.ClientSession, bench: Bench, protocols: tuple[str, ...]) -> None:
    await published(bench, 2)
    async with client.ws_connect("/v1/events?since=1", protocols=protocols) as socket:
        await published(bench, 1)
        events = []
        for _ in range(2):
            message = await socket.receive(timeout=PATIENCE_S)
            decode = msgspec.msgpack.decode if protocols else msgspec.json.decode
            events.append(decode(message.data, type=Event))
    assert [event.number for event in events] == [2, 3]


async def test_a_websocket_without_since_begins_now(client: aiohttp.ClientSession, bench: Bench) -> None:
    await published(bench, 2)
    async with client.ws_connect("/v1/events?machine=lab") as socket:
        await published(bench, 1, "other")
        await published(bench, 1)
        assert (await socket.receive_json(timeout=PATIENCE_S))["number"] == 4


async def test_the_event_websocket_takes_no_messages(client: aiohttp.ClientSession) -> None:
    async with client.ws_connect("/v1/events") as socket:
        await socket.send_str("subscribe")
        assert (await closing(socket))[0] == 1003


async def test_events_that_are_gone_are_a_conflict_before_the_websocket_opens(short_directory: Path) -> None:
    path = str(short_directory / "api.sock")
    async with opened_bench(short_directory, kept_events=3) as bench, serve(create(bench.as_service()), path):
        await published(bench, 10)
        reply = await ask(path, "GET", "/v1/events?since=1", headers=HANDSHAKE)
        assert (reply.status, reply.error().code) == (409, "events_gone")
        assert reply.error().details["last"] == 10


async def told(reply: aiohttp.ClientResponse) -> dict[str, str]:
    """The next server-sent event, as its fields; a comment is the field called ''."""
    fields: dict[str, str] = {}
    async with asyncio.timeout(PATIENCE_S):
        while line := (await reply.content.readline()).decode().rstrip("\n"):
            name, _, value = line.partition(": ")
            fields[name] = value
    return fields


STREAM = {"Accept": "text/event-stream"}


async def test_server_sent_events(client: aiohttp.ClientSession, bench: Bench) -> None:
    await published(bench, 2)
    async with client.get("/v1/events?since=0", headers=STREAM) as reply:
        assert reply.content_type == "text/event-stream"
        first, second = await told(reply), await told(reply)
        assert (first["id"], first["event"]) == ("1", "test.happened")
        assert json.loads(second["data"])["data"] == {"index": 1}


async def test_a_browser_that_reconnects_goes_on_where_it_was(client: aiohttp.ClientSession, bench: Bench) -> None:
    await published(bench, 3)
    async with client.get("/v1/events?since=0", headers={**STREAM, "Last-Event-ID": "2"}) as reply:
        assert (await told(reply))["id"] == "3"


@pytest.mark.parametrize("last", ["", "x", "-1", "1.5", "9" * 30])
async def test_a_last_event_that_is_no_number_is_invalid(socket_path: str, last: str) -> None:
    reply = await ask(socket_path, "GET", "/v1/events", headers={**STREAM, "Last-Event-ID": last})
    assert (reply.status, reply.error().code) == (422, "invalid")


async def test_a_browser_is_told_what_is_gone(short_directory: Path) -> None:
    path = str(short_directory / "api.sock")
    async with opened_bench(short_directory, kept_events=3) as bench, serve(create(bench.as_service()), path), session_on(path) as client:
        await published(bench, 10)
        async with client.get("/v1/events?since=1", headers=STREAM) as reply:
            gap, event = await told(reply), await told(reply)
        assert gap["event"] == "gap"
        assert int(event["id"]) == json.loads(gap["data"])["first"]


async def test_a_browser_from_before_a_new_database_starts_over(client: aiohttp.ClientSession, bench: Bench) -> None:
    async with client.get("/v1/events?since=99", headers=STREAM) as reply:
        assert (await told(reply))["event"] == "gap"
        await published(bench, 1)
        assert (await told(reply))["id"] == "1"


async def test_a_quiet_event_stream_shows_that_it_lives(start_server: Server, bench: Bench) -> None:
    async with session_on(await start_server(Limits(heartbeat_s=0.1))) as client, client.get("/v1/events", headers=STREAM) as reply:
        assert "" in await told(reply)
        await published(bench, 1)
        while "id" not in (fields := await told(reply)):
            pass
        assert fields["id"] == "1"


async def test_a_quiet_websocket_is_pinged_and_one_that_does_not_answer_is_dropped(start_server: Server) -> None:
    path = await start_server(Limits(heartbeat_s=0.2))
    async with connected(path) as (reader, writer):
        writer.write(request("GET", "/v1/events", headers=HANDSHAKE))
        assert (await answer(reader)).status == 101
        assert (await ended(reader)).startswith(b"\x89")
