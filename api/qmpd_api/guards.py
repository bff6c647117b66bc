"""What every request passes before its handler, in this order: the clock, the error boundary, the size, the Host, the Origin, the path."""

from __future__ import annotations

import logging
import re
from collections.abc import Awaitable, Callable
from typing import Final

from aiohttp import web

from qmpd.errors import Forbidden, Misdirected, NotFound, QmpdError, TooLarge, Undecodable
from qmpd.migration.parcels import ITEM_PATTERN
from qmpd.spec import NAME_PATTERN, WORD_PATTERN
from qmpd_api import media
from qmpd_api.auditing import IDENTITY, SWITCHING, failed, identity_of, keep_account, opened
from qmpd_api.codec import encode
from qmpd_api.echo import echo
from qmpd_api.exchange import LIMITS, check_size
from qmpd_api.idempotency import Answer
from qmpd_api.statuses import STANDING_HEADERS, MethodNotAllowed, RequestTimeout, body_of, headers_of, status_of
from qmpd_api.visits import Visit

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

#: A host name or address and an optional port, as RFC 3986 has them.
_HOST: Final = re.compile(r"(?P<name>[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?")
_SEGMENTS: Final = {"name": re.compile(NAME_PATTERN), "id": re.compile(WORD_PATTERN), "item": re.compile(ITEM_PATTERN)}
_STARTED: Final = web.RequestKey("response_started", bool)

_log = logging.getLogger(__name__)


async def mark_response(request: web.Request, response: web.StreamResponse) -> None:
    """Signal handler: the headers of every response, and a note that the status can no longer be changed."""
    request[_STARTED] = True
    response.headers.update(STANDING_HEADERS)
    response.headers[IDENTITY] = identity_of(request)
    if response.status == SWITCHING:
        opened(request)


@web.middleware
async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
    """All of it, in one piece: each middleware more would be paid for by every request."""
    visit = request.protocol
    if isinstance(visit, Visit):
        visit.request_begun()
    try:
        for check in CHECKS:
            check(request)
        return await handler(request)
    except web.HTTPException as error:
        if isinstance(error, web.HTTPMethodNotAllowed) and request.method == "OPTIONS":
            return web.Response(status=204, headers={"Allow": ", ".join(sorted(error.allowed_methods))})
        return error_response(request, _ours(error))
    except QmpdError as error:
        return error_response(request, error)
    except ConnectionError:
        raise
    except Exception as error:
        # The boundary: whatever goes wrong in one request must not reach the others, and the caller learns that it was our bug.
        _log.exception("request failed", extra={"method": request.method, "path": request.rel_url.raw_path})
        if _STARTED in request:
            raise ConnectionResetError("the response had begun") from error
        return error_response(request, QmpdError("this is a bug in qmpd; its log has the details"))
    finally:
        if isinstance(visit, Visit):
            visit.request_over()


def error_response(request: web.BaseRequest, error: QmpdError) -> web.Response:
    """The response to an error, in the representation the caller likes best."""
    response = error_answer(request, error).response()
    if isinstance(error, TooLarge | RequestTimeout):
        # What is left of the request is not read, so nothing can come after it on this connection.
        response.force_close()
    return response


def error_answer(request: web.BaseRequest, error: QmpdError) -> Answer:
    """The same as a value that can be kept."""
    failed(request, error.code)
    chosen = media.of_answer(request.headers.getall("Accept", []))
    status = status_of(type(error))
    if status >= 500:
        _log.info(
            "request not served", extra={"path": request.rel_url.raw_path, "status": status, "code": error.code, "error": error.message}
        )
    return Answer(status=status, headers={"Content-Type": str(chosen), **headers_of(error)}, body=encode(body_of(error), chosen))


def _ours(error: web.HTTPException) -> QmpdError:
    if isinstance(error, web.HTTPMethodNotAllowed):
        allowed = sorted(error.allowed_methods)
        return MethodNotAllowed(f"{echo(error.method)} is not one of {', '.join(allowed)}", allowed=allowed)
    if error.status == web.HTTPNotFound.status_code:
        return NotFound("there is nothing at this path")
    return Undecodable(f"this is not a request that can be answered ({error.reason})")


def check_announced_size(request: web.Request) -> None:
    """A body that says it is too large is not read."""
    check_size(request.content_length or 0, request.app[LIMITS])


async def answer_expectation(request: web.Request) -> web.StreamResponse | None:
    """What a client hears that asks before it sends its body (RFC 9110, 10.1.1): aiohttp would say yes to any size."""
    if request.headers["Expect"].strip().lower() != "100-continue":
        return error_response(request, Undecodable("the only expectation that can be met is 100-continue"))
    try:
        check_size(request.content_length or 0, request.app[LIMITS])
    except TooLarge as error:
        return error_response(request, error)
    await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    # This was not the response: aiohttp counts what was written to know whether one has begun.
    request.writer.output_size = 0
    return None


def check_host(request: web.Request) -> None:
    """The Host must be ours: a name of somebody else's that leads here is DNS rebinding."""
    given = request.headers.getall("Host", [])
    if len(given) != 1 or not given[0].strip():
        raise Undecodable("a request needs exactly one Host header")
    known = request.app[LIMITS].hosts
    # A request line with an absolute URL has a second host, which takes precedence (RFC 9112, 3.2.2).
    for host in {given[0].strip(), request.host} - known:
        match = _HOST.fullmatch(host)
        if match is None or match["name"].lower() not in known:
            names = sorted(known)
            raise Misdirected(f"the host '{echo(host)}' is not this daemon; it is called {' or '.join(names)}", known=names)


def check_origin(request: web.Request) -> None:
    """Requests that a web page makes carry an Origin; only pages that were allowed may, WebSockets included."""
    for origin in request.headers.getall("Origin", []):
        if origin not in request.app[LIMITS].origins:
            raise Forbidden(f"the web origin '{echo(origin)}' is not allowed")


def check_path(request: web.Request) -> None:
    """A name in the path must be one: aiohttp decodes %2F and the like into it."""
    for kind, segment in request.match_info.items():
        pattern = _SEGMENTS.get(kind)
        if pattern is not None and not pattern.match(segment):
            raise NotFound(f"'{echo(segment)}' cannot be the name of anything")


CHECKS: Final = (check_announced_size, check_host, check_origin, check_path)
#: The account of a request is kept around everything, its refusals included.
GUARDS: Final = (keep_account, guard)
