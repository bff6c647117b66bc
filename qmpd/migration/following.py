"""Memory that follows a guest which runs at its destination already (postcopy), until all of it is there.

Neither side has a whole guest meanwhile: its owner is the destination, and the source's QEMU only gives what it still has. A connection
that breaks is made anew, by the daemons, as the first one was. Where the destination's QEMU ends, the guest has crashed there, and what
the source has left is of no use.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Final

from qmpd.errors import MigrationFailed, QmpdError
from qmpd.lifecycle import AT_REST
from qmpd.machine import Machine
from qmpd.migration.addresses import TcpAddress
from qmpd.migration.door import knock
from qmpd.migration.progress import POSTCOPY, Progress
from qmpd.migration.qemu import HANDED, PREFIX, Qemu, ask_map
from qmpd.migration.watch import watching

#: A link that is down is not noticed by TCP for many minutes: who has got nothing for so long gives the connection up, and joins anew.
STALL_S: Final = 30.0
#: A destination that cannot be joined yet is asked again this often.
AGAIN_S: Final = 1.0
#: Memory goes on as soon as the ends are connected, and QEMU does not say when they cannot be.
RESUME_LIMIT_S: Final = 15.0
#: QEMU's words for a source that is not connected again yet.
_APART: Final = frozenset({None, "postcopy-paused", "postcopy-recover-setup"})

_log = logging.getLogger(__name__)
#: Where this host is awaited again, and the secret that opens there; None when there is nobody left to follow.
Rejoin = Callable[[], Awaitable[tuple[TcpAddress, str] | None]]


async def is_halfway(machine: Machine) -> bool:
    """Whether a part of the guest is elsewhere already. False for a machine at rest. Raises as `Monitor.execute`, and MonitorUnavailable
    for a process that was not taken over yet."""
    if machine.state in AT_REST:
        return False
    return (await ask_map(machine.session, "query-migrate")).get("status") in POSTCOPY


async def follow(machine: Machine, rejoin: Rejoin) -> None:
    """Returns when all memory has followed, or there is nobody left to follow, or this QEMU has ended."""
    while machine.state not in AT_REST:
        try:
            if await _followed(machine):
                return
            place = await rejoin()
            if place is None:
                return
            await resume(machine.session, *place)
        except QmpdError as error:
            _log.warning("memory does not follow its guest at the moment", extra={"machine": machine.name, "error": error.message})
            await machine.until(AT_REST, AGAIN_S)


async def resume(qemu: Qemu, at: TcpAddress, secret: str) -> None:
    """In postcopy, after the connection was lost: goes on at a destination where it is awaited again (`incoming.recover`).

    Raises:
        MigrationFailed: the destination could not be reached; both ends wait on.
        QemuRefused: this QEMU does not wait for that.
    """
    with watching(qemu) as watch, await knock(at, secret) as line:
        await qemu.hand(PREFIX, line)
        await qemu.execute("migrate", {"uri": HANDED, "resume": True})
        try:
            async with asyncio.timeout(RESUME_LIMIT_S):
                while await watch.next() in _APART:
                    pass
        except TimeoutError as error:
            with suppress(OSError):  # a QEMU that waits for the other one's answer waits no longer
                line.shutdown(socket.SHUT_RDWR)
            raise MigrationFailed(f"the destination's QEMU did not answer within {RESUME_LIMIT_S:g} s") from error


async def _followed(machine: Machine) -> bool:
    """Waits until all has followed (True), or the connection is lost or of no use any more (False)."""
    loop = asyncio.get_running_loop()
    with watching(machine.session) as watch:
        seen, since = Progress(), loop.time()
        while (status := await watch.next()) not in {"completed", "postcopy-paused"}:
            if status in {"failed", "cancelled"}:
                return False
            if watch.progress != seen:
                seen, since = watch.progress, loop.time()
            elif loop.time() - since > STALL_S:
                with suppress(QmpdError):
                    await machine.session.execute_oob("migrate-pause")
                since = loop.time()
    return status == "completed"
