"""How every stream ends: with its reason, and with the daemon."""

from __future__ import annotations

import asyncio
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from qmpd.bus import SlowReader
from qmpd.errors import EventsGone, NotFound
from qmpd_api import sockets
from qmpd_api.application import create
from qmpd_api.limits import Limits
from qmpd_api.server import serve
from tests.api.bench import Bench
from tests.api.wire import HANDSHAKE, PATIENCE_S, answer, closing, connected, request, session_on

CONSOLE = "/v1/machines/lab/console"
LOG = "/v1/machines/lab/log"
STREAM = {"Accept": "text/event-stream"}

ENDINGS: dict[str, tuple[Exception, int, str]] = {
    "too slow": (TimeoutError(), 1013, "too slow: nothing was read for 10 s"),
    "events come too fast": (SlowReader(7), 1013, "slow_reader: "),
    "events are gone": (EventsGone("events after 1 are not kept", first=5, last=9), 1013, "events_gone: events after 1 are not kept"),
    "another error": (NotFound("there is no such machine"), 1011, "not_found: there is no such machine"),
}


@pytest.mark.parametrize(("error", "code", "reason"), ENDINGS.values(), ids=ENDINGS)
async def test_a_stream_that_ends_says_why(bench: Bench, short_directory: Path, error: Exception, code: int, reason: str) -> None:
    async def stream(request: web.Request) -> web.StreamResponse:
        async def speak() -> sockets.Closing:
            raise error

        async def hear(_: str | bytes) -> None:
            return None

        async with sockets.opened(request) as socket:
            await sockets.converse(socket, Limits(), name="stream", speak=speak, hear=hear)
        return socket

    path = str(short_directory / "api.sock")
    app = create(bench.as_service())
    app.router.add_get("/stream", stream)
    async with serve(app, path), session_on(path) as session, session.ws_connect("/stream") as socket:
        got = await closing(socket)
    assert got[0] == code
    assert got[1].startswith(reason)


async def test_streams_end_with_the_daemon(bench: Bench, short_directory: Path) -> None:
    path = str(short_directory / "api.sock")
    server = serve(create(bench.as_service()), path)
    await server.__aenter__()
    async with (
        bench.guest(),
        session_on(path) as client,
        client.ws_connect(CONSOLE) as console,
        client.ws_connect("/v1/events") as events,
        client.get("/v1/events", headers=STREAM) as stream,
        client.get(LOG + "?follow=true") as log,
    ):
        ending = asyncio.create_task(server.__aexit__(None, None, None), name="ending")
        assert (await closing(console))[0] == 1001
        assert (await closing(events))[0] == 1001
        for response in (stream, log):
            with pytest.raises(aiohttp.ClientPayloadError):
                await response.content.read()
        await ending


async def test_a_viewer_that_does_not_read_does_not_keep_the_daemon(bench: Bench, short_directory: Path) -> None:
    path = str(short_directory / "api.sock")
    server = serve(create(bench.as_service(), Limits(farewell_s=0.2, shutdown_s=0.2)), path)
    await server.__aenter__()
    async with bench.guest() as guest, connected(path) as (reader, writer):
        writer.write(request("GET", CONSOLE, headers=HANDSHAKE))
        assert (await answer(reader)).status == 101
        for _ in range(20):
            await guest.prints(b"x" * 65536)
        async with asyncio.timeout(PATIENCE_S):
            await server.__aexit__(None, None, None)
