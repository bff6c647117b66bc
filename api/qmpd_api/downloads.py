"""The responses that are written piece by piece: the console's log, server-sent events; and the description of the API."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final, TypeVar

from aiohttp import web

from qmpd.errors import EventsGone, Problem, QmpdError, invalid
from qmpd_api.codec import encode
from qmpd_api.echo import echo
from qmpd_api.exchange import DESCRIPTION, LIMITS, Call
from qmpd_api.limits import Limits
from qmpd_api.media import EVENT_STREAM, Media
from qmpd_api.queries import EventsQuery, LogQuery, Query
from qmpd_api.sockets import OPENINGS

if TYPE_CHECKING:
    from qmpd.console import Console

T = TypeVar("T")

#: The offsets the log holds, from the oldest kept byte to the end.
CONSOLE_START: Final = "X-Qmpd-Console-Start"
CONSOLE_END: Final = "X-Qmpd-Console-End"
#: The number of the last event a browser saw before its connection broke (HTML, server-sent events).
LAST_EVENT: Final = "Last-Event-ID"
_HEARTBEAT: Final = b": still here\n\n"


@asynccontextmanager
async def held(iterator: AsyncIterator[T]) -> AsyncIterator[AsyncIterator[T]]:
    """The iterator; what it holds is given back on leaving, not when the garbage collector comes by."""
    try:
        yield iterator
    finally:
        if isinstance(iterator, AsyncGenerator):
            await iterator.aclose()


async def description(request: web.Request, call: Call[None, Query]) -> web.Response:
    """The published description of this API."""
    del call
    return web.Response(body=await asyncio.to_thread(request.app[DESCRIPTION]), content_type=str(Media.JSON))


async def log(request: web.Request, call: Call[None, LogQuery]) -> web.StreamResponse:
    """The bytes of the log from an offset on: those it has now, or with `follow` until the machine stops."""
    port = call.service.console(call.name, call.query.port)
    start, end = await port.start(), port.end
    if call.query.since > end:
        raise invalid([Problem(path="?since", message=f"the log ends at {end}")])
    headers = {CONSOLE_START: str(start), CONSOLE_END: str(end)}
    limits = request.app[LIMITS]
    async with _written(request, "application/octet-stream", headers) as response:
        left = call.query.limit
        async with held(_pieces(port, call.query, end, limits)) as pieces:
            async for data in pieces:
                await _write(response, data if left is None else data[:left], limits)
                left = None if left is None else left - len(data)
                if left is not None and left <= 0:
                    break
    return response


async def _pieces(port: Console, query: LogQuery, end: int, limits: Limits) -> AsyncIterator[bytes]:
    offset = query.since
    if query.follow:
        async with held(port.follow(offset, chunk=limits.chunk_bytes)) as pieces:
            async for _, data in pieces:
                yield data
        return
    while offset < end:
        begin, data = await port.read(offset, min(limits.chunk_bytes, end - offset))
        if not data:
            return
        yield data
        offset = begin + len(data)


async def bundle(request: web.Request, call: Call[None, Query]) -> web.StreamResponse:
    """The support bundle, sent while it is made."""
    headers = {"Content-Disposition": 'attachment; filename="qmpd-bundle.tar.gz"'}
    made = call.service.upkeep.bundle(call.service.version())
    async with _written(request, "application/gzip", headers) as response, held(made) as pieces:
        async for data in pieces:
            await _write(response, data, request.app[LIMITS])
    return response


async def event_stream(request: web.Request, call: Call[None, EventsQuery]) -> web.StreamResponse:
    """Server-sent events. Those that are gone are reported as an event called `gap`, and the stream goes on with the oldest kept one."""
    limits = request.app[LIMITS]
    since = _last_seen(request, call.query)
    async with _written(request, EVENT_STREAM, {"X-Accel-Buffering": "no"}) as response:
        while True:
            try:
                await _tell(response, call, since, limits)
                break
            except EventsGone as gone:
                await _write(response, _told("gap", gone.details), limits)
                first = gone.details.get("first")
                since = max(0, first - 1) if isinstance(first, int) else None
    return response


async def _tell(response: web.StreamResponse, call: Call[None, EventsQuery], since: int | None, limits: Limits) -> None:
    async with call.service.bus.subscribe(since, call.query.machine) as happenings:
        while True:
            try:
                async with asyncio.timeout(limits.heartbeat_s):
                    event = await anext(happenings)
            except TimeoutError:
                await _write(response, _HEARTBEAT, limits)
            except StopAsyncIteration:
                return
            else:
                await _write(response, _told(event.kind, event, event.number), limits)


def _told(kind: str, document: object, number: int | None = None) -> bytes:
    head = f"id: {number}\n" if number is not None else ""
    return f"{head}event: {kind}\ndata: ".encode() + encode(document, Media.JSON) + b"\n\n"


def _last_seen(request: web.Request, query: EventsQuery) -> int | None:
    """Where the stream begins. Last-Event-ID wins: a browser that reconnects sends it with the address it had at first."""
    text = request.headers.get(LAST_EVENT)
    if text is None:
        return query.since
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise invalid([Problem(path=LAST_EVENT, message=f"must be the number of an event, not {echo(text)}")])
    return int(text)


@asynccontextmanager
async def _written(request: web.Request, media: str, headers: dict[str, str]) -> AsyncIterator[web.StreamResponse]:
    """A response of unknown length. It ends properly only if the block does: otherwise the client sees that it was cut."""
    response = web.StreamResponse(headers={**headers, "Content-Type": media})
    # What comes later on this connection would wait for the end of the stream.
    response.force_close()
    with request.app[OPENINGS].download():
        await response.prepare(request)
        try:
            yield response
            await response.write_eof()
        except (TimeoutError, QmpdError) as error:
            # The status is sent and cannot be taken back: a chunked body without its last chunk is how HTTP/1.1 says "cut".
            raise ConnectionResetError(f"stream cut: {error}") from error


async def _write(response: web.StreamResponse, data: bytes, limits: Limits) -> None:
    async with asyncio.timeout(limits.reader_s):
        await response.write(data)
