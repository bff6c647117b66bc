"""Connections of QEMU's between two daemons, each through a WebSocket: the data of a migration where no other port is open.

A tunnel is quiet for as long as QEMU is, and full for as long as the other QEMU does not read: neither is a reason to cut it. A host
that is gone is noticed by TCP itself.
"""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import aiohttp
from aiohttp import WSMsgType, web

from qmpd.migration.protocol import Channel
from qmpd.migration.tunnel import CHUNK_BYTES, carry
from qmpd_api import sockets
from qmpd_api.connection import Connection, segment, url
from qmpd_api.exchange import Call
from qmpd_api.queries import TunnelQuery
from qmpd_api.streams_client import websocket

PROTOCOL: Final = "qmpd.tunnel.v1"
#: aiohttp counts the frame with the message.
MESSAGE_BYTES: Final = CHUNK_BYTES + 1024
#: After so many seconds without a byte the kernel asks the other host whether it is still there, and again, and gives up.
KEEPALIVE: Final = {socket.TCP_KEEPIDLE: 20, socket.TCP_KEEPINTVL: 10, socket.TCP_KEEPCNT: 3}


class TunnelStream:
    """A WebSocket of either side as a `qmpd.peers.Stream`."""

    def __init__(self, opened: web.WebSocketResponse | aiohttp.ClientWebSocketResponse) -> None:
        self._socket = opened
        connection = opened.get_extra_info("socket")
        if connection is not None and connection.family in {socket.AF_INET, socket.AF_INET6}:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in KEEPALIVE.items():
                connection.setsockopt(socket.IPPROTO_TCP, option, value)

    async def send(self, data: bytes) -> None:
        """See `qmpd.peers.Stream`."""
        await self._socket.send_bytes(data)

    async def receive(self) -> bytes:
        """See `qmpd.peers.Stream`."""
        message = await self._socket.receive()
        if message.type is WSMsgType.BINARY and isinstance(message.data, bytes):
            return message.data
        raise ConnectionResetError(f"the other host closed the tunnel {message.extra or ''}".rstrip())


async def tunnel(request: web.Request, call: Call[None, TunnelQuery]) -> web.StreamResponse:
    """Lead a connection of a peer's QEMU on to the one that waits here."""
    sockets.check_opening(request, PROTOCOL)  # QEMU takes one connection, and must not get one that is none
    async with (
        call.service.migration.tunnelled(call.caller, call.id, call.query.channel) as (near, meter),
        sockets.opened(request, PROTOCOL, message_bytes=MESSAGE_BYTES, heartbeat=False) as opened,
    ):
        await carry(near, TunnelStream(opened), meter)
    return opened


@asynccontextmanager
async def dug(connection: Connection, migration: str, channel: Channel) -> AsyncIterator[TunnelStream]:
    """A tunnel to a peer's QEMU that waits for this. Raises PeerError."""
    address = url(f"/v1/peer/migrations/{segment(migration)}/tunnel", {"channel": channel})
    async with websocket(connection, address, PROTOCOL, heartbeat_s=None, message_bytes=MESSAGE_BYTES) as opened:
        yield TunnelStream(opened)
