"""Consoles and logs as they are streamed."""

from __future__ import annotations

import asyncio
import contextlib
import os
from pathlib import Path

import aiohttp
import msgpack
import msgspec
import pytest

from qmpd_api.limits import Limits
from qmpd_api.streams import CONSOLE_PROTOCOL, ConsoleFrame
from tests.api.bench import Bench
from tests.api.conftest import Server
from tests.api.wire import HANDSHAKE, PATIENCE_S, answer, ask, closing, connected, ended, request, session_on, until_there_is_room

CONSOLE = "/v1/machines/lab/console"
LOG = "/v1/machines/lab/log"


async def frame(socket: aiohttp.ClientWebSocketResponse) -> ConsoleFrame:
    return msgspec.msgpack.decode(await socket.receive_bytes(timeout=PATIENCE_S), type=ConsoleFrame)


async def test_a_framed_console_goes_both_ways(client: aiohttp.ClientSession, bench: Bench) -> None:
    async with bench.guest() as guest:
        await guest.prints(b"before ")
        await until_printed(bench, 7)
        async with client.ws_connect(CONSOLE, protocols=[CONSOLE_PROTOCOL]) as socket:
            assert socket.protocol == CONSOLE_PROTOCOL
            assert await frame(socket) == ConsoleFrame(kind="hello", offset=7)
            await guest.prints(b"\xff\x00now")
            assert await frame(socket) == ConsoleFrame(kind="output", offset=7, data=b"\xff\x00now")
            await socket.send_bytes(msgpack.packb({"kind": "input", "data": b"ls\r"}))
            assert await guest.reads(3) == b"ls\r"


async def until_printed(bench: Bench, count: int) -> None:
    """Returns when the daemon has seen so many bytes."""
    async with asyncio.timeout(PATIENCE_S):
        async for offset, data in bench.port.follow(0):
            if offset + len(data) >= count and bench.port.end >= count:
                return


async def test_a_console_ends_with_its_machine(client: aiohttp.ClientSession, bench: Bench) -> None:
    async with bench.guest() as guest:
        await guest.prints(b"bye")
        socket = await client.ws_connect(CONSOLE + "?since=0", protocols=[CONSOLE_PROTOCOL])
        assert [(await frame(socket)).kind for _ in range(2)] == ["hello", "output"]
    assert await frame(socket) == ConsoleFrame(kind="ended", offset=3)
    assert await closing(socket) == (1000, "the machine stopped")


async def test_a_stopped_machine_still_shows_its_log(client: aiohttp.ClientSession, bench: Bench) -> None:
    await printed(bench, b"0123456789")
    async with client.ws_connect(CONSOLE + "?scrollback=4", protocols=[CONSOLE_PROTOCOL]) as socket:
        frames = [await frame(socket) for _ in range(3)]
    assert frames == [
        ConsoleFrame(kind="hello", offset=6),
        ConsoleFrame(kind="output", offset=6, data=b"6789"),
        ConsoleFrame(kind="ended", offset=10),
    ]


async def printed(bench: Bench, data: bytes) -> None:
    """A log that an earlier run left."""
    await asyncio.to_thread(bench.log.write_bytes, data)
    await bench.port.load()


async def test_output_that_is_gone_is_announced(client: aiohttp.ClientSession, bench: Bench) -> None:
    await asyncio.to_thread(sparse, bench.log)
    await bench.port.load()
    async with client.ws_connect(CONSOLE + "?since=10", protocols=[CONSOLE_PROTOCOL]) as socket:
        frames = [await frame(socket) for _ in range(3)]
    assert frames[:2] == [ConsoleFrame(kind="hello", offset=10), ConsoleFrame(kind="dropped", offset=1 << 20)]
    assert frames[2].offset == 1 << 20
    assert frames[2].data.endswith(b"kept")


def sparse(path: Path) -> None:
    with path.open("wb") as log:
        os.truncate(log.fileno(), 1 << 20)
        log.seek(1 << 20)
        log.write(b"kept")


async def test_a_plain_console_is_bytes_both_ways(client: aiohttp.ClientSession, bench: Bench) -> None:
    async with bench.guest() as guest, client.ws_connect(CONSOLE) as socket:
        assert socket.protocol is None
        await guest.prints(b"login: ")
        assert await socket.receive_bytes(timeout=PATIENCE_S) == b"login: "
        await socket.send_bytes(b"root\r")
        assert await guest.reads(5) == b"root\r"


BAD_MESSAGES = {
    "text on a binary channel": ("hello", 1003),
    "not msgpack": (b"\xc1", 1007),
    "not a frame": (msgpack.packb([1]), 1007),
    "no kind": (msgpack.packb({"data": b""}), 1007),
    "text as data": (msgpack.packb({"kind": "input", "data": "ls"}), 1007),
    "too large": (msgpack.packb({"kind": "input", "data": b"x" * (5 << 20)}), 1009),
}


@pytest.mark.parametrize(("message", "code"), BAD_MESSAGES.values(), ids=BAD_MESSAGES)
async def test_a_message_that_is_no_frame_ends_the_console(
    client: aiohttp.ClientSession, bench: Bench, message: str | bytes, code: int
) -> None:
    async with bench.guest(), client.ws_connect(CONSOLE, protocols=[CONSOLE_PROTOCOL]) as socket:
        try:
            await (socket.send_str(message) if isinstance(message, str) else socket.send_bytes(message))
        except ConnectionError:
            assert code == 1009  # the server closed before it had read everything
        assert (await closing(socket))[0] in {code, 1006 if code == 1009 else code}


async def test_invalid_utf_8_ends_the_console(socket_path: str, bench: Bench) -> None:
    async with bench.guest(), connected(socket_path) as (reader, writer):
        writer.write(request("GET", CONSOLE, headers=HANDSHAKE))
        assert (await answer(reader)).status == 101
        writer.write(b"\x81\x82\0\0\0\0\xff\xfe")
        frame_sent = await ended(reader)
    # An unmasked close frame: 0x88, the length, the code.
    assert frame_sent[0] == 0x88
    assert int.from_bytes(frame_sent[2:4], "big") == 1007


@pytest.mark.parametrize(
    "odd", [{"kind": "resize", "columns": 0, "rows": 10**6}, {"kind": "input"}, {"kind": "input", "data": b""}, {"kind": ""}]
)
async def test_frames_that_type_nothing_are_ignored(client: aiohttp.ClientSession, bench: Bench, odd: dict[str, object]) -> None:
    async with bench.guest() as guest, client.ws_connect(CONSOLE, protocols=[CONSOLE_PROTOCOL]) as socket:
        await socket.send_bytes(msgpack.packb(odd))
        await socket.send_bytes(msgpack.packb({"kind": "input", "data": b"x"}))
        assert await guest.reads(1) == b"x"


async def test_typing_into_a_stopped_machine_ends_the_console(client: aiohttp.ClientSession, bench: Bench) -> None:
    async with bench.guest():
        socket = await client.ws_connect(CONSOLE)
    with contextlib.suppress(aiohttp.ClientConnectionResetError):  # the daemon may have closed it already
        await socket.send_bytes(b"x")
    code, _ = await closing(socket)
    assert code in {1000, 1011}


@pytest.mark.parametrize("path", [CONSOLE, "/v1/events"])
async def test_an_unknown_subprotocol_is_refused_at_once(client: aiohttp.ClientSession, path: str) -> None:
    with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
        await client.ws_connect(path, protocols=["chat", "superchat"])
    assert caught.value.status == 400


BAD_HANDSHAKES = {
    "no upgrade": ({}, 426),
    "another upgrade": ({"Upgrade": "h2c", "Connection": "Upgrade"}, 426),
    "no connection header": ({**HANDSHAKE, "Connection": "close"}, 400),
    "old version": ({**HANDSHAKE, "Sec-WebSocket-Version": "6"}, 400),
    "no key": ({name: value for name, value in HANDSHAKE.items() if "Key" not in name}, 400),
    "bad key": ({**HANDSHAKE, "Sec-WebSocket-Key": "short"}, 400),
    "key that is not base64": ({**HANDSHAKE, "Sec-WebSocket-Key": "\u00e4" * 24}, 400),
}


@pytest.mark.parametrize(("headers", "status"), BAD_HANDSHAKES.values(), ids=BAD_HANDSHAKES)
async def test_a_bad_handshake_is_refused(socket_path: str, headers: dict[str, str], status: int) -> None:
    reply = await ask(socket_path, "GET", CONSOLE, headers=headers)
    assert reply.status == status
    assert reply.error().code == ("upgrade_required" if status == 426 else "undecodable")


@pytest.mark.parametrize("query", ["since=1", "since=0&scrollback=0", "port=1"])
async def test_a_console_that_cannot_begin_is_refused_before_it_opens(socket_path: str, query: str) -> None:
    reply = await ask(socket_path, "GET", f"{CONSOLE}?{query}", headers=HANDSHAKE)
    assert reply.status in {404, 422}


async def test_a_viewer_that_stops_reading_is_cut_and_the_others_are_not(start_server: Server, bench: Bench) -> None:
    path = await start_server(Limits(reader_s=1.0, farewell_s=0.2, stall_s=2.0, connections_per_peer=2))
    flood = b"x" * 65536
    async with (
        bench.guest() as guest,
        session_on(path) as session,
        session.ws_connect(CONSOLE) as other,
        connected(path) as (reader, writer),
    ):
        writer.write(request("GET", CONSOLE, headers=HANDSHAKE))
        assert (await answer(reader)).status == 101
        received = 0
        for _ in range(40):
            await guest.prints(flood)
        while received < 40 * len(flood):
            received += len(await other.receive_bytes(timeout=PATIENCE_S))
        await until_there_is_room(path)
        assert len(await ended(reader)) < 40 * len(flood)
        await guest.prints(b"still here")
        assert await other.receive_bytes(timeout=PATIENCE_S) == b"still here"


async def test_the_log_is_what_was_printed(client: aiohttp.ClientSession, bench: Bench) -> None:
    await printed(bench, b"0123456789")
    for query, body in {"": b"0123456789", "?since=4": b"456789", "?since=4&limit=2": b"45", "?since=10": b"", "?limit=0": b""}.items():
        async with client.get(LOG + query) as reply:
            assert (reply.status, reply.content_type) == (200, "application/octet-stream")
            assert await reply.read() == body
            assert (reply.headers["X-Qmpd-Console-Start"], reply.headers["X-Qmpd-Console-End"]) == ("0", "10")


async def test_a_followed_log_goes_on_until_the_machine_stops(client: aiohttp.ClientSession, bench: Bench) -> None:
    async with bench.guest() as guest:
        await guest.prints(b"one ")
        reply = await client.get(LOG + "?follow=true")
        assert await reply.content.readany() == b"one "
        await guest.prints(b"two")
        assert await reply.content.readany() == b"two"
    async with reply:
        assert await reply.content.read() == b""


async def test_a_followed_log_has_a_limit_too(client: aiohttp.ClientSession, bench: Bench) -> None:
    async with bench.guest() as guest:
        await guest.prints(b"0123456789")
        async with client.get(LOG + "?follow=true&limit=4") as reply:
            assert await reply.read() == b"0123"


async def test_a_reader_of_the_log_that_stops_is_cut(start_server: Server, bench: Bench) -> None:
    await printed(bench, b"x" * (4 << 20))
    path = await start_server(Limits(reader_s=0.2, stall_s=0.5, connections_per_peer=1))
    async with connected(path) as (reader, writer):
        writer.write(request("GET", LOG))
        await until_there_is_room(path)
        body = await ended(reader)
    assert not body.endswith(b"0\r\n\r\n")
    assert len(body) < 4 << 20
