"""Whom this daemon trusts over TLS: its own certificates, the authority's, and what the authority has revoked.

The revocation list is looked at again when its file changes, so that a revoked peer is refused on connections it has already.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from typing import Final

from qmpd.access import ROLES, Caller, Role
from qmpd.emulatorfiles import Stamp, stamp
from qmpd.errors import Forbidden, Unauthorized
from qmpd.peers import Peers
from qmpd.pki import ORGANIZATION
from qmpd.pki.certificates import Unreadable, describe, describe_der, describe_list
from qmpd.pki.context import client_context, server_context
from qmpd.pki.directory import AUTHORITY, REVOKED, SERVER, Pki

#: The roles that a certificate may give, by the word in it.
_ROLES: Final[dict[str, Role]] = {str(role): role for role in ROLES}
#: How often the file of the revocation list is looked at: a revocation takes effect this soon.
LOOK_S: Final = 2.0

_log = logging.getLogger(__name__)


class Trust:
    """The certificates of one directory, loaded. Made by `loaded`."""

    def __init__(self, pki: Pki, server: ssl.SSLContext, client: ssl.SSLContext, names: tuple[str, ...], peers: Peers) -> None:
        self.pki = pki
        self._peers = peers
        self.server = server
        self.client = client
        self.names = names
        self._revoked: frozenset[str] = frozenset()
        self._seen: Stamp | None = None
        self._looked_at = 0.0

    async def caller(self, certificate: bytes, address: str | None) -> Caller:
        """The owner of a certificate (DER) whose chain TLS has verified.

        Raises:
            Unauthorized: it was revoked, or it gives no role.
            Forbidden: it is that of a peer whom the settings do not name.
        """
        await self._look()
        try:
            facts = describe_der(certificate)
        except Unreadable as error:
            raise Unauthorized("this certificate cannot be read") from error
        if facts.serial in self._revoked:
            _log.warning(
                "certificate refused", extra={"certificate": facts.name, "serial": facts.serial, "reason": "revoked", "address": address}
            )
            raise Unauthorized("this certificate was revoked")
        role = _ROLES.get(facts.role) if facts.organization == ORGANIZATION else None
        if role is None:
            raise Unauthorized("this certificate gives no role")
        if role != "peer":
            return Caller(user=f"{role}:{facts.name}", role=role, address=address, credential=facts.serial)
        peer = self._peers.owned_by(facts.name)
        if peer is None:
            _log.warning("peer refused", extra={"certificate": facts.name, "serial": facts.serial, "address": address})
            raise Forbidden(f"{facts.name} is no peer of this daemon", role=role)
        return Caller(user=f"peer:{peer.name}", role=role, address=address, peer=peer.name, credential=facts.serial)

    async def _look(self) -> None:
        now = asyncio.get_running_loop().time()
        if now - self._looked_at < LOOK_S and self._seen is not None:
            return
        self._looked_at = now
        await asyncio.to_thread(self._read)

    def _read(self) -> None:
        seen = stamp(self.pki.directory / REVOKED)
        if seen == self._seen and seen is not None:
            return
        listed, authority = self.pki.read(REVOKED), self.pki.read(AUTHORITY)
        try:
            revoked = describe_list(listed or b"", authority or b"").revoked
        except Unreadable as error:
            # The last good list stays in force: a file that is being replaced must neither open nor close every door.
            _log.error("revocation list cannot be read", extra={"path": str(self.pki.directory / REVOKED), "error": str(error)})
            return
        self._seen, self._revoked = seen, frozenset(revoked)
        for context in (self.server, self.client):
            context.load_verify_locations(str(self.pki.directory / REVOKED))


def loaded(directory: str, peers: Peers) -> Trust:
    """The trust of a directory, and in these peers. Blocks.

    Raises:
        HostError: a file is missing or cannot be used.
    """
    pki = Pki(directory)
    server, client = server_context(pki), client_context(pki)
    return Trust(pki, server, client, describe(pki.read(SERVER[0]) or b"").hosts, peers)
