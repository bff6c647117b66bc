"""What the routes about trust do: tokens, peers, the authority and the audit log."""

from __future__ import annotations

from qmpd.audit import Sought
from qmpd.auditviews import AuditPage
from qmpd.peerviews import JoinAnswer, JoinRequest, PeerGreeting, PeerHealth, PeerView, RevocationView
from qmpd.views import NewToken, TokenRequest, TokenView
from qmpd_api.exchange import Call
from qmpd_api.queries import AuditQuery, Query


async def tokens(call: Call[None, Query]) -> tuple[TokenView, ...]:
    """The tokens."""
    return call.service.tokens.list()


async def create_token(call: Call[TokenRequest, Query]) -> NewToken:
    """Make a token."""
    return await call.service.tokens.create(call.body)


async def revoke_token(call: Call[None, Query]) -> None:
    """End a token."""
    await call.service.tokens.revoke(call.id)


async def peers(call: Call[None, Query]) -> tuple[PeerView, ...]:
    """The other daemons."""
    return call.service.peering.list()


async def peer_health(call: Call[None, Query]) -> PeerHealth:
    """Ask another daemon now."""
    return await call.service.peering.health(call.id)


async def greeting(call: Call[None, Query]) -> PeerGreeting:
    """What a peer hears."""
    return call.service.peering.greet(call.caller)


async def join(call: Call[JoinRequest, Query]) -> JoinAnswer:
    """Get a certificate."""
    return await call.service.authority.join(call.body, call.caller.address)


async def revoked(call: Call[None, Query]) -> RevocationView:
    """The revocation list."""
    return await call.service.authority.revoked()


async def audit(call: Call[None, AuditQuery]) -> AuditPage:
    """The audit log."""
    query = call.query
    return await call.service.audit.read(Sought(since=query.since, machine=query.machine, who=query.who, limit=query.limit))
