"""A machine with limits gets its own place among the host's processes before QEMU runs, so that all of QEMU is in it.

That place is a scope of systemd, or a cgroup below one that was given to this daemon; `qmpd.hostcheck.limits` says which. Neither
is the cgroup of the daemon, and neither needs the daemon: what runs in it outlives its restart. A scope vanishes with its last
process; the directory of a machine is removed by whoever sees the end.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Final, TypeVar

from qmpd import cgroups
from qmpd.errors import HostError
from qmpd.facts import Confinement
from qmpd.hostcheck.limits import SYSTEM_BUS, caller, found
from qmpd.hostcheck.tree import HostTree
from qmpd.settings import Settings
from qmpd.spec import Limits
from qmpd.systemd import Property, Systemd, systemd

T = TypeVar("T")

SLICE: Final = "qmpd.slice"
#: At the end of the host it is stopped, and ends the guests in order, before the scopes are.
GUESTS_SHUTDOWN: Final = "qmpd-guests-shutdown.service"
MIB: Final = 1024 * 1024

#: Puts processes into the place that was prepared. Blocks, and must not be called in the thread of the loop. Raises HostError.
Admit = Callable[[Sequence[int]], None]


class Confiner:
    """What this daemon can do to hold machines to limits."""

    def __init__(self, settings: Settings, environ: Mapping[str, str], tree: HostTree | None = None) -> None:
        self._given = settings.machines_cgroup
        self._caller = caller(os.geteuid(), settings.machines_cgroup, environ)
        self._tree = HostTree() if tree is None else tree

    async def found(self) -> Confinement:
        """The way there is. Looked at each time: what is missing may be mended while the daemon runs."""
        return await asyncio.to_thread(found, self._tree, self._caller)

    @asynccontextmanager
    async def admission(self, name: str, limits: Limits) -> AsyncIterator[Admit]:
        """Prepares a place for the processes of machine `name`; what takes time goes on beside whatever the caller does.

        Raises:
            HostError: there is no way to hold it to limits.
        """
        way = await self.found()
        match way.way:
            case "scope":
                async with systemd(way.place) as connection:
                    connection.begin()
                    yield partial(_into_scope, asyncio.get_running_loop(), connection, name, limits)
            case "cgroup":
                async with systemd(f"unix:path={SYSTEM_BUS}") as connection:
                    yield partial(_into_cgroup, asyncio.get_running_loop(), connection, way.place, name, limits)
            case None:
                raise HostError(f"machine {name!r} has limits, and they cannot be kept: {way.obstacle}; {way.mend}")

    def sweep(self) -> None:
        """Removes the places of machines that ended while no daemon ran. Blocks."""
        if self._given is not None:
            cgroups.sweep(self._given)


def scope_of(name: str) -> str:
    """The unit of machine `name`."""
    return f"qmpd-{name}.scope"


def properties(name: str, limits: Limits, pids: Sequence[int]) -> list[Property]:
    """The properties of a machine's scope, in systemd's names and units."""
    numbers = {
        "CPUQuotaPerSecUSec": limits.cpu_percent * 10_000 if limits.cpu_percent is not None else None,
        "CPUWeight": limits.cpu_weight,
        "MemoryMax": limits.memory_max_mib * MIB if limits.memory_max_mib is not None else None,
        "IOWeight": limits.io_weight,
        "TasksMax": limits.tasks_max,
    }
    return [
        Property("Description", "s", f"qmpd machine {name}"),
        Property("Slice", "s", SLICE),
        Property("PIDs", "au", list(pids)),
        # Also one that was ended by a signal is gone with its process: its name is wanted for the next.
        Property("CollectMode", "s", "inactive-or-failed"),
        Property("Before", "as", [GUESTS_SHUTDOWN]),
        *(Property(key, "t", value) for key, value in numbers.items() if value is not None),
    ]


def _into_scope(loop: asyncio.AbstractEventLoop, connection: Systemd, name: str, limits: Limits, pids: Sequence[int]) -> None:
    unit = scope_of(name)
    _in_loop(loop, connection.start_scope(unit, properties(name, limits, pids)))
    for pid in pids:
        where = cgroups.directory_of(pid) or ""
        if not where.endswith(f"/{unit}"):
            raise HostError(f"systemd says that {unit} is there, but process {pid} is in {where or 'no cgroup'}")


def _into_cgroup(loop: asyncio.AbstractEventLoop, connection: Systemd, parent: str, name: str, limits: Limits, pids: Sequence[int]) -> None:
    directory = cgroups.make(parent, name, limits)
    for pid in pids:
        try:
            _enter(loop, connection, directory, pid)
        except OSError as error:
            raise HostError(f"process {pid} cannot be put into {directory}: {error.strerror}", path=str(directory)) from error


def _enter(loop: asyncio.AbstractEventLoop, connection: Systemd, directory: Path, pid: int) -> None:
    try:
        cgroups.enter(directory, pid)
    except PermissionError:
        # The kernel lets a process go only to who has rights over both places. Where both are systemd's, systemd has them.
        unit = directory.parent.name
        if not unit.endswith(".service"):
            raise
        _in_loop(loop, connection.attach(unit, f"/{directory.name}", pid))


def _in_loop(loop: asyncio.AbstractEventLoop, work: Coroutine[object, object, T]) -> T:
    return asyncio.run_coroutine_threadsafe(work, loop).result()
