"""systemd's manager over D-Bus: scopes around processes, and processes put into a service's delegated cgroups.

A connection is made for one errand and closed after it: a daemon whose machines have no limits never makes one, and does not even
load the library. `begin` connects beside whatever else is done.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

import msgspec

from qmpd.errors import HostError

if TYPE_CHECKING:
    from dbus_fast import Message
    from dbus_fast.aio import MessageBus

NAME: Final = "org.freedesktop.systemd1"
PATH: Final = "/org/freedesktop/systemd1"
BUS: Final = "org.freedesktop.DBus"
MANAGER: Final = "org.freedesktop.systemd1.Manager"
UNIT_EXISTS: Final = "org.freedesktop.systemd1.UnitExists"
#: What systemd tells its subscribers of jobs and units, and nothing else.
SIGNALS: Final = f"type='signal',sender='{NAME}',interface='{MANAGER}',path='{PATH}'"
#: systemd answers within milliseconds; on a host that boots with a hundred machines it has more to do.
ANSWER_LIMIT_S: Final = 20.0
#: A scope is removed when its last process has ended: systemd is told by the kernel, and does it at once unless it is busy.
GONE_LIMIT_S: Final = 5.0


class Property(msgspec.Struct, frozen=True):
    """A property of a unit: its name, its D-Bus signature, and its value."""

    name: str
    signature: str
    value: object


class Refused(HostError):
    """systemd answered with an error; details carry its `error`."""


class Systemd:
    """One connection with a manager of systemd. All that it raises is a HostError that says what was tried."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._connecting: asyncio.Task[MessageBus] | None = None
        self._results: dict[str, str] = {}
        self._removed: set[str] = set()
        self._heard = asyncio.Event()

    def begin(self) -> None:
        """Start to connect, without waiting for it."""
        if self._connecting is None:
            self._connecting = asyncio.create_task(self._connect(), name="systemd:connect")

    async def close(self) -> None:
        """Let go of the connection."""
        if self._connecting is None:
            return
        self._connecting.cancel()
        await asyncio.wait([self._connecting])
        if not self._connecting.cancelled() and self._connecting.exception() is None:
            self._connecting.result().disconnect()

    async def version(self) -> str:
        """Which systemd it is."""
        answer = await self._call("Get", "ss", [MANAGER, "Version"], interface="org.freedesktop.DBus.Properties")
        return str(getattr(answer, "value", answer))

    async def start_scope(self, unit: str, properties: Sequence[Property]) -> None:
        """Start a transient scope; returns when it is there. An old one of this name that is about to vanish is waited for.

        Raises:
            HostError: systemd refused it, did not answer, or another unit has the name.
        """
        try:
            await self._start_scope(unit, properties)
        except Refused as error:
            if error.details.get("error") != UNIT_EXISTS:
                raise
            with contextlib.suppress(TimeoutError):
                await self._until(lambda: unit in self._removed, GONE_LIMIT_S)
            await self._start_scope(unit, properties)

    async def attach(self, unit: str, directory: str, pid: int) -> None:
        """Put a process into a directory below the cgroup of a service with Delegate=, whose user is ours. Raises HostError."""
        await self._call("AttachProcessesToUnit", "ssau", [unit, directory, [pid]])

    async def _start_scope(self, unit: str, properties: Sequence[Property]) -> None:
        from dbus_fast import Variant

        given = [[item.name, Variant(item.signature, item.value)] for item in properties]
        job = str(await self._call("StartTransientUnit", "ssa(sv)a(sa(sv))", [unit, "fail", given, []]))
        try:
            await self._until(lambda: job in self._results, ANSWER_LIMIT_S)
        except TimeoutError as error:
            raise HostError(f"systemd did not start {unit} within {ANSWER_LIMIT_S:.0f} s") from error
        if self._results[job] != "done":
            raise HostError(f"systemd did not start {unit}: its job ended as {self._results[job]!r}")

    async def _call(self, member: str, signature: str, body: Sequence[object], *, interface: str = MANAGER) -> object:
        from dbus_fast import DBusError, Message, MessageType

        self.begin()
        message = Message(destination=NAME, path=PATH, interface=interface, member=member, signature=signature, body=list(body))
        try:
            async with asyncio.timeout(ANSWER_LIMIT_S):
                bus = await self._connected()
                reply = await bus.call(message)
        except TimeoutError as error:
            raise HostError(f"systemd did not answer {member} within {ANSWER_LIMIT_S:.0f} s") from error
        except (DBusError, OSError, EOFError) as error:
            raise HostError(f"systemd cannot be asked for {member}: {error}") from error
        if reply.message_type is MessageType.ERROR:
            words = " ".join(map(str, reply.body)) or reply.error_name
            raise Refused(f"systemd refused {member}: {words}", error=reply.error_name)
        return reply.body[0] if reply.body else None

    async def _connected(self) -> MessageBus:
        if self._connecting is None:
            raise HostError("there is no connection with systemd")
        return await asyncio.shield(self._connecting)

    async def _connect(self) -> MessageBus:
        await asyncio.to_thread(importlib.import_module, "dbus_fast.aio")
        from dbus_fast import AuthError, InvalidAddressError, Message
        from dbus_fast.aio import MessageBus

        try:
            bus = await MessageBus(bus_address=self._address, auth_timeout=ANSWER_LIMIT_S).connect()
        except (OSError, AuthError, InvalidAddressError) as error:
            raise HostError(f"the message bus of systemd at {self._address} cannot be used: {error}") from error
        bus.add_message_handler(self._take)
        match = Message(destination=BUS, path="/org/freedesktop/DBus", interface=BUS, member="AddMatch", signature="s", body=[SIGNALS])
        subscription = Message(destination=NAME, path=PATH, interface=MANAGER, member="Subscribe")
        await asyncio.gather(bus.call(match), bus.call(subscription))
        return bus

    def _take(self, message: Message) -> None:
        if message.interface != MANAGER:
            return
        if message.member == "JobRemoved" and message.signature == "uoss":
            self._results[str(message.body[1])] = str(message.body[3])
        elif message.member == "UnitRemoved" and message.signature == "so":
            self._removed.add(str(message.body[0]))
        self._heard.set()

    async def _until(self, condition: Callable[[], bool], limit_s: float) -> None:
        async with asyncio.timeout(limit_s):
            while not condition():
                self._heard.clear()
                await self._heard.wait()


@asynccontextmanager
async def systemd(address: str) -> AsyncIterator[Systemd]:
    """A connection with the manager on this bus, made when it is needed or begun, and let go of at the end."""
    connection = Systemd(address)
    try:
        yield connection
    finally:
        await connection.close()
