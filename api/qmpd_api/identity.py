"""Who makes a request, and whether that is one who may: the process on the Unix socket, or the owner of a certificate or token.

What a caller may not know of is not there: a machine outside the labels of its token is not found.
"""

from __future__ import annotations

import asyncio
import ssl
from typing import TYPE_CHECKING, Any, Final

from aiohttp import web

from qmpd.access import Caller, check_right, in_scope
from qmpd.errors import Forbidden, NotFound, Unauthorized
from qmpd.spec import MachineChanges, MachineSpec
from qmpd_api.auditing import identified
from qmpd_api.exchange import SERVICE
from qmpd_api.peers import PEERS, address_of

if TYPE_CHECKING:
    from qmpd.trust import Trust
    from qmpd_api.routes import Route

#: The daemon's certificates, where it listens on TCP.
TRUST: Final[web.AppKey[Trust]] = web.AppKey("trust")
SCHEME: Final = "Bearer"


async def admitted(request: web.Request, route: Route[Any, Any]) -> Caller:
    """The caller of a request, if it has the right that the route needs.

    Raises:
        Unauthorized: nobody known, or a token or certificate that is not valid (any more).
        Forbidden: the role does not have the right, or the route is not for those who see some machines only.
        NotFound: there is no such machine, as far as this caller may know.
        Busy: too many refused attempts came from its address.
    """
    peers = request.app[PEERS]
    address = address_of(request.transport)
    if address is None:
        caller = await peers.caller(request.transport)
        identified(request, route, caller)
    else:
        identified(request, route, Caller(address=address))
        peers.check_patience(address)
        try:
            caller = await _remote(request, address)
            identified(request, route, caller)
            check_right(caller, route.right)
        except Unauthorized:
            peers.refused(address)
            raise
    check_right(caller, route.right)
    if caller.labels:
        _check_scope(request, route, caller)
    return caller


async def _remote(request: web.Request, address: str) -> Caller:
    shown = request.headers.getall("Authorization", [])
    if shown:
        scheme, _, token = shown[0].partition(" ")
        if len(shown) > 1 or scheme.lower() != SCHEME.lower():
            raise Unauthorized(f"Authorization must be {SCHEME} and a token, once")
        return request.app[SERVICE].tokens.caller(token.strip(), address)
    certificate = _certificate(request.transport)
    trust = request.app.get(TRUST)
    if certificate is None or trust is None:
        return Caller(address=address)
    return await trust.caller(certificate, address)


def _certificate(transport: asyncio.BaseTransport | None) -> bytes | None:
    connection = None if transport is None else transport.get_extra_info("ssl_object")
    return connection.getpeercert(binary_form=True) if isinstance(connection, ssl.SSLObject) else None


def _check_scope(request: web.Request, route: Route[Any, Any], caller: Caller) -> None:
    name = request.match_info.get("name")
    if name is not None:
        if not request.app[SERVICE].exists_for(caller, name):
            raise NotFound(f"there is no machine {name!r}", machine=name)
    elif not route.scoped:
        raise Forbidden(f"{caller.user} may use the machines with its labels only, and this is about the whole host")


def check_labels(body: object, caller: Caller) -> None:
    """Raises Forbidden when a caller would give a machine labels that take it out of the caller's own sight."""
    labels = body.labels if isinstance(body, MachineSpec | MachineChanges) else None
    if labels is not None and not in_scope(labels, caller):
        needed = ", ".join(f"{key}={value}" for key, value in caller.labels.items())
        raise Forbidden(f"{caller.user} may define machines with the labels {needed} only", labels=dict(caller.labels))
