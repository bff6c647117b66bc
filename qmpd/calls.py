"""The commands of one monitor session that are waiting or in flight, and what their answers, deadlines and losses mean.

Knows no transport: bytes go out through `send`, and whoever reads the connection reports what came back.

* One in-band command is in flight at a time; callers queue in order. A command whose caller went away, or whose answer is
  overdue, holds the line until QEMU answers it: more of them would only pile up in front of the out-of-band ones.
* A deadline counts from the sending. When it passes QEMU is *silent* until it answers an in-band command, however late. A late
  answer is dropped; what the command did is unknown.
* Out-of-band commands go beside the line.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from typing import Final, TypeAlias

from qmpd.commands import encode
from qmpd.errors import Busy, MonitorUnavailable, QemuDied, QemuRefused, QemuSilent, QmpdError

#: Callers that may wait for the line; each holds a command of up to 64 KiB.
QUEUE_LIMIT: Final = 64
#: Out-of-band commands in flight: they are for emergencies, and a stopped QEMU answers none.
OOB_LIMIT: Final = 8
#: Characters of QEMU's own text that an error repeats.
_TEXT_LIMIT: Final = 512

_log = logging.getLogger(__name__)

Answer: TypeAlias = Mapping[str, object] | QmpdError


class _Call:
    """A command that was sent; `answer` is resolved once: by the reply, the deadline or the end of the session."""

    def __init__(self, command: str, answer: asyncio.Future[Answer], due: asyncio.TimerHandle) -> None:
        self.command = command
        self.answer = answer
        self.due = due

    def resolve(self, answer: Answer) -> None:
        self.due.cancel()
        if not self.answer.done():  # its caller gave up or went away
            self.answer.set_result(answer)


class Calls:
    """See the module. `closed` says why the session ended, or None while it lasts; `silent` whether an answer is overdue."""

    def __init__(self, name: str, send: Callable[[bytes], None]) -> None:
        self.name = name
        self.closed: str | None = None
        self.silent = False
        self._send = send
        self._loop = asyncio.get_running_loop()
        self._line = asyncio.Lock()
        self._queued = 0
        self._in_band: dict[str, _Call] = {}
        self._out_of_band: dict[str, _Call] = {}
        self._serial = 0
        self._changed = asyncio.Event()

    async def in_band(self, command: str, arguments: Mapping[str, object] | None, limit_s: float) -> object:
        """Queue, send and return the value QEMU answers with. Raises as `Monitor.execute` promises."""
        self.check_open()
        self._serial += 1
        ident = f"q{self._serial}"
        message = encode(command, arguments, ident=ident)
        await self._take_line(command, limit_s)
        return await self._ask(self._in_band, command, ident, message, limit_s)

    async def out_of_band(self, command: str, arguments: Mapping[str, object] | None, limit_s: float) -> object:
        """Send at once and return the value QEMU answers with. Raises as `Monitor.execute_oob` promises."""
        self.check_open()
        if len(self._out_of_band) >= OOB_LIMIT:
            raise Busy(f"{OOB_LIMIT} out-of-band commands of {self.name} are unanswered", limit=OOB_LIMIT)
        self._serial += 1
        ident = f"o{self._serial}"
        message = encode(command, arguments, ident=ident, oob=True)
        return await self._ask(self._out_of_band, command, ident, message, limit_s)

    def check_open(self) -> None:
        """Raise MonitorUnavailable if the session has ended."""
        if self.closed is not None:
            raise MonitorUnavailable(f"the monitor of {self.name} is not connected: {self.closed}")

    async def wait_silent(self, silent: bool) -> None:
        """Return when `self.silent` is as asked. Raises MonitorUnavailable if the session ends first."""
        while self.silent is not silent:
            self.check_open()
            await self._changed.wait()

    def answered(self, ident: str, message: Mapping[str, object]) -> None:
        """A reply arrived. One that nobody waits for any more is dropped."""
        if call := self._in_band.pop(ident, None):
            self._free_line()
        elif not (call := self._out_of_band.pop(ident, None)):
            return
        call.resolve(message)

    def unusable(self, error: QmpdError) -> bool:
        """The reply to the command that holds the line cannot be used. False if no command holds it."""
        if not self._in_band:
            return False
        _, call = self._in_band.popitem()
        self._free_line()
        call.resolve(error)
        return True

    def end(self, reason: str) -> None:
        """The session ended: no reply will arrive any more, and nothing more can be sent."""
        self.closed = reason
        calls = [*self._in_band.values(), *self._out_of_band.values()]
        for call in calls:
            call.resolve(QemuDied(f"{reason} before {call.command} was answered: whether it took effect is unknown"))
        if self._in_band:
            self._line.release()
        self._in_band.clear()
        self._out_of_band.clear()
        self._notify()

    async def _take_line(self, command: str, limit_s: float) -> None:
        if self._queued >= QUEUE_LIMIT:
            raise Busy(f"{QUEUE_LIMIT} commands wait for {self.name} already", limit=QUEUE_LIMIT)
        if not (self._queued or self._line.locked()):
            await self._line.acquire()  # at once: nobody is before us
            return
        self._queued += 1
        try:
            async with asyncio.timeout(limit_s):
                await self._line.acquire()
        except TimeoutError as error:
            holder = next((call.command for call in self._in_band.values()), "another command")
            raise QemuSilent(f"{self.name}: {command} was not sent in {limit_s:g} s, QEMU has not answered {holder}") from error
        finally:
            self._queued -= 1
        if self.closed is not None:
            self._line.release()
            raise QemuDied(f"{self.closed} before {command} was sent")

    async def _ask(self, calls: dict[str, _Call], command: str, ident: str, message: bytes, limit_s: float) -> object:
        due = self._loop.call_later(limit_s, self._overdue, calls, ident, limit_s)
        call = calls[ident] = _Call(command, self._loop.create_future(), due)
        self._send(message)
        answer = await call.answer
        if isinstance(answer, QmpdError):
            raise answer
        return _value(command, answer)

    def _overdue(self, calls: dict[str, _Call], ident: str, limit_s: float) -> None:
        call = calls[ident]
        if calls is self._in_band:
            self._become(silent=True)  # and the call keeps the line
        else:
            del calls[ident]
        _log.warning("command unanswered", extra={"machine": self.name, "command": call.command, "deadline_s": limit_s})
        call.resolve(QemuSilent(f"{self.name}: no answer to {call.command} in {limit_s:g} s; it may still take effect"))

    def _free_line(self) -> None:
        self._line.release()
        if self.silent:
            self._become(silent=False)
            _log.info("monitor answers again", extra={"machine": self.name})

    def _become(self, *, silent: bool) -> None:
        self.silent = silent
        self._notify()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


def _value(command: str, reply: Mapping[str, object]) -> object:
    if "return" in reply:
        return reply["return"]
    match reply.get("error"):
        case {"class": str(kind), "desc": str(text)}:
            raise QemuRefused(f"{command}: {text[:_TEXT_LIMIT]}", **{"class": kind[:_TEXT_LIMIT], "desc": text[:_TEXT_LIMIT]})
    raise QemuDied(f"QEMU's answer to {command} has neither a value nor an error")
