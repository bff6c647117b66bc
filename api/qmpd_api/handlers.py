"""What each document route does: one call of the service. Everything before it (decoding, limits) and after it (encoding) is elsewhere."""

from __future__ import annotations

from typing import Any

import msgspec

from qmpd.board import NamedBoard
from qmpd.errors import NotFound, Problem, invalid
from qmpd.processviews import AdoptRequest, ForgetRequest, ProcessView
from qmpd.spec import MachineChanges, MachineSpec
from qmpd.views import (
    BoardView,
    CheckReport,
    CommandView,
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
from qmpd_api.exchange import Call, Reply, etag
from qmpd_api.queries import BoardsQuery, CreateQuery, EventsQuery, JobsQuery, MachinesQuery, Query, WaitQuery


class Nothing(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of a verb that takes no arguments: none at all, or an empty map."""


async def version(call: Call[None, Query]) -> Version:
    """The daemon and what it speaks."""
    return call.service.version()


async def boards(call: Call[None, BoardsQuery]) -> list[BoardView]:
    """The catalogue."""
    return await call.service.boards(call.query.arch)


async def board(call: Call[None, Query]) -> NamedBoard:
    """One board file."""
    return call.service.board(call.id)


async def emulators(call: Call[None, Query]) -> list[EmulatorView]:
    """The emulators of this host."""
    return await call.service.emulators()


async def check(call: Call[None, Query]) -> CheckReport:
    """What this host can and cannot do."""
    return await call.service.check()


async def doctor(call: Call[None, Query]) -> DoctorReport:
    """What is wrong with this daemon and its machines."""
    return await call.service.upkeep.doctor()


async def validate(call: Call[MachineSpec, Query]) -> ValidationReport:
    """All that is wrong with a definition."""
    return await call.service.validate(call.body)


async def command(call: Call[MachineSpec, Query]) -> CommandView:
    """The QEMU command of a definition."""
    return await call.service.command(call.body)


async def machines(call: Call[None, MachinesQuery]) -> MachineList:
    """The machines."""
    return call.service.machines(call.query.labels(), call.query.state, call.caller)


async def create(call: Call[MachineSpec, CreateQuery]) -> Reply:
    """Store a definition, and start it if asked."""
    view = await call.service.create(call.body, start=call.query.start, paused=call.query.paused)
    return Reply(document=view, headers={"Location": f"/v1/machines/{view.name}", **etag(view.revision)})


async def machine(call: Call[None, Query]) -> Reply:
    """One machine."""
    return _tagged(call.service.machine(call.name))


async def replace(call: Call[MachineSpec, Query]) -> Reply:
    """Replace a definition."""
    if call.body.name != call.name:
        raise invalid([Problem(path="$.name", message=f"a machine keeps its name: this one is called {call.name!r}")])
    return _tagged(await call.service.replace(call.name, call.body, call.needed_revision()))


async def update(call: Call[MachineChanges, Query]) -> Reply:
    """Change a definition, whatever the machine does."""
    return _tagged(await call.service.update(call.name, call.body, call.needed_revision()))


async def delete(call: Call[None, Query]) -> None:
    """Delete a machine at rest."""
    await call.service.delete(call.name, call.revision)


async def definition(call: Call[None, Query]) -> Reply:
    """What the user said about a machine."""
    view = call.service.definition(call.name)
    return Reply(document=view, headers=etag(view.revision))


async def machine_command(call: Call[None, Query]) -> CommandView:
    """The QEMU command of a stored definition."""
    return await call.service.machine_command(call.name)


async def start(call: Call[StartRequest, Query]) -> MachineView:
    """Launch QEMU."""
    return await call.service.start(call.name, call.body)


async def stop(call: Call[Nothing, Query]) -> StopView:
    """End QEMU without asking the guest."""
    return await call.service.stop(call.name)


async def kill(call: Call[Nothing, Query]) -> StopView:
    """SIGKILL."""
    return await call.service.kill(call.name)


async def power_off(call: Call[Nothing, Query]) -> StopView:
    """SIGTERM."""
    return await call.service.rescue.power_off(call.name)


async def reattach(call: Call[Nothing, Query]) -> MachineView:
    """Try to reach a machine's QEMU."""
    return await call.service.rescue.reattach(call.name)


async def forget(call: Call[ForgetRequest, Query]) -> None:
    """Give up a machine."""
    await call.service.rescue.forget(call.name, call.body)


async def processes(call: Call[None, Query]) -> list[ProcessView]:
    """The QEMUs of this host."""
    return await call.service.rescue.processes()


async def adopt(call: Call[AdoptRequest, Query]) -> Reply:
    """Take over a QEMU that somebody else started."""
    view = await call.service.rescue.adopt(call.body)
    return Reply(document=view, headers={"Location": f"/v1/machines/{view.name}", **etag(view.revision)})


async def reset(call: Call[Nothing, Query]) -> MachineView:
    """The reset button."""
    return await call.service.reset(call.name)


async def pause(call: Call[Nothing, Query]) -> MachineView:
    """Halt the vCPUs."""
    return await call.service.pause(call.name)


async def resume(call: Call[Nothing, Query]) -> MachineView:
    """Let the vCPUs go on."""
    return await call.service.resume(call.name)


async def shutdown(call: Call[ShutdownRequest, Query]) -> Reply:
    """Ask the guest to shut down; a job waits for it."""
    return _job(await call.service.shutdown(call.name, call.body))


async def shutdown_host(call: Call[HostShutdownRequest, Query]) -> Reply:
    """End all machines; a job waits for them."""
    return _job(await call.service.shutdown_host(call.body))


async def wait(call: Call[None, WaitQuery]) -> MachineView:
    """Wait for a state."""
    return await call.service.wait(call.name, frozenset(call.query.state), call.query.timeout_s)


async def qmp(call: Call[QmpRequest, Query]) -> QmpAnswer:
    """Pass one QMP command through."""
    return await call.service.qmp(call.name, call.body, call.caller)


async def screenshot(call: Call[None, Query]) -> bytes:
    """The display as a PNG image."""
    return await call.service.screenshot(call.name)


async def send_key(call: Call[SendKeyRequest, Query]) -> None:
    """Press keys."""
    await call.service.send_key(call.name, call.body)


async def expect(call: Call[ExpectRequest, Query]) -> ExpectResult:
    """Wait for output."""
    return await call.service.expect(call.name, call.body)


async def events(call: Call[None, EventsQuery]) -> EventPage:
    """One page of events."""
    return await call.service.events_page(call.query.since or 0, call.query.limit, call.query.machine)


async def jobs(call: Call[None, JobsQuery]) -> JobList:
    """The jobs."""
    listed = await call.service.jobs(call.query.machine)
    return JobList(jobs=tuple(job for job in listed.jobs if call.service.exists_for(call.caller, job.machine)))


async def job(call: Call[None, Query]) -> JobView:
    """One job."""
    return await _job_of(call)


async def cancel(call: Call[Nothing, Query]) -> JobView:
    """Ask a job to stop."""
    await _job_of(call)
    return await call.service.cancel(call.id)


async def _job_of(call: Call[Any, Query]) -> JobView:
    found = await call.service.job(call.id)
    if not call.service.exists_for(call.caller, found.machine):
        raise NotFound(f"there is no job {call.id}")
    return found


async def metrics(call: Call[None, Query]) -> bytes:
    """The numbers of this daemon for Prometheus."""
    return await call.service.upkeep.metrics()


def _tagged(view: MachineView) -> Reply:
    return Reply(document=view, headers=etag(view.revision))


def _job(view: JobView) -> Reply:
    return Reply(document=view, headers={"Location": f"/v1/jobs/{view.id}"})
