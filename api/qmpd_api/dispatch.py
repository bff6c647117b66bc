"""From a request to a route's handler and back: decode, call, encode."""

from __future__ import annotations

from typing import Any

import msgspec
from aiohttp import web

from qmpd.access import Caller
from qmpd.errors import Busy, QmpdError, Unauthorized, Undecodable
from qmpd_api import media
from qmpd_api.auditing import about
from qmpd_api.codec import decode_aside, encode
from qmpd_api.exchange import LIMITS, SERVICE, Call, Reply, read_body, revision_of
from qmpd_api.guards import Handler, error_answer
from qmpd_api.idempotency import ATTEMPTS, Answer, fingerprint_of, key_of
from qmpd_api.identity import admitted, check_labels
from qmpd_api.limits import Limits
from qmpd_api.peers import PEERS
from qmpd_api.queries import decode_query
from qmpd_api.routes import Route


def endpoint(route: Route[Any, Any]) -> Handler:
    """The aiohttp handler of a route."""

    async def answer(request: web.Request) -> web.StreamResponse:
        caller = await admitted(request, route)  # before its body is read: a stranger's is not
        raw = await read_body(request, _limits(request, route))
        call = await _call(request, route, raw, caller)
        if route.stream is not None:
            response = await route.stream(request, call)
            if response is not None:
                return response
        finished = await _once(request, route, call, raw)
        return finished.response()

    return answer


def _limits(request: web.Request, route: Route[Any, Any]) -> Limits:
    limits = request.app[LIMITS]
    return limits if route.body_bytes is None else msgspec.structs.replace(limits, body_bytes=min(route.body_bytes, limits.body_bytes))


async def _call(request: web.Request, route: Route[Any, Any], raw: bytes, caller: Caller) -> Call[Any, Any]:
    """Everything the caller said, as types. The body before the query: a body that is no document makes the rest meaningless."""
    body = await _body(request, route, raw)
    about(request, body)
    if caller.labels:
        check_labels(body, caller)
    return Call(
        service=request.app[SERVICE],
        caller=caller,
        body=body,
        query=decode_query(request.query, route.query, request.app[LIMITS]),
        name=request.match_info.get("name", ""),
        id=request.match_info.get("id", ""),
        item=request.match_info.get("item", ""),
        revision=revision_of(request) if route.revision in {"optional", "needed"} else None,
    )


async def _body(request: web.Request, route: Route[Any, Any], raw: bytes) -> object:
    if route.takes is not None:
        media.check_bytes(request.headers.get("Content-Type"), route.takes)
        return raw
    if route.body is None:
        if raw:
            raise Undecodable("this request takes no body")
        return None
    if not raw and not route.body_needed:
        return route.body()
    kind = media.of_body(request.headers.get("Content-Type"))
    return await decode_aside(raw, kind, route.body, request.app[LIMITS])


async def _once(request: web.Request, route: Route[Any, Any], call: Call[Any, Any], raw: bytes) -> Answer:
    key = key_of(request, call.caller) if route.method == "POST" and route.kept else None
    if key is None:
        return await _served(request, route, call)

    async def attempt() -> Answer:
        try:
            return await _served(request, route, call)
        except Busy:
            raise
        except QmpdError as error:
            return error_answer(request, error)

    return await request.app[ATTEMPTS].once(call.service.journal, key, fingerprint_of(request, raw), attempt)


async def _served(request: web.Request, route: Route[Any, Any], call: Call[Any, Any]) -> Answer:
    if route.handler is None:
        raise RuntimeError(f"the stream of {route.path} declined, and the route has no handler")
    with request.app[PEERS].under_way(route.pool):
        try:
            result = await route.handler(call)
        except Unauthorized:
            if call.caller.address is not None:
                request.app[PEERS].refused(call.caller.address)
            raise
    about(request, result)
    document, headers = (result.document, result.headers) if isinstance(result, Reply) else (result, {})
    if document is None:
        return Answer(status=route.status, headers=dict(headers))
    if route.produces is not None and isinstance(document, bytes):
        return Answer(status=route.status, headers={**headers, "Content-Type": route.produces}, body=document)
    chosen = media.of_answer(request.headers.getall("Accept", []))
    return Answer(status=route.status, headers={**headers, "Content-Type": str(chosen)}, body=encode(document, chosen))
