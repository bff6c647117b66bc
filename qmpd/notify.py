"""What a service manager is told: that the daemon is ready, that it ends, and that its event loop turns (sd_notify(3)).

The manager passes the address of a datagram socket in the environment. Where there is none, nothing is sent.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, MutableMapping
from contextlib import asynccontextmanager
from typing import Final

import msgspec

from qmpd.tasks import alongside

#: A manager reads its datagrams at once; one that does not for this long is not waited for.
SEND_DEADLINE_S: Final = 5.0

_log = logging.getLogger(__name__)


class Manager(msgspec.Struct, frozen=True, kw_only=True):
    """Where the service manager listens, if there is one, and how often it is told that the daemon lives, if it cares."""

    address: str | None = None
    ping_s: float | None = None

    async def tell(self, *assignments: str) -> None:
        """Sends one message, such as `READY=1`. A manager that cannot be reached is logged: that ends no daemon."""
        if self.address is None:
            return
        try:
            async with asyncio.timeout(SEND_DEADLINE_S):
                await _send(self.address, "\n".join(assignments).encode())
        except OSError as error:  # TimeoutError too
            _log.warning("service manager not told", extra={"told": assignments[0], "error": str(error) or "not in time"})


def taken_from(environ: MutableMapping[str, str], pid: int) -> Manager:
    """The manager that started the process `pid`. Its variables are removed, so that no child takes them for its own."""
    address = environ.pop("NOTIFY_SOCKET", None)
    interval = environ.pop("WATCHDOG_USEC", "")
    watched = environ.pop("WATCHDOG_PID", str(pid))
    if address is not None and address[:1] not in {"/", "@"}:
        _log.warning("service manager of an unknown kind", extra={"address": address})
        address = None
    # isdigit() alone takes digits that int() does not.
    microseconds = int(interval) if interval.isascii() and interval.isdigit() and watched == str(pid) else 0
    return Manager(address=address, ping_s=microseconds / 2 / 1_000_000 or None)


@asynccontextmanager
async def announced(manager: Manager, status: str) -> AsyncIterator[None]:
    """Tells the manager that the daemon is ready, and at the end of the block that it stops.

    In between the event loop pings it, twice in the time it allows: a loop that is blocked for that long is missed.
    """
    await manager.tell("READY=1", f"STATUS={status}")
    try:
        async with alongside(_ping(manager), "watchdog"):
            yield
    finally:
        await manager.tell("STOPPING=1", "STATUS=ending; machines go on")


async def _ping(manager: Manager) -> None:
    if manager.address is None or manager.ping_s is None:
        return
    while True:
        await manager.tell("WATCHDOG=1")
        await asyncio.sleep(manager.ping_s)


async def _send(address: str, message: bytes) -> None:
    # A socket for each message: a manager that is started anew listens on a new one at the same address.
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.setblocking(False)
        sock.connect("\0" + address[1:] if address.startswith("@") else address)
        await asyncio.get_running_loop().sock_sendall(sock, message)
