"""The connections of a daemon to its peers: mutual TLS, and nobody but the peer that was meant at the other end."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import UTC
from typing import Final

from qmpd.journal import timestamp
from qmpd.migration.protocol import Channel
from qmpd.peerviews import PeerCertificate
from qmpd.pki import ORGANIZATION
from qmpd.settings import Peer
from qmpd_api.client import Client
from qmpd_api.connection import Remote, failures_of_peer
from qmpd_api.tunnels import TunnelStream, dug

_ROLE: Final = "peer"
#: The number that OpenSSL has for every failure of its own (SSL_ERROR_SSL).
_REFUSED: Final = 1


class PeerClient(Client):
    """A client of a peer. Made by `dialled`; raises PeerUnavailable, PeerRefused and PeerSilent."""

    def __init__(self, peer: Peer, pki_dir: str) -> None:
        self._peer = peer
        self._pki_dir = pki_dir
        self.shown: PeerCertificate | None = None
        super().__init__(Remote(address=peer.address, pki_dir=pki_dir), failures=failures_of_peer(peer.name))

    async def __aenter__(self) -> PeerClient:
        context = await asyncio.to_thread(self._context)
        self.target = Remote(address=self._peer.address, pki_dir=self._pki_dir, context=context)
        return await super().__aenter__()

    def _context(self) -> ssl.SSLContext:
        from qmpd.pki.context import client_context, pinned  # here: most daemons have no peers, and need no cryptography
        from qmpd.pki.directory import Pki

        return pinned(client_context(Pki(self._pki_dir)), self._check)

    def _check(self, certificate: bytes) -> None:
        """TLS has verified the chain and the name of the host; this, that the host is the peer."""
        from qmpd.pki.certificates import Unreadable, describe_der

        try:
            facts = describe_der(certificate)
        except Unreadable as error:
            raise ssl.SSLCertVerificationError(_REFUSED, str(error)) from error
        self.shown = PeerCertificate(
            name=facts.name, role=facts.role, expires_at=timestamp(facts.not_after.astimezone(UTC)), fingerprint=facts.fingerprint
        )
        if (facts.organization, facts.role, facts.name) != (ORGANIZATION, _ROLE, self._peer.owner):
            raise ssl.SSLCertVerificationError(_REFUSED, f"it is {facts.role}:{facts.name}, not {_ROLE}:{self._peer.owner}")

    def tunnel(self, migration: str, channel: Channel) -> AbstractAsyncContextManager[TunnelStream]:
        """A stream to where its QEMU waits for this."""
        return dug(self.connection, migration, channel)


@asynccontextmanager
async def dialled(peer: Peer, pki_dir: str) -> AsyncIterator[PeerClient]:
    """A client of `peer` that shows the certificate in `pki_dir`. Nothing is sent before the first question.

    Raises:
        HostError: the certificates are missing or cannot be used.
    """
    async with PeerClient(peer, pki_dir) as client:
        yield client
