"""One HTTP connection: aiohttp's, with the deadlines it lacks and with errors in our shape.

aiohttp limits neither how long the head of a request may take nor how long a reader may leave the socket full, and answers what
it cannot parse in a shape of its own, with a stack trace in the log.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Final

import msgspec
from aiohttp import web

from qmpd.errors import Busy, QmpdError, Undecodable
from qmpd_api.limits import Limits
from qmpd_api.peers import Peers, address_of, credentials_of
from qmpd_api.statuses import STANDING_HEADERS, RequestTimeout, body_of, headers_of, status_of

_log = logging.getLogger(__name__)

#: Lines and fields longer than this end the request. Ours have names of at most 63 characters.
MAX_LINE: Final = 8190


class Visit(web.RequestHandler):
    """aiohttp's handler of one connection, which it creates with `manager` (the server) and asyncio drives."""

    __slots__ = ("_admitted", "_busy", "_due", "_late", "_limits", "_peer", "_peers", "_stalled")

    def __init__(self, manager: web.Server, *, loop: asyncio.AbstractEventLoop, limits: Limits, peers: Peers) -> None:
        super().__init__(
            manager,
            loop=loop,
            keepalive_timeout=limits.idle_s,
            lingering_time=limits.lingering_s,
            max_line_size=MAX_LINE,
            max_field_size=MAX_LINE,
            auto_decompress=False,
            access_log=None,  # type: ignore[arg-type]  # aiohttp takes None for "no access log"
        )
        self._limits = limits
        self._peers = peers
        self._admitted = False
        self._busy = False
        self._peer: int | str | None = None
        self._due: float | None = None
        self._late: asyncio.TimerHandle | None = None
        self._stalled: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Admits the peer, or tells it that there are too many."""
        credentials = credentials_of(transport)
        self._peer = credentials[1] if credentials else address_of(transport)
        self._admitted = self._peers.admit(self._peer)
        if not self._admitted:
            self.transport = transport  # type: ignore[assignment]  # a stream transport, as for every stream server
            self._refuse(Busy("too many connections"))
            return
        super().connection_made(transport)
        self._expect_within(self._limits.idle_s)

    def connection_lost(self, exc: BaseException | None) -> None:
        """Ends the timers and gives the place back."""
        for timer in (self._late, self._stalled):
            if timer is not None:
                timer.cancel()
        if self._admitted:
            self._admitted = False
            self._peers.leave(self._peer)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """The first bytes of a request start the clock for its head."""
        if data and self._due is not None and not self._busy:
            self._busy = True
            self._expect_within(self._limits.head_s)
        super().data_received(data)

    def request_begun(self) -> None:
        """The head of a request is complete: from here on its handler keeps the time."""
        self._busy = True
        self._due = None

    def request_over(self) -> None:
        """The response is written: the next request may begin."""
        self._busy = False
        self._expect_within(self._limits.idle_s)

    def pause_writing(self) -> None:
        """The peer does not read: it gets a limited time to make room."""
        super().pause_writing()
        self._stalled = asyncio.get_running_loop().call_later(self._limits.stall_s, self._abort)

    def resume_writing(self) -> None:
        """The peer has made room."""
        super().resume_writing()
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    def handle_error(
        self, request: web.BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        """What aiohttp answers to bytes that are not HTTP; only what escapes the application's own boundary comes here with 500."""
        del message
        if status == web.HTTPInternalServerError.status_code or request.writer.output_size > 0:
            return super().handle_error(request, status, exc)
        error = Undecodable("this is not an HTTP request, or one with a line or header field that is broken or too long")
        body = msgspec.json.encode(body_of(error))
        response = web.Response(status=status, body=body, headers=STANDING_HEADERS, content_type="application/json")
        response.force_close()
        return response

    def _expect_within(self, seconds: float) -> None:
        """The time for what comes next. A timer that would go off earlier stays, and looks again then: most requests need no new one."""
        loop = asyncio.get_running_loop()
        self._due = loop.time() + seconds
        if self._late is None or self._late.when() > self._due:
            if self._late is not None:
                self._late.cancel()
            self._late = loop.call_at(self._due, self._look_at_clock)

    def _look_at_clock(self) -> None:
        self._late = None
        if self._due is None:
            return  # a handler keeps the time now
        loop = asyncio.get_running_loop()
        if loop.time() < self._due:
            self._late = loop.call_at(self._due, self._look_at_clock)
            return
        self._due = None
        if self._busy:
            self._refuse(RequestTimeout(f"the head of the request did not arrive within {self._limits.head_s:g} s"))
        else:
            self.force_close()

    def _refuse(self, error: QmpdError) -> None:
        """Answers without a request, and closes."""
        body = msgspec.json.encode(body_of(error))
        about = {"Content-Type": "application/json", "Content-Length": str(len(body)), "Connection": "close"}
        lines = "".join(f"{name}: {value}\r\n" for name, value in {**STANDING_HEADERS, **about, **headers_of(error)}.items())
        if self.transport is not None:
            self.transport.write(f"HTTP/1.1 {status_of(type(error))} \r\n{lines}\r\n".encode() + body)
        _log.info("connection refused", extra={"peer": self._peer, "reason": error.code})
        self.force_close()

    def _abort(self) -> None:
        _log.info("reader cut", extra={"peer": self._peer})
        if self.transport is not None:
            self.transport.abort()
