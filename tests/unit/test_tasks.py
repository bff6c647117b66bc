"""Tasks have an owner and an end."""

from __future__ import annotations

import asyncio
import logging

import pytest

from qmpd.tasks import alongside, background, undivided

PATIENCE_S = 20.0


class Work:
    """A coroutine that says how far it came, and goes on when it is told to."""

    def __init__(self) -> None:
        self.begun = asyncio.Event()
        self.go = asyncio.Event()
        self.outcome = "nothing"

    async def __call__(self) -> str:
        self.begun.set()
        try:
            async with asyncio.timeout(PATIENCE_S):
                await self.go.wait()
        except asyncio.CancelledError:
            self.outcome = "cancelled"
            raise
        self.outcome = "done"
        return self.outcome


async def test_a_task_in_the_background_ends_with_its_block() -> None:
    work = Work()
    async with background() as tasks:
        task = tasks.start(work(), "work")
        await work.begun.wait()
        assert task.get_name() == "work"
    assert work.outcome == "cancelled"


async def test_a_task_that_never_took_its_first_step_ends_too() -> None:
    work = Work()
    async with background() as tasks:
        task = tasks.start(work(), "work")
    assert task.cancelled()
    assert work.outcome == "nothing"


async def test_a_task_that_will_not_go_at_once_is_waited_for() -> None:
    let_go, begun = asyncio.Event(), asyncio.Event()

    async def stubborn() -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            let_go.set()
            raise

    async with background() as tasks:
        tasks.start(stubborn(), "stubborn")
        await begun.wait()
    assert let_go.is_set()


async def test_a_task_that_fails_is_logged_and_takes_nobody_with_it(caplog: pytest.LogCaptureFixture) -> None:
    async def failing() -> None:
        raise ValueError("on purpose")

    work = Work()
    async with background() as tasks:
        other = tasks.start(work(), "other")
        failed = tasks.start(failing(), "failing")
        await asyncio.wait([failed])
        work.go.set()
        assert await other == "done"
    (entry,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert (entry.getMessage(), vars(entry)["task"]) == ("task failed", "failing")


async def test_what_runs_alongside_ends_with_its_block() -> None:
    work = Work()
    async with alongside(work(), "work") as task:
        await work.begun.wait()
    assert task.cancelled()
    assert work.outcome == "cancelled"


async def test_what_ran_alongside_can_be_asked_for_its_result() -> None:
    work = Work()
    async with alongside(work(), "work") as task:
        work.go.set()
        assert await task == "done"


async def test_what_must_not_stop_half_way_goes_on_when_its_caller_is_cancelled() -> None:
    work = Work()
    caller = asyncio.create_task(undivided(work(), "work"), name="caller")
    await work.begun.wait()
    caller.cancel()
    await asyncio.sleep(0)
    assert not caller.done()
    work.go.set()
    await asyncio.wait([caller], timeout=PATIENCE_S)
    assert caller.cancelled()
    assert work.outcome == "done"


async def test_what_must_not_stop_half_way_gives_its_result_and_its_error() -> None:
    async def failing() -> None:
        raise ValueError("on purpose")

    work = Work()
    work.go.set()
    assert await undivided(work(), "work") == "done"
    with pytest.raises(ValueError, match="on purpose"):
        await undivided(failing(), "failing")
