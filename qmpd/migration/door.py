"""The door to a machine that is awaited: a port of the daemon's, at which the peer says a secret and is led to QEMU.

QEMU's own port would take whoever comes first, and its handshake waits for them with its whole main loop, on both sides: one who
connects and says nothing holds up a destination, and a source whose handshake nobody answers does not run its guest meanwhile. So the
daemons make the connection and hand it to their QEMUs (`getfd`), in a mode in which neither waits; TLS is spoken between the QEMUs, over
that same connection, as ever.

What is said before: the caller sends the secret it was told over the API, and hears the number of a port in two bytes. Zero: this
connection is QEMU's now. Any other: QEMU listens there itself, from this moment on (several connections cannot be handed over).
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import os
import secrets
import socket
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import ExitStack, suppress
from functools import partial
from typing import Final

from qmpd.errors import MigrationFailed
from qmpd.migration.addresses import TcpAddress, TcpRange
from qmpd.migration.ports import Bind, bound, port_of

#: Bytes of a secret.
SECRET_BYTES: Final = 32
#: Who has not said the secret by then does not know it: the peer says it at once.
SAYING_S: Final = 5.0
#: Callers that may be about to say something at a time; one more, and the oldest is turned away.
CALLERS: Final = 32
#: The other daemon answers at once, unless its QEMU does not.
ANSWER_S: Final = 15.0
#: A line that takes nothing for so long is broken (tcp(7): in milliseconds), and one on which nothing was heard after such probes.
SILENT_MS: Final = 60_000
_KEEPALIVE: Final = {socket.TCP_KEEPIDLE: 20, socket.TCP_KEEPINTVL: 10, socket.TCP_KEEPCNT: 4}
_PORT_BYTES: Final = 2

_log = logging.getLogger(__name__)
#: Makes QEMU take a connection, and returns the port at which it listens in place of that, or 0.
Take = Callable[[socket.socket], Awaitable[int]]


class Door:
    """A port at which one peer is awaited, once. `secret` is what it must say; whoever else comes hears nothing, and harms nothing."""

    def __init__(self, listener: socket.socket) -> None:
        self.secret = secrets.token_hex(SECRET_BYTES)
        self.port = port_of(listener)
        self._listener = listener
        self._attending: asyncio.Task[object] | None = None

    def close(self) -> None:
        """Nobody is awaited any more: who attends is cancelled. Idempotent."""
        if self._attending is None:
            self._listener.close()
        else:
            self._attending.cancel()

    async def attend(self, take: Take) -> None:
        """Stays until the peer has come and was led on, or somebody cancels it; closed then.

        Raises:
            QmpdError: QEMU did not take it.
            OSError: the peer was gone again, or the host is out of something.
        """
        self._attending = asyncio.current_task()
        try:
            with self._listener:
                line = await self._peer()
            with line:
                _watched(line)
                port = await take(line)
                await asyncio.get_running_loop().sock_sendall(line, port.to_bytes(_PORT_BYTES, "big"))
        finally:
            self._attending = None

    async def _peer(self) -> socket.socket:
        """The first who says the secret."""
        loop = asyncio.get_running_loop()
        came: asyncio.Queue[socket.socket | OSError] = asyncio.Queue()
        callers: deque[asyncio.Task[None]] = deque()
        try:
            async with asyncio.TaskGroup() as group:
                # Not `sock_accept`, which loses whom it has accepted when it is cancelled in that moment.
                loop.add_reader(self._listener, self._accept, group, callers, came)
                try:
                    first = await came.get()
                finally:
                    loop.remove_reader(self._listener)
                    for task in callers:
                        task.cancel()
        finally:
            while not came.empty():
                if isinstance(late := came.get_nowait(), socket.socket):
                    late.close()
        if isinstance(first, OSError):
            raise first
        return first

    def _accept(self, group: asyncio.TaskGroup, callers: deque[asyncio.Task[None]], came: asyncio.Queue[socket.socket | OSError]) -> None:
        try:
            caller, _ = self._listener.accept()
        except BlockingIOError:
            return  # it is gone again
        except OSError as error:
            came.put_nowait(error)
            return
        caller.setblocking(False)
        while callers and callers[0].done():
            callers.popleft()
        if len(callers) >= CALLERS:
            callers.popleft().cancel()
        task = group.create_task(self._listen_to(caller, came), name=f"door:{self.port}:caller")
        task.add_done_callback(partial(_closed, caller))  # also one that was turned away before it began
        callers.append(task)

    async def _listen_to(self, caller: socket.socket, came: asyncio.Queue[socket.socket | OSError]) -> None:
        said = b""
        with suppress(OSError):  # TimeoutError is one
            async with asyncio.timeout(SAYING_S):
                said = await _exactly(caller, SECRET_BYTES)
        if hmac.compare_digest(said, bytes.fromhex(self.secret)):
            came.put_nowait(caller.dup())
        else:
            _log.warning("a stranger at a migration port was turned away", extra={"port": self.port})


def _closed(caller: socket.socket, _done: asyncio.Task[None]) -> None:
    caller.close()


async def opened(where: TcpRange, bind: Bind = bound) -> Door:
    """A door at a port of the range. Raises as `bind`."""
    return Door(await bind(where))


async def knock(at: TcpAddress, secret: str) -> tuple[socket.socket, int]:
    """A connection to where the peer awaits this host, and the port to go to instead, or 0.

    Raises:
        MigrationFailed: nobody answers there, or not to this secret.
    """
    with ExitStack() as undo:
        try:
            async with asyncio.timeout(ANSWER_S):
                line = undo.enter_context(await _connected(at))
                await asyncio.get_running_loop().sock_sendall(line, bytes.fromhex(secret))
                port = int.from_bytes(await _exactly(line, _PORT_BYTES), "big")
        except OSError as error:  # TimeoutError is one
            number = error.errno or 0  # below 0: one of getaddrinfo(3)
            reason = (os.strerror(number) if number > 0 else error.strerror) or "it was not answered"
            raise MigrationFailed(f"the destination's port {at.port} at {at.host} could not be reached: {reason}") from error
        _watched(line)
        undo.pop_all()
        return line, port


async def _connected(at: TcpAddress) -> socket.socket:
    loop = asyncio.get_running_loop()
    problem = OSError(0, "it has no address")
    for family, kind, protocol, _, address in await loop.getaddrinfo(at.host, at.port, type=socket.SOCK_STREAM):
        with ExitStack() as undo:
            line = undo.enter_context(socket.socket(family, kind, protocol))
            line.setblocking(False)
            try:
                await loop.sock_connect(line, address)
            except OSError as error:
                problem = error
                continue
            undo.pop_all()
            return line
    raise problem


async def _exactly(line: socket.socket, count: int) -> bytes:
    """So many bytes and not one more: what follows is for QEMU."""
    loop = asyncio.get_running_loop()
    said = b""
    while len(said) < count:
        more = await loop.sock_recv(line, count - len(said))
        if not more:
            raise ConnectionResetError(0, "the other end has closed it")
        said += more
    return said


def _watched(line: socket.socket) -> None:
    """Has the kernel break a connection whose other end is gone without a word; QEMU would wait for ever."""
    line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    line.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, SILENT_MS)
    line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _KEEPALIVE.items():
        line.setsockopt(socket.IPPROTO_TCP, option, value)
