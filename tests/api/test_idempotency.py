"""A client that asks twice with the same key."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from qmpd_api.application import create
from qmpd_api.server import serve
from tests.api.bench import Bench, opened_bench
from tests.api.wire import Reply, ask

KEY = "5b2f6a0e-7a52-4c1c-9f33-6a7a0f1c2d3e"


def body(name: str = "lab") -> bytes:
    return json.dumps({"name": name, "board": "riscv64-virt"}).encode()


async def post(path: str, data: bytes = body(), key: str = KEY, target: str = "/v1/machines", **headers: str) -> Reply:
    return await ask(path, "POST", target, data, {"Idempotency-Key": key, **headers})


def said(reply: Reply) -> tuple[int, bytes, str | None]:
    return reply.status, reply.body, reply.headers.get("location")


async def test_the_second_request_gets_the_first_answer(socket_path: str, bench: Bench) -> None:
    first, second = await post(socket_path), await post(socket_path)
    assert first.status == 201
    assert said(first) == said(second)
    assert bench.calls == ["create lab"]


async def test_without_a_key_the_second_request_is_a_conflict(socket_path: str) -> None:
    assert (await ask(socket_path, "POST", "/v1/machines", body())).status == 201
    assert (await ask(socket_path, "POST", "/v1/machines", body())).status == 409


@pytest.mark.parametrize(
    ("data", "target"), [(body("other"), "/v1/machines"), (body(), "/v1/machines?start=true"), (body(), "/v1/validate")]
)
async def test_the_same_key_for_another_request_is_invalid(socket_path: str, bench: Bench, data: bytes, target: str) -> None:
    await post(socket_path)
    reply = await post(socket_path, data, target=target)
    assert (reply.status, reply.error().code) == (422, "invalid")
    assert bench.calls == ["create lab"]


async def test_requests_at_the_same_time_have_one_effect(socket_path: str, bench: Bench) -> None:
    bench.gate.clear()
    async with asyncio.TaskGroup() as group:
        posts = [group.create_task(post(socket_path), name=f"post-{index}") for index in range(5)]
        other = group.create_task(post(socket_path, body("other")), name="post-other")
        await asyncio.wait({other})
        bench.gate.set()
    assert other.result().status == 422
    assert len({said(task.result()) for task in posts}) == 1
    assert bench.calls == ["create lab"]


async def test_an_error_is_an_answer_too(socket_path: str, bench: Bench) -> None:
    for _ in range(2):
        reply = await post(socket_path, b"{}", target="/v1/machines/lab/start")
        assert (reply.status, reply.error().code) == (409, "wrong_state")
    assert bench.calls == ["start lab False"]


async def test_an_answer_outlives_the_daemon(short_directory: Path) -> None:
    path = str(short_directory / "api.sock")
    async with opened_bench(short_directory) as bench, serve(create(bench.as_service()), path):
        first = await post(path)
    async with opened_bench(short_directory) as bench, serve(create(bench.as_service()), path):
        second = await post(path)
        assert bench.calls == []
    assert said(first) == said(second)


async def test_an_answer_that_is_too_large_to_keep_is_given_all_the_same(socket_path: str, bench: Bench) -> None:
    data = json.dumps({"execute": "echo", "arguments": {"text": "x" * ((1 << 20) - 100)}}).encode()
    for _ in range(2):
        assert (await post(socket_path, data, target="/v1/machines/lab/qmp")).status == 200
    assert bench.calls == ["qmp lab echo"] * 2


async def test_a_bug_is_not_kept(socket_path: str, bench: Bench) -> None:
    bench.bug = ZeroDivisionError()
    assert (await post(socket_path)).status == 500
    bench.bug = None
    assert (await post(socket_path)).status == 201


@pytest.mark.parametrize("key", ["", " ", "x" * 201, "a\tb", "schl\u00fcssel"])
async def test_a_key_is_short_and_printable(socket_path: str, bench: Bench, key: str) -> None:
    reply = await post(socket_path, key=key)
    assert (reply.status, reply.error().code) == (422, "invalid")
    assert not bench.calls


async def test_a_key_on_a_request_that_changes_nothing_is_ignored(socket_path: str) -> None:
    for _ in range(2):
        assert (await ask(socket_path, "GET", "/v1/version", headers={"Idempotency-Key": KEY})).status == 200
