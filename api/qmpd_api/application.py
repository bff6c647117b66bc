"""The aiohttp application: the routes, the guards and the objects they share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec
from aiohttp import web

from qmpd_api import openapi
from qmpd_api.dispatch import endpoint
from qmpd_api.exchange import DESCRIPTION, LIMITS, SERVICE
from qmpd_api.guards import GUARDS, answer_expectation, mark_response
from qmpd_api.idempotency import ATTEMPTS, Attempts
from qmpd_api.limits import Limits
from qmpd_api.peers import PEERS, Peers
from qmpd_api.routes import ROUTES
from qmpd_api.sockets import OPENINGS, Openings

if TYPE_CHECKING:
    from qmpd.service import Service


def create(service: Service, limits: Limits | None = None, *, names: Sequence[str] = ()) -> web.Application:
    """An application that answers for `service`, also under `names`. It owns nothing that outlives it, and does not close the service."""
    limits = limits or Limits()
    written = {f"[{name}]" if ":" in name else name.lower() for name in names}
    limits = msgspec.structs.replace(limits, hosts=limits.hosts | written)
    app = web.Application(middlewares=GUARDS, client_max_size=limits.body_bytes)
    app[SERVICE] = service
    app[LIMITS] = limits
    app[PEERS] = Peers(limits)
    app[ATTEMPTS] = Attempts()
    app[OPENINGS] = Openings(limits)
    app[DESCRIPTION] = _description
    # aiohttp looks at one after the other: first those that programs ask over and over.
    for route in sorted(ROUTES, key=lambda route: route.pool != "waits"):
        handler = endpoint(route)
        app.router.add_route(route.method, route.path, handler, expect_handler=answer_expectation)
        if route.method == "GET" and route.handler is not None:
            app.router.add_route("HEAD", route.path, handler)
    app.on_response_prepare.append(mark_response)
    app.on_shutdown.append(_close_streams)
    return app


def _description() -> bytes:
    return openapi.encoded()


async def _close_streams(app: web.Application) -> None:
    await app[OPENINGS].close()
