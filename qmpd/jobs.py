"""What outlasts its request: runs as a task, is written down before it begins, can be cancelled, and keeps its result."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Final

import msgspec

from qmpd.errors import Busy, NoSpace, QmpdError, WrongState
from qmpd.journal import Ending, Journal
from qmpd.machine import Publish
from qmpd.store import Unknown
from qmpd.tasks import Tasks, background, undivided
from qmpd.views import JobView, Progress

#: An ending that found no space is written again this often: a disk is cleared by people.
WRITE_AGAIN_S: Final = 5.0
#: Work that is cut off may have to ask its QEMU for something; a daemon that ends has ten seconds for everything.
INTERRUPT_S: Final = 5.0

_log = logging.getLogger(__name__)
Work = Callable[[], Awaitable[msgspec.Struct]]


class Report:
    """How the work of a job says how far it is."""

    def __init__(self, job: str, journal: Journal) -> None:
        self.job = job
        #: Why the job cannot be cancelled any more; empty while it can.
        self.final = ""
        self._journal = journal

    async def __call__(self, progress: Progress) -> None:
        """Records how far it is."""
        try:
            await self._journal.update_job(self.job, progress)
        except QmpdError as error:  # it is for people: a disk that is full must not end the work
            _log.warning("progress was not recorded", extra={"job": self.job, "error": error.message})

    def point_of_no_return(self, reason: str) -> None:
        """From here on it goes on whatever anybody says."""
        self.final = reason


class Jobs:
    """The jobs of this daemon. Made by `open_jobs`."""

    def __init__(self, journal: Journal, publish: Publish, tasks: Tasks) -> None:
        self._journal = journal
        self._publish = publish
        self._tasks = tasks
        self._running: dict[str, tuple[asyncio.Task[None], Report]] = {}

    async def begin(self, kind: str, machine: str, work: Work) -> JobView:
        """Starts `work` as a job; its struct becomes the result, its QmpdError the error."""
        return await self.begin_reporting(kind, machine, lambda _report: work())

    async def begin_reporting(self, kind: str, machine: str | None, work: Callable[[Report], Awaitable[msgspec.Struct]]) -> JobView:
        """The same for work that says how far it is, and may be about no one machine."""
        job = await self._journal.create_job(kind, machine)
        report = Report(job.id, self._journal)
        task = self._tasks.start(self._run(job, lambda: work(report)), f"job:{kind}:{machine or 'host'}")
        self._running[job.id] = (task, report)
        self._publish("job.started", machine or "", {"job": job.id, "kind": kind})
        return job

    async def cancel(self, job_id: str) -> JobView:
        """Cancels a running job and waits until it has let go. Raises WrongState when it has ended, is ending, or cannot go back."""
        task, report = self._running.get(job_id, (None, None))
        if task is None or report is None:
            job = await self._journal.job(job_id)
            what = "is ending already" if job.state == "running" else f"has ended: {job.state}"
            raise WrongState(f"job {job_id} {what}", state=job.state, allowed=["running"])
        if report.final:
            raise WrongState(f"job {job_id} is past the point of no return: {report.final}", state="running", allowed=[])
        del self._running[job_id]
        task.cancel()
        return await undivided(self._end(job_id, task), f"cancel:{job_id}")

    async def _end(self, job_id: str, task: asyncio.Task[None]) -> JobView:
        await asyncio.wait([task])
        return await self._finish(job_id, "cancelled")

    async def interrupt(self) -> None:
        """The daemon ends: cuts off what still runs, and waits a moment for it to let go of its machines. No ending is recorded."""
        tasks = [task for task, _ in self._running.values()]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=INTERRUPT_S)

    async def job(self, job_id: str) -> JobView:
        """One job. Raises NotFound."""
        return await self._journal.job(job_id)

    async def jobs(self, machine: str | None) -> tuple[JobView, ...]:
        """The newest jobs, newest first."""
        return await self._journal.jobs(machine)

    async def _run(self, job: JobView, work: Work) -> None:
        result, error = None, None
        try:
            result = msgspec.to_builtins(await work())
        except QmpdError as failure:
            error = {"code": failure.code, "message": failure.message, "details": failure.details}
        except Exception as mistake:  # noqa: BLE001  the boundary of a job: a mistake of ours must not look like a job that goes on for ever
            _log.exception("mistake in a job", extra={"job": job.id, "kind": job.kind})
            error = {"code": "internal", "message": repr(mistake), "details": {}}
        finally:
            # A job that is cut off because the daemon ends has no ending: the next daemon finds it interrupted.
            self._running.pop(job.id, None)
        await self._finish(job.id, "succeeded" if error is None else "failed", result=result, error=error)

    async def _finish(
        self, job_id: str, state: Ending, *, result: Mapping[str, object] | None = None, error: Mapping[str, object] | None = None
    ) -> JobView:
        """Records an ending, however long the disk stays full: a job whose ending is not written would look as if it went on for ever."""
        while True:
            try:
                return self._ended(await self._journal.finish_job(job_id, state, result=result, error=error))
            except (NoSpace, Busy, Unknown) as refusal:
                _log.error("the ending of a job is not recorded yet", extra={"job": job_id, "state": state, "error": refusal.message})
            await asyncio.sleep(WRITE_AGAIN_S)

    def _ended(self, job: JobView) -> JobView:
        _log.info("job ended", extra={"job": job.id, "kind": job.kind, "state": job.state})
        self._publish("job.ended", job.machine or "", {"job": job.id, "kind": job.kind, "state": job.state})
        return job


@asynccontextmanager
async def open_jobs(journal: Journal, publish: Publish) -> AsyncIterator[Jobs]:
    """The jobs of this daemon; those still running when it ends are left as they are and count as interrupted."""
    async with background() as tasks:
        yield Jobs(journal, publish, tasks)
