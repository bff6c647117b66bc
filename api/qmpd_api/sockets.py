"""What every WebSocket here has: a checked opening, bounded messages, a heartbeat, and an end with a reason.

A reader that leaves its socket full is cut (close code 1013) and may come back and say where it was. Everything that is open is
known to `Openings`, so that the end of the daemon ends it too.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Final

from aiohttp import WSCloseCode, WSMsgType, web

from qmpd.bus import SlowReader
from qmpd.errors import Busy, EventsGone, QmpdError, Undecodable
from qmpd_api.exchange import LIMITS
from qmpd_api.limits import Limits
from qmpd_api.statuses import UpgradeRequired

#: RFC 6455: a control frame carries at most 125 bytes, two of which are the code.
MAX_REASON: Final = 123
#: aiohttp checks it too, but falls over characters that are not ASCII.
_KEY: Final = re.compile(r"[A-Za-z0-9+/]{22}==")
#: How an error of ours ends a stream. Anything else is 1011, "unexpected condition".
_CLOSE_CODES: Final[dict[type[QmpdError], int]] = {
    Undecodable: WSCloseCode.INVALID_TEXT,
    Busy: WSCloseCode.TRY_AGAIN_LATER,
    EventsGone: WSCloseCode.TRY_AGAIN_LATER,
    SlowReader: WSCloseCode.TRY_AGAIN_LATER,
}

Closing = tuple[int, str]
NORMAL: Final[Closing] = (WSCloseCode.OK, "")


class Openings:
    """The streams that are open now."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._tasks: set[asyncio.Task[object]] = set()
        self._sockets: set[web.WebSocketResponse] = set()

    @contextmanager
    def download(self) -> Iterator[None]:
        """Counts the current task as a stream that may be cancelled when the daemon ends."""
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("a stream runs in a task")
        self._tasks.add(task)
        try:
            yield
        finally:
            self._tasks.discard(task)

    @contextmanager
    def socket(self, socket: web.WebSocketResponse) -> Iterator[None]:
        """Counts `socket` as one that is told when the daemon ends."""
        self._sockets.add(socket)
        try:
            yield
        finally:
            self._sockets.discard(socket)

    async def close(self) -> None:
        """Ends all of them: WebSockets with 1001 ("going away"), the others by closing their connection."""
        for task in self._tasks:
            task.cancel()
        going = (WSCloseCode.GOING_AWAY, "the daemon ends")
        await asyncio.gather(*(close(socket, going, self._limits) for socket in self._sockets))


OPENINGS: Final = web.AppKey("openings", Openings)


def is_upgrade(request: web.BaseRequest) -> bool:
    """Whether the request asks for a WebSocket."""
    return request.headers.get("Upgrade", "").strip().lower() == "websocket"


def check_opening(request: web.Request, *protocols: str) -> None:
    """Raises UpgradeRequired where a request is not the opening of a WebSocket, Undecodable where it is one that cannot be answered."""
    if not is_upgrade(request):
        raise UpgradeRequired("this path is a WebSocket: send Connection: Upgrade and Upgrade: websocket")
    if not _KEY.fullmatch(request.headers.get("Sec-WebSocket-Key", "")):
        raise Undecodable("Sec-WebSocket-Key must be 16 bytes in base64")
    wanted = [word.strip() for value in request.headers.getall("Sec-WebSocket-Protocol", []) for word in value.split(",")]
    if wanted and not set(wanted) & set(protocols):
        raise Undecodable(f"none of the subprotocols asked for is known here; known: {', '.join(protocols)}", known=list(protocols))


@asynccontextmanager
async def opened(
    request: web.Request, *protocols: str, message_bytes: int | None = None, heartbeat: bool = True
) -> AsyncIterator[web.WebSocketResponse]:
    """The WebSocket that `request` opens; closed on leaving.

    Without `heartbeat` the other side may leave what it is sent unread for as long as it likes: its answer to a ping would be behind that.

    Raises:
        UpgradeRequired: the request is not the opening of a WebSocket.
        Undecodable: its key is none, or it asks only for subprotocols other than `protocols`.
    """
    check_opening(request, *protocols)
    limits = request.app[LIMITS]
    # Without compression: a few compressed bytes would become megabytes before the size of the message is looked at.
    socket = web.WebSocketResponse(
        timeout=limits.farewell_s,
        heartbeat=limits.heartbeat_s if heartbeat else None,
        protocols=protocols,
        compress=False,
        max_msg_size=limits.message_bytes if message_bytes is None else message_bytes,
    )
    await socket.prepare(request)
    with request.app[OPENINGS].socket(socket):
        try:
            yield socket
        finally:
            await close(socket, NORMAL, limits)


async def close(socket: web.WebSocketResponse, closing: Closing, limits: Limits) -> None:
    """Closes with a code and a reason; a peer that does not take them is left to the connection's own limit."""
    code, reason = closing
    try:
        async with asyncio.timeout(limits.farewell_s):
            await socket.close(code=code, message=reason.encode()[:MAX_REASON], drain=False)
    except TimeoutError:
        return


def closing_of(error: QmpdError) -> Closing:
    """How an error of ours ends a stream."""
    code = next((_CLOSE_CODES[parent] for parent in type(error).__mro__ if parent in _CLOSE_CODES), WSCloseCode.INTERNAL_ERROR)
    return code, f"{error.code}: {error.message}"


async def converse(
    socket: web.WebSocketResponse,
    limits: Limits,
    *,
    name: str,
    speak: Callable[[], Awaitable[Closing]],
    hear: Callable[[str | bytes], Awaitable[Closing | None]],
) -> None:
    """Runs both directions until either ends: `speak` by returning how to close, `hear` (called per message) likewise, or the peer."""
    async with asyncio.TaskGroup() as tasks:
        speaking = tasks.create_task(_speaking(socket, limits, speak), name=name)
        await _hearing(socket, limits, hear)
        speaking.cancel()


async def _speaking(socket: web.WebSocketResponse, limits: Limits, speak: Callable[[], Awaitable[Closing]]) -> None:
    try:
        closing = await speak()
    except TimeoutError:
        closing = (WSCloseCode.TRY_AGAIN_LATER, f"too slow: nothing was read for {limits.reader_s:g} s")
    except QmpdError as error:
        closing = closing_of(error)
    except ConnectionError:
        closing = NORMAL
    await close(socket, closing, limits)


async def _hearing(socket: web.WebSocketResponse, limits: Limits, hear: Callable[[str | bytes], Awaitable[Closing | None]]) -> None:
    async for message in socket:
        if message.type not in {WSMsgType.TEXT, WSMsgType.BINARY}:
            return
        try:
            closing = await hear(message.data)
        except QmpdError as error:
            closing = closing_of(error)
        if closing is not None:
            await close(socket, closing, limits)
            return


async def send(socket: web.WebSocketResponse, data: str | bytes, limits: Limits) -> None:
    """Sends one message; raises TimeoutError if the peer does not make room for it within `limits.reader_s`."""
    async with asyncio.timeout(limits.reader_s):
        if isinstance(data, str):
            await socket.send_str(data)
        else:
            await socket.send_bytes(data)
