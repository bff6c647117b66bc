"""Block jobs as QEMU reports them. Ours do not vanish by themselves: what they came to is there to be read, and is dismissed."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from qmpd.migration.qemu import Qemu, ask_list
from qmpd.migration.watch import Watch


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """A job as QEMU reports it."""

    ident: str
    status: str
    done: int
    total: int
    error: str | None

    @property
    def behind(self) -> bool:
        """Whether there is something to copy that is not copied."""
        return self.done < self.total


async def concluded(qemu: Qemu, name: str, watch: Watch) -> Job | None:
    """The job once it has ended; None when it is gone."""
    while True:
        job = (await jobs(qemu)).get(name)
        if job is None or job.status == "concluded":
            return job
        await watch.wake()


async def jobs(qemu: Qemu) -> dict[str, Job]:
    """All jobs by name."""
    return {job.ident: job for job in map(_job, await ask_list(qemu, "query-jobs"))}


def _job(answer: Mapping[str, object]) -> Job:
    error = answer.get("error")
    return Job(
        ident=str(answer.get("id")),
        status=str(answer.get("status")),
        done=_bytes(answer.get("current-progress")),
        total=_bytes(answer.get("total-progress")),
        error=error if isinstance(error, str) else None,
    )


def _bytes(value: object) -> int:
    return value if isinstance(value, int) else 0


def words(job: Job | None) -> str:
    """Why it ended."""
    return "its job is gone" if job is None else job.error or "QEMU does not say why"
