"""The data of a migration through the connection of the daemons, where no other port is open between the hosts.

QEMU speaks to Unix sockets on both hosts: at the source to one of the daemon's, at the destination the daemon connects to one of
QEMU's. Each connection of QEMU's goes through one stream between the daemons (`qmpd.peers.Stream`), which is encrypted there.

Rules:

* What has been taken from one side and not been given to the other yet is little (`CHUNK_BYTES` and the buffers of one connection): a
  side that does not read stops the one that writes, through both daemons, and nobody else.
* Who has said all may still hear. What breaks is broken on both sides: QEMU notices, and so the migration fails, and nothing hangs.
* Connections are led on in the order in which QEMU made them: until QEMU 8.0 a destination takes the first for the main one.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, ExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Final, TypeAlias

from qmpd.errors import MigrationFailed, QmpdError
from qmpd.listeners import bound_listeners
from qmpd.migration.protocol import Channel
from qmpd.peers import Stream
from qmpd.tasks import alongside
from qmpd.ucred import credentials_of

#: What is passed on at a time. Larger pieces cost no less (measured), smaller ones more.
CHUNK_BYTES: Final = 256 * 1024
#: Of what QEMU has written, so much is read ahead: with one read of the loop's beyond it, below half a MiB.
_AHEAD_BYTES: Final = 64 * 1024
#: A QEMU that waits for its state accepts at once, unless its main loop is blocked.
REACH_S: Final = 10.0
#: A queue of connections that is full is looked at again: the kernel does not say when there is room (connect(2), EAGAIN).
_LOOK_S: Final = 0.05

_log = logging.getLogger(__name__)
Near: TypeAlias = tuple[asyncio.StreamReader, asyncio.StreamWriter]
#: Opens a stream to the other host for a connection of QEMU's to this channel. Raises PeerError.
Dial: TypeAlias = Callable[[Channel], AbstractAsyncContextManager[Stream]]
#: Passes on what goes over a connection of QEMU's.
Carry: TypeAlias = Callable[[socket.socket], Awaitable[object]]
#: Opens the way to the other host for a connection of QEMU's to this channel. Raises QmpdError.
Lead: TypeAlias = Callable[[Channel], AbstractAsyncContextManager[Carry]]


class Meter:
    """What went through `way` in one migration: bytes in each direction, connections, and what was wrong last."""

    def __init__(self, way: str = "the tunnel") -> None:
        self.way = way
        self.sent = self.received = self.connections = 0
        self.problem = ""


def tunnelling(dial: Dial, meter: Meter) -> Lead:
    """Leads connections through a tunnel."""

    @asynccontextmanager
    async def lead(channel: Channel) -> AsyncIterator[Carry]:
        async with dial(channel) as stream:

            async def through(connection: socket.socket) -> bool:
                return await carry(await asyncio.open_unix_connection(sock=connection, limit=_AHEAD_BYTES), stream, meter)

            yield through

    return lead


async def carry(near: Near, stream: Stream, meter: Meter) -> bool:
    """Passes on what either side says until both have said all, or one of them is gone. Whether all of it got through."""
    reader, writer = near
    whole = True
    try:
        async with asyncio.TaskGroup() as both:
            both.create_task(_outward(reader, stream, meter), name="tunnel-out")
            both.create_task(_inward(stream, writer, meter), name="tunnel-in")
    except* OSError as broken:
        whole = False
        meter.problem = meter.problem or str(broken.exceptions[0]) or type(broken.exceptions[0]).__name__
    finally:
        writer.transport.abort()
    return whole


async def _outward(reader: asyncio.StreamReader, stream: Stream, meter: Meter) -> None:
    while data := await reader.read(CHUNK_BYTES):
        await stream.send(data)
        meter.sent += len(data)
    await stream.send(b"")


async def _inward(stream: Stream, writer: asyncio.StreamWriter, meter: Meter) -> None:
    writer.transport.set_write_buffer_limits(high=0)  # what the kernel does not take stops the other side
    while data := await stream.receive():
        writer.write(data)
        await writer.drain()
        meter.received += len(data)
    with suppress(OSError):  # QEMU may have closed it altogether
        writer.write_eof()


@asynccontextmanager
async def reached(path: str) -> AsyncIterator[Near]:
    """A connection to a Unix socket at which QEMU listens.

    Raises:
        MigrationFailed: it does not, or not any more.
    """
    with await joined(path) as connection:
        reader, writer = await asyncio.open_unix_connection(sock=connection, limit=_AHEAD_BYTES)
        try:
            yield reader, writer
        finally:
            writer.transport.abort()


async def joined(path: str) -> socket.socket:
    """A connection to a Unix socket at which QEMU listens. Raises as `reached`."""
    with ExitStack() as undo:
        connection = undo.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        connection.setblocking(False)
        try:
            async with asyncio.timeout(REACH_S):
                while True:
                    if _connected(connection, path):
                        break
                    await asyncio.sleep(_LOOK_S)
        except (OSError, TimeoutError) as error:
            raise MigrationFailed(f"QEMU does not listen for what is led on to it: {str(error) or 'it is busy'}") from error
        undo.pop_all()
        return connection


def _connected(connection: socket.socket, path: str) -> bool:
    try:
        connection.connect(path)
    except BlockingIOError:
        return False
    return True


@asynccontextmanager
async def entrances(paths: Mapping[Channel, str], pid: int, lead: Lead, meter: Meter) -> AsyncIterator[None]:
    """Unix sockets at which the QEMU with this process id, and nobody else, reaches the other host, while the block lasts.

    Raises what `bound_listeners` raises.
    """
    async with bound_listeners({str(channel): path for channel, path in paths.items()}) as listeners:
        try:
            async with alongside(_attend({channel: listeners[channel] for channel in paths}, pid, lead, meter), "entrances"):
                yield
        finally:
            await asyncio.to_thread(_remove, tuple(paths.values()))


def _remove(paths: tuple[str, ...]) -> None:
    for path in paths:
        Path(path).unlink(missing_ok=True)


async def _attend(listeners: Mapping[Channel, socket.socket], pid: int, lead: Lead, meter: Meter) -> None:
    async with asyncio.TaskGroup() as all_of_them:
        for channel, listener in listeners.items():
            listener.setblocking(False)
            all_of_them.create_task(_admit(listener, channel, pid, lead, meter), name=f"entrance:{channel}")


async def _admit(listener: socket.socket, channel: Channel, pid: int, lead: Lead, meter: Meter) -> None:
    loop = asyncio.get_running_loop()
    async with asyncio.TaskGroup() as carrying:
        while True:
            connection, _ = await loop.sock_accept(listener)
            caller, _, _ = credentials_of(connection)
            if caller != pid:
                _log.warning("a stranger at an entrance was turned away", extra={"pid": caller, "qemu": pid})
                connection.close()
                continue
            meter.connections += 1
            open_or_not = asyncio.Event()
            name = f"entrance:{channel}:{meter.connections}"
            carrying.create_task(_lead_on(connection, channel, lead, meter, open_or_not.set), name=name)
            await open_or_not.wait()  # before the next one, so that they stay in their order


async def _lead_on(connection: socket.socket, channel: Channel, lead: Lead, meter: Meter, settled: Callable[[], None]) -> None:
    with connection:
        try:
            async with lead(channel) as through:
                settled()
                await through(connection)
        except QmpdError as error:
            meter.problem = error.message
        finally:
            settled()


async def explained(work: Awaitable[None], meter: Meter | None) -> None:
    """Awaits a part of a migration, through a tunnel maybe; its failure says what was wrong with the way, if anything was."""
    try:
        await work
    except MigrationFailed as error:
        if meter is not None and meter.problem:
            raise MigrationFailed(f"{error.message} ({meter.way}: {meter.problem})", **error.details) from error
        raise
