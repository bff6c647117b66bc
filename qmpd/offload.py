"""Blocking work away from the event loop, without losing what it made when the caller is cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Final, TypeVar

T = TypeVar("T")

#: The loop itself holds tasks weakly.
_undoing: Final[set[asyncio.Task[object]]] = set()


async def off_loop(work: Callable[[], T], *, undo: Callable[[T], object], name: str) -> T:
    """Run `work` in a thread, as a task called `name`, and return what it makes.

    A cancelled caller does not wait for it; what it makes then is given to `undo`, in a thread too.
    """
    task = asyncio.create_task(asyncio.to_thread(work), name=name)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        task.add_done_callback(partial(_abandon, undo))
        raise


def _abandon(undo: Callable[[T], object], made: asyncio.Task[T]) -> None:
    if made.cancelled() or made.exception() is not None:
        return
    undoing = made.get_loop().create_task(asyncio.to_thread(undo, made.result()), name=f"{made.get_name()}-undo")
    _undoing.add(undoing)
    undoing.add_done_callback(_undoing.discard)
