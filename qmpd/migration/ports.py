"""The ports at which machines of peers are awaited. The daemon binds each itself, and keeps it or hands it to QEMU: between finding a port
that is free and listening at it nobody else can get it."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Final, TypeAlias

from qmpd.errors import HostError, MigrationFailed
from qmpd.hostprocess import qemu_sockets
from qmpd.listeners import FIRST_PASSED, MIGRATION, passed
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


def passed_ports(environ: Mapping[str, str], pid: int, first: int = FIRST_PASSED) -> list[socket.socket]:
    """The listening sockets that systemd passed to this very process for machines of peers.

    Raises:
        HostError: one of them is none, or is no TCP socket.
    """
    with ExitStack() as undo:
        found = []
        for descriptor, name in passed(environ, pid, first).items():
            if name != MIGRATION:
                continue
            listener = undo.enter_context(socket.socket(fileno=descriptor))
            tcp = listener.family in {socket.AF_INET, socket.AF_INET6} and listener.type == socket.SOCK_STREAM
            if not tcp or not listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                raise HostError(f"descriptor {descriptor}, which systemd passed for migrations, is no TCP socket that listens")
            found.append(listener)
        undo.pop_all()
        return found


class Ports:
    """Where machines of peers are awaited: at sockets that were passed to the daemon, each by one at a time, or where it binds itself.

    QEMU gets a copy of the very socket, and takes whoever comes there as long as it has that: before 8.2 as long as it lives. So a socket
    is free when no QEMU has it, which the kernel is asked, whichever daemon gave it away.
    """

    def __init__(self, listeners: Sequence[socket.socket] = ()) -> None:
        self._listeners = {os.fstat(listener.fileno()).st_ino: listener for listener in listeners}
        self._lent: set[int] = set()

    async def bound(self, where: TcpRange) -> socket.socket:
        """A listening socket that nobody else uses: one that was passed, or where none was, at a port of the range.

        Raises:
            MigrationFailed: there is none.
            Busy: the host is out of descriptors or memory.
        """
        if not self._listeners:
            return await bound(where)
        # Before the kernel is asked: one that is being given to a QEMU now is not seen there yet.
        idle = [inode for inode in self._listeners if inode not in self._lent]
        held = await asyncio.to_thread(qemu_sockets)
        for inode in idle:
            if inode not in held and inode not in self._lent:
                lent = _Lent(os.dup(self._listeners[inode].fileno()), partial(self._lent.discard, inode))
                self._lent.add(inode)
                return lent
        raise MigrationFailed(f"all {len(self._listeners)} sockets that were passed for migrations are in use")


class _Lent(socket.socket):
    """A copy of a socket that was passed; when it is closed, the next one may have it."""

    def __init__(self, descriptor: int, give_back: Callable[[], None]) -> None:
        super().__init__(fileno=descriptor)
        self.setblocking(False)
        self._give_back = give_back

    def close(self) -> None:
        """Gives it back. Idempotent."""
        super().close()
        self._give_back()


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
