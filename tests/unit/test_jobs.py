"""What outlasts its request is written down, ends once, and can be cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import msgspec
import pytest

from qmpd.database import open_database
from qmpd.errors import NoSpace, NotFound, NotYet, WrongState
from qmpd.failpoint import arm
from qmpd.jobs import Jobs, Report, open_jobs
from qmpd.journal import Journal, open_journal
from qmpd.views import Progress

PATIENCE_S = 20.0


class Result(msgspec.Struct):
    """What a job makes here."""

    made: int = 1


class World:
    """The jobs of a daemon, and what they published."""

    def __init__(self, jobs: Jobs, journal: Journal, published: list[tuple[str, str]]) -> None:
        self.jobs = jobs
        self.journal = journal
        self.published = published
        self.begun = asyncio.Event()
        self.go = asyncio.Event()

    async def work(self) -> Result:
        """Ends when it may."""
        self.begun.set()
        async with asyncio.timeout(PATIENCE_S):
            await self.go.wait()
        return Result()

    async def ended(self, job_id: str) -> str:
        """The state of a job that is no longer running."""
        async with asyncio.timeout(PATIENCE_S):
            while (job := await self.jobs.job(job_id)).state == "running":
                await asyncio.sleep(0)
        return job.state


@asynccontextmanager
async def opened(state_dir: Path) -> AsyncIterator[World]:
    published: list[tuple[str, str]] = []

    def publish(kind: str, machine: str, data: Mapping[str, object]) -> None:
        published.append((kind, f"{machine} {data.get('state', '')}".strip()))

    async with AsyncExitStack() as stack:
        database = await stack.enter_async_context(open_database(state_dir))
        journal = await stack.enter_async_context(open_journal(database))
        yield World(await stack.enter_async_context(open_jobs(journal, publish)), journal, published)


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with opened(tmp_path) as made:
        yield made


async def test_a_job_keeps_its_result(world: World) -> None:
    job = await world.jobs.begin("shutdown", "one", world.work)
    assert (job.kind, job.machine, job.state) == ("shutdown", "one", "running")
    world.go.set()
    assert await world.ended(job.id) == "succeeded"
    assert (await world.jobs.job(job.id)).result == {"made": 1}
    assert world.published == [("job.started", "one"), ("job.ended", "one succeeded")]
    assert [found.id for found in await world.jobs.jobs("one")] == [job.id]
    assert await world.jobs.jobs("two") == ()


async def test_a_job_keeps_its_error(world: World) -> None:
    async def failing() -> Result:
        raise NotYet("not in time", state="running")

    job = await world.jobs.begin("shutdown", "one", failing)
    assert await world.ended(job.id) == "failed"
    assert (await world.jobs.job(job.id)).error == {"code": "not_yet", "message": "not in time", "details": {"state": "running"}}


async def test_a_mistake_of_ours_ends_a_job_too(world: World) -> None:
    async def mistaken() -> Result:
        raise KeyError("oops")

    job = await world.jobs.begin("shutdown", "one", mistaken)
    assert await world.ended(job.id) == "failed"
    assert ((await world.jobs.job(job.id)).error or {})["code"] == "internal"


async def test_a_cancelled_job_has_let_go_when_the_answer_comes(world: World) -> None:
    job = await world.jobs.begin("shutdown", "one", world.work)
    await world.begun.wait()
    assert (await world.jobs.cancel(job.id)).state == "cancelled"
    assert not [task for task in asyncio.all_tasks() if task.get_name().startswith("job:")]
    assert world.published[-1] == ("job.ended", "one cancelled")
    with pytest.raises(WrongState, match="has ended: cancelled") as wrong:
        await world.jobs.cancel(job.id)
    assert wrong.value.details == {"state": "cancelled", "allowed": ["running"]}


async def test_a_job_can_be_cancelled_before_its_first_step(world: World) -> None:
    job = await world.jobs.begin("shutdown", "one", world.work)
    assert not world.begun.is_set()
    assert (await world.jobs.cancel(job.id)).state == "cancelled"
    assert not world.begun.is_set()


async def test_of_two_who_cancel_one_is_told_that_the_other_does(world: World) -> None:
    job = await world.jobs.begin("shutdown", "one", world.work)
    await world.begun.wait()
    outcomes = await asyncio.gather(world.jobs.cancel(job.id), world.jobs.cancel(job.id), return_exceptions=True)
    assert [isinstance(outcome, WrongState) for outcome in outcomes] == [False, True]
    assert await world.ended(job.id) == "cancelled"
    assert [kind for kind, _ in world.published].count("job.ended") == 1


async def test_a_job_is_cancelled_even_if_the_one_who_asked_goes_away(world: World) -> None:
    job = await world.jobs.begin("shutdown", "one", world.work)
    await world.begun.wait()
    asking = asyncio.create_task(world.jobs.cancel(job.id), name="asking")
    await asyncio.sleep(0)
    asking.cancel()
    await asyncio.wait([asking], timeout=PATIENCE_S)
    assert await world.ended(job.id) == "cancelled"


async def test_there_is_no_job_of_an_unknown_id(world: World) -> None:
    with pytest.raises(NotFound):
        await world.jobs.job("nothing")
    with pytest.raises(NotFound):
        await world.jobs.cancel("nothing")


async def test_a_job_that_is_cut_off_is_found_interrupted(tmp_path: Path) -> None:
    async with opened(tmp_path) as world:
        job = await world.jobs.begin("shutdown", "one", world.work)
        await world.begun.wait()
    async with opened(tmp_path) as world:
        found = await world.jobs.job(job.id)
        assert (found.state, (found.error or {})["code"]) == ("interrupted", "interrupted")
        with pytest.raises(WrongState):
            await world.jobs.cancel(job.id)


async def test_an_ending_that_found_no_space_is_recorded_when_there_is_some(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qmpd.jobs.WRITE_AGAIN_S", 0.01)
    async with opened(tmp_path) as world:
        job = await world.jobs.begin("shutdown", "one", world.work)
        await world.begun.wait()
        arm("job-change:error")
        try:
            world.go.set()
            for _ in range(5):
                await asyncio.sleep(0.02)
                assert (await world.jobs.job(job.id)).state == "running"
            with pytest.raises(WrongState, match="is ending already"):
                await world.jobs.cancel(job.id)
        finally:
            arm("")
        assert await world.ended(job.id) == "succeeded"


async def test_a_job_that_is_about_no_one_machine_says_how_far_it_is(tmp_path: Path) -> None:
    async with opened(tmp_path) as world:

        async def work(report: Report) -> Result:
            await report(Progress(phase="order 1", done=2, total=3, unit="machines"))
            return await world.work()

        job = await world.jobs.begin_reporting("host-shutdown", None, work)
        await world.begun.wait()
        seen = await world.jobs.job(job.id)
        assert (seen.machine, seen.progress.done, seen.progress.total) == (None, 2, 3)
        world.go.set()
        assert await world.ended(job.id) == "succeeded"


async def test_progress_that_cannot_be_recorded_does_not_end_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def full(_job: str, _progress: Progress) -> None:
        raise NoSpace("the disk is full")

    async with opened(tmp_path) as world:
        monkeypatch.setattr(world.journal, "update_job", full)

        async def work(report: Report) -> Result:
            await report(Progress(done=1))
            return Result()

        job = await world.jobs.begin_reporting("host-shutdown", None, work)
        assert await world.ended(job.id) == "succeeded"
