"""Letting machines go on that were halted because the host's disk was full, once there is room again, where their definitions say so."""

from __future__ import annotations

import asyncio
import logging
import os
from pathlib import Path
from typing import Final

from qmpd import power
from qmpd.diskerrors import IO_ERROR
from qmpd.errors import QmpdError
from qmpd.lifecycle import State
from qmpd.machine import Machine
from qmpd.plan.disks import disk_path
from qmpd.registry import Registry
from qmpd.tasks import Tasks

#: How often file systems are looked at on which a machine waits: somebody who makes room expects to see something happen.
LOOK_S: Final = 2.0
#: A machine that fills the room at once, again and again, is let go on this often, and no oftener.
LONGEST_PAUSE_S: Final = 60.0
#: A machine that ran this long has used its room well: it is not one that fails at once.
WELL_S: Final = 300.0
#: This much room lets a guest do something; on a small file system its twentieth part does.
ROOM_BYTES: Final = 64 * 1024 * 1024
ROOM_PART: Final = 20

_log = logging.getLogger(__name__)


def is_room(free: int, size: int) -> bool:
    """Whether a file system of `size` bytes with `free` ones has room enough for a guest to go on."""
    return free > 0 and free >= min(ROOM_BYTES, size // ROOM_PART)


def pause_after(attempts: int) -> float:
    """Seconds between a machine's going on and the next time, if it went on `attempts` times in a row and was halted again."""
    return float(min(LOOK_S * 2 ** min(attempts, 16), LONGEST_PAUSE_S))


def waits(machine: Machine) -> bool:
    """Whether this machine is one that waits for room."""
    error = machine.disk_error
    halted = machine.state is State.PAUSED and machine.status == IO_ERROR
    return halted and machine.definition.spec.resume_when_space and error is not None and error.nospace


class Resumes:
    """Looks after the machines that wait for room."""

    def __init__(self, registry: Registry, tasks: Tasks) -> None:
        self._registry = registry
        self._tasks = tasks
        self._looking: set[str] = set()
        #: How often in a row a machine was let go on, and when it was last.
        self._tried: dict[str, tuple[int, float]] = {}

    async def run(self) -> None:
        """For ever: one look at each machine that waits, then a pause. A file system that hangs keeps only its own machines waiting."""
        while True:
            await asyncio.sleep(LOOK_S)
            for machine in self._registry:
                if waits(machine) and machine.name not in self._looking and self._due(machine.name):
                    self._looking.add(machine.name)
                    self._tasks.start(self._look(machine), f"room:{machine.name}")

    def _due(self, name: str) -> bool:
        attempts, last = self._tried.get(name, (0, float("-inf")))
        since = asyncio.get_running_loop().time() - last
        if since > WELL_S:
            self._tried.pop(name, None)
        return since > WELL_S or since >= pause_after(attempts)

    async def _look(self, machine: Machine) -> None:
        try:
            if not await asyncio.to_thread(_has_room, self._image(machine)):
                return
            if not waits(machine):  # somebody else was faster
                return
            attempts, _ = self._tried.get(machine.name, (0, 0.0))
            self._tried[machine.name] = (attempts + 1, asyncio.get_running_loop().time())
            async with machine.held("resume"):
                await power.resume(machine)
            _log.info("machine goes on: there is room again", extra={"machine": machine.name, "attempt": attempts + 1})
        except (QmpdError, OSError) as error:
            _log.warning("machine waits for room and did not go on", extra={"machine": machine.name, "error": str(error)})
        finally:
            self._looking.discard(machine.name)

    def _image(self, machine: Machine) -> str:
        """The image that found no room; of a device that is not in the definition nobody knows, and the machine's own place has to do."""
        error, spec, paths = machine.disk_error, machine.definition.spec, self._registry.paths(machine.name)
        if error is None or error.disk is None or error.disk >= len(spec.disks):
            return paths.state
        return disk_path(spec, paths, error.disk)


def _has_room(path: str) -> bool:
    system = os.statvfs(Path(path).parent)
    return is_room(system.f_bavail * system.f_frsize, system.f_blocks * system.f_frsize)
