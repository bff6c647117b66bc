"""The streams of the API as a client sees them: console, log and events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager
from typing import Final

import aiohttp
import msgspec
from yarl import URL

from qmpd.errors import QmpdError
from qmpd.views import ErrorBody, Event, EventPage, QmpRequest
from qmpd_api.connection import ERRORS, QUERY_DEADLINE_S, Connection, DaemonSilent, DaemonUnavailable, Query, error_of, url

CONSOLE_PROTOCOL: Final = "qmpd.console.v1"
EVENTS_PROTOCOL: Final = "qmpd.events.msgpack"
QMP_PROTOCOL: Final = "qmpd.qmp.v1"

#: Both sides ping, so that a peer that vanished without a word is noticed within about this long.
HEARTBEAT_S: Final = 20.0
#: Pacing of new attempts: soon enough that a restarted daemon is found at once, and no busy loop.
RECONNECT_EVERY_S: Final = 0.25
#: A restart or an upgrade of the daemon takes seconds; one that is away longer than this is not coming back by itself.
RECONNECT_LIMIT_S: Final = 60.0
#: One console frame never exceeds what the daemon reads from its log at once; this is far beyond it.
MAX_FRAME_BYTES: Final = 16 * 1024 * 1024
#: Half of what the daemon takes in one message, so that the frame around the bytes fits too.
INPUT_FRAME_BYTES: Final = 32 * 1024
#: A peer that does not answer a closing handshake in this time has nothing more to say.
CLOSE_DEADLINE_S: Final = 2.0
#: Why a WebSocket was not opened has to be asked for, and may be over by then: it is opened again, so often.
OPENINGS: Final = 5
#: One page of the events that were missed: a second's worth of a busy host.
PAGE_EVENTS: Final = 1000

CONSOLE_START: Final = "X-Qmpd-Console-Start"
CONSOLE_END: Final = "X-Qmpd-Console-End"

_OVER: Final = frozenset({aiohttp.WSMsgType.CLOSE, aiohttp.WSMsgType.CLOSING, aiohttp.WSMsgType.CLOSED, aiohttp.WSMsgType.ERROR})
#: What makes a GET the opening of a WebSocket; the key is RFC 6455's example, as its value does not matter for an error.
_UPGRADE: Final = {
    "Connection": "Upgrade",
    "Upgrade": "websocket",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
    "Accept": "application/json",
}


class ConsoleFrame(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One message of `qmpd.console.v1`.

    `hello` comes first and says at which offset output begins; `data` of an `output` begins at `offset`; `dropped` says that what was
    next is no longer kept and that output goes on at `offset`; `ended` is the last. Kinds of newer daemons may come, too.
    """

    kind: str
    offset: int = 0
    data: bytes = b""


class LogSlice(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes of a console's log. They begin at `offset`; the log holds the offsets from `start` up to `end`."""

    data: bytes
    offset: int
    start: int
    end: int


class EventGap(msgspec.Struct, frozen=True, kw_only=True):
    """The events after `since` and before `first` happened, and are no longer kept."""

    since: int
    first: int


EventStreamItem = Event | EventGap


class ConsoleStream:
    """An open console. Iterating yields the daemon's frames and ends after `ended`, which says that the machine did."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket

    async def __aiter__(self) -> AsyncIterator[ConsoleFrame]:
        while True:
            message = await self._socket.receive()
            if message.type is aiohttp.WSMsgType.BINARY:
                frame = msgspec.msgpack.decode(message.data, type=ConsoleFrame)
                yield frame
                if frame.kind == "ended":
                    return
            elif message.type in _OVER:
                raise _closing_error("the console", message)

    async def write(self, data: bytes) -> None:
        """Type `data`. It is on its way when this returns; raises DaemonUnavailable if the connection is gone."""
        try:
            for begin in range(0, len(data), INPUT_FRAME_BYTES):
                frame = ConsoleFrame(kind="input", data=data[begin : begin + INPUT_FRAME_BYTES])
                await self._socket.send_bytes(msgspec.msgpack.encode(frame))
        except (aiohttp.ClientError, ConnectionError) as error:
            raise DaemonUnavailable(f"the console was closed (code {self._socket.close_code})") from error


@asynccontextmanager
async def console_stream(connection: Connection, address: URL) -> AsyncIterator[ConsoleStream]:
    """An open console, closed on the way out."""
    async with websocket(connection, address, CONSOLE_PROTOCOL) as socket:
        yield ConsoleStream(socket)


class _QmpReply(msgspec.Struct, frozen=True):
    result: object = msgspec.field(name="return", default=None)
    error: ErrorBody | None = None


class QmpStream:
    """An open QMP session: one command at a time, each about as quick as over QEMU's own socket. Made by `qmp_stream`."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._turn = asyncio.Lock()

    async def execute(self, command: str, arguments: Mapping[str, object] | None = None, *, oob: bool = False) -> object:
        """What QEMU returned. Raises what `Client.qmp` raises, and DaemonUnavailable when the session is lost."""
        request = QmpRequest(execute=command, arguments=dict(arguments or {}), oob=oob)
        async with self._turn:
            try:
                await self._socket.send_str(msgspec.json.encode(request).decode())
            except ConnectionError as error:
                raise DaemonUnavailable("the QMP session was lost: the outcome is unknown") from error
            message = await self._socket.receive()
        if message.type is not aiohttp.WSMsgType.TEXT:
            raise _closing_error("the QMP session", message)
        reply = msgspec.json.decode(message.data, type=_QmpReply)
        if reply.error is not None:
            raise error_of(reply.error)
        return reply.result


@asynccontextmanager
async def qmp_stream(connection: Connection, address: URL) -> AsyncIterator[QmpStream]:
    """An open QMP session, closed on the way out."""
    async with websocket(connection, address, QMP_PROTOCOL) as socket:
        yield QmpStream(socket)


async def log_slice(connection: Connection, path: str, query: Query) -> LogSlice:
    """What the log holds now, from `since` on."""
    reply = await connection.fetch("GET", path, query=query, headers={"Accept": "application/octet-stream"})
    headers = {key.lower(): value for key, value in reply.headers.items()}
    start, end = int(headers.get(CONSOLE_START.lower(), "0")), int(headers.get(CONSOLE_END.lower(), str(len(reply.body))))
    since = query.get("since")
    return LogSlice(data=reply.body, offset=max(start, since if isinstance(since, int) else start), start=start, end=end)


async def log_stream(connection: Connection, path: str, query: Query) -> AsyncGenerator[bytes, None]:
    """The log as it grows; ends when the daemon ends it."""
    headers = {"Accept": "application/octet-stream"}
    async with connection.response("GET", url(path, query), headers=headers, deadline_s=None) as response:
        async for chunk in response.content.iter_any():
            yield chunk


async def event_stream(connection: Connection, since: int | None, machine: str | None) -> AsyncGenerator[EventStreamItem, None]:
    """Events after `since` (None: from now on), over as many connections as it takes."""
    feed = _EventFeed(connection, machine)
    await feed.begin(since)
    clock = asyncio.get_running_loop().time
    lost_at: float | None = None
    while True:
        try:
            async with aclosing(feed.items()) as items:
                async for item in items:
                    yield item
        except (DaemonUnavailable, DaemonSilent):
            if not feed.ever or (lost_at is not None and clock() - lost_at > RECONNECT_LIMIT_S):
                raise
        lost_at = clock() if feed.alive or lost_at is None else lost_at
        feed.alive = False
        await asyncio.sleep(RECONNECT_EVERY_S)


async def bundle_stream(connection: Connection, path: str) -> AsyncGenerator[bytes, None]:
    """The pieces of a support bundle as they come."""
    async with connection.response("GET", url(path, {}), headers={"Accept": "application/gzip"}, deadline_s=None) as response:
        async for piece in response.content.iter_any():
            yield piece


class _EventFeed:
    """How far a follower of events is. `ever`: there was a connection; `alive`: there was one since this was last set to False."""

    def __init__(self, connection: Connection, machine: str | None) -> None:
        self._connection = connection
        self._machine = machine
        self._newest = 0
        self.ever = False
        self.alive = False

    async def begin(self, since: int | None) -> None:
        """Decide after which number to begin."""
        self._newest = (await self._page(None, 1)).last if since is None else since

    async def items(self) -> AsyncGenerator[EventStreamItem, None]:
        """What was missed, from pages; then what happens, until the connection is lost."""
        while True:
            page = await self._page(self._newest, PAGE_EVENTS)
            self.ever = self.alive = True
            if page.gap:
                yield EventGap(since=self._newest, first=page.first)
                self._newest = page.first - 1
            for event in page.events:
                self._newest = event.number
                yield event
            if not (page.events or page.gap):
                self._newest = page.last
                break
        query: Query = {"since": self._newest, "machine": self._machine}
        async with websocket(self._connection, url("/v1/events", query), EVENTS_PROTOCOL) as socket:
            async for message in socket:
                if message.type is aiohttp.WSMsgType.BINARY:
                    event = msgspec.msgpack.decode(message.data, type=Event)
                    self._newest = event.number
                    yield event

    async def _page(self, since: int | None, limit: int) -> EventPage:
        query: Query = {"since": since, "limit": limit, "machine": self._machine}
        return await self._connection.call("GET", "/v1/events", EventPage, query=query)


@asynccontextmanager
async def websocket(
    connection: Connection, address: URL, protocol: str, *, heartbeat_s: float | None = HEARTBEAT_S, message_bytes: int = MAX_FRAME_BYTES
) -> AsyncIterator[aiohttp.ClientWebSocketResponse]:
    """An open WebSocket, closed on the way out. Raises what the daemon answered where it did not open it."""
    limits = aiohttp.ClientWSTimeout(ws_close=CLOSE_DEADLINE_S)
    for _ in range(OPENINGS):
        with connection.translated(f"GET {address.path}", QUERY_DEADLINE_S):
            try:
                async with asyncio.timeout(QUERY_DEADLINE_S):
                    socket = await connection.session.ws_connect(
                        address, protocols=(protocol,), heartbeat=heartbeat_s, max_msg_size=message_bytes, timeout=limits
                    )
                break
            except aiohttp.WSServerHandshakeError as refusal:
                if (reason := await _refusal(connection, address)) is not None:
                    raise reason from refusal
    else:
        raise DaemonUnavailable(f"the daemon would open {address.path} whenever it was asked why it does not")
    async with socket:
        yield socket


async def _refusal(connection: Connection, address: URL) -> QmpdError | None:
    """The daemon's reason not to open a WebSocket, which aiohttp does not read: ask again, and read it. None where it would by now."""
    try:
        async with connection.response("GET", address, headers=_UPGRADE, deadline_s=QUERY_DEADLINE_S):
            return None
    except QmpdError as reason:
        return reason


def _closing_error(what: str, message: aiohttp.WSMessage) -> QmpdError:
    """Why the daemon closed a stream: its own error where it names one (`code: message`), else that the stream is gone."""
    reason = message.extra if isinstance(message.extra, str) else ""
    code, _, sentence = reason.partition(": ")
    if message.type is aiohttp.WSMsgType.CLOSE and code in ERRORS:
        return error_of(ErrorBody(code=code, message=sentence))
    return DaemonUnavailable(f"the daemon closed {what}: {reason or 'the connection broke'}")
