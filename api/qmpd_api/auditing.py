"""From a request and its answer to an entry of the audit log: what changes something, and what was refused."""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final

import msgspec
from aiohttp import web

from qmpd.access import Caller, Right
from qmpd.auditviews import AuditEntry
from qmpd.journal import timestamp, utc_now
from qmpd.peerviews import JoinAnswer
from qmpd.processviews import AdoptRequest
from qmpd.spec import MachineSpec
from qmpd.views import TokenRequest
from qmpd_api.echo import echo
from qmpd_api.exchange import SERVICE
from qmpd_api.peers import address_of, credentials_of

if TYPE_CHECKING:
    from qmpd_api.routes import Route

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

#: Rights whose use is noted, whatever came of it. Of a peer, what is not a mere question.
NOTED: Final[frozenset[Right]] = frozenset({"operate", "define", "admin", "join"})
#: What says that somebody was refused for who they are, where they came from, or how often.
REFUSALS: Final = frozenset({401, 403, 421, 429})
QUESTIONS: Final = frozenset({"GET", "HEAD", "OPTIONS"})
#: The status of a WebSocket that was opened.
SWITCHING: Final = int(HTTPStatus.SWITCHING_PROTOCOLS)
IDENTITY: Final = "X-Request-Id"

_ID: Final = web.RequestKey("request_id", str)
_ROUTE: Final[web.RequestKey[Route[Any, Any]]] = web.RequestKey("route")
_CALLER: Final = web.RequestKey("caller", Caller)
_SUBJECT: Final = web.RequestKey("subject", tuple)
_CODE: Final = web.RequestKey("code", str)
#: Unique to this daemon's run; counting costs less than chance.
_RUN: Final = secrets.token_hex(4)
_COUNT: Final = itertools.count(1)

_log = logging.getLogger(__name__)


def identified(request: web.Request, route: Route[Any, Any], caller: Caller) -> None:
    """Notes whose request it is, and of which route."""
    request[_ROUTE] = route
    request[_CALLER] = caller


def about(request: web.Request, body: object) -> None:
    """Notes what a request is about that says so in its body, or in that of its answer."""
    if isinstance(body, MachineSpec | AdoptRequest):
        request[_SUBJECT] = (body.name, None)
    elif isinstance(body, TokenRequest | JoinAnswer):
        request[_SUBJECT] = (None, body.name)


def failed(request: web.BaseRequest, code: str) -> None:
    """Notes why a request was not served."""
    request[_CODE] = code


def identity_of(request: web.BaseRequest) -> str:
    """The number of a request, which its answer and its log lines carry."""
    if _ID not in request:
        request[_ID] = f"{_RUN}-{next(_COUNT)}"
    return request[_ID]


def opened(request: web.Request) -> None:
    """Notes that a stream has begun which may change something: its end may be hours away."""
    if _noted(request, SWITCHING):
        _note(request, SWITCHING, None)


@web.middleware
async def keep_account(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Notes the request when it has ended, however it ended."""
    loop = asyncio.get_running_loop()
    begun, status = loop.time(), 0
    try:
        response = await handler(request)
        status = response.status
    finally:
        if _noted(request, status):
            _note(request, status, (loop.time() - begun) * 1000)
    return response


def _noted(request: web.Request, status: int) -> bool:
    if status in REFUSALS:
        return True
    route = request.get(_ROUTE)
    if route is None or (not route.noted and status < HTTPStatus.BAD_REQUEST):
        return False
    return route.right in NOTED or (route.right == "peer" and request.method not in QUESTIONS)


def _note(request: web.Request, status: int, duration_ms: float | None) -> None:
    """Status 0 is that of a request whose client went away, or whose answer broke off."""
    route, caller = request.get(_ROUTE), request.get(_CALLER)
    if caller is None:
        caller = _stranger(request)
    named = request.match_info.get("name")
    machine, subject = request.get(_SUBJECT, (None if named is None else echo(named), None))
    other = request.match_info.get("id")
    resource = request.match_info.route.resource
    entry = AuditEntry(
        at=timestamp(utc_now()),
        request=identity_of(request),
        method=echo(request.method),
        route=route.path if route is not None else resource.canonical if resource is not None else "-",
        status=status,
        who=caller.user,
        role=caller.role,
        credential=caller.credential,
        origin=caller.address,
        uid=caller.uid,
        pid=caller.pid,
        machine=machine,
        subject=subject if other is None else echo(other),
        code=request.get(_CODE),
        duration_ms=None if duration_ms is None else round(duration_ms, 3),
    )
    request.app[SERVICE].audit.note(entry)
    _log.info("request", extra={name: value for name, value in msgspec.to_builtins(entry).items() if name != "at"})


def _stranger(request: web.Request) -> Caller:
    credentials = credentials_of(request.transport)
    if credentials is None:
        return Caller(address=address_of(request.transport))
    pid, uid, gid = credentials
    return Caller(uid=uid, gid=gid, pid=pid)
