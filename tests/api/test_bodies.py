"""Bodies and queries as they come over the wire: media types, encodings, sizes, and which problem is named."""

from __future__ import annotations

import gzip
import json
import os
import zlib

import aiohttp
import msgpack
import pytest

from qmpd.views import ErrorBody
from qmpd_api.codec import decode, encode
from qmpd_api.limits import Limits
from qmpd_api.media import Media, of_answer
from tests.api.bench import Bench
from tests.api.conftest import Server
from tests.api.wire import ask, connected, ended, request

DOCUMENT = {"name": "lab", "board": "riscv64-virt"}
BODY = json.dumps(DOCUMENT).encode()


def headers(kind: str, **more: str) -> dict[str, str]:
    return {"Content-Type": kind, **{name.replace("_", "-"): value for name, value in more.items()}}


@pytest.mark.parametrize(
    "kind",
    [
        "application/json",
        "Application/JSON",
        "application/json; charset=utf-8",
        'application/json;charset="UTF-8"',
        "application/json ;foo=bar",
    ],
)
async def test_json_is_taken(socket_path: str, bench: Bench, kind: str) -> None:
    assert (await ask(socket_path, "POST", "/v1/validate", BODY, headers(kind))).status == 200
    assert bench.calls == ["validate lab"]


async def test_msgpack_is_taken_and_answered(client: aiohttp.ClientSession) -> None:
    kind = {"Content-Type": "application/msgpack", "Accept": "application/msgpack"}
    async with client.post("/v1/validate", data=msgpack.packb(DOCUMENT), headers=kind) as reply:
        assert (reply.status, reply.content_type) == (200, "application/msgpack")
        assert msgpack.unpackb(await reply.read())["ok"] is True


@pytest.mark.parametrize(
    "kind",
    [
        "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x",
        "application/xml", "json", "", "application/json2", "*/*",
        "application/json; charset=utf-16", "application/json; charset=latin-1", "application/json; charset=no-such",
    ],
)  # fmt: skip
async def test_another_media_type_is_unsupported(socket_path: str, bench: Bench, kind: str) -> None:
    reply = await ask(socket_path, "POST", "/v1/validate", BODY, headers(kind))
    assert (reply.status, reply.error().code) == (415, "unsupported_media_type")
    assert not bench.calls


async def test_a_body_without_a_media_type_is_unsupported(socket_path: str) -> None:
    bare = f"POST /v1/validate HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(BODY)}\r\nConnection: close\r\n\r\n".encode() + BODY
    async with connected(socket_path) as (reader, writer):
        writer.write(bare)
        assert (await ended(reader)).startswith(b"HTTP/1.1 415 ")


ACCEPTS = {
    "": Media.JSON,
    "*/*": Media.JSON,
    "application/*": Media.JSON,
    "application/msgpack": Media.MSGPACK,
    "application/msgpack;q=0.5, application/json;q=0.4": Media.MSGPACK,
    "application/json, application/msgpack": Media.JSON,
    "application/msgpack, */*;q=0.1": Media.MSGPACK,
    "application/msgpack;q=0": Media.JSON,
    "application/msgpack;q=x": Media.JSON,
    "text/html": Media.JSON,
    ",;,=": Media.JSON,
}


@pytest.mark.parametrize(("accept", "media"), ACCEPTS.items())
def test_the_answer_is_in_what_the_caller_likes_best(accept: str, media: Media) -> None:
    assert of_answer([accept]) is media


async def test_errors_are_in_what_the_caller_likes_best(client: aiohttp.ClientSession) -> None:
    async with client.get("/nowhere", headers={"Accept": "application/msgpack"}) as reply:
        error = decode(await reply.read(), Media.MSGPACK, ErrorBody, Limits())
        assert (reply.status, error.code) == (404, "not_found")


@pytest.mark.parametrize("encoding", ["br", "deflate", "zstd", "compress", "gzip, gzip", "identity, gzip", "x"])
async def test_another_content_encoding_is_unsupported(socket_path: str, encoding: str) -> None:
    reply = await ask(socket_path, "POST", "/v1/validate", BODY, headers("application/json", Content_Encoding=encoding))
    assert (reply.status, reply.error().code) == (415, "unsupported_media_type")


async def test_gzip_is_taken(socket_path: str) -> None:
    reply = await ask(socket_path, "POST", "/v1/validate", gzip.compress(BODY), headers("application/json", Content_Encoding="gzip"))
    assert reply.status == 200


BROKEN_GZIP = {
    "not gzip": BODY,
    "truncated": gzip.compress(BODY)[:-4],
    "followed by more": gzip.compress(BODY) + b"x",
    "two members": gzip.compress(BODY) * 2,
    "zlib": zlib.compress(BODY),
    "wrong checksum": gzip.compress(BODY)[:-8] + b"\0" * 8,
}


@pytest.mark.parametrize("body", BROKEN_GZIP.values(), ids=BROKEN_GZIP)
async def test_broken_gzip_is_undecodable(socket_path: str, body: bytes) -> None:
    reply = await ask(socket_path, "POST", "/v1/validate", body, headers("application/json", Content_Encoding="gzip"))
    assert (reply.status, reply.error().code) == (400, "undecodable")


async def test_a_gzip_bomb_is_too_large(socket_path: str) -> None:
    packer = zlib.compressobj(wbits=31)
    bomb = b"".join(packer.compress(b" " * (1 << 20)) for _ in range(100)) + packer.flush()
    reply = await ask(socket_path, "POST", "/v1/validate", bomb, headers("application/json", Content_Encoding="gzip"))
    assert (reply.status, reply.error().code) == (413, "too_large")


async def test_a_body_that_announces_too_much_is_not_read(start_server: Server) -> None:
    async with connected(await start_server(Limits(lingering_s=0.1))) as (reader, writer):
        writer.write(request("POST", "/v1/validate", headers={"Content-Length": str(1 << 40), "Content-Type": "application/json"}))
        assert (await ended(reader)).startswith(b"HTTP/1.1 413 ")


async def test_a_chunked_body_over_the_cap_is_cut_off(start_server: Server) -> None:
    async with connected(await start_server(Limits(lingering_s=0.1))) as (reader, writer):
        writer.write(request("POST", "/v1/validate", headers={"Transfer-Encoding": "chunked", "Content-Type": "application/json"}))
        chunk = b"10000\r\n" + b" " * 65536 + b"\r\n"
        for _ in range(20):
            writer.write(chunk)
        assert (await ended(reader)).startswith(b"HTTP/1.1 413 ")


async def test_a_body_at_the_cap_is_read(socket_path: str) -> None:
    body = BODY + b" " * (Limits().body_bytes - len(BODY))
    assert (await ask(socket_path, "POST", "/v1/validate", body)).status == 200


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'{"name":"lab","name":"lab","board":"b"}', b'{"name":NaN}'])
async def test_what_is_no_document_is_undecodable(socket_path: str, body: bytes) -> None:
    reply = await ask(socket_path, "POST", "/v1/validate", body, headers("application/json"))
    assert (reply.status, reply.error().code) == (400, "undecodable")


async def test_an_invalid_document_is_answered_with_paths(socket_path: str) -> None:
    document = {**DOCUMENT, "disks": [{"kind": "image", "path": 1, "format": "raw"}]}
    reply = await ask(socket_path, "POST", "/v1/validate", json.dumps(document).encode())
    assert (reply.status, reply.error().code) == (422, "invalid")
    assert reply.error().details == {"problems": [{"path": "$.disks[0].path", "message": "Expected `str`, got `int`"}]}


@pytest.mark.parametrize(("method", "target"), [("GET", "/v1/version"), ("DELETE", "/v1/machines/lab")])
async def test_a_request_without_a_body_refuses_one(socket_path: str, method: str, target: str) -> None:
    assert (await ask(socket_path, method, target, b"{}")).status == 400


@pytest.mark.parametrize("body", [b"", b"{}"])
async def test_a_verb_without_arguments_takes_none_or_an_empty_map(socket_path: str, bench: Bench, body: bytes) -> None:
    bench.fill(1)
    assert (await ask(socket_path, "POST", "/v1/machines/machine-0000/kill", body)).status == 200


async def test_a_verb_without_arguments_refuses_some(socket_path: str, bench: Bench) -> None:
    reply = await ask(socket_path, "POST", "/v1/machines/lab/kill", b'{"force":true}')
    assert (reply.status, reply.error().code) == (422, "invalid")
    assert not bench.calls


QUERIES = {
    "/v1/events?since=-1": ["?since"],
    "/v1/events?since=x": ["?since"],
    "/v1/events?since=": ["?since"],
    "/v1/events?since=1&since=2": ["?since"],
    "/v1/events?since=9223372036854775808": ["?since"],
    "/v1/events?since=" + "9" * 5000: ["?since"],
    "/v1/events?since=1e400": ["?since"],
    "/v1/events?limit=0": ["?limit"],
    "/v1/events?limit=1001": ["?limit"],
    "/v1/events?machine=A": ["?machine"],
    "/v1/events?colour=red": ["?colour"],
    "/v1/events?since=x&limit=0&colour=red": ["?colour", "?since", "?limit"],
    "/v1/machines?state=flying": ["?state"],
    "/v1/machines?label=novalue": ["?label"],
    "/v1/machines?label=a=%ef%bf%bf": ["?label"],
    "/v1/machines?%1b[31m=1": [r"?\x1b[31m"],
    "/v1/machines/lab/wait": ["?state"],
    "/v1/machines/lab/wait?state=running&timeout_s=nan": ["?timeout_s"],
    "/v1/machines/lab/wait?state=running&timeout_s=inf": ["?timeout_s"],
    "/v1/machines/lab/wait?state=running&timeout_s=3601": ["?timeout_s"],
    "/v1/machines/lab/log?follow=maybe": ["?follow"],
    "/v1/machines/lab/log?port=4": ["?port"],
    "/v1/machines/lab/log?since=1": ["?since"],
    "/v1/version?pretty=true": ["?pretty"],
}


@pytest.mark.parametrize(("target", "paths"), QUERIES.items())
async def test_a_wrong_parameter_is_named(socket_path: str, target: str, paths: list[str]) -> None:
    reply = await ask(socket_path, "GET", target)
    assert (reply.status, reply.error().code) == (422, "invalid")
    problems = reply.error().details["problems"]
    assert isinstance(problems, list)
    assert [problem["path"] for problem in problems] == paths


async def test_labels_and_states_select(socket_path: str, bench: Bench) -> None:
    await ask(socket_path, "GET", "/v1/machines?label=rack=1=2&label=role=&state=running")
    assert bench.calls == ["machines {'rack': '1=2', 'role': ''} running"]


@pytest.mark.parametrize("text", ["1", "*", 'W/"1"', '"x"', '"01"', '""', '"1", "2"', '"-1"', '"' + "9" * 30 + '"'])
async def test_only_one_quoted_revision_is_a_match(socket_path: str, bench: Bench, text: str) -> None:
    reply = await ask(socket_path, "PUT", "/v1/machines/lab", BODY, {"If-Match": text})
    assert (reply.status, reply.error().code) == (422, "invalid")
    assert not bench.calls


async def test_replacing_needs_a_revision(socket_path: str, bench: Bench) -> None:
    reply = await ask(socket_path, "PUT", "/v1/machines/lab", BODY)
    assert (reply.status, reply.error().code) == (428, "revision_required")
    assert not bench.calls


async def test_a_machine_keeps_its_name(socket_path: str, bench: Bench) -> None:
    reply = await ask(socket_path, "PUT", "/v1/machines/other", BODY, {"If-Match": '"1"'})
    assert (reply.status, reply.error().code) == (422, "invalid")
    assert not bench.calls


async def test_the_answer_to_one_machine_carries_its_revision(client: aiohttp.ClientSession, bench: Bench) -> None:
    async with client.post("/v1/machines", json=DOCUMENT) as created:
        assert created.status == 201
        assert created.headers["ETag"] == '"7"'
        assert created.headers["Location"] == "/v1/machines/lab"
    async with client.get("/v1/machines/lab") as got:
        assert got.headers["ETag"] == '"7"'
    async with client.put("/v1/machines/lab", json=DOCUMENT, headers={"If-Match": '"7"'}) as replaced:
        assert (replaced.status, replaced.headers["ETag"]) == (200, '"7"')
    async with client.delete("/v1/machines/lab", headers={"If-Match": '"7"'}) as deleted:
        assert (deleted.status, await deleted.read()) == (204, b"")
    assert bench.calls == ["create lab", "replace lab 7", "delete lab 7"]


async def test_a_wrong_state_is_a_conflict_that_names_it(socket_path: str) -> None:
    reply = await ask(socket_path, "POST", "/v1/machines/lab/start")
    assert (reply.status, reply.error().code) == (409, "wrong_state")
    assert reply.error().details == {"state": "running", "allowed": ["stopped"]}


async def test_the_caller_is_who_the_kernel_says(socket_path: str, bench: Bench) -> None:
    reply = await ask(socket_path, "POST", "/v1/machines/lab/qmp", b'{"execute":"query-status","arguments":{"a":[1]}}')
    assert json.loads(reply.body) == {"return": {"text": "a?b", "arguments": {"a": [1]}}}
    (caller,) = bench.callers
    assert (caller.uid, caller.gid, caller.pid) == (os.getuid(), os.getgid(), os.getpid())
    assert caller.user


async def test_a_thousand_machines_are_one_answer(client: aiohttp.ClientSession, bench: Bench) -> None:
    bench.fill(1000)
    async with client.get("/v1/machines") as reply:
        assert len((await reply.json())["machines"]) == 1000


async def test_metrics_are_prometheus_text(client: aiohttp.ClientSession) -> None:
    async with client.get("/metrics") as reply:
        assert reply.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
        assert await reply.read() == b"qmpd_machines 0\n"


def test_what_is_encoded_does_not_depend_on_our_types() -> None:
    assert encode(ErrorBody(code="a", message="b", details={"path": object}), Media.JSON).startswith(b'{"code":"a"')
