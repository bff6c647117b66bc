"""The one place where tasks are made that are not in a TaskGroup: they have names, an owner, and an end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import TypeVar

T = TypeVar("T")

_log = logging.getLogger(__name__)


class Tasks:
    """Tasks that belong to something and fail alone: one that fails is logged and takes nobody with it. Made by `background`."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[object]] = set()

    def start(self, work: Coroutine[object, object, T], name: str) -> asyncio.Task[T]:
        """Runs a coroutine as a task."""
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    async def cancel(self) -> None:
        """Cancels all that still run and waits until they have let go."""
        while self._tasks:
            for task in self._tasks:
                task.cancel()
            await asyncio.wait(self._tasks)

    def _ended(self, task: asyncio.Task[object]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None:
            _log.error("task failed", extra={"task": task.get_name()}, exc_info=error)


@asynccontextmanager
async def background() -> AsyncIterator[Tasks]:
    """A place for tasks; those that still run at the end of the block are cancelled."""
    tasks = Tasks()
    try:
        yield tasks
    finally:
        await tasks.cancel()


async def undivided(work: Coroutine[object, object, T], name: str) -> T:
    """Runs a coroutine to its end even if the caller is cancelled meanwhile; only then is the caller cancelled.

    For what must not stop half way: a change that is written down, and the memory that has to follow it.
    """
    task = asyncio.get_running_loop().create_task(work, name=name)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise


@asynccontextmanager
async def alongside(work: Coroutine[object, object, T], name: str) -> AsyncIterator[asyncio.Task[T]]:
    """Runs a coroutine as a task as long as the block lasts. Who wants its result or its error awaits the task."""
    task = asyncio.get_running_loop().create_task(work, name=name)
    try:
        yield task
    finally:
        if not task.done():  # or waiting would take turns of the loop all the same
            task.cancel()
            await asyncio.wait([task])
        if not task.cancelled():
            task.exception()  # heard: who did not wait for it does not want it
