"""One machine: its state, and the one task that launches or adopts its QEMU and stays until it has ended.

All changes of state happen in `happen`, by the table in `qmpd.lifecycle`, on behalf of that task. The verbs that act on the QEMU are
in `qmpd.power` and `qmpd.operating`; one verb at a time holds the machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from functools import partial

import msgspec

from qmpd.backlog import QmpEvent
from qmpd.board import Board
from qmpd.cgroups import directory_of, leave
from qmpd.console import Console, all_connected
from qmpd.diskerrors import found_in, halted_by
from qmpd.endings import judged, keep
from qmpd.errors import HostError, LaunchFailed, MonitorUnavailable, QmpdError, WrongState
from qmpd.facts import MachinePaths
from qmpd.failpoint import passing
from qmpd.hold import Hold
from qmpd.journal import timestamp, utc_now
from qmpd.launching import Launch, prepared
from qmpd.lifecycle import ALIVE, AT_REST, IN_TROUBLE, Happening, State, after
from qmpd.machineview import view_of
from qmpd.monitor import Monitor
from qmpd.process import ExitStatus, QemuProcess, describe
from qmpd.processviews import TroubleView
from qmpd.record import Definition, LaunchRecord, has_begun, mark_begun, remove_record
from qmpd.session import Session
from qmpd.shortage import shortage
from qmpd.spec import Limits
from qmpd.storage import mark_finished
from qmpd.tpm import accompanied, dismissed
from qmpd.views import DiskErrorView, ExitView, MachineView

_log = logging.getLogger(__name__)
Publish = Callable[[str, str, Mapping[str, object]], object]
#: Launches or adopts, and stays until the process has ended; the future is resolved as soon as the machine is ready.
Work = Callable[[asyncio.Future[None]], Coroutine[object, object, None]]


def now() -> str:
    """The wall clock, as the API writes it: UTC, ISO 8601, milliseconds."""
    return timestamp(utc_now())


class Machine:
    """A machine as the daemon knows it. Everything but the verbs answers from memory."""

    def __init__(self, definition: Definition, revision: int, publish: Publish) -> None:
        self.definition = definition
        self.revision = revision
        self.board: Board | None = None
        self.consoles: dict[int, Console] = {}
        self.console_port: int | None = None
        self.state = State.STOPPED
        self.status: str | None = None
        self.since = now()
        self.exit: ExitView | None = None
        self.resets = 0
        self.disk_error: DiskErrorView | None = None
        self.launch: LaunchRecord | None = None
        self.cgroup: str | None = None
        self.trouble: TroubleView | None = None
        self.asked_to_end = False
        self.awaited = False  # another host owns it: its QEMU here waits for its state, or has it, and must not run
        self.on_end: Callable[[Machine], None] = lambda _machine: None
        self._publish = publish
        self._hold = Hold()
        self._session: Session | None = None
        self._task: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()
        self._began = 0.0

    @property
    def name(self) -> str:
        """The machine's name."""
        return self.definition.spec.name

    @property
    def operation(self) -> str | None:
        """The verb that holds the machine."""
        return self._hold.holder

    @property
    def alive(self) -> bool:
        """Whether there is a process, as far as is known."""
        return self.state in ALIVE

    @property
    def stray(self) -> bool:
        """Whether there is a process that this daemon has no connection with, nor a record of."""
        return self.state is State.UNREACHABLE and self._session is None

    @property
    def ran_s(self) -> float:
        """Seconds since the process was launched or taken over."""
        return asyncio.get_running_loop().time() - self._began

    def view(self) -> MachineView:
        """The machine as the API shows it."""
        return view_of(self)

    def happen(self, happening: Happening) -> None:
        """Moves the state by the table, tells everybody who waits, and publishes the change. An illegal happening raises."""
        if happening is Happening.HALTED and self.awaited:
            happening = Happening.AWAITED
        before, self.state = self.state, after(self.state, happening)
        if happening is Happening.RAN or self.state in AT_REST:
            self.disk_error = None
        if self.state is before:
            return
        self.since = now()
        self._tell()
        data: dict[str, object] = {"state": str(self.state), "previous": str(before), "status": self.status}
        if self.state not in IN_TROUBLE:
            self.trouble = None
        elif self.trouble is not None:
            data["reason"] = self.trouble.reason
        if self.state in AT_REST and self.exit is not None:
            data["exit"] = msgspec.to_builtins(self.exit)
        self._publish("machine.state", self.name, data)

    def set_trouble(self, reason: str) -> None:
        """Why QEMU cannot be reached, or does not answer. The first reason begins a trouble, that of each attempt replaces it.

        Who reports it again every second is heard once.
        """
        moment, before = now(), self.trouble
        began, attempts = (moment, 1) if before is None else (before.since, before.attempts + 1)
        self.trouble = TroubleView(reason=reason, since=began, tried_at=moment, attempts=attempts)
        if before is None or before.reason != reason:
            self._publish("machine.trouble", self.name, {"reason": reason, "since": began, "attempts": attempts})

    def set_status(self, status: str) -> None:
        """QEMU's own word for the run state."""
        if status != self.status:
            self.status = status
            self._tell()

    def take_blocks(self, blocks: object) -> None:
        """QEMU's answer to `query-block`, of a guest that is halted because a disk failed: for a daemon that missed the event."""
        if self.disk_error is None:
            self._note_disk_error(found_in(blocks, now()))

    def _note_disk_error(self, error: DiskErrorView | None) -> None:
        """Requests that were under way together fail together: the first says it all."""
        if error is not None and self.disk_error is None:
            self.disk_error = error
            self._publish("machine.disk-error", self.name, msgspec.to_builtins(error))

    def take_event(self, event: QmpEvent) -> None:
        """Passes an event of QEMU on to everybody who listens."""
        if event.name == "RESET":
            self.resets += event.count
        elif event.name == "BLOCK_IO_ERROR":
            self._note_disk_error(halted_by(event.data, now()))
        self._publish("qmp", self.name, {"event": event.name, "data": dict(event.data), "count": event.count})

    def _tell(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def until(self, states: frozenset[State], timeout_s: float) -> bool:
        """Waits until the machine is in one of `states`; False when it was not in time."""
        return await self.when(lambda: self.state in states, timeout_s)

    async def when(self, condition: Callable[[], bool], timeout_s: float) -> bool:
        """Waits until a condition on the machine holds; False when it did not in time."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while not condition():
                    await self._changed.wait()
        return condition()

    # Who holds it.

    @asynccontextmanager
    async def held(self, operation: str, *, instead_of: frozenset[str] = frozenset()) -> AsyncIterator[None]:
        """Keeps other verbs out. Raises Held when one is under way that this one does not replace."""
        with self.holding(operation, instead_of=instead_of):
            yield

    @contextmanager
    def holding(self, operation: str, *, instead_of: frozenset[str] = frozenset()) -> Iterator[None]:
        """The same for who cannot wait."""
        try:
            with self._hold.taken(operation, instead_of, self.name, str(self.state)):
                yield
        finally:
            self._tell()

    def require(self, states: frozenset[State], verb: str) -> None:
        """Raises WrongState, naming state and holder, when the machine is in none of `states`."""
        if self.state not in states:
            allowed = sorted(str(state) for state in states)
            message = f"cannot {verb} machine {self.name!r}: it is {self.state}, and must be {' or '.join(allowed)}"
            raise WrongState(message, state=str(self.state), allowed=allowed, holder=self.operation)

    @property
    def has_process(self) -> bool:
        """Whether there is a process that this daemon holds."""
        return self._session is not None

    @property
    def session(self) -> Session:
        """The live session. Raises WrongState when there is no process, MonitorUnavailable when it is none of ours."""
        if self.stray:
            reason = self.trouble.reason if self.trouble is not None else "it has no record of it"
            raise MonitorUnavailable(f"a QEMU of machine {self.name!r} is alive, and this daemon has no connection with it: {reason}")
        if self._session is None:
            raise WrongState(f"machine {self.name!r} is {self.state}: it has no process", state=str(self.state), allowed=[])
        return self._session

    async def start(self, launch: Launch) -> None:
        """Launches QEMU; returns when the guest runs (or, if it is launched paused, is built and halted before its first instruction).

        Raises:
            LaunchFailed: QEMU ended before it was ready; the machine is as before and nothing is left.
            HostError: this host could not start a process.
        """
        await self._over()
        self.require(AT_REST, "start")
        self.exit, self.resets, self.asked_to_end, self.status = None, 0, self.awaited, None
        self.happen(Happening.LAUNCH)
        await self._spawn_task(partial(self._launch, launch))

    async def adopt(self, record: LaunchRecord, process: QemuProcess, paths: MachinePaths) -> None:
        """Takes over a process that runs already, and asks it for everything. Returns after the first attempt."""
        await self._over()
        self.launch = record
        self.found()
        await self._spawn_task(partial(self._adopt, record, process, paths))

    def found(self) -> None:
        """A QEMU of this machine is alive, and will be taken over."""
        if self.state in AT_REST:
            self.happen(Happening.FOUND)

    def lost(self, reason: str) -> None:
        """A QEMU of this machine is alive, but which process it is cannot be said: it cannot be reached."""
        self.set_trouble(reason)
        self.found()

    def ended_unseen(self, reason: str, *, rebooted: bool) -> None:
        """The process of an earlier daemon's record is gone, and nobody saw how it ended."""
        self.exit = ExitView(reason=reason, clean=False, at=now())
        self.happen(Happening.FOUND)
        self.happen(Happening.EXITED if rebooted else Happening.DIED)
        if not rebooted:
            self.on_end(self)

    async def release(self) -> None:
        """Lets go of the process without touching it: the daemon ends, QEMU goes on."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _over(self) -> None:
        """Returns when the task of the process before has let go of it. Nothing has changed yet: who waits here may be cancelled."""
        if self._task is not None and not self._task.done():
            await asyncio.wait([self._task])

    async def _spawn_task(self, work: Work) -> None:
        loop = asyncio.get_running_loop()
        ready: asyncio.Future[None] = loop.create_future()
        self._began = loop.time()
        self._task = loop.create_task(self._run(work, ready), name=f"machine:{self.name}")
        await ready  # whoever goes away takes nothing along: it is settled for nobody then

    async def _run(self, work: Work, ready: asyncio.Future[None]) -> None:
        try:
            await work(ready)
        except QmpdError as error:
            self._failed(error, ready)
        except OSError as error:
            self._failed(shortage(error) or HostError(f"machine {self.name!r} could not be started: {error}"), ready)
        except asyncio.CancelledError:
            ready.cancel()
            raise
        except Exception as error:  # noqa: BLE001  the boundary of a machine: a mistake of ours must not look like a start without end
            _log.exception("mistake in a machine's task", extra={"machine": self.name})
            self._failed(HostError(f"qmpd made a mistake with machine {self.name!r}: {error!r}"), ready)
        else:
            _settle(ready)
        finally:
            self._session = None

    async def _launch(self, launch: Launch, ready: asyncio.Future[None]) -> None:
        async with prepared(launch, self.definition) as (process, record):
            self.launch = record
            if launch.head_start is not None:
                # The machine is stored, or nobody would have opened the gate. QEMU builds its machine meanwhile.
                await asyncio.to_thread(mark_finished, launch.state_dir)
            session = Session(self, self.name, process, record.sockets, launch.stderr_path, record.expected_uuid)

            async def begin(monitor: Monitor) -> None:
                if launch.paused:
                    await session.ask_status(monitor)
                else:
                    await passing("guest-cont")
                    await monitor.execute("cont")
                    await passing("guest-going")
                    self.set_status("running")
                    self.happen(Happening.RAN)
                    _settle(ready)  # who waits for the start need not wait for the note
                    await asyncio.sleep(0)
                    await asyncio.to_thread(mark_begun, record.run_dir)

            end = partial(self._end, session, record, launch.state_dir)
            await self._follow(session, record, session.launch(begin, partial(_settle, ready), end))

    async def _adopt(self, record: LaunchRecord, process: QemuProcess, paths: MachinePaths, ready: asyncio.Future[None]) -> None:
        try:
            session = Session(self, self.name, process, record.sockets, paths.log("stderr"), record.expected_uuid)
            paused = record.paused or await asyncio.to_thread(has_begun, record.run_dir)
            end = partial(self._end, session, record, paths.state)
            await self._follow(session, record, session.adopt(partial(_settle, ready), end, paused=paused))
        finally:
            process.close()

    async def _follow(self, session: Session, record: LaunchRecord, conversation: Coroutine[object, object, None]) -> None:
        self._session = session
        self._tell()
        async with self._placed(session, record), all_connected(self.consoles, record.pipes):
            try:
                async with accompanied(self.name, session.process, record.tpm, self._publish):
                    await conversation
            except LaunchFailed:
                await asyncio.to_thread(remove_record, record.run_dir)
                raise

    async def _end(self, session: Session, record: LaunchRecord, state_dir: str, status: ExitStatus) -> None:
        """The process has ended: what there is to read and to write, in one go, and then the machine is at rest. Somebody waits for that.

        Nobody is told before how it ended is written down and its record is gone: a daemon that is killed then must not take a machine
        that was stopped for one that crashed.
        """
        consoles = list(self.consoles.values())
        await dismissed(session.process.companion)

        def work() -> tuple[ExitView, list[tuple[int, bytes] | None]]:
            ending = judged(status, session.shutdown_reason, session.last_words(), now())
            keep(state_dir, ending)
            remove_record(record.run_dir)
            return ending, [console.look() for console in consoles]

        ending, logs = await asyncio.to_thread(work)
        for console, seen in zip(consoles, logs, strict=True):
            console.note(seen)
        self.exit, self._session, self.status = ending, None, None
        self.happen(Happening.EXITED if ending.clean or self.asked_to_end else Happening.DIED)
        # In the next turn of the loop, behind the answers that go out in this one.
        fields = {"machine": self.name, "status": describe(status), "clean": ending.clean}
        asyncio.get_running_loop().call_soon(partial(_log.info, "machine ended", extra=fields))
        self.on_end(self)

    @asynccontextmanager
    async def _placed(self, session: Session, record: LaunchRecord) -> AsyncIterator[None]:
        """Knows where a machine with limits is held to them. Its cgroup is removed with its end."""
        if record.definition.spec.limits == Limits():
            yield
            return
        self.cgroup = await asyncio.to_thread(directory_of, record.identity.pid)
        try:
            yield
        finally:
            if self.cgroup is not None and session.process.exit is not None:
                await asyncio.to_thread(leave, self.cgroup)
            self.cgroup = None

    def _failed(self, error: QmpdError, ready: asyncio.Future[None]) -> None:
        if self.state in AT_REST:
            return  # it had ended, and whoever waited for that knows
        self.status = None
        ending = Happening.EXITED if self.asked_to_end else Happening.DIED
        if self._session is not None and self._session.process.exit is None:
            ending = Happening.DISCONNECTED  # nobody looks after it any more, but it was not seen to end
        elif self.state is State.STARTING:
            ending = Happening.LAUNCH_FAILED
        self.happen(ending)
        if not ready.done():
            ready.set_exception(error)
        else:
            _log.error("machine lost", extra={"machine": self.name, "error": error.message})


def _settle(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)
