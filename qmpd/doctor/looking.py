"""Looking at files without waiting for those that do not answer.

A call on a dead network mount waits in the kernel for ever, and nothing ends it. So there is one thread for each file system that is
looked at, which may stay behind; a file system whose thread is still there is not looked at again. What is on others is not held up.
The file system of a path is told by the mount points in its name: following it would already be to look at it.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

import msgspec

from qmpd.doctor.condition import Silence
from qmpd.hostcheck.resources import is_below, mounts

#: Looking at some files takes microseconds, on a busy network a second; after this the file system is dead.
LOOK_DEADLINE_S: Final = 3.0
MOUNTS: Final = Path("/proc/self/mountinfo")


class Look(msgspec.Struct, frozen=True, kw_only=True):
    """Something to look at: `work` is called in a thread with nothing and returns what was seen; it may never return."""

    path: str
    work: Callable[[], object]


class _Round:
    """The looks at one file system, in a thread; `over` is set when it has looked at all."""

    def __init__(self, point: str, looks: Sequence[Look]) -> None:
        self.over = asyncio.Event()
        self._looks = looks
        self._seen: list[object] = []
        self._loop = asyncio.get_running_loop()
        # A daemon thread: one that waits in the kernel must not keep the process from ending.
        self._thread = threading.Thread(target=self._run, name=f"qmpd-look:{point}", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            for look in self._looks:
                try:
                    self._seen.append(look.work())
                except (OSError, ValueError) as error:
                    self._seen.append(error)
        finally:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                self._loop.call_soon_threadsafe(self.over.set)

    def answers(self) -> list[object]:
        """What was seen, and silence for the rest: the first that is missing does not answer, and hides those behind it."""
        seen = list(self._seen)
        missing = self._looks[len(seen) :]
        return [*seen, *(Silence(behind=missing[0].path if number else None) for number, _ in enumerate(missing))]


class Lookout:
    """The threads that look; one of these for each daemon."""

    def __init__(self) -> None:
        self._rounds: dict[str, _Round] = {}
        self._one_at_a_time = asyncio.Lock()

    async def look(self, looks: Sequence[Look]) -> list[object]:
        """What each look returned, or the OSError or ValueError that it raised, or a Silence; within `LOOK_DEADLINE_S`."""
        points = [point for point, _ in mounts(await asyncio.to_thread(MOUNTS.read_text, "utf-8", "replace"))]
        grouped: dict[str, list[int]] = {}
        for index, look in enumerate(looks):
            grouped.setdefault(point_of(look.path, points), []).append(index)
        async with self._one_at_a_time:
            begun = await self._begun({point: [looks[index] for index in indexes] for point, indexes in grouped.items()})
        answers: list[object] = [Silence() for _ in looks]
        for point, each in begun.items():
            for index, answer in zip(grouped[point], each.answers(), strict=True):
                answers[index] = answer
        return answers

    async def _begun(self, grouped: Mapping[str, Sequence[Look]]) -> dict[str, _Round]:
        """A round for each file system on which none is stuck; they have looked at all, or their time is over."""
        begun: dict[str, _Round] = {}
        for point, looks in grouped.items():
            known = self._rounds.get(point)
            if known is None or known.over.is_set():
                begun[point] = self._rounds[point] = _Round(point, looks)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LOOK_DEADLINE_S):
                for each in begun.values():
                    await each.over.wait()
        return begun


def point_of(path: str, points: Sequence[str]) -> str:
    """The mount point that a path is below, by its name."""
    return max((point for point in points if is_below(path, point)), key=len, default="/")
