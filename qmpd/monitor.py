"""One session with one QEMU over QMP. The only importer of `qemu.qmp`.

The library (0.0.6, pinned) owns connecting, negotiation, the reader task and the state machine of disconnecting. What it does
with events, replies, overlong lines, unsent output and logs would let a guest or a stopped QEMU harm the daemon: `_Session`
replaces exactly those parts, and tests/qmp holds a test for each. Events wait in `qmpd.backlog`, commands in `qmpd.calls`.
Closing never waits for QEMU: unsent bytes are thrown away.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractContextManager, ExitStack, asynccontextmanager, suppress
from ssl import SSLContext
from typing import Final

import msgspec
from qemu.qmp import ConnectError, Message, QMPClient, QMPError, Runstate
from qemu.qmp.error import ProtocolError
from qemu.qmp.protocol import SocketAddrT
from qemu.qmp.qmp_client import NegotiationError

from qmpd.backlog import EventBacklog, EventsLost, Hearer, QmpEvent
from qmpd.calls import Calls
from qmpd.commands import CHANGE_DEADLINE_S, QUERY_DEADLINE_S, QUIT_DEADLINE_S, deadline_for
from qmpd.errors import MonitorUnavailable, QemuDied, QemuSilent, TooLarge
from qmpd.lines import LINE_LIMIT, Lines, Refused
from qmpd.shortage import shortage
from qmpd.ucred import credentials_of

__all__ = [
    "CHANGE_DEADLINE_S",
    "QUERY_DEADLINE_S",
    "QUIT_DEADLINE_S",
    "EventsLost",
    "Monitor",
    "QmpEvent",
    "connected",
    "deadline_for",
]

#: Closing aborts the transport first, which takes a few turns of the loop; this is the promise that it ends.
CLOSE_LIMIT_S: Final = 2.0
#: QEMU closes its monitor and ends within milliseconds, usually. To take a connection down costs as much as that end, and somebody waits
#: for the end: the connection is kept so long, unless it is let go before.
FAREWELL_S: Final = 0.05
#: Until a connection that is full is looked at again: nobody tells when there is room for a descriptor.
_FULL_S: Final = 0.01
#: QEMU 7.2 garbles now and then, while it starts, what its first client says: it is said once more, over another connection.
NEGOTIATIONS: Final = 2
CLOSED_BY_QEMU: Final = "QEMU closed the connection"
#: Characters of an error's text that are repeated.
_TEXT_LIMIT: Final = 256

_log = logging.getLogger(__name__)
#: The library logs message bodies and calls every lost connection an error; what matters of that is logged here.
_library_log = logging.getLogger(f"{__name__}.library")
_library_log.setLevel(logging.CRITICAL)


class _Nonsense(ProtocolError, Refused):
    """The peer sent what no QEMU sends."""


class _Session(QMPClient):
    """The library's client without its unbounded parts."""

    def __init__(self, name: str) -> None:
        # The name is not for the library: it makes a logger of each, and loggers are never freed.
        super().__init__(readbuflen=LINE_LIMIT)
        self.logger = _library_log
        self.backlog = EventBacklog()
        self.calls = Calls(name, self._write)
        self.ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.ended_by_peer = False
        self.let_go = asyncio.Event()
        #: The beginning of what was heard last before there was consent.
        self.heard = b""
        self._lines: Lines

    def abort(self) -> None:
        """Drop the connection and everything unsent, now."""
        if self._writer is not None:
            self._writer.transport.abort()

    def _write(self, message: bytes) -> None:
        if self._writer is not None:
            self._writer.write(message)  # buffered without limit, but `Calls` limits number and size

    async def pass_descriptor(self, descriptor: int) -> None:
        """Sends a copy of a descriptor, with a blank that means nothing between two commands. The next `getfd` takes it.

        Raises:
            MonitorUnavailable: the connection is gone.
            QemuSilent: QEMU reads nothing.
        """
        if self._writer is None:
            raise MonitorUnavailable("the monitor is not connected")
        transport = self._writer.transport
        try:
            with socket.socket(fileno=os.dup(transport.get_extra_info("socket").fileno())) as sock:
                async with asyncio.timeout(QUERY_DEADLINE_S):
                    while transport.get_write_buffer_size() or not _sent(sock, descriptor):  # noqa: ASYNC110  nobody tells
                        await asyncio.sleep(_FULL_S)
        except TimeoutError as error:
            raise QemuSilent("QEMU reads nothing from its monitor") from error
        except OSError as error:
            raise shortage(error) or MonitorUnavailable(f"the connection broke: {_shorten(error)}") from error

    def _cb_inbound(self, msg: Message) -> Message:
        return msg  # the library formats every message for its debug log, even when that is off

    def _cb_outbound(self, msg: Message) -> Message:
        return msg

    async def _do_connect(self, address: SocketAddrT | socket.socket, ssl: SSLContext | None = None) -> None:
        """The library's, with a reader that has a limit and hands lines on as they come."""
        if not isinstance(address, socket.socket):
            raise TypeError("the socket is connected before")
        self._set_state(Runstate.CONNECTING)
        loop = asyncio.get_running_loop()
        self._lines = Lines(self._overlong, _Nonsense)
        protocol = asyncio.StreamReaderProtocol(self._lines)
        transport, _ = await loop.create_connection(lambda: protocol, sock=address, ssl=ssl)
        self._reader, self._writer = self._lines, asyncio.StreamWriter(transport, protocol, self._lines, loop)

    def _overlong(self, size: int) -> None:
        error = TooLarge(f"QEMU's answer has {size} bytes, at most {LINE_LIMIT} are read", limit=LINE_LIMIT)
        if not self.calls.unusable(error):
            raise _Nonsense(f"a line of {size} bytes that answers nothing")

    async def _do_recv(self) -> Message:
        """What the library reads by itself, until it has negotiated."""
        while True:
            line = await self._lines.next()
            self.heard = line[:_TEXT_LIMIT]
            document = _document(line)
            if "event" not in document:
                return Message(document, eager=False)
            # A machine that runs may emit between our request for capabilities and QEMU's consent; the library takes that
            # event for the consent's absence and gives up.
            self.backlog.put(document, len(line))

    async def _bh_recv_message(self) -> None:
        """What the library calls from then on, for ever: here once."""
        try:
            await self._lines.hand_to(self._take)
        except EOFError:
            self.ended_by_peer = True
            self.calls.end(CLOSED_BY_QEMU)
            with suppress(TimeoutError):
                async with asyncio.timeout(FAREWELL_S):
                    await self.let_go.wait()
            raise

    def _take(self, line: bytes) -> None:
        document = _document(line)
        if "event" in document:
            self.backlog.put(document, len(line))
            return
        ident = document.get("id")
        if isinstance(ident, str):
            self.calls.answered(ident, document)
        elif "error" in document and ident is None:
            raise _Nonsense("an error that belongs to no command")
        # Anything else answers nothing we asked, and the protocol says to ignore it.

    async def _bh_flush_writer(self) -> None:
        self.abort()  # a stopped QEMU reads nothing, and waiting for it would keep its only monitor slot taken

    async def _bh_close_stream(self, error_pathway: bool = False) -> None:
        self.abort()
        await super()._bh_close_stream(error_pathway)

    async def _bh_disconnect(self) -> None:
        try:
            await super()._bh_disconnect()
        finally:
            reason = self._reason()
            self.calls.end(reason)
            self.backlog.close()
            if not self.ended.done():
                self.ended.set_result(reason)

    def _reason(self) -> str:
        for task in (self._reader_task, self._writer_task):
            error = task.exception() if task is not None and task.done() and not task.cancelled() else None
            match error:
                case None:
                    continue
                case EOFError():
                    return CLOSED_BY_QEMU
                case _Nonsense():
                    return f"QEMU's end sent {error}"
                case _:
                    return f"the connection broke: {_shorten(error)}"
        return "qmpd closed the connection"


class Monitor:
    """A negotiated session with one QEMU; made by `connected`. `version` is QEMU's, like `7.2.22`; `peer_pid` who listens."""

    def __init__(self, session: _Session, name: str, peer_pid: int) -> None:
        self.name = name
        self.peer_pid = peer_pid
        self.version, self.oob = _greeting(session)
        self._session = session
        self._calls = session.calls

    @property
    def silent(self) -> bool:
        """Whether the answer to an in-band command is overdue; true until QEMU answers one."""
        return self._calls.silent

    @property
    def closed(self) -> str | None:
        """Why the session ended, or None while it lasts."""
        return self._calls.closed

    @property
    def heard_out(self) -> bool:
        """Whether QEMU has closed the connection, and whoever reads the events has read them all."""
        return self._session.ended_by_peer and self._session.backlog.read_out

    def let_go(self) -> None:
        """Nobody needs the connection any more: one that QEMU has closed is taken down now."""
        self._session.let_go.set()

    async def execute(self, command: str, arguments: Mapping[str, object] | None = None, *, deadline_s: float | None = None) -> object:
        """Run an in-band command and return its value. The default deadline is that of the command's class.

        Raises:
            Invalid: QEMU's parser could not take it; QEMU was not asked.
            TooLarge: the command is too long and QEMU was not asked, or the answer is too long and the command ran.
            QemuRefused: QEMU answered with an error.
            QemuSilent: no answer in time, or the command could not be sent for as long. If it was, it may still take effect.
            QemuDied: the session ended meanwhile; whether the command took effect is unknown.
            MonitorUnavailable: the session had ended before.
            Busy: too many callers wait already.
        """
        return await self._calls.in_band(command, arguments, deadline_for(command) if deadline_s is None else deadline_s)

    async def execute_oob(
        self, command: str, arguments: Mapping[str, object] | None = None, *, deadline_s: float = QUERY_DEADLINE_S
    ) -> object:
        """Run a command out of band, past whatever blocks QEMU's main loop. Raises what `execute` raises."""
        if not self.oob:
            raise MonitorUnavailable(f"the QEMU of {self.name} takes no out-of-band commands")
        return await self._calls.out_of_band(command, arguments, deadline_s)

    async def hand(self, name: str, line: socket.socket) -> None:
        """Gives QEMU a copy of a connection under a name (`getfd`), which is this monitor's: what uses it must go the same way.

        It is in non-blocking mode afterwards, on both sides: QEMU makes what it receives block, and would wait with its main loop.

        Raises what `execute` raises.
        """
        await self._session.pass_descriptor(line.fileno())
        await self.execute("getfd", {"fdname": name})
        line.setblocking(False)

    def events(self) -> AsyncIterator[QmpEvent | EventsLost]:
        """QEMU's events for one reader, merged and bounded as `qmpd.backlog` says; ends with the session, all read."""
        return self._session.backlog

    def hearing(self, take: Hearer) -> AbstractContextManager[None]:
        """While the block lasts `take` is called for each event as it arrives, before it waits for the reader of `events`."""
        return self._session.backlog.hearing(take)

    async def wait_silent(self, silent: bool = True) -> None:
        """Return when `self.silent` is as asked, at once if it is. Raises MonitorUnavailable if the session ends first."""
        await self._calls.wait_silent(silent)

    async def wait_closed(self) -> str:
        """Return why the session ended, once it has. QEMU may well live on: only its pidfd tells."""
        return await asyncio.shield(self._session.ended)


@asynccontextmanager
async def connected(path: str, *, name: str, peer_pid: int | None, deadline_s: float) -> AsyncIterator[Monitor]:
    """A negotiated monitor at the socket `path`; once it is yielded QEMU has built the machine. Leaving takes at most 2 s.

    `peer_pid` is the process that must own the socket. A connection made before QEMU took over the listening socket we passed
    to it carries our own pid instead (the kernel notes who called listen(2), at the time of the connect), which is as good.

    Raises:
        MonitorUnavailable: nobody listens there, or somebody else does.
        Busy: the host is out of descriptors or memory.
        QemuDied: the connection ended, or carried something that is not QMP, before the machine was built.
        QemuSilent: no answer within `deadline_s`, or too many clients wait already: QEMU hangs, or serves another client. Or it greets,
            and answers with anything but consent, again and again: another monitor of it may do better.
    """
    try:
        async with asyncio.timeout(deadline_s):
            session, pid = await _negotiated(path, name, peer_pid)
    except TimeoutError as error:
        raise QemuSilent(f"{name}: QEMU was not ready in {deadline_s:g} s") from error
    try:
        monitor = Monitor(session, name, pid)
        # In the next turn of the loop: somebody waits for what is said to QEMU first.
        asyncio.get_running_loop().call_soon(_note_connected, monitor)
        yield monitor
    finally:
        await _close(session, name)


async def _negotiated(path: str, name: str, peer_pid: int | None, attempts: int = NEGOTIATIONS) -> tuple[_Session, int]:
    """A session that QEMU consented to, and the process at its other end. Raises what `connected` raises."""
    session = _Session(name)
    with ExitStack() as undo:
        sock, pid = _dial(path, name, peer_pid)
        undo.callback(sock.close)
        try:
            await session.connect(sock)
        except ConnectError as error:
            if not isinstance(error.exc, NegotiationError):
                raise QemuDied(f"{name}: the monitor ended before QEMU was ready: {_shorten(error.exc)}") from error
            answer = ascii(session.heard)[1:]
            if attempts == 1:
                raise QemuSilent(f"{name}: QEMU greets, and does not consent to a session: {answer}", answer=answer) from error
            _log.warning("QEMU does not consent to a session, it is asked again", extra={"machine": name, "answer": answer})
        else:
            undo.pop_all()  # the session has it now
            return session, pid
    return await _negotiated(path, name, peer_pid, attempts - 1)


def _note_connected(monitor: Monitor) -> None:
    _log.info("monitor connected", extra={"machine": monitor.name, "version": monitor.version, "oob": monitor.oob})


def _dial(path: str, name: str, peer_pid: int | None) -> tuple[socket.socket, int]:
    with ExitStack() as undo:
        try:
            sock = undo.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            sock.setblocking(False)  # connecting to a local socket succeeds or fails at once
            sock.connect(path)
        except BlockingIOError as error:
            raise QemuSilent(f"{name}: QEMU takes no client, and too many wait for its monitor") from error
        except OSError as error:
            raise shortage(error) or MonitorUnavailable(f"{name}: no monitor at {path}: {_shorten(error)}") from error
        pid, _, _ = credentials_of(sock)
        if peer_pid is not None and pid not in {peer_pid, os.getpid()}:
            raise MonitorUnavailable(f"{name}: the socket {path} belongs to process {pid}, not to {peer_pid}", pid=pid)
        undo.pop_all()
        return sock, pid


async def _close(session: _Session, name: str) -> None:
    session.abort()
    try:
        async with asyncio.timeout(CLOSE_LIMIT_S):
            await session.disconnect()
    except TimeoutError:
        _log.error("monitor did not close", extra={"machine": name})
    except (QMPError, EOFError, OSError):
        pass  # what ended the session, already told by `closed`
    _log.info("monitor closed", extra={"machine": name, "reason": session.calls.closed})


def _sent(sock: socket.socket, descriptor: int) -> bool:
    try:
        socket.send_fds(sock, [b" "], [descriptor])
    except BlockingIOError:
        return False
    return True


def _document(line: bytes) -> dict[str, object]:
    try:
        document = msgspec.json.decode(line)
    except (ValueError, RecursionError) as error:
        raise _Nonsense(f"a line of {len(line) + 1} bytes that is not JSON: {_shorten(error)}") from error
    if not isinstance(document, dict):
        raise _Nonsense(f"a {type(document).__name__} where a message belongs")
    return document


def _greeting(session: _Session) -> tuple[str, bool]:
    if session.greeting is None:
        return "unknown", False
    greeting = session.greeting.QMP
    oob = "oob" in greeting.capabilities
    match greeting.version.get("qemu"):
        case {"major": int(major), "minor": int(minor), "micro": int(micro)}:
            return f"{major}.{minor}.{micro}", oob
    return "unknown", oob


def _shorten(error: BaseException) -> str:
    return (ascii(str(error))[1:-1] or type(error).__name__)[:_TEXT_LIMIT]
