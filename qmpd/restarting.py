"""Starting machines again that ended by themselves, as their definitions say."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Final

from qmpd.machine import Machine
from qmpd.spec import RestartPolicy
from qmpd.tasks import Tasks

#: A machine that ran this long is healthy: its earlier failures no longer count.
HEALTHY_S: Final = 600.0
#: The back-off doubles up to here, so that a machine that cannot start costs little and is still tried.
LONGEST_BACKOFF_S: Final = 300.0
#: What holds a machine whose QEMU is gone ends soon; of what does not, a start is told, and counts as one that failed.
HELD_LIMIT_S: Final = 60.0

_log = logging.getLogger(__name__)


def delay_before_restart(policy: RestartPolicy, *, failed: bool, attempts: int) -> float | None:
    """Seconds to wait before the next start, or None for no restart. `attempts` counts restarts since the last healthy run."""
    if policy.when == "never" or (policy.when == "on-failure" and not failed) or attempts >= policy.limit:
        return None
    return float(min(policy.backoff_s * 2**attempts, LONGEST_BACKOFF_S))


class Restarts:
    """Watches how machines end. `start` starts one by name and says whether that worked; `wanted`, whether any shall be started."""

    def __init__(self, tasks: Tasks, start: Callable[[str], Awaitable[bool]], wanted: Callable[[], bool] = lambda: True) -> None:
        self._wanted = wanted
        self._tasks = tasks
        self._start = start
        self._attempts: dict[str, int] = {}

    def ended(self, machine: Machine) -> None:
        """To be called whenever a machine's QEMU is gone."""
        if machine.asked_to_end or not self._wanted():
            self._attempts.pop(machine.name, None)
        else:
            self._again(machine, failed=machine.exit is None or not machine.exit.clean, ran_s=machine.ran_s)

    def _again(self, machine: Machine, *, failed: bool, ran_s: float) -> None:
        attempts = 0 if ran_s > HEALTHY_S else self._attempts.get(machine.name, 0)
        delay = delay_before_restart(machine.definition.spec.restart, failed=failed, attempts=attempts)
        if delay is None:
            return
        self._attempts[machine.name] = attempts + 1
        _log.info("machine will be started again", extra={"machine": machine.name, "delay_s": delay, "attempt": attempts + 1})
        self._tasks.start(self._later(machine, delay), f"restart:{machine.name}")

    async def _later(self, machine: Machine, delay_s: float) -> None:
        await asyncio.sleep(delay_s)
        # A migration that comes to its end, say, holds it: to be refused for that is no failure of its guest's.
        await machine.when(lambda: machine.operation is None or self._unwanted(machine), HELD_LIMIT_S)
        if self._unwanted(machine) or await self._start(machine.name):
            return
        if not self._unwanted(machine):
            self._again(machine, failed=True, ran_s=0.0)

    def _unwanted(self, machine: Machine) -> bool:
        """Whether somebody started, stopped, deleted or changed the machine meanwhile."""
        return machine.alive or machine.asked_to_end or machine.definition.spec.restart.when == "never"
