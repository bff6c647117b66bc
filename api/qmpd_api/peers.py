"""Who is at the other end of a connection, and how many connections and requests each may have."""

from __future__ import annotations

import asyncio
import pwd
import socket
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from aiohttp import web

from qmpd import ucred
from qmpd.access import Caller
from qmpd.errors import Busy
from qmpd_api.limits import Limits


class Peers:
    """Counts connections and requests under way against the limits, and remembers user names."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._connections: Counter[int | str | None] = Counter()
        self._refusals: dict[str, tuple[float, float]] = {}
        self._caps = {"changes": limits.changes, "waits": limits.waits, "joins": limits.joins}
        self._under_way: Counter[str] = Counter()
        self._users: dict[int, str | None] = {}

    def admit(self, peer: int | str | None) -> bool:
        """Counts a new connection of this user or address, or says that there are too many."""
        if self._connections.total() >= self._limits.connections or self._connections[peer] >= self._limits.connections_per_peer:
            return False
        self._connections[peer] += 1
        return True

    def leave(self, peer: int | str | None) -> None:
        """The end of a connection that was admitted."""
        self._connections[peer] -= 1
        if not self._connections[peer]:
            del self._connections[peer]

    def refused(self, address: str) -> None:
        """Counts a request without a valid token or certificate."""
        now = asyncio.get_running_loop().time()
        if len(self._refusals) >= self._limits.refusing_addresses:
            self._refusals = {known: entry for known, entry in self._refusals.items() if self._left(entry, now) > 0}
        if len(self._refusals) < self._limits.refusing_addresses or address in self._refusals:
            self._refusals[address] = (self._left(self._refusals.get(address, (0.0, now)), now) + 1.0, now)

    def check_patience(self, address: str) -> None:
        """Raises Busy when so many requests of this address were refused lately that it seems to guess."""
        now = asyncio.get_running_loop().time()
        if self._left(self._refusals.get(address, (0.0, now)), now) >= self._limits.refusals:
            raise Busy("too many requests of this address were refused: wait a minute", limit=self._limits.refusals)

    def _left(self, entry: tuple[float, float], now: float) -> float:
        count, since = entry
        return max(0.0, count - (now - since) * self._limits.refusals / self._limits.refusals_forgotten_s)

    @contextmanager
    def under_way(self, pool: str) -> Iterator[None]:
        """Counts a request; raises Busy when there are as many as may be. The pool "none" has no limit."""
        cap = self._caps.get(pool)
        if cap is not None and self._under_way[pool] >= cap:
            raise Busy(f"{cap} such requests are under way: ask again in a moment", limit=cap)
        self._under_way[pool] += 1
        try:
            yield
        finally:
            self._under_way[pool] -= 1

    async def caller(self, transport: asyncio.BaseTransport | None) -> Caller:
        """The process at the other end of a Unix socket, an admin; nobody in particular where the kernel does not say."""
        credentials = credentials_of(transport)
        if credentials is None:
            return Caller()
        pid, uid, gid = credentials
        return Caller(uid=uid, gid=gid, pid=pid, user=await self._user(uid), role="admin")

    async def _user(self, uid: int) -> str | None:
        if uid not in self._users:
            # A directory service may be asked for the name, over a network.
            self._users[uid] = await asyncio.to_thread(_user_name, uid)
        return self._users[uid]


PEERS: Final = web.AppKey("peers", Peers)


def credentials_of(transport: asyncio.BaseTransport | None) -> tuple[int, int, int] | None:
    """Process, user and group id of the peer of a Unix socket, as they were when it connected; None for other sockets."""
    connection = transport.get_extra_info("socket") if transport is not None else None
    if connection is None or connection.family != socket.AF_UNIX:
        return None
    return ucred.credentials_of(connection)


def address_of(transport: asyncio.BaseTransport | None) -> str | None:
    """The address of the peer of a TCP connection; None for other sockets."""
    connection = transport.get_extra_info("socket") if transport is not None else None
    if connection is None or connection.family not in {socket.AF_INET, socket.AF_INET6}:
        return None
    peer = transport.get_extra_info("peername") if transport is not None else None
    return str(peer[0]) if isinstance(peer, tuple) else "unknown"


def _user_name(uid: int) -> str | None:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return None
