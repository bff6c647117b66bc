"""One QEMU process, from launch or adoption to its exit: its monitor, and what it says.

A session owns the connections to the process, never the process: when a session is cancelled because the daemon ends, QEMU goes
on. It reports to its owner what happens, and decides nothing about the machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from contextlib import AbstractContextManager
from typing import Final, Literal, Protocol

from qmpd.backlog import Hearer, Hearers
from qmpd.capture import tail_of
from qmpd.diskerrors import IO_ERROR
from qmpd.errors import Busy, LaunchFailed, MonitorUnavailable, NotProven, QemuDied, QemuRefused, QemuSilent, QmpdError
from qmpd.failpoint import passing
from qmpd.lifecycle import Happening
from qmpd.monitor import QUERY_DEADLINE_S, EventsLost, Monitor, QmpEvent, connected
from qmpd.process import ExitStatus, QemuProcess, describe
from qmpd.tasks import alongside

#: Until a new QEMU has built its machine: 0.1 s on an idle host; a minute means that it hangs.
READY_DEADLINE_S: Final = 60.0
#: A QEMU that has not answered on one monitor by then is asked on the other, which is given the whole time.
FIRST_ANSWER_S: Final = 10.0
#: An adopted QEMU built its machine long ago and greets at once, unless its main loop is blocked.
GREETING_DEADLINE_S: Final = 5.0
#: A lost monitor is tried again this often while the process lives.
RECONNECT_S: Final = 1.0
#: Somebody who asks for an attempt may have to wait for the one under way, and then for their own: each greets and is asked twice.
RETRY_DEADLINE_S: Final = 35.0
#: A QEMU that ends closes its monitor before its disks are flushed and it is gone.
GRACE_S: Final = 5.0
#: When the process has gone the kernel has closed its sockets: what it said last is there to be read.
DRAIN_DEADLINE_S: Final = 5.0
#: A question that could not be put is put again this often.
ASK_AGAIN_S: Final = 1.0
#: Events after which QEMU's run state may be another one than the event says.
ASK_AFTER: Final = frozenset({"STOP", "SUSPEND", "SUSPEND_DISK", "WAKEUP", "GUEST_PANICKED", "RESET"})

_log = logging.getLogger(__name__)
Begin = Callable[[Monitor], Awaitable[None]]
End = Callable[[ExitStatus], Awaitable[None]]


class Owner(Protocol):
    """Who is told: the machine."""

    def happen(self, happening: Happening) -> None:
        """Something happened that may move the state."""

    def set_status(self, status: str) -> None:
        """QEMU's own word for the run state changed."""

    def take_blocks(self, blocks: object) -> None:
        """QEMU's answer to `query-block`, of a guest that is halted because a disk failed."""

    def take_event(self, event: QmpEvent) -> None:
        """QEMU sent an event (a coalesced one stands for `count`)."""

    def set_trouble(self, reason: str) -> None:
        """QEMU cannot be reached, or does not answer; told before the happening that says so."""


class Session:
    """A live process and the way to talk to it. `shutdown_reason` is QMP's, once QEMU said that it shuts down.

    `disowned` says why the process is not taken for the machine's, if it is not: it is neither asked nor signalled then.
    """

    def __init__(self, owner: Owner, name: str, process: QemuProcess, sockets: Mapping[str, str], stderr_path: str, uuid: str) -> None:
        self.process = process
        self.shutdown_reason: str | None = None
        self.disowned: NotProven | None = None
        self._uuid = uuid
        self._nudge = asyncio.Event()
        self._tried = asyncio.Event()
        self._begun = self._concluded = 0
        self._failure: QmpdError | None = None
        self._owner = owner
        self._name = name
        # Every machine has two: QEMU 7.2 may lose, as it starts, what the first client of one says, and then never hears it again.
        self._lines = deque(sockets[name] for name in ("qmp", "rescue") if name in sockets)
        self._stderr_path = stderr_path
        self._monitor: Monitor | None = None
        self._hearers = Hearers()
        self._started = False

    @property
    def monitor(self) -> Monitor:
        """The connected monitor.

        Raises:
            MonitorUnavailable: there is none at the moment; the process may well be alive.
        """
        if self._monitor is None:
            raise MonitorUnavailable(f"machine {self._name!r} has no monitor connection at the moment")
        return self._monitor

    # What outlasts one monitor connection (`qmpd.migration.qemu.Qemu`).

    @property
    def closed(self) -> str | None:
        """Why QEMU will never answer again, or None: a lost connection is made anew as long as the process lives."""
        return None if self.process.exit is None else f"QEMU ended with {describe(self.process.exit)}"

    async def execute(self, command: str, arguments: Mapping[str, object] | None = None, *, deadline_s: float | None = None) -> object:
        """`Monitor.execute` over the connection there is. Raises MonitorUnavailable while there is none."""
        return await self.monitor.execute(command, arguments, deadline_s=deadline_s)

    async def execute_oob(
        self, command: str, arguments: Mapping[str, object] | None = None, *, deadline_s: float = QUERY_DEADLINE_S
    ) -> object:
        """`Monitor.execute_oob` over the connection there is. Raises MonitorUnavailable while there is none."""
        return await self.monitor.execute_oob(command, arguments, deadline_s=deadline_s)

    async def hand(self, name: str, line: socket.socket) -> None:
        """`Monitor.hand` over the connection there is. Raises MonitorUnavailable while there is none."""
        await self.monitor.hand(name, line)

    def hearing(self, take: Hearer) -> AbstractContextManager[None]:
        """`Monitor.hearing` over this and every further connection; each new one begins with `EventsLost`."""
        return self._hearers.hearing(take)

    async def launch(self, begin: Begin, ready: Callable[[], None], end: End) -> None:
        """Connects to a QEMU that was just launched, lets `begin` set it going, and stays until it has ended and `end` was told how.

        Raises:
            LaunchFailed: it ended, or hung and was ended, before it was ready; `end` is not told.
        """
        if await self._while_it_lives(self._watch_launched(begin, ready), end):
            return
        await self._pause(GRACE_S)
        if not await self._while_it_lives(self._reconnect(), end):
            await end(await self.process.wait())

    async def adopt(self, ready: Callable[[], None], end: End, *, paused: bool) -> None:
        """Connects to a QEMU that runs already, and stays until it has ended and `end` was told how.

        `ready` is called after the first attempt, unless the process had ended by then. A guest that was launched to run, and
        was not set going before its daemon died, is set going (`paused` says that it was launched to wait).
        """
        if not await self._while_it_lives(self._watch_adopted(ready, paused=paused), end):
            await end(await self.process.wait())

    async def ask_status(self, monitor: Monitor) -> str:
        """Asks QEMU for its run state, reports and returns it."""
        answer = await _run_state(monitor)
        status = str(answer.get("status"))
        self._owner.set_status(status)
        if status == IO_ERROR:
            with contextlib.suppress(QemuRefused):  # which disk it was is for people, and what else there is to know is known
                self._owner.take_blocks(await monitor.execute("query-block"))
        self._owner.happen(Happening.RAN if answer.get("running") is True else Happening.HALTED)
        return status

    async def retry(self) -> None:
        """Tries now what is tried every second anyway: to reach QEMU, or to get an answer from it.

        Raises:
            MonitorUnavailable, QemuDied: it cannot be reached.
            QemuSilent: it does not answer.
            NotProven: what answers is not this machine's QEMU.
        """
        if self._monitor is not None:
            await self.ask_status(self._monitor)
            return
        wanted = self._begun + 1  # an attempt that is under way began before we were asked
        self._nudge.set()
        try:
            async with asyncio.timeout(RETRY_DEADLINE_S):
                while self._concluded < wanted and self.process.exit is None:
                    await self._tried.wait()
        except TimeoutError as error:
            raise QemuSilent(f"the attempt to reach machine {self._name!r} takes longer than {RETRY_DEADLINE_S:g} s") from error
        if self._failure is not None and self.process.exit is None:
            raise self._failure

    def last_words(self) -> str:
        """The end of what QEMU printed; nothing where that cannot be read. Blocks."""
        try:
            return tail_of(self._stderr_path, self.process.stderr_start)
        except OSError as error:
            _log.warning("standard error of QEMU cannot be read", extra={"machine": self._name, "error": str(error)})
            return ""

    async def _while_it_lives(self, watch: Coroutine[object, object, None], end: End) -> bool:
        """Stays until the watch is over, or the process. Whether `end` was told: of a QEMU that was heard out that comes first, and what
        else there is to do nobody waits for. What another one said last is still read."""
        async with alongside(watch, f"monitor:{self._name}") as watching:
            await asyncio.wait([watching, self.process.over], return_when=asyncio.FIRST_COMPLETED)
            monitor, status, told = self._monitor, self.process.exit, False
            if monitor is not None and status is not None:
                told = self._started and monitor.heard_out
                if told:
                    await end(status)
                monitor.let_go()
            if not watching.done():
                await asyncio.wait([watching], timeout=DRAIN_DEADLINE_S)
            if watching.done():
                watching.result()
            return told

    async def _watch_launched(self, begin: Begin, ready: Callable[[], None]) -> None:
        async def begin_and_tell(monitor: Monitor) -> None:
            await begin(monitor)
            self._started = True
            ready()

        deadlines = (FIRST_ANSWER_S, READY_DEADLINE_S)[-len(self._lines) :]
        for deadline_s in deadlines:
            try:
                await self._converse(begin_and_tell, deadline_s)
            except QmpdError as error:
                if not self._started and isinstance(error, QemuSilent) and deadline_s is not deadlines[-1]:
                    _log.warning("QEMU does not answer its monitor, the other one is tried", extra={"machine": self._name})
                    continue
                if not self._started:
                    raise await self._launch_failed(error) from error
            break

    async def _watch_adopted(self, ready: Callable[[], None], *, paused: bool) -> None:
        await self._pause(0)  # what was found may have ended already
        await self._reconnect(first_attempt=ready, paused=paused)

    async def _reconnect(self, first_attempt: Callable[[], None] | None = None, *, paused: bool = True) -> None:
        async def begin(monitor: Monitor) -> None:
            await self._prove(monitor)
            if not paused and (await _run_state(monitor)).get("status") == "prelaunch":
                # Before anybody hears that it is halted: who is told that a guest is paused does not see it begin to run.
                await passing("adopted-cont")
                await monitor.execute("cont")
            await self.ask_status(monitor)
            self._started = True
            self._conclude(None)
            if first_attempt is not None:
                first_attempt()

        while self.process.exit is None:
            self._begun += 1
            self._nudge.clear()
            try:
                await self._converse(begin, GREETING_DEADLINE_S)
            except QemuSilent as error:
                self._report(Happening.SILENT, error)
            except QmpdError as error:  # also what is wrong on our side, descriptors that ran out say: the process lives all the same
                self._report(Happening.DISCONNECTED, error)
            else:
                await self._pause(GRACE_S)
                self._report(Happening.DISCONNECTED, MonitorUnavailable("QEMU closed the monitor connection"))
            await self._pause(0)
            if first_attempt is not None and self.process.exit is None:
                first_attempt()
            # What is not ours may not want to be asked every second: only somebody who says so asks it again.
            await self._pause(None if self.disowned else RECONNECT_S, self._nudge)

    async def _prove(self, monitor: Monitor) -> None:
        answer = await monitor.execute("query-uuid")
        found = answer.get("UUID") if isinstance(answer, dict) else None
        if found != self._uuid:
            pid = self.process.identity.pid
            message = f"process {pid} is another QEMU: it says that its UUID is {found}, and that of {self._name!r} is {self._uuid}"
            self.disowned = NotProven(message, uuid=found, pid=pid)
            raise self.disowned
        self.disowned = None

    def _report(self, happening: Happening, error: QmpdError) -> None:
        if self.process.exit is None:
            self._owner.set_trouble(error.message)
            self._owner.happen(happening)
        self._conclude(error)

    def _conclude(self, failure: QmpdError | None) -> None:
        self._concluded, self._failure = self._begun, failure
        tried, self._tried = self._tried, asyncio.Event()
        tried.set()

    async def _pause(self, seconds: float | None, nudge: asyncio.Event | None = None) -> None:
        """Waits, but not longer than the process lives, nor when somebody is in a hurry."""
        if nudge is None:
            await asyncio.wait([self.process.over], timeout=seconds)
            return
        async with alongside(nudge.wait(), f"nudge:{self._name}") as nudged:
            waits: list[asyncio.Future[None] | asyncio.Task[Literal[True]]] = [self.process.over, nudged]
            await asyncio.wait(waits, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)

    async def _converse(self, begin: Begin, deadline_s: float) -> None:
        """One monitor session, until QEMU ends it. After silence the next one is held over the machine's other monitor."""
        try:
            async with connected(self._lines[0], name=self._name, peer_pid=self.process.identity.pid, deadline_s=deadline_s) as monitor:
                self._monitor = monitor
                try:
                    with monitor.hearing(self._hearers.tell):
                        self._hearers.tell(EventsLost(count=0))
                        async with (
                            alongside(self._take_events(monitor), f"events:{self._name}") as events,
                            alongside(self._watch_silence(monitor), f"silence:{self._name}"),
                        ):
                            await begin(monitor)
                            await events
                finally:
                    self._monitor = None
        except QemuSilent:
            self._lines.rotate()
            raise

    async def _take_events(self, monitor: Monitor) -> None:
        async for event in monitor.events():
            if isinstance(event, EventsLost):
                await self._ask_again(monitor)
                continue
            self._note_reason(event)
            self._owner.take_event(event)
            if event.name == "RESUME":
                self._owner.set_status("running")
                self._owner.happen(Happening.RAN)
            elif event.name in ASK_AFTER:
                await self._ask_again(monitor)

    def _note_reason(self, event: QmpEvent) -> None:
        """Keeps why QEMU is about to end: of a guest that was powered off and reset since, nothing is left."""
        if event.name == "SHUTDOWN":
            self.shutdown_reason = str(event.data.get("reason", "unknown"))
        elif event.name == "WATCHDOG" and event.data.get("action") == "poweroff":
            self.shutdown_reason = "watchdog"  # QEMU exits on the spot, with status 0 and without SHUTDOWN
        elif event.name == "RESET":
            self.shutdown_reason = None

    async def _ask_again(self, monitor: Monitor) -> None:
        """Asks until there is an answer or the session ends: a change that was not followed up would never be noticed."""
        while monitor.closed is None:
            try:
                await self.ask_status(monitor)
            except (Busy, QemuSilent):
                await self._pause(ASK_AGAIN_S)  # other commands are before ours
            except QmpdError:
                return  # what the end of the process will tell
            else:
                return

    async def _watch_silence(self, monitor: Monitor) -> None:
        try:
            while True:
                await monitor.wait_silent()
                self._owner.set_trouble("the answer to a command is overdue: its main loop is blocked, or the process is stopped")
                self._owner.happen(Happening.SILENT)
                await monitor.wait_silent(False)
                await self._ask_again(monitor)
        except MonitorUnavailable:
            return

    async def _launch_failed(self, error: QmpdError) -> LaunchFailed:
        if not isinstance(error, QemuSilent):
            await self._pause(GRACE_S)
        hung = self.process.exit is None
        if hung:
            self.process.signal(signal.SIGKILL)
        status = await self.process.wait()
        tail = await asyncio.to_thread(self.last_words)
        how = "was not ready in time and was ended" if hung else f"ended with {describe(status)} before it was ready"
        return LaunchFailed(f"QEMU {how}: {_reason(tail) or error.message}", exit=describe(status), stderr=tail)


def _reason(stderr: str) -> str:
    """The line of what QEMU printed that says why it ended: its own last one, or else the last of all."""
    lines = stderr.strip().splitlines()
    own = [line for line in lines if line.startswith("qemu-system")]
    return (own or lines or [""])[-1]


async def _run_state(monitor: Monitor) -> dict[str, object]:
    answer = await monitor.execute("query-status")
    if not isinstance(answer, dict):
        raise QemuDied("QEMU's answer to query-status is not a map")
    return answer
