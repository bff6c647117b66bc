"""The door to a machine that is awaited: a port of the daemon's, at which the peer says a secret and is led to QEMU.

QEMU's own port would take whoever comes first, and its handshake waits for them with its whole main loop, on both sides: one who
connects and says nothing holds up a destination, and a source whose handshake nobody answers does not run its guest meanwhile. So the
daemons make the connection and hand it to their QEMUs (`getfd`), in a mode in which neither waits; TLS is spoken between the QEMUs, over
that same connection, as ever.

What is said before: the caller sends the secret it was told over the API, and hears one byte when QEMU has the connection. All that
follows is between the QEMUs. Where a connection cannot be handed over, the daemons pass on what they say (`qmpd.migration.relays`).
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import os
import secrets
import socket
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, ExitStack, asynccontextmanager, suppress
from functools import partial
from typing import Final

from qmpd.errors import MigrationFailed
from qmpd.migration.addresses import TcpAddress, TcpRange
from qmpd.migration.ports import Bind, bound, port_of
from qmpd.tasks import Tasks, background

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
#: What the peer hears.
_LET_IN: Final = b"\x01"

_log = logging.getLogger(__name__)
#: Makes QEMU take a connection: in the block it has that, and what is said on it after the block is for QEMU.
Take = Callable[[socket.socket], AbstractAsyncContextManager[None]]


class Door:
    """A port at which one peer is awaited. `secret` is what it must say; whoever else comes hears nothing, and harms nothing."""

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

    async def attend(self, take: Take, connections: int = 1) -> None:
        """Stays until the peer has come as often as it has connections, and each was led on, in the order in which they came; or until
        somebody cancels it. Closed then.

        Raises:
            QmpdError: QEMU did not take one.
            OSError: the peer was gone again, or the host is out of something.
        """
        self._attending = asyncio.current_task()
        try:
            with self._listener:
                async with self._heard() as came:
                    for _ in range(connections):
                        with await _next(came) as line:
                            _watched(line)
                            async with take(line):
                                await asyncio.get_running_loop().sock_sendall(line, _LET_IN)
        finally:
            self._attending = None

    @asynccontextmanager
    async def _heard(self) -> AsyncIterator[asyncio.Queue[socket.socket | OSError]]:
        """All who say the secret while the block lasts."""
        loop = asyncio.get_running_loop()
        came: asyncio.Queue[socket.socket | OSError] = asyncio.Queue()
        try:
            async with background() as tasks:
                # Not `sock_accept`, which loses whom it has accepted when it is cancelled in that moment.
                loop.add_reader(self._listener, self._accept, tasks, deque[asyncio.Task[None]](), came)
                try:
                    yield came
                finally:
                    loop.remove_reader(self._listener)
        finally:
            while not came.empty():
                if isinstance(late := came.get_nowait(), socket.socket):
                    late.close()

    def _accept(self, tasks: Tasks, callers: deque[asyncio.Task[None]], came: asyncio.Queue[socket.socket | OSError]) -> None:
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
        task = tasks.start(self._listen_to(caller, came), f"door:{self.port}:caller")
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


async def _next(came: asyncio.Queue[socket.socket | OSError]) -> socket.socket:
    first = await came.get()
    if isinstance(first, OSError):
        raise first
    return first


def _closed(caller: socket.socket, _done: asyncio.Task[None]) -> None:
    caller.close()


async def opened(where: TcpRange, bind: Bind = bound) -> Door:
    """A door at a port of the range. Raises as `bind`."""
    return Door(await bind(where))


async def knock(at: TcpAddress, secret: str) -> socket.socket:
    """A connection to a QEMU, where the peer awaits this host.

    Raises:
        MigrationFailed: nobody answers there, or not to this secret.
    """
    with ExitStack() as undo:
        try:
            async with asyncio.timeout(ANSWER_S):
                line = undo.enter_context(await _connected(at))
                await asyncio.get_running_loop().sock_sendall(line, bytes.fromhex(secret))
                await _exactly(line, len(_LET_IN))
        except OSError as error:  # TimeoutError is one
            number = error.errno or 0  # below 0: one of getaddrinfo(3)
            reason = (os.strerror(number) if number > 0 else error.strerror) or "it was not answered"
            raise MigrationFailed(f"the destination's port {at.port} at {at.host} could not be reached: {reason}") from error
        _watched(line)
        undo.pop_all()
        return line


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
