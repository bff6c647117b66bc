"""The ports at which machines of peers are awaited. The daemon binds each itself, and keeps it or hands it to QEMU: between finding a port
that is free and listening at it nobody else can get it."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from typing import Final, TypeAlias

from qmpd.errors import MigrationFailed
from qmpd.migration.addresses import TcpRange
from qmpd.shortage import shortage

#: Callers that may wait until somebody accepts them.
BACKLOG: Final = 32

#: Gives a listening socket, which is the caller's.
Bind: TypeAlias = Callable[[TcpRange], Awaitable[socket.socket]]


async def bound(where: TcpRange) -> socket.socket:
    """A listening socket at the first port of the range that is free.

    Raises:
        MigrationFailed: none is, or the address is none of this host's.
        Busy: the host is out of descriptors or memory.
    """
    loop = asyncio.get_running_loop()
    problem = "no port of the range is free"
    for port in range(where.first, where.last + 1):
        try:
            found = await loop.getaddrinfo(where.host, port, type=socket.SOCK_STREAM)
            return _listening(*found[0])
        except OSError as error:
            if (short := shortage(error)) is not None:
                raise short from error
            problem = error.strerror or str(error)
    raise MigrationFailed(f"the peer cannot be awaited at {where.host}, ports {where.first} to {where.last}: {problem}")


def port_of(listener: socket.socket) -> int:
    """The port at which somebody listens."""
    return int(listener.getsockname()[1])


def _listening(family: int, kind: int, protocol: int, _name: str, address: tuple[object, ...]) -> socket.socket:
    with ExitStack() as undo:
        listener = undo.enter_context(socket.socket(family, kind, protocol))
        listener.setblocking(False)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
        undo.pop_all()
        return listener
