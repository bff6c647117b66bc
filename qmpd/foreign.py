"""The QEMUs of this host: which of them are machines of this daemon, which are strays of its directories, which somebody else's.

They are looked at and never touched.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from qmpd.commandline import qmp_places
from qmpd.hostprocess import HostProcess, holds, process, qemus
from qmpd.journal import timestamp
from qmpd.processviews import ProcessView
from qmpd.redaction import redacted
from qmpd.registry import Registry
from qmpd.runlock import lock_paths


async def listed(registry: Registry) -> list[ProcessView]:
    """Every QEMU of this host that this daemon may see, by number."""
    connected = connected_pids(registry)
    locks = {path: machine.name for machine in registry for path in lock_paths(registry.paths(machine.name).state)}
    return await asyncio.to_thread(_listed, connected, locks)


def connected_pids(registry: Registry) -> dict[int, str]:
    """The processes that this daemon holds, and their machines."""
    return {machine.launch.identity.pid: machine.name for machine in registry if machine.has_process and machine.launch is not None}


def _listed(connected: Mapping[int, str], locks: Mapping[str, str]) -> list[ProcessView]:
    found = {one.identity.pid: one for one in qemus()}
    for pid in connected.keys() - found.keys():  # an emulator may have any name
        if (one := process(pid)) is not None:
            found[pid] = one
    return [_view(found[pid], connected.get(pid), locks) for pid in sorted(found)]


def _view(found: HostProcess, ours: str | None, locks: Mapping[str, str]) -> ProcessView:
    stray = None if ours is not None else lock_owner(found.identity.pid, locks)
    places = qmp_places(found.argv, found.directory or "/")
    return ProcessView(
        pid=found.identity.pid,
        kind="machine" if ours is not None else "stray" if stray is not None else "foreign",
        machine=ours or stray,
        user=found.user,
        started_at=timestamp(found.started_at),
        command=redacted(found.argv),
        qmp=tuple(place.path for place in places if place.path is not None),
    )


def lock_owner(pid: int, locks: Mapping[str, str]) -> str | None:
    """The machine whose lock a process holds, of `locks` by their paths. Blocks."""
    return next((name for path, name in locks.items() if holds(pid, path)), None)
