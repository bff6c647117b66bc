"""What outlasts its request: runs as a task, is written down before it begins, can be cancelled, and keeps its result."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import msgspec

from qmpd.errors import QmpdError, WrongState
from qmpd.journal import Journal
from qmpd.machine import Publish
from qmpd.tasks import Tasks, background, undivided
from qmpd.views import JobView

_log = logging.getLogger(__name__)
Work = Callable[[], Awaitable[msgspec.Struct]]


class Jobs:
    """The jobs of this daemon. Made by `open_jobs`."""

    def __init__(self, journal: Journal, publish: Publish, tasks: Tasks) -> None:
        self._journal = journal
        self._publish = publish
        self._tasks = tasks
        self._running: dict[str, asyncio.Task[None]] = {}

    async def begin(self, kind: str, machine: str, work: Work) -> JobView:
        """Starts `work` as a job; its struct becomes the result, its QmpdError the error."""
        job = await self._journal.create_job(kind, machine)
        self._running[job.id] = self._tasks.start(self._run(job, work), f"job:{kind}:{machine}")
        self._publish("job.started", machine, {"job": job.id, "kind": kind})
        return job

    async def cancel(self, job_id: str) -> JobView:
        """Cancels a running job and waits until it has let go. Raises WrongState when it has ended, or is being cancelled."""
        task = self._running.pop(job_id, None)
        if task is None:
            job = await self._journal.job(job_id)
            what = "is being cancelled already" if job.state == "running" else f"has ended: {job.state}"
            raise WrongState(f"job {job_id} {what}", state=job.state, allowed=["running"])
        task.cancel()
        return await undivided(self._end(job_id, task), f"cancel:{job_id}")

    async def _end(self, job_id: str, task: asyncio.Task[None]) -> JobView:
        await asyncio.wait([task])
        return self._ended(await self._journal.finish_job(job_id, "cancelled"))

    async def job(self, job_id: str) -> JobView:
        """One job. Raises NotFound."""
        return await self._journal.job(job_id)

    async def jobs(self, machine: str | None) -> tuple[JobView, ...]:
        """The newest jobs, newest first."""
        return await self._journal.jobs(machine)

    async def _run(self, job: JobView, work: Work) -> None:
        try:
            result = await work()
        except QmpdError as error:
            body = {"code": error.code, "message": error.message, "details": error.details}
            self._ended(await self._journal.finish_job(job.id, "failed", error=body))
        except Exception as error:  # noqa: BLE001  the boundary of a job: a mistake of ours must not look like a job that goes on for ever
            _log.exception("mistake in a job", extra={"job": job.id, "kind": job.kind})
            body = {"code": "internal", "message": repr(error), "details": {}}
            self._ended(await self._journal.finish_job(job.id, "failed", error=body))
        else:
            self._ended(await self._journal.finish_job(job.id, "succeeded", result=msgspec.to_builtins(result)))
        finally:
            # A job that is cut off because the daemon ends has no ending: the next daemon finds it interrupted.
            self._running.pop(job.id, None)

    def _ended(self, job: JobView) -> JobView:
        _log.info("job ended", extra={"job": job.id, "kind": job.kind, "state": job.state})
        self._publish("job.ended", job.machine or "", {"job": job.id, "kind": job.kind, "state": job.state})
        return job


@asynccontextmanager
async def open_jobs(journal: Journal, publish: Publish) -> AsyncIterator[Jobs]:
    """The jobs of this daemon; those still running when it ends are left as they are and count as interrupted."""
    async with background() as tasks:
        yield Jobs(journal, publish, tasks)
