"""What the daemon does for its authority: it admits who was invited, tells others what was revoked, and hears it from them."""

from __future__ import annotations

import asyncio
import logging
from datetime import timedelta
from typing import Final

from qmpd.errors import HostError, NotFound, QmpdError, Unauthorized
from qmpd.peering import Peering
from qmpd.peerviews import JoinAnswer, JoinRequest, RevocationView

#: How long a revocation takes from one daemon to the next, at most; an idle daemon asks each peer so often.
ASK_EVERY_S: Final = 60.0
#: A list is made anew when it ends this soon: long before anybody is refused because nobody revoked anything for a year.
ENDS_SOON: Final = timedelta(days=180)

_log = logging.getLogger(__name__)


class Authority:
    """The authority whose certificates are in `pki_dir`. Its key is there on one host only."""

    def __init__(self, pki_dir: str, peering: Peering) -> None:
        self._pki_dir = pki_dir
        self._peering = peering
        self._silent: set[str] = set()
        #: One at a time: whoever has no certificate yet shall not keep all threads busy.
        self._admitting = asyncio.Lock()

    async def join(self, request: JoinRequest, address: str | None) -> JoinAnswer:
        """Admits somebody who was invited, once.

        Raises:
            Unauthorized: the token is not (or not any more) one of this authority's.
            Invalid: the certificate request is none.
            HostError: the daemon's user cannot use the authority's key.
        """
        async with self._admitting:
            return await asyncio.to_thread(self._admitted, request, address)

    async def revoked(self) -> RevocationView:
        """What was revoked. Raises NotFound where there is no authority."""
        return await asyncio.to_thread(self._revoked)

    async def keep_current(self, serving: asyncio.Event) -> None:
        """Asks the peers again and again whether they know a newer list, and makes one that ends soon anew, from when the API is there.

        Ends by being cancelled.
        """
        await serving.wait()
        while True:
            await self.look()
            await asyncio.sleep(ASK_EVERY_S)

    async def look(self) -> None:
        """The same once. What fails is logged."""
        try:
            if await asyncio.to_thread(self._renewed):
                _log.info("revocation list made anew", extra={"directory": self._pki_dir})
        except QmpdError as error:
            _log.warning("revocation list cannot be made anew", extra={"directory": self._pki_dir, "error": error.message})
        for peer in self._peering.peers:
            await self._asked(peer.name)

    async def _asked(self, name: str) -> None:
        from qmpd.pki.certificates import Unreadable  # here: a daemon without peers needs no cryptography

        try:
            heard = await self._peering.revocations(name)
            if await asyncio.to_thread(self._taken, heard):
                _log.warning("revocation list taken", extra={"peer": name, "number": heard.number})
            self._silent.discard(name)
        except (QmpdError, Unreadable) as error:
            if name not in self._silent:  # said once: it may be down for days
                self._silent.add(name)
                _log.info("revocation list not heard", extra={"peer": name, "error": str(error)})

    def _admitted(self, request: JoinRequest, address: str | None) -> JoinAnswer:
        from qmpd.pki.directory import Pki
        from qmpd.pki.invitations import redeem

        try:
            made = redeem(Pki(self._pki_dir), request.token, request.request.encode("utf-8", "surrogatepass"))
        except Unauthorized:
            _log.warning("invitation refused", extra={"address": address})
            raise
        except HostError as error:
            _log.error("nobody can join", extra={"directory": self._pki_dir, "error": error.message})
            raise
        _log.warning("joined", extra={"certificate": made.name, "role": made.role, "address": address})
        return JoinAnswer(
            name=made.name,
            role=made.role,
            certificate=made.certificate.decode(),
            authority=made.authority.decode(),
            revoked=made.revoked.decode(),
        )

    def _revoked(self) -> RevocationView:
        from qmpd.pki.certificates import Unreadable, describe_list
        from qmpd.pki.directory import AUTHORITY, REVOKED, Pki

        pki = Pki(self._pki_dir)
        listed, authority = pki.read(REVOKED), pki.read(AUTHORITY)
        if listed is None or authority is None:
            raise NotFound("this daemon has no certificates, and so no revocation list")
        try:
            return RevocationView(number=describe_list(listed, authority).number, revoked=listed.decode())
        except (Unreadable, UnicodeDecodeError) as error:
            raise HostError(f"the revocation list is damaged: {error}") from error

    def _renewed(self) -> bool:
        from qmpd.pki.directory import AUTHORITY_KEY, Pki

        pki = Pki(self._pki_dir)
        return pki.read(AUTHORITY_KEY) is not None and pki.renew_list(ENDS_SOON)

    def _taken(self, heard: RevocationView) -> bool:
        from qmpd.pki.directory import AUTHORITY_KEY, Pki

        pki = Pki(self._pki_dir)
        # Where the authority's key is, its own list is the last word.
        return pki.read(AUTHORITY_KEY) is None and pki.take_list(heard.revoked.encode("utf-8", "surrogatepass"))
