from __future__ import annotations

import asyncio
import threading

import pytest

from qmpd.offload import off_loop
from tests.process.emulator import quiet


def never(_made: object) -> None:
    pytest.fail("undone")


async def test_work_runs_in_a_thread_and_its_result_is_returned() -> None:
    assert await off_loop(threading.get_ident, undo=never, name="work") != threading.get_ident()


async def test_an_error_of_the_work_is_the_callers() -> None:
    with pytest.raises(ZeroDivisionError):
        await off_loop(lambda: 1 // 0, undo=never, name="work")


@pytest.mark.parametrize("fails", [False, True])
async def test_what_work_makes_for_a_caller_that_went_away_is_undone(fails: bool) -> None:
    begun, go = threading.Event(), threading.Event()
    undone: list[str] = []

    def work() -> str:
        begun.set()
        go.wait()
        if fails:
            raise OSError
        return "made"

    task = asyncio.create_task(off_loop(work, undo=undone.append, name="work"), name="caller")
    await asyncio.to_thread(begun.wait)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert undone == []
    go.set()
    await quiet()
    assert undone == ([] if fails else ["made"])
