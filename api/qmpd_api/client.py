"""The Python client of the HTTP API: one method per route, the same types and the same errors as inside the daemon.

    async with Client() as client:
        await client.create(MachineSpec(name="lab", board="riscv64-virt"), start=True)
        print((await client.expect("lab", ExpectRequest(pattern="OpenSBI", from_start=True))).text)

Every method raises what the daemon raised (`qmpd.errors`), or `DaemonUnavailable` or `DaemonSilent` (`qmpd_api.connection`).
A cancelled call is abandoned, not undone.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from types import TracebackType
from typing import Final, Self

import msgspec

from qmpd.board import NamedBoard
from qmpd.lifecycle import State
from qmpd.processviews import AdoptRequest, ForgetRequest, ProcessView
from qmpd.spec import MachineChanges, MachineSpec
from qmpd.views import (
    BoardView,
    CheckReport,
    CommandView,
    DefinitionView,
    DoctorReport,
    EmulatorView,
    EventPage,
    ExpectRequest,
    ExpectResult,
    HostShutdownRequest,
    JobList,
    JobView,
    MachineList,
    MachineView,
    QmpAnswer,
    QmpRequest,
    SendKeyRequest,
    ShutdownRequest,
    StartRequest,
    StopView,
    ValidationReport,
    Version,
)
from qmpd_api.connection import (
    DAEMON,
    MARGIN_S,
    PROBE_DEADLINE_S,
    QUERY_DEADLINE_S,
    VERB_DEADLINE_S,
    Connection,
    DaemonSilent,
    DaemonUnavailable,
    Failures,
    Query,
    Remote,
    T,
    Wire,
    connected,
    segment,
    url,
)
from qmpd_api.endpoint import default_socket
from qmpd_api.item_client import ItemVerbs
from qmpd_api.migration_client import MigrationVerbs
from qmpd_api.streams_client import (
    ConsoleStream,
    EventStreamItem,
    LogSlice,
    QmpStream,
    bundle_stream,
    console_stream,
    event_stream,
    log_slice,
    log_stream,
    qmp_stream,
)
from qmpd_api.trust_client import TrustVerbs

__all__ = ["Client", "ConsoleStream", "DaemonSilent", "DaemonUnavailable", "LogSlice", "QmpStream", "Wire"]

#: How often a job is looked at. Its progress is for people: faster than this nobody reads it.
JOB_LOOK_S: Final = 0.25
#: A guest that boots or stops on an idle host is done within about this.
DEFAULT_WAIT_S: Final = 60.0


class Client(TrustVerbs, MigrationVerbs, ItemVerbs):
    """A connection to one daemon, used in `async with`. Safe to use from any number of tasks at once."""

    def __init__(self, target: str | Remote | None = None, *, wire: Wire = "msgpack", failures: Failures = DAEMON) -> None:
        self.target = target or default_socket()
        self._failures = failures
        self._wire = wire
        self._stack = AsyncExitStack()
        self._connection: Connection | None = None

    async def __aenter__(self) -> Self:
        self._connection = await self._stack.enter_async_context(connected(self.target, self._wire, self._failures))
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._connection = None
        await self._stack.aclose()

    @property
    def connection(self) -> Connection:
        """The pool of connections below; raises RuntimeError outside `async with`."""
        if self._connection is None:
            raise RuntimeError("the client is used outside of its `async with`")
        return self._connection

    async def version(self) -> Version:
        """The daemon, and what it speaks."""
        return await self._get("/v1/version", Version)

    async def boards(self, arch: str | None = None) -> tuple[BoardView, ...]:
        """The catalogue, ordered by id; only the boards of `arch` if it is given."""
        return await self._get("/v1/boards", tuple[BoardView, ...], {"arch": arch}, PROBE_DEADLINE_S)

    async def board(self, board: str) -> NamedBoard:
        """One board file, or NotFound."""
        return await self._get(f"/v1/boards/{segment(board)}", NamedBoard)

    async def emulators(self) -> tuple[EmulatorView, ...]:
        """The emulators of the daemon's host."""
        return await self._get("/v1/emulators", tuple[EmulatorView, ...], None, PROBE_DEADLINE_S)

    async def check(self) -> CheckReport:
        """What the daemon's host can and cannot do. Slow: starts emulators."""
        return await self._get("/v1/check", CheckReport, None, PROBE_DEADLINE_S)

    async def doctor(self) -> DoctorReport:
        """What is wrong with the daemon and its machines, and what to do. Findings are an answer here, not an error."""
        return await self._get("/v1/doctor", DoctorReport, None, VERB_DEADLINE_S)

    def bundle(self) -> AsyncGenerator[bytes, None]:
        """A support bundle (.tar.gz) in pieces: what is known of the daemon and its machines, without secrets."""
        return bundle_stream(self.connection, "/v1/bundle")

    async def validate(self, spec: MachineSpec) -> ValidationReport:
        """All that is wrong with a definition. Wrong definitions are an answer here, not an error."""
        return await self._post("/v1/validate", ValidationReport, spec, deadline_s=PROBE_DEADLINE_S)

    async def command(self, spec: MachineSpec) -> CommandView:
        """The QEMU command of a definition, which is not stored; Invalid if it has none."""
        return await self._post("/v1/command", CommandView, spec, deadline_s=PROBE_DEADLINE_S)

    async def machine_command(self, name: str) -> CommandView:
        """The QEMU command of a stored definition."""
        return await self._get(_at(name, "command"), CommandView, None, PROBE_DEADLINE_S)

    async def machines(self, labels: Mapping[str, str] | None = None, state: State | None = None) -> MachineList:
        """The machines that carry all of `labels` and are in `state`, ordered by name."""
        wanted = tuple(f"{key}={value}" for key, value in (labels or {}).items())
        return await self._get("/v1/machines", MachineList, {"label": wanted, "state": state})

    async def machine(self, name: str) -> MachineView:
        """One machine, or NotFound."""
        return await self._get(_at(name), MachineView)

    async def definition(self, name: str) -> DefinitionView:
        """What the user said about a machine, and its revision."""
        return await self._get(_at(name, "definition"), DefinitionView)

    async def create(self, spec: MachineSpec, *, start: bool = False, paused: bool = False) -> MachineView:
        """Store a definition, and start it if asked. If starting fails the machine exists all the same."""
        query: Query = {"start": start or None, "paused": paused or None}
        return await self._post("/v1/machines", MachineView, spec, query=query, deadline_s=PROBE_DEADLINE_S)

    async def replace(self, name: str, spec: MachineSpec, revision: int) -> MachineView:
        """Replace the definition that was read as `revision`; StaleRevision if it changed since."""
        return await self.connection.call(
            "PUT", _at(name), MachineView, body=spec, headers=_if_match(revision), deadline_s=PROBE_DEADLINE_S
        )

    async def update(self, name: str, changes: MachineChanges, revision: int) -> MachineView:
        """Change the definition that was read as `revision`, whatever the machine does; StaleRevision if it changed since."""
        return await self.connection.call(
            "PATCH", _at(name), MachineView, body=changes, headers=_if_match(revision), deadline_s=VERB_DEADLINE_S
        )

    async def delete(self, name: str, revision: int | None = None) -> None:
        """Delete a machine at rest, with the disks that were made for it; StaleRevision if `revision` is given and not the current one."""
        headers = {} if revision is None else _if_match(revision)
        await self.connection.fetch("DELETE", _at(name), headers=headers, deadline_s=VERB_DEADLINE_S)

    async def start(self, name: str, *, paused: bool = False) -> MachineView:
        """Launch QEMU; returns when the machine runs, or is halted before its first instruction if `paused`."""
        return await self._post(_at(name, "start"), MachineView, StartRequest(paused=paused), deadline_s=PROBE_DEADLINE_S)

    async def stop(self, name: str) -> StopView:
        """End QEMU without asking the guest; returns when the process is gone. Never more than SIGTERM."""
        return await self._post(_at(name, "stop"), StopView)

    async def kill(self, name: str) -> StopView:
        """SIGKILL; returns when the process is gone."""
        return await self._post(_at(name, "kill"), StopView)

    async def power_off(self, name: str) -> StopView:
        """SIGTERM, which needs no monitor; returns when the process is gone."""
        return await self._post(_at(name, "power-off"), StopView)

    async def reattach(self, name: str) -> MachineView:
        """Try now to reach the QEMU of a machine that is unreachable or unresponsive; raises what that failed with."""
        return await self._post(_at(name, "reattach"), MachineView)

    async def forget(self, name: str) -> None:
        """Give up a machine whose QEMU cannot be reached. Its files are kept, and its process lives on: nobody looks after it."""
        request = ForgetRequest(confirm=name)
        await self.connection.fetch("POST", _at(name, "forget"), body=request, deadline_s=VERB_DEADLINE_S)

    async def processes(self) -> tuple[ProcessView, ...]:
        """The QEMUs of the daemon's host that it may see: ours, strays of our directories, and foreign ones."""
        return await self._get("/v1/processes", tuple[ProcessView, ...])

    async def adopt(self, request: AdoptRequest) -> MachineView:
        """Take over a QEMU that somebody else started."""
        return await self._post("/v1/adopt", MachineView, request)

    async def reset(self, name: str) -> MachineView:
        """The reset button."""
        return await self._post(_at(name, "reset"), MachineView)

    async def pause(self, name: str) -> MachineView:
        """Halt the vCPUs."""
        return await self._post(_at(name, "pause"), MachineView)

    async def resume(self, name: str) -> MachineView:
        """Let the vCPUs go on."""
        return await self._post(_at(name, "resume"), MachineView)

    async def shutdown(self, name: str, request: ShutdownRequest | None = None) -> JobView:
        """Ask the guest to shut down; returns the job that waits for it."""
        return await self._post(_at(name, "shutdown"), JobView, request or ShutdownRequest())

    async def shutdown_host(self, request: HostShutdownRequest | None = None) -> JobView:
        """End all machines, because their host goes down; returns the job, until the end of which none can be started."""
        return await self._post("/v1/shutdown", JobView, request or HostShutdownRequest())

    async def wait(self, name: str, states: Iterable[State], timeout_s: float = DEFAULT_WAIT_S) -> MachineView:
        """Return when the machine is in one of `states`; NotYet when it was not within `timeout_s` (an hour at most)."""
        query: Query = {"state": tuple(str(state) for state in states), "timeout_s": timeout_s}
        return await self._get(_at(name, "wait"), MachineView, query, timeout_s + MARGIN_S)

    async def qmp(self, name: str, command: str, arguments: Mapping[str, object] | None = None, *, oob: bool = False) -> object:
        """What QEMU returned; QemuRefused with QEMU's `class` and `desc` if it answered with an error."""
        request = QmpRequest(execute=command, arguments=dict(arguments or {}), oob=oob)
        return (await self._post(_at(name, "qmp"), QmpAnswer, request)).result

    async def screenshot(self, name: str) -> bytes:
        """The display as a PNG image."""
        reply = await self.connection.fetch("GET", _at(name, "screenshot"), headers={"Accept": "image/png"}, deadline_s=VERB_DEADLINE_S)
        return reply.body

    async def send_key(self, name: str, keys: Iterable[str], hold_ms: int = 100) -> None:
        """Press `keys` (QEMU's qcodes) together for `hold_ms`."""
        request = SendKeyRequest(keys=tuple(keys), hold_ms=hold_ms)
        await self.connection.fetch("POST", _at(name, "send-key"), body=request, deadline_s=VERB_DEADLINE_S)

    async def expect(self, name: str, request: ExpectRequest) -> ExpectResult:
        """Wait for the console to print a match. No match in time is an answer here, not an error."""
        return await self._post(_at(name, "expect"), ExpectResult, request, deadline_s=request.timeout_s + MARGIN_S)

    def console(
        self, name: str, *, port: int | None = None, since: int | None = None, scrollback: int | None = None
    ) -> AbstractAsyncContextManager[ConsoleStream]:
        """The serial console, from offset `since`, or from the last `scrollback` bytes. Used in `async with`."""
        query: Query = {"port": port, "since": since, "scrollback": scrollback}
        return console_stream(self.connection, url(_at(name, "console"), query))

    def qmp_session(self, name: str) -> AbstractAsyncContextManager[QmpStream]:
        """QMP commands one after the other over one WebSocket, for a program that sends many. Used in `async with`."""
        return qmp_stream(self.connection, url(_at(name, "qmp")))

    async def log(self, name: str, *, port: int | None = None, since: int | None = None, limit: int | None = None) -> LogSlice:
        """Up to `limit` bytes of the console's log from offset `since` (None: from the oldest kept)."""
        return await log_slice(self.connection, _at(name, "log"), {"port": port, "since": since, "limit": limit})

    def follow_log(self, name: str, *, port: int | None = None, since: int | None = None) -> AsyncGenerator[bytes, None]:
        """The console's log from offset `since` on, as it grows, until the machine ends."""
        return log_stream(self.connection, _at(name, "log"), {"port": port, "since": since, "follow": True})

    async def events_page(self, since: int | None = None, limit: int | None = None, machine: str | None = None) -> EventPage:
        """Up to `limit` events after number `since`."""
        return await self._get("/v1/events", EventPage, {"since": since, "limit": limit, "machine": machine})

    def events(self, since: int | None = None, machine: str | None = None) -> AsyncGenerator[EventStreamItem, None]:
        """Events after number `since` (None: from now on) as they happen, without end.

        A lost connection is made again from the last number seen, so nothing is missed: what the daemon no longer keeps is
        reported as an EventGap. Raises DaemonUnavailable if the daemon is not there at first, or stays away too long.
        """
        return event_stream(self.connection, since, machine)

    async def jobs(self, machine: str | None = None) -> JobList:
        """Jobs, newest first."""
        return await self._get("/v1/jobs", JobList, {"machine": machine})

    async def job(self, job: str) -> JobView:
        """One job, or NotFound."""
        return await self._get(f"/v1/jobs/{segment(job)}", JobView)

    async def cancel(self, job: str) -> JobView:
        """Ask a job to stop. What it had done stays done."""
        return await self._post(f"/v1/jobs/{segment(job)}/cancel", JobView)

    async def wait_job(self, job: str, progress: Callable[[JobView], None] | None = None) -> JobView:
        """Return the job when it has ended, however it ended; `progress` sees it every time it is looked at.

        There is no limit: a job has its own. Cancelling the wait leaves the job alone.
        """
        while True:
            view = await self.job(job)
            if progress is not None:
                progress(view)
            if view.state != "running":
                return view
            await asyncio.sleep(JOB_LOOK_S)

    async def metrics(self) -> str:
        """The daemon's numbers, in Prometheus' text format."""
        return (await self.connection.fetch("GET", "/metrics", headers={"Accept": "text/plain"})).body.decode()

    async def description(self) -> dict[str, object]:
        """The published description of the API (OpenAPI)."""
        return await self.connection.call("GET", "/v1/openapi.json", dict[str, object], headers={"Accept": "application/json"})

    async def _get(self, path: str, answer: type[T], query: Query | None = None, deadline_s: float = QUERY_DEADLINE_S) -> T:
        return await self.connection.call("GET", path, answer, query=query, deadline_s=deadline_s)

    async def _post(
        self,
        path: str,
        answer: type[T],
        body: msgspec.Struct | None = None,
        *,
        query: Query | None = None,
        deadline_s: float = VERB_DEADLINE_S,
    ) -> T:
        return await self.connection.call("POST", path, answer, query=query, body=body, deadline_s=deadline_s)


def _at(name: str, verb: str = "") -> str:
    return f"/v1/machines/{segment(name)}" + (f"/{verb}" if verb else "")


def _if_match(revision: int) -> dict[str, str]:
    return {"If-Match": f'"{revision}"'}
