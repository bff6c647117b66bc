"""Connections that cannot be handed to QEMU: the daemons pass on what goes over them, as it is.

QEMU makes several connections (multifd) itself, and accepts them itself. Measured: told to use `fd:` for them, QEMU 10.0 and 11 refuse, and
7.2 hangs. Nor do they take a socket that somebody bound for them to listen at: whatever is handed to 10.0 and 11 is a connection (7.2
listens if it is told `tcp:fd:NAME`). And a destination whose guest waits for memory with all of QEMU takes nothing in: `getfd` has no
out-of-band form. So in these cases QEMU speaks to a Unix socket in the machine's own directory, on the same host, and between the hosts
are connections of the daemons, each made as all others are: at a door (`qmpd.migration.door`). TLS is spoken between the QEMUs; nobody
could read it here.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Final

from qmpd.errors import QmpdError
from qmpd.migration.addresses import TcpAddress
from qmpd.migration.door import Door, Take, knock
from qmpd.migration.protocol import Channel
from qmpd.migration.tunnel import CHUNK_BYTES, Carry, Meter, entrances, joined
from qmpd.tasks import Tasks

#: The peer comes as soon as it has heard where it is awaited again; if it does not, it asks once more.
AGAIN_S: Final = 60.0

_log = logging.getLogger(__name__)


async def relayed(one: socket.socket, other: socket.socket) -> None:
    """Passes on what either says until both have said all. What breaks is broken on both sides, and so is all when it is cancelled."""
    try:
        async with asyncio.TaskGroup() as both:
            both.create_task(_passed_on(one, other), name="line-out")
            both.create_task(_passed_on(other, one), name="line-in")
    except* OSError as broken:
        _log.info("a line broke", extra={"error": str(broken.exceptions[0])})
    finally:
        for end in (one, other):
            with suppress(OSError):  # it was broken
                end.shutdown(socket.SHUT_RDWR)


async def _passed_on(here: socket.socket, there: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    piece = memoryview(bytearray(CHUNK_BYTES))
    while count := await loop.sock_recv_into(here, piece):
        await loop.sock_sendall(there, piece[:count])
        await asyncio.sleep(0)  # neither of the two waits as long as there is something to do
    there.shutdown(socket.SHUT_WR)


class Relays:
    """The connections that one host's daemon passes on. They last as long as both ends do, or the daemon."""

    def __init__(self, tasks: Tasks) -> None:
        self._tasks = tasks
        #: Who is awaited again, by machine.
        self._again: dict[str, asyncio.Task[None]] = {}

    def _begin(self, one: socket.socket, other: socket.socket, name: str) -> asyncio.Task[None]:
        ends = (one.dup(), other.dup())
        task = self._tasks.start(relayed(*ends), name)
        task.add_done_callback(partial(_closed, ends))  # also of one that was cancelled before it began
        return task

    # At a destination.

    def to(self, path: str, name: str) -> Take:
        """Leads whoever is let in on to the Unix socket at which a machine's QEMU listens. Raises MigrationFailed where it does not."""

        @asynccontextmanager
        async def take(line: socket.socket) -> AsyncIterator[None]:
            with await joined(path) as near:
                yield
                self._begin(near, line, f"relay:{name}")

        return take

    async def await_again(self, machine: str, open_door: Callable[[], Awaitable[Door]], path: str) -> Door:
        """Has the peer led on to the Unix socket when it comes to another door, in place of the one where it was awaited before, whose port
        may be the only one that there is. Raises as `open_door`."""
        if (before := self._again.pop(machine, None)) is not None:
            before.cancel()
            await asyncio.wait([before])
        door = await open_door()
        task = self._again[machine] = self._tasks.start(self._awaited_again(door, path, machine), f"again:{machine}")
        task.add_done_callback(lambda _: door.close())
        return door

    async def _awaited_again(self, door: Door, path: str, machine: str) -> None:
        try:
            async with asyncio.timeout(AGAIN_S):
                await door.attend(self.to(path, machine))
        except (QmpdError, OSError) as error:  # TimeoutError is one; the source asks again
            _log.warning("the peer was not led to QEMU again", extra={"machine": machine, "error": str(error)})
        finally:
            if self._again.get(machine) is asyncio.current_task():
                del self._again[machine]

    # At a source.

    @asynccontextmanager
    async def entrance(self, path: str, pid: int, at: TcpAddress, secret: str, meter: Meter) -> AsyncIterator[None]:
        """A Unix socket at which the QEMU with this process id, and nobody else, reaches the peer, as long as the block lasts.

        Connections that were made outlast it, if it does not fail: QEMU says the last word on them when it has sent all. `meter` says
        what was wrong, if anything was.
        """
        begun: list[asyncio.Task[None]] = []

        @asynccontextmanager
        async def lead(_channel: Channel) -> AsyncIterator[Carry]:
            with await knock(at, secret) as line:

                async def carry(connection: socket.socket) -> None:
                    begun.append(self._begin(connection, line, f"relay:{at.port}"))

                yield carry

        async with entrances({"memory": path}, pid, lead, meter):
            try:
                yield
            except BaseException:
                for task in begun:
                    task.cancel()
                raise


def _closed(ends: tuple[socket.socket, ...], _done: asyncio.Task[None]) -> None:
    for end in ends:
        end.close()
