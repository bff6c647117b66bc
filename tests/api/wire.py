"""HTTP by hand, for requests that no client library would send."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import aiohttp
import msgspec
from aiohttp import WSMsgType

from qmpd.views import ErrorBody

#: Every answer these tests wait for comes within a second; a loaded machine gets more.
PATIENCE_S = 60.0

HEAD = {"Host": "localhost"}


class Reply(msgspec.Struct, frozen=True):
    """A parsed response."""

    status: int
    headers: dict[str, str]
    body: bytes

    def error(self) -> ErrorBody:
        """The body, which must be an error in the one shape."""
        return msgspec.json.decode(self.body, type=ErrorBody)


@asynccontextmanager
async def connected(path: str) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection to a Unix socket, closed on leaving whatever is unsent."""
    reader, writer = await asyncio.open_unix_connection(path)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def answer(reader: asyncio.StreamReader) -> Reply:
    """The next response on a connection."""
    async with asyncio.timeout(PATIENCE_S):
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:] if line)}
        body = await reader.readexactly(int(headers.get("content-length", "0")))
    return Reply(int(head[0].split(" ")[1]), headers, body)


async def exchange(path: str, request: bytes) -> Reply:
    """Sends bytes and returns the first response."""
    async with connected(path) as (reader, writer):
        writer.write(request)
        return await answer(reader)


def request(method: str, target: str, body: bytes = b"", headers: Mapping[str, str] | None = None) -> bytes:
    """The bytes of a well-formed request; `headers` replace and add."""
    fields = {**HEAD, **({"Content-Length": str(len(body)), "Content-Type": "application/json"} if body else {}), **(headers or {})}
    lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return f"{method} {target} HTTP/1.1\r\n{lines}\r\n".encode() + body


async def ask(path: str, method: str, target: str, body: bytes = b"", headers: Mapping[str, str] | None = None) -> Reply:
    """A request of its own connection."""
    return await exchange(path, request(method, target, body, headers))


async def ended(reader: asyncio.StreamReader) -> bytes:
    """Everything up to the end of the connection, which must come."""
    async with asyncio.timeout(PATIENCE_S):
        try:
            return await reader.read()
        except ConnectionResetError:
            return b""


async def until_there_is_room(path: str) -> None:
    """Returns when the server takes one more connection."""
    async with asyncio.timeout(PATIENCE_S):
        while (await ask(path, "GET", "/v1/version")).status == 429:
            await asyncio.sleep(0.01)


HANDSHAKE = {
    "Connection": "Upgrade",
    "Upgrade": "websocket",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
}


async def closing(socket: aiohttp.ClientWebSocketResponse) -> tuple[int | None, str]:
    """The code and reason with which the server closes; what comes before is skipped."""
    while True:
        message = await socket.receive(timeout=PATIENCE_S)
        if message.type is WSMsgType.CLOSE:
            return message.data, message.extra or ""
        if message.type in {WSMsgType.CLOSED, WSMsgType.ERROR}:
            return socket.close_code, ""


@asynccontextmanager
async def session_on(path: str) -> AsyncIterator[aiohttp.ClientSession]:
    """An HTTP client of a socket."""
    async with aiohttp.ClientSession("http://localhost", connector=aiohttp.UnixConnector(path)) as session:
        yield session
