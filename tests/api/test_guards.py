"""What a request must look like before anybody looks at what it asks for."""

from __future__ import annotations

import logging

import aiohttp
import pytest

from qmpd_api.limits import Limits
from tests.api.bench import Bench
from tests.api.conftest import Server
from tests.api.wire import ask, connected, ended, exchange, request

BODY = b'{"name":"lab","board":"riscv64-virt"}'


@pytest.mark.parametrize("host", ["localhost", "qmpd", "LOCALHOST", "localhost:8080", "qmpd:1"])
async def test_our_own_names_are_answered(socket_path: str, host: str) -> None:
    assert (await ask(socket_path, "GET", "/v1/version", headers={"Host": host})).status == 200


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "127.0.0.1", "localhost@evil", "[::1]", "localhost:x", "a b"])
async def test_somebody_elses_host_is_misdirected(socket_path: str, host: str) -> None:
    reply = await ask(socket_path, "GET", "/v1/version", headers={"Host": host})
    assert (reply.status, reply.error().code) == (421, "misdirected")


async def test_a_missing_host_is_undecodable(socket_path: str) -> None:
    reply = await exchange(socket_path, b"GET /v1/version HTTP/1.1\r\n\r\n")
    assert (reply.status, reply.error().code) == (400, "undecodable")


async def test_an_empty_host_is_undecodable(socket_path: str) -> None:
    assert (await ask(socket_path, "GET", "/v1/version", headers={"Host": ""})).status == 400


async def test_two_hosts_are_undecodable(socket_path: str) -> None:
    reply = await exchange(socket_path, b"GET /v1/version HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n")
    assert (reply.status, reply.error().code) == (400, "undecodable")


async def test_an_absolute_target_cannot_hide_another_host(socket_path: str) -> None:
    assert (await ask(socket_path, "GET", "http://evil.example/v1/version")).status == 421


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://localhost", "http://localhost:8080", ""])
@pytest.mark.parametrize(("method", "target"), [("GET", "/v1/version"), ("POST", "/v1/machines"), ("GET", "/nowhere")])
async def test_a_web_page_is_refused(socket_path: str, bench: Bench, method: str, target: str, origin: str) -> None:
    reply = await ask(socket_path, method, target, BODY if method == "POST" else b"", {"Origin": origin})
    assert (reply.status, reply.error().code) == (403, "forbidden")
    assert not bench.calls


@pytest.mark.parametrize("path", ["/v1/events", "/v1/machines/lab/console"])
async def test_a_web_page_gets_no_websocket(client: aiohttp.ClientSession, path: str) -> None:
    with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
        await client.ws_connect(path, origin="https://evil.example")
    assert caught.value.status == 403


async def test_a_page_that_was_allowed_is_answered(start_server: Server) -> None:
    path = await start_server(Limits(origins=frozenset({"https://lab.example"})))
    assert (await ask(path, "GET", "/v1/version", headers={"Origin": "https://lab.example"})).status == 200
    assert (await ask(path, "GET", "/v1/version", headers={"Origin": "https://lab.example.evil"})).status == 403


SEGMENTS = ["a%2Fb", "..%2f..%2fetc", "%00", "a%00", "%0d%0a", "a%0a", "%1b[31m", "%e2%80%ae", "A", "-a", "a" * 64, "%ff", "a%20b", "a_b"]


@pytest.mark.parametrize("segment", SEGMENTS)
@pytest.mark.parametrize("suffix", ["", "/definition", "/console", "/log"])
async def test_a_path_that_names_no_machine_is_not_found(socket_path: str, segment: str, suffix: str) -> None:
    reply = await ask(socket_path, "GET", f"/v1/machines/{segment}{suffix}")
    assert (reply.status, reply.error().code) == (404, "not_found")
    assert reply.error().message.isprintable()


@pytest.mark.parametrize("target", ["/", "/v1", "/v1/", "/v2/version", "/v1/version/", "//v1/version", "/v1/../metrics", "*", "/%"])
async def test_an_unknown_path_is_not_found_in_the_one_shape(socket_path: str, target: str) -> None:
    reply = await ask(socket_path, "GET", target)
    assert reply.status in {400, 404}
    assert reply.error().code in {"not_found", "undecodable"}


@pytest.mark.parametrize("method", ["PUT", "PATCH", "DELETE", "TRACE", "PROPFIND"])
async def test_a_method_that_is_not_there_names_those_that_are(socket_path: str, method: str) -> None:
    reply = await ask(socket_path, method, "/v1/machines")
    assert (reply.status, reply.error().code) == (405, "method_not_allowed")
    assert reply.headers["allow"] == "GET, HEAD, POST"
    assert reply.error().details == {"allowed": ["GET", "HEAD", "POST"]}


async def test_options_says_what_is_there_and_allows_no_page(socket_path: str) -> None:
    reply = await ask(socket_path, "OPTIONS", "/v1/machines")
    assert (reply.status, reply.headers["allow"], reply.body) == (204, "GET, HEAD, POST", b"")
    assert not [name for name in reply.headers if name.startswith("access-control")]


async def test_head_is_get_without_the_body(client: aiohttp.ClientSession) -> None:
    async with client.get("/v1/version") as got, client.head("/v1/version") as head:
        assert head.status == 200
        assert await head.read() == b""
        assert head.headers["Content-Length"] == got.headers["Content-Length"]


async def test_every_response_says_that_it_is_data(socket_path: str) -> None:
    for target in ("/v1/version", "/nowhere", "/metrics"):
        reply = await ask(socket_path, "GET", target)
        assert reply.headers["x-content-type-options"] == "nosniff"
        assert reply.headers["cache-control"] == "no-store"
        assert reply.headers["server"] == "qmpd"


GARBAGE = {
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 64,
    "words": b"hello there\r\n\r\n",
    "no version": b"GET /v1/version\r\n\r\n",
    "length and chunks": request("POST", "/v1/validate", headers={"Content-Length": "5", "Transfer-Encoding": "chunked"}) + b"0\r\n\r\n",
    "two lengths": b"POST /v1/validate HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
    "negative length": request("POST", "/v1/validate", headers={"Content-Length": "-1"}),
    "folded header": b"GET /v1/version HTTP/1.1\r\nHost: localhost\r\n folded\r\n\r\n",
    "NUL in a header": b"GET /v1/version HTTP/1.1\r\nHost: localhost\r\nX: a\0b\r\n\r\n",
    "a long target": request("GET", "/v1/machines?label=a=" + "x" * 9000),
    "a long header": request("GET", "/v1/version", headers={"X-Long": "x" * 9000}),
    "many headers": request("GET", "/v1/version", headers={f"X-{i}": "x" for i in range(500)}),
}


@pytest.mark.parametrize("garbage", GARBAGE.values(), ids=GARBAGE)
async def test_what_is_not_http_is_refused_and_the_connection_closed(
    socket_path: str, garbage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async with connected(socket_path) as (reader, writer):
        writer.write(garbage)
        head, _, body = (await ended(reader)).partition(b"\r\n\r\n")
    assert head[8:13] == b" 400 "
    assert b'"code":"undecodable"' in body
    assert not [record for record in caplog.records if record.exc_info]


async def test_chunks_that_are_broken_are_undecodable(socket_path: str) -> None:
    async with connected(socket_path) as (reader, writer):
        writer.write(request("POST", "/v1/validate", headers={"Transfer-Encoding": "chunked", "Content-Type": "application/json"}))
        writer.write(b"zz\r\n{}\r\n0\r\n\r\n")
        assert b" 400 " in await reader.readline()


async def test_an_unknown_expectation_is_refused(socket_path: str) -> None:
    reply = await ask(socket_path, "POST", "/v1/validate", BODY, {"Expect": "a-miracle"})
    assert (reply.status, reply.error().code) == (400, "undecodable")


async def test_a_client_that_asks_first_is_told_that_its_body_is_too_large(socket_path: str) -> None:
    headers = {"Expect": "100-continue", "Content-Length": str(1 << 30)}
    assert (await exchange(socket_path, request("POST", "/v1/validate", headers=headers))).status == 413


async def test_a_client_that_asks_first_may_go_on(socket_path: str) -> None:
    headers = {"Expect": "100-continue", "Content-Length": str(len(BODY)), "Content-Type": "application/json", "Connection": "close"}
    async with connected(socket_path) as (reader, writer):
        writer.write(request("POST", "/v1/validate", headers=headers))
        assert await reader.readline() == b"HTTP/1.1 100 Continue\r\n"
        writer.write(BODY)
        assert b"HTTP/1.1 200 " in await ended(reader)


async def test_a_bug_is_answered_as_one_and_logged(socket_path: str, bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    bench.bug = ZeroDivisionError("the secret")
    with caplog.at_level(logging.ERROR):
        reply = await ask(socket_path, "GET", "/v1/version")
    assert (reply.status, reply.error().code) == (500, "internal")
    assert b"secret" not in reply.body
    assert "the secret" in caplog.text
    bench.bug = None
    assert (await ask(socket_path, "GET", "/v1/version")).status == 200


async def test_pipelined_requests_are_answered_in_order(socket_path: str) -> None:
    async with connected(socket_path) as (reader, writer):
        writer.write(request("GET", "/v1/version") * 3 + request("GET", "/nowhere", headers={"Connection": "close"}))
        answers = await ended(reader)
    assert answers.count(b"HTTP/1.1 200 OK") == 3
    assert answers.rindex(b"HTTP/1.1 404 ") > answers.rindex(b"HTTP/1.1 200 ")
