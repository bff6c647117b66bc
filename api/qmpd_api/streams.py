"""The WebSockets: a serial console in both directions, QMP commands, and events as they happen."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final, Literal

import msgspec
from aiohttp import WSCloseCode, web

from qmpd.errors import Problem, QmpdError, Undecodable, invalid
from qmpd.views import ErrorBody, Event, QmpRequest
from qmpd_api import sockets
from qmpd_api.codec import decode_aside, encode
from qmpd_api.downloads import event_stream, held
from qmpd_api.exchange import LIMITS, Call
from qmpd_api.limits import Limits
from qmpd_api.media import Media, wants_event_stream
from qmpd_api.peers import PEERS
from qmpd_api.queries import ConsoleQuery, EventsQuery, Query
from qmpd_api.statuses import body_of

if TYPE_CHECKING:
    from qmpd.console import Console

CONSOLE_PROTOCOL: Final = "qmpd.console.v1"
EVENTS_PROTOCOL: Final = "qmpd.events.msgpack"
QMP_PROTOCOL: Final = "qmpd.qmp.v1"


class ConsoleFrame(msgspec.Struct, frozen=True, kw_only=True):
    """One message of `qmpd.console.v1`, in msgpack.

    `hello` says at which offset output begins, `output` carries bytes that begin at `offset`, `dropped` says that the log no longer
    has what was next and goes on at `offset`, `ended` that the machine stopped. The client sends `input`; other kinds are ignored.
    """

    kind: Literal["hello", "output", "dropped", "ended", "input"]
    offset: int = 0
    data: bytes = b""


class QmpMessage(QmpRequest, frozen=True, kw_only=True):
    """One message of `qmpd.qmp.v1` from the client, in JSON: a command, and what its answer shall carry to be known by."""

    id: int | str | None = None


class QmpReply(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The answer: what QEMU returned, or an error in the shape of all errors."""

    id: int | str | None = None
    result: object = msgspec.field(name="return", default=None)
    error: ErrorBody | None = None


class _ClientFrame(msgspec.Struct, frozen=True, kw_only=True):
    kind: str
    data: bytes = b""


_FRAME: Final = msgspec.msgpack.Decoder(_ClientFrame)


async def console(request: web.Request, call: Call[None, ConsoleQuery]) -> web.StreamResponse:
    """A serial console: framed with the subprotocol `qmpd.console.v1`, plain bytes without one."""
    port = call.service.console(call.name, call.query.port)
    offset = await _beginning(port, call.query)
    limits = request.app[LIMITS]
    async with sockets.opened(request, CONSOLE_PROTOCOL) as socket:
        framed = socket.ws_protocol is not None

        async def speak() -> sockets.Closing:
            return await (_framed if framed else _plain)(socket, port, offset, limits)

        async def hear(message: str | bytes) -> sockets.Closing | None:
            if isinstance(message, str):
                return WSCloseCode.UNSUPPORTED_DATA, "this channel takes binary messages"
            data = _typed(message) if framed else message
            if data:
                await port.write(data)
            return None

        await sockets.converse(socket, limits, name=f"console-{call.name}", speak=speak, hear=hear)
    return socket


async def _beginning(port: Console, query: ConsoleQuery) -> int:
    """The offset at which output begins: one that was asked for, or the end."""
    end = port.end
    if query.since is not None and query.scrollback is not None:
        raise invalid([Problem(path="?scrollback", message="either since or scrollback")])
    if query.since is not None:
        if query.since > end:
            raise invalid([Problem(path="?since", message=f"the log ends at {end}")])
        return query.since
    return max(await port.start(), end - (query.scrollback or 0))


def _typed(message: bytes) -> bytes:
    """What an `input` frame types. Kinds this version does not know (a resize, say) type nothing."""
    try:
        frame = _FRAME.decode(message)
    except msgspec.DecodeError as error:
        raise Undecodable("the message is not a console frame") from error
    return frame.data if frame.kind == "input" else b""


async def _framed(socket: web.WebSocketResponse, port: Console, offset: int, limits: Limits) -> sockets.Closing:
    async def say(frame: ConsoleFrame) -> None:
        await sockets.send(socket, msgspec.msgpack.encode(frame), limits)

    await say(ConsoleFrame(kind="hello", offset=offset))
    async with held(port.follow(offset, chunk=limits.chunk_bytes)) as pieces:
        async for begin, data in pieces:
            if begin != offset:
                await say(ConsoleFrame(kind="dropped", offset=begin))
            await say(ConsoleFrame(kind="output", offset=begin, data=data))
            offset = begin + len(data)
    await say(ConsoleFrame(kind="ended", offset=offset))
    return WSCloseCode.OK, "the machine stopped"


async def _plain(socket: web.WebSocketResponse, port: Console, offset: int, limits: Limits) -> sockets.Closing:
    async with held(port.follow(offset, chunk=limits.chunk_bytes)) as pieces:
        async for _, data in pieces:
            await sockets.send(socket, data, limits)
    return WSCloseCode.OK, "the machine stopped"


async def qmp_session(request: web.Request, call: Call[None, Query]) -> web.StreamResponse:
    """QMP commands one after the other over one WebSocket: each text message is one, and gets one message with the same `id` back."""
    call.service.machine(call.name)  # one that is not there is an ordinary answer, and not the end of a WebSocket
    limits = request.app[LIMITS]
    async with sockets.opened(request, QMP_PROTOCOL) as socket:

        async def speak() -> sockets.Closing:
            ended: asyncio.Future[sockets.Closing] = asyncio.get_running_loop().create_future()
            return await ended  # nothing is said unasked

        async def hear(message: str | bytes) -> sockets.Closing | None:
            if isinstance(message, bytes):
                return WSCloseCode.UNSUPPORTED_DATA, "this channel takes text messages"
            asked = await decode_aside(message.encode(), Media.JSON, QmpMessage, limits)
            with request.app[PEERS].under_way("waits"):
                answer = await _qmp_answer(call, asked)
            await sockets.send(socket, encode(answer, Media.JSON).decode(), limits)
            return None

        await sockets.converse(socket, limits, name=f"qmp-{call.name}", speak=speak, hear=hear)
    return socket


async def _qmp_answer(call: Call[None, Query], asked: QmpMessage) -> QmpReply:
    try:
        request = QmpRequest(execute=asked.execute, arguments=asked.arguments, oob=asked.oob)
        return QmpReply(id=asked.id, result=(await call.service.qmp(call.name, request, call.caller)).result)
    except QmpdError as error:
        return QmpReply(id=asked.id, error=body_of(error))


async def events(request: web.Request, call: Call[None, EventsQuery]) -> web.StreamResponse | None:
    """Events as they happen, over a WebSocket or as server-sent events; None where a page was asked for."""
    if sockets.is_upgrade(request):
        return await _event_socket(request, call)
    if wants_event_stream(request.headers.getall("Accept", [])):
        return await event_stream(request, call)
    return None


async def _event_socket(request: web.Request, call: Call[None, EventsQuery]) -> web.StreamResponse:
    limits = request.app[LIMITS]
    # First the subscription: events that are gone are then an ordinary answer, and not the end of a WebSocket.
    async with (
        call.service.bus.subscribe(call.query.since, call.query.machine) as happenings,
        sockets.opened(request, EVENTS_PROTOCOL) as socket,
    ):
        media = Media.JSON if socket.ws_protocol is None else Media.MSGPACK

        async def speak() -> sockets.Closing:
            async for event in happenings:
                await sockets.send(socket, _message(event, media), limits)
            return WSCloseCode.GOING_AWAY, "the daemon ends"

        async def hear(_: str | bytes) -> sockets.Closing | None:
            return WSCloseCode.UNSUPPORTED_DATA, "this stream takes no messages"

        await sockets.converse(socket, limits, name="events", speak=speak, hear=hear)
    return socket


def _message(event: Event, media: Media) -> str | bytes:
    body = encode(event, media)
    return body.decode() if media is Media.JSON else body
