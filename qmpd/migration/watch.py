"""Waiting for a QEMU that migrates: woken by its events, and asking all the same, because an event may be missed.

Time in which nothing is learned is counted, so that who waits can give up; how long that may last is theirs to say.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from qmpd.backlog import EventsLost, QmpEvent
from qmpd.errors import Busy, MigrationFailed, MonitorUnavailable, QemuDied, QemuSilent
from qmpd.migration.progress import Progress, read_progress
from qmpd.migration.qemu import Qemu, ask_map

#: Without an event QEMU is asked this often. Each question costs it a fraction of a millisecond.
POLL_S: Final = 0.25
#: A lost monitor of a process that lives is made anew every second; one that stays away for so long will not come back.
LOST_LIMIT_S: Final = 30.0
_JOBS: Final = frozenset({"JOB_STATUS_CHANGE", "BLOCK_JOB_READY", "BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED", "BLOCK_JOB_ERROR"})


class Watch:
    """One QEMU, watched while the block of `watching` lasts. `progress` is what it answered last."""

    def __init__(self, qemu: Qemu) -> None:
        self.progress = Progress()
        self._qemu = qemu
        self._heard: deque[str] = deque()
        self._woken = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._lost_since: float | None = None

    async def next(self) -> str | None:
        """The next status of the migration: what an event said, or else what QEMU answers; None when it cannot be asked now.

        Raises:
            MigrationFailed: QEMU has ended, or its monitor stayed away.
        """
        if not self._heard:
            await self.wake()
        if self._heard:
            return self._heard.popleft()
        return await self.ask()

    async def wake(self) -> None:
        """Returns at the next event that matters, or when it is time to ask."""
        try:
            async with asyncio.timeout(POLL_S):
                await self._woken.wait()
        except TimeoutError:
            pass
        self._woken.clear()

    async def ask(self) -> str | None:
        """The status that QEMU answers with, and all its figures in `progress`. None and raises as `next`."""
        try:
            answer = await ask_map(self._qemu, "query-migrate")
        except (QemuSilent, Busy):
            return None  # its main loop is blocked: events tell, or whoever waits loses patience
        except (MonitorUnavailable, QemuDied) as error:
            if self._qemu.closed is not None:
                raise MigrationFailed(f"QEMU ended while it migrated: {self._qemu.closed}") from error
            self._miss(error)
            return None
        self._lost_since = None
        self.progress = read_progress(answer)
        return self.progress.status

    def _miss(self, error: MonitorUnavailable | QemuDied) -> None:
        now = self._loop.time()
        self._lost_since = now if self._lost_since is None else self._lost_since
        if now - self._lost_since > LOST_LIMIT_S:
            raise MigrationFailed(f"the monitor of QEMU stayed away for {LOST_LIMIT_S:g} s: {error.message}") from error

    def take(self, item: QmpEvent | EventsLost) -> None:
        """An event of QEMU's."""
        if isinstance(item, EventsLost):
            self._heard.clear()  # what was heard before may be long past
        elif item.name == "MIGRATION":
            self._heard.append(str(item.data.get("status")))
        elif item.name not in _JOBS:
            return
        self._woken.set()


@contextmanager
def watching(qemu: Qemu) -> Iterator[Watch]:
    """A watch over this QEMU."""
    watch = Watch(qemu)
    with qemu.hearing(watch.take):
        yield watch
