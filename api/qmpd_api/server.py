"""The listener: a Unix socket of our own, or sockets that systemd passed."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import socket
import ssl
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from aiohttp import web

from qmpd.errors import HostError, Problem, invalid
from qmpd.listeners import FIRST_PASSED, MIGRATION, bound_listeners, passed
from qmpd_api.exchange import LIMITS
from qmpd_api.identity import TRUST
from qmpd_api.peers import PEERS
from qmpd_api.visits import Visit

if TYPE_CHECKING:
    from qmpd.trust import Trust

#: Clients that may wait to be accepted: a herd of shell scripts, while the daemon re-adopts its machines. One that finds the backlog
#: full is refused by the kernel, which asyncio's clients take for a connection.
BACKLOG: Final = 512
#: Who may connect: the daemon's user, and the group where there is one.
OWNER_ONLY: Final = 0o600
OWNER_AND_GROUP: Final = 0o660
MAX_PORT: Final = 65_535
#: A handshake is two round trips; this allows for the other side of the world and a busy host. Who is slower is sent away.
HANDSHAKE_S: Final = 10.0

_log = logging.getLogger(__name__)


@asynccontextmanager
async def serve(app: web.Application, path: str, *, group: str | None = None, mode: int | None = None) -> AsyncIterator[None]:
    """Answers on the Unix socket at `path` while the block runs, and removes it afterwards.

    The socket belongs to `group` where one is named (then with mode 0660, else 0600, unless `mode` says otherwise). What a dead
    daemon left at `path` is replaced. Streams are ended with a reason when the block is left; other requests get a moment.

    Raises:
        AlreadyExists: another daemon listens there, or `path` is not a socket.
        Invalid: the path is too long for a socket.
        HostError: there is no such group, or the daemon may not give the socket to it.
    """
    async with AsyncExitStack() as stack:
        listener = (await stack.enter_async_context(bound_listeners({"api": path})))["api"]
        await stack.enter_async_context(_removed(path))
        await asyncio.to_thread(_hand_over, path, group, mode if mode is not None else OWNER_AND_GROUP if group else OWNER_ONLY)
        await stack.enter_async_context(answering(app, [listener]))
        _log.info("listening", extra={"socket": path, "group": group})
        yield


@asynccontextmanager
async def answering(app: web.Application, listeners: list[socket.socket], *, security: ssl.SSLContext | None = None) -> AsyncIterator[None]:
    """Answers on sockets that are bound already, while the block runs: on Unix sockets, or with `security` over TLS. Closed at its end."""
    loop = asyncio.get_running_loop()
    runner = web.AppRunner(app, shutdown_timeout=app[LIMITS].shutdown_s, handle_signals=False)
    await runner.setup()
    manager = runner.server
    if manager is None:
        raise RuntimeError("a runner that is set up has a server")

    def visit() -> Visit:
        return Visit(manager, loop=loop, limits=app[LIMITS], peers=app[PEERS])

    async with AsyncExitStack() as stack:
        stack.push_async_callback(runner.cleanup)
        for listener in listeners:
            server = await _listening(loop, visit, listener, security)
            stack.callback(server.close)
        yield


def passed_sockets(environ: Mapping[str, str], pid: int, first: int = FIRST_PASSED) -> list[socket.socket]:
    """The listening sockets systemd passed to this very process for the API, from descriptor `first` on; none where it passed none.

    Raises:
        HostError: one of them is not a Unix stream socket. TCP needs TLS, and is not opened by accident.
    """
    with ExitStack() as undo:
        found = []
        for descriptor, name in passed(environ, pid, first).items():
            if name == MIGRATION:
                continue
            listener = undo.enter_context(socket.socket(fileno=descriptor))
            if listener.family != socket.AF_UNIX or listener.type != socket.SOCK_STREAM:
                raise HostError(f"descriptor {descriptor} passed by systemd is not a Unix stream socket")
            found.append(listener)
        undo.pop_all()
        return found


@asynccontextmanager
async def _removed(path: str) -> AsyncIterator[None]:
    """Removes the socket at the end, if it is still the one that is there now."""
    ours = await asyncio.to_thread(os.lstat, path)
    try:
        yield
    finally:
        if not await asyncio.to_thread(_remove, path, ours.st_ino):
            _log.warning("socket was replaced or removed by somebody else", extra={"socket": path})


@asynccontextmanager
async def answering_remotely(app: web.Application, trust: Trust, addresses: Sequence[str]) -> AsyncIterator[tuple[tuple[str, int], ...]]:
    """Answers over TLS at `addresses` (host:port; port 0 takes a free one) while the block runs; yields where.

    Raises:
        Invalid: an address is none of this host's, or its port is taken.
    """
    app[TRUST] = trust
    listeners = [listener for index, address in enumerate(addresses) for listener in await _bound(address, index)]
    async with answering(app, listeners, security=trust.server):
        where = tuple((str(listener.getsockname()[0]), int(listener.getsockname()[1])) for listener in listeners)
        _log.info("listening", extra={"addresses": [f"{host}:{port}" for host, port in where]})
        yield where


async def _bound(address: str, index: int) -> list[socket.socket]:
    """A listening socket at each address that a name stands for."""
    host, _, port = address.rpartition(":")
    if int(port) > MAX_PORT:
        raise invalid([Problem(path=f"listen[{index}]", message=f"cannot listen at {address}: ports end at {MAX_PORT}")])
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        with ExitStack() as undo:
            listeners = []
            for family, _kind, _protocol, _name, where in dict.fromkeys(found):
                listener = undo.enter_context(socket.create_server(where[:2], family=family, backlog=BACKLOG))
                listeners.append(listener)
            undo.pop_all()
            return listeners
    except OSError as error:
        raise invalid([Problem(path=f"listen[{index}]", message=f"cannot listen at {address}: {error}")]) from error


async def _listening(
    loop: asyncio.AbstractEventLoop, visit: Callable[[], Visit], listener: socket.socket, security: ssl.SSLContext | None
) -> asyncio.AbstractServer:
    if security is not None:
        return await loop.create_server(visit, sock=listener, backlog=BACKLOG, ssl=security, ssl_handshake_timeout=HANDSHAKE_S)
    if sys.version_info >= (3, 13):
        # It would remove the path when the server closes, and a socket that was passed is its owner's.
        return await loop.create_unix_server(visit, sock=listener, backlog=BACKLOG, cleanup_socket=False)
    return await loop.create_unix_server(visit, sock=listener, backlog=BACKLOG)


def _remove(path: str, inode: int) -> bool:
    socket_path = Path(path)
    try:
        if socket_path.lstat().st_ino != inode:
            return False
    except FileNotFoundError:
        return False
    socket_path.unlink()
    return True


def _hand_over(path: str, group: str | None, mode: int) -> None:
    try:
        if group is not None:
            shutil.chown(path, group=group)
        Path(path).chmod(mode)
    except LookupError as error:
        raise HostError(f"there is no group {group!r} to give the socket {path} to") from error
    except OSError as error:
        raise HostError(f"cannot give the socket {path} to the group {group!r}: {error.strerror}") from error
