"""This daemon among others: what it says to a peer, and whether its peers answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from datetime import datetime
from typing import Final

from qmpd import __version__
from qmpd.access import Caller
from qmpd.errors import HostError, PeerError, PeerSilent, PeerUnavailable
from qmpd.journal import timestamp, utc_now
from qmpd.peers import Dial, PeerDaemon, Peers
from qmpd.peerviews import PeerGreeting, PeerHealth, PeerView, RevocationView
from qmpd.settings import Peer

#: A greeting is four round trips with the handshake and no work: who needs longer is of no use for a migration.
HEALTH_S: Final = 10.0
#: Peers that are asked at a time; each costs a connection and a handshake.
ASKED_AT_ONCE: Final = 8


def nowhere(peer: Peer) -> AbstractAsyncContextManager[PeerDaemon]:
    """The `Dial` of a daemon that was given no way to reach others."""
    raise PeerUnavailable(f"this daemon has no way to reach {peer.name}", peer=peer.name)


class Peering:
    """The peers of this daemon, and how they are reached."""

    def __init__(self, peers: Peers, dial: Dial = nowhere, now: Callable[[], datetime] = utc_now) -> None:
        self.peers = peers
        self.dial = dial
        self._now = now
        self._turns = asyncio.Semaphore(ASKED_AT_ONCE)

    def list(self) -> tuple[PeerView, ...]:
        """The peers by name, as the settings have them. Nobody is asked."""
        return tuple(
            PeerView(
                name=peer.name,
                url=peer.url,
                certificate=peer.owner,
                may_send=peer.may_send,
                may_receive=peer.may_receive,
                migration_address=peer.migration_address or peer.host,
            )
            for peer in self.peers
        )

    def greet(self, caller: Caller) -> PeerGreeting:
        """What this daemon says to a peer that asks. Raises Forbidden to everybody else."""
        peer = self.peers.asking(caller)
        return PeerGreeting(
            version=__version__, peer=peer.name, may_send=peer.may_send, may_receive=peer.may_receive, time=timestamp(self._now())
        )

    async def health(self, name: str) -> PeerHealth:
        """Asks a peer now. That it does not answer is an answer here. Raises NotFound."""
        peer = self.peers.get(name)
        try:
            async with self._turns, asyncio.timeout(HEALTH_S):
                return await self._asked(peer)
        except TimeoutError:
            return _absent(peer, "peer_silent", f"no answer within {HEALTH_S:g} s")
        except (PeerError, HostError) as error:
            return _absent(peer, error.code, error.message)

    async def revocations(self, name: str) -> RevocationView:
        """What a peer knows of revocations. Raises PeerError, HostError without certificates, NotFound."""
        peer = self.peers.get(name)
        try:
            async with self._turns, asyncio.timeout(HEALTH_S), self.dial(peer) as daemon:
                return await daemon.revoked()
        except TimeoutError as error:
            raise PeerSilent(f"{name} did not answer within {HEALTH_S:g} s", peer=name) from error

    async def _asked(self, peer: Peer) -> PeerHealth:
        async with self.dial(peer) as daemon:
            await daemon.greeting()  # with it the handshake: the next one measures the way alone
            asked, before = self._now(), asyncio.get_running_loop().time()
            greeting = await daemon.greeting()
            took = asyncio.get_running_loop().time() - before
            shown = daemon.shown
        return PeerHealth(
            name=peer.name,
            url=peer.url,
            reachable=True,
            greeting=greeting,
            certificate=shown,
            round_trip_ms=round(took * 1000, 3),
            clock_ahead_s=_ahead(greeting.time, asked, took / 2),
        )


def _absent(peer: Peer, code: str, problem: str) -> PeerHealth:
    return PeerHealth(name=peer.name, url=peer.url, reachable=False, code=code, problem=problem)


def _ahead(said: str, asked: datetime, way_s: float) -> float | None:
    try:
        return round((datetime.fromisoformat(said) - asked).total_seconds() - way_s, 3)
    except (ValueError, TypeError):  # a peer may say anything; TypeError: a time without a zone
        return None
