"""The methods of the client for whom a daemon trusts: tokens, peers, the authority and the audit log."""

from __future__ import annotations

from abc import ABC, abstractmethod

from qmpd.auditviews import AuditPage
from qmpd.peerviews import JoinAnswer, JoinRequest, PeerGreeting, PeerHealth, PeerView, RevocationView
from qmpd.views import NewToken, TokenRequest, TokenView
from qmpd_api.connection import Connection, segment


class TrustVerbs(ABC):
    """One method per route, as in the rest of the client."""

    @property
    @abstractmethod
    def connection(self) -> Connection:
        """The pool of connections to the daemon."""

    async def tokens(self) -> tuple[TokenView, ...]:
        """The tokens, without their secrets."""
        return await self.connection.call("GET", "/v1/tokens", tuple[TokenView, ...])

    async def create_token(self, request: TokenRequest) -> NewToken:
        """Make a token; its text is in this answer and nowhere else."""
        return await self.connection.call("POST", "/v1/tokens", NewToken, body=request)

    async def revoke_token(self, name_or_id: str) -> None:
        """End a token at once. Raises NotFound."""
        await self.connection.fetch("DELETE", f"/v1/tokens/{segment(name_or_id)}")

    async def peers(self) -> tuple[PeerView, ...]:
        """The other daemons that this one knows. None of them is asked."""
        return await self.connection.call("GET", "/v1/peers", tuple[PeerView, ...])

    async def peer_health(self, name: str) -> PeerHealth:
        """Has the daemon ask a peer now. A peer that does not answer is an answer, not an error."""
        return await self.connection.call("GET", f"/v1/peers/{segment(name)}/health", PeerHealth)

    async def greeting(self) -> PeerGreeting:
        """What the daemon says to a peer. Raises Forbidden to everybody else."""
        return await self.connection.call("GET", "/v1/peer", PeerGreeting)

    async def join(self, request: JoinRequest) -> JoinAnswer:
        """A certificate for who was invited, once. `qmpd pki join` is what does this with care for whom it tells the token."""
        return await self.connection.call("POST", "/v1/pki/join", JoinAnswer, body=request)

    async def revoked(self) -> RevocationView:
        """What the daemon's authority revoked, as far as the daemon knows."""
        return await self.connection.call("GET", "/v1/pki/crl", RevocationView)

    async def audit(self, *, since: str | None = None, machine: str | None = None, who: str | None = None, limit: int = 100) -> AuditPage:
        """Who changed what and who was refused, newest first; `since` is a time with a zone (RFC 3339)."""
        query = {"since": since, "machine": machine, "who": who, "limit": limit}
        return await self.connection.call("GET", "/v1/audit", AuditPage, query=query)
