"""Starting machines with the daemon, and ending them with the host: in what order, and with what pauses."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable
from itertools import groupby

import msgspec

from qmpd.spec import MachineSpec

_log = logging.getLogger(__name__)


class Wave(msgspec.Struct, frozen=True, kw_only=True):
    """Machines of one order, by name. `delay_s`: how long the next wave waits when all of them have been tried."""

    order: int
    names: tuple[str, ...]
    delay_s: float


def waves(specs: Iterable[MachineSpec]) -> tuple[Wave, ...]:
    """All machines, the lowest `autostart_order` first. Of the delays in one wave the longest counts."""
    ordered = sorted(specs, key=lambda spec: (spec.autostart_order, spec.name))
    found = []
    for order, group in groupby(ordered, key=lambda spec: spec.autostart_order):
        members = tuple(group)
        longest = max(spec.autostart_delay_s for spec in members)
        found.append(Wave(order=order, names=tuple(spec.name for spec in members), delay_s=longest))
    return tuple(found)


async def start_in_order(specs: Iterable[MachineSpec], start: Callable[[str], Awaitable[bool]], wanted: Callable[[], bool]) -> None:
    """Starts machines wave after wave, until it is not `wanted` any more. One that does not start keeps nobody else from it.

    `start` says whether it worked, and how many are started at once is its own affair.
    """
    plan = waves(specs)
    for position, wave in enumerate(plan):
        if not wanted():
            return
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(_started(name, start), name=f"autostart:{name}") for name in wave.names]
        _log.info("autostart", extra={"order": wave.order, "started": sum(task.result() for task in tasks), "machines": len(tasks)})
        if position < len(plan) - 1:
            await asyncio.sleep(wave.delay_s)


async def _started(name: str, start: Callable[[str], Awaitable[bool]]) -> bool:
    try:
        return await start(name)
    except Exception:  # noqa: BLE001  a mistake of ours with one machine must not keep the others of the host from starting
        _log.exception("mistake while starting a machine", extra={"machine": name})
        return False
