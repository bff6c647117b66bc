"""Clients that are slow, silent or many."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import aiohttp
import pytest

from qmpd_api.limits import Limits
from tests.api.bench import Bench
from tests.api.conftest import Server
from tests.api.wire import PATIENCE_S, answer, ask, connected, ended, request, until_there_is_room

BODY = b'{"name":"lab","board":"riscv64-virt"}'
#: Long enough for a loaded host to send three bytes, short enough to wait for.
SHORT_S = 0.3


async def test_a_head_that_comes_too_slowly_is_refused(start_server: Server) -> None:
    async with connected(await start_server(Limits(head_s=SHORT_S))) as (reader, writer):
        writer.write(b"GET /v1/version HTTP/1.1\r\nHost: local")
        reply = await answer(reader)
        assert (reply.status, reply.error().code) == (408, "request_timeout")
        assert await ended(reader) == b""


async def test_a_second_head_is_timed_like_the_first(start_server: Server) -> None:
    async with connected(await start_server(Limits(head_s=SHORT_S))) as (reader, writer):
        writer.write(request("GET", "/v1/version"))
        assert (await answer(reader)).status == 200
        writer.write(b"GET /v1/ver")
        assert (await answer(reader)).status == 408


async def test_a_body_that_comes_too_slowly_is_refused(start_server: Server, bench: Bench) -> None:
    async with connected(await start_server(Limits(body_s=SHORT_S, lingering_s=0.1))) as (reader, writer):
        headers = {"Content-Length": str(len(BODY)), "Content-Type": "application/json"}
        writer.write(request("POST", "/v1/validate", headers=headers) + BODY[:5])
        reply = await answer(reader)
        assert (reply.status, reply.error().code) == (408, "request_timeout")
        assert await ended(reader) == b""
    assert not bench.calls


@pytest.mark.parametrize("requests", [0, 1])
async def test_an_idle_connection_is_closed(start_server: Server, requests: int) -> None:
    async with connected(await start_server(Limits(idle_s=SHORT_S))) as (reader, writer):
        for _ in range(requests):
            writer.write(request("GET", "/v1/version"))
            await answer(reader)
        assert await ended(reader) == b""


async def test_a_request_may_take_longer_than_an_idle_connection(start_server: Server, bench: Bench) -> None:
    bench.gate.clear()
    path = await start_server(Limits(idle_s=SHORT_S, head_s=SHORT_S))
    async with connected(path) as (reader, writer), connected(path) as (idle, _):
        writer.write(request("POST", "/v1/machines", BODY))
        await ended(idle)
        bench.gate.set()
        assert (await answer(reader)).status == 201


async def test_a_reader_that_stops_reading_is_cut(start_server: Server, bench: Bench) -> None:
    bench.fill(5000)
    path = await start_server(Limits(stall_s=SHORT_S, connections_per_peer=1))
    async with connected(path) as (reader, writer):
        writer.write(request("GET", "/v1/machines"))
        await until_there_is_room(path)
        head, _, body = (await ended(reader)).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ")
    assert f"content-length: {len(body)}" not in head.decode().lower()


async def test_one_user_cannot_take_all_connections(start_server: Server) -> None:
    path = await start_server(Limits(connections_per_peer=3))
    async with AsyncExitStack() as stack:
        welcome = [await stack.enter_async_context(connected(path)) for _ in range(3)]
        for reader, writer in welcome:
            writer.write(request("GET", "/v1/version"))
            assert (await answer(reader)).status == 200
        refused, _ = await stack.enter_async_context(connected(path))
        reply = await answer(refused)
        assert (reply.status, reply.error().code, reply.headers["retry-after"]) == (429, "too_many_requests", "1")
        assert await ended(refused) == b""
        reader, writer = welcome[0]
        writer.write(request("GET", "/v1/version", headers={"Connection": "close"}))
        assert (await answer(reader)).status == 200
        await ended(reader)
        again, writer = await stack.enter_async_context(connected(path))
        writer.write(request("GET", "/v1/version"))
        assert (await answer(again)).status == 200


async def test_many_silent_connections_are_refused_or_end(start_server: Server) -> None:
    path = await start_server(Limits(connections_per_peer=50, idle_s=6.0))
    async with AsyncExitStack() as stack:
        silent = [await stack.enter_async_context(connected(path)) for _ in range(200)]
        outcomes = await asyncio.gather(*(ended(reader) for reader, _ in silent))
    assert sum(b" 429 " in outcome for outcome in outcomes) == 150
    assert (await ask(path, "GET", "/v1/version")).status == 200


async def test_many_creations_at_once_are_mostly_told_to_come_back(start_server: Server, bench: Bench) -> None:
    bench.gate.clear()
    path = await start_server(Limits(changes=8, connections_per_peer=400))
    connector = aiohttp.UnixConnector(path, limit=0)
    async with aiohttp.ClientSession("http://localhost", connector=connector) as session:

        async def create(index: int) -> int:
            async with session.post("/v1/machines", json={"name": f"m{index}", "board": "riscv64-virt"}) as reply:
                if reply.status == 429:
                    assert reply.headers["Retry-After"] == "1"
                return reply.status

        waiting = [asyncio.create_task(create(index), name=f"create-{index}") for index in range(300)]
        refused = asyncio.as_completed(waiting, timeout=PATIENCE_S)
        assert {await next(refused) for _ in range(292)} == {429}
        assert len(bench.calls) == 8
        async with session.get("/v1/machines") as reply:
            assert reply.status == 200
        bench.fill(1)
        async with session.post("/v1/machines/machine-0000/kill") as reply:
            assert reply.status == 200, "kill must work when nothing else does"
        bench.gate.set()
        assert sorted(await asyncio.gather(*waiting)) == [201] * 8 + [429] * 292
