"""What a migration will take, before it begins: from how fast the guest changes memory and how fast the way is. Pure."""

from __future__ import annotations

import math
from typing import Final

from qmpd.migration.convergence import MIB, OVERHEAD_MS, TRACKING_SINCE, limit_ms
from qmpd.migration.measuring import converging_s
from qmpd.migrationviews import Goal, Prediction

_MS: Final = 1000.0
_ONCE: Final = (
    ". This QEMU loses track of what its guest changes: memory is sent once while the guest runs, and what was changed meanwhile when it "
    f"is halted; version {TRACKING_SINCE[0]}.{TRACKING_SINCE[1]} and later keep to a downtime"
)
_AT_DEADLINE: Final = {
    "pause": "the guest would be halted then to be moved",
    "postcopy": "the guest would run on at the destination then, its memory following",
    "abort": "the machine would stay",
}


def predicted(
    *,
    memory_bytes: int,
    disk_bytes: int,
    bandwidth_mib_s: float,
    dirty_mib_s: float | None,
    goal: Goal,
    tracks: bool = True,
    overhead_ms: int = OVERHEAD_MS,
) -> Prediction:
    """The time and the downtime to expect. `memory_bytes` is all of the guest's, so they are bounds: what it never used costs next to
    nothing. `bandwidth_mib_s`, greater than 0, is what was measured on the way; a goal that allows less is taken into account. `tracks`:
    see `keeps_track`; without, memory is sent once before the guest is halted.
    """
    speed = min(bandwidth_mib_s, goal.bandwidth_mib_s or bandwidth_mib_s)
    disks_s = disk_bytes / (speed * MIB)
    allowed_ms = limit_ms(goal, overhead_ms) if tracks else math.inf
    memory_s = converging_s(memory_bytes, (dirty_mib_s or 0.0) * MIB, speed * MIB, allowed_ms, most_bytes=memory_bytes)
    total_s = None if memory_s is None else disks_s + memory_s
    in_time = total_s is not None and (goal.deadline_s is None or total_s <= goal.deadline_s)
    downtime_ms = _downtime_ms(memory_bytes, dirty_mib_s, speed, allowed_ms) + overhead_ms if in_time and dirty_mib_s is not None else None
    return Prediction(
        memory_bytes=memory_bytes,
        disk_bytes=disk_bytes,
        bandwidth_mib_s=speed,
        dirty_mib_s=dirty_mib_s,
        total_s=total_s if in_time or goal.deadline_s is None else None,
        downtime_ms=downtime_ms,
        reachable=in_time,
        explanation=_explained(goal, speed, dirty_mib_s, total_s, downtime_ms) + ("" if tracks else _ONCE),
    )


def predicted_at_rest(*, sent_bytes: int, bandwidth_mib_s: float, goal: Goal) -> Prediction:
    """The least time to expect of a machine at rest, of which `sent_bytes` are to be sent: nobody has measured the disks. Of its goal only
    what it has of that counts: the most that it may take of the network, and whether it stays where it is at the deadline.
    """
    speed = min(bandwidth_mib_s, goal.bandwidth_mib_s or bandwidth_mib_s)
    total_s = sent_bytes / (speed * MIB)
    limit_s = goal.deadline_s if goal.then == "abort" else None
    in_time = limit_s is None or total_s <= limit_s
    known = f"{sent_bytes / MIB:.1f} MiB are to be sent, and {speed:.1f} MiB/s go over: it takes {total_s:.0f} s at least"
    return Prediction(
        memory_bytes=0,
        disk_bytes=sent_bytes,
        bandwidth_mib_s=speed,
        total_s=total_s,
        reachable=in_time,
        explanation=known if in_time else f"{known}, and {limit_s:g} s are allowed; {_otherwise(goal)}",
    )


def _downtime_ms(memory_bytes: int, dirty_mib_s: float, speed: float, allowed_ms: float) -> float:
    """How long the last part takes: the first pass that leaves little enough is the last."""
    left_mib = memory_bytes / MIB
    while True:
        left_mib = min(dirty_mib_s * left_mib / speed, left_mib)
        if left_mib / speed * _MS <= allowed_ms:
            return left_mib / speed * _MS


def _explained(goal: Goal, speed: float, dirty: float | None, total_s: float | None, downtime_ms: float | None) -> str:
    changes = "how much memory the guest changes could not be measured" if dirty is None else f"the guest changes {dirty:.1f} MiB/s"
    known = f"{changes}, and {speed:.1f} MiB/s go over"
    if total_s is None:
        return f"{known}: it does not end within {goal.downtime_ms} ms of downtime by itself; {_otherwise(goal)}"
    if goal.deadline_s is not None and total_s > goal.deadline_s:
        return f"{known}: it takes {total_s:.0f} s, and {goal.deadline_s:g} s are allowed; {_otherwise(goal)}"
    halted = "" if downtime_ms is None else f", and the guest stands still for about {downtime_ms:.0f} ms"
    return f"{known}: it takes about {total_s:.0f} s at most{halted}"


def _otherwise(goal: Goal) -> str:
    if goal.deadline_s is not None:
        return f"after {goal.deadline_s:g} s {_AT_DEADLINE[goal.then]}"
    if goal.auto_converge is not False:
        return "its processors are slowed until it does, which may not be enough: set a deadline"
    return "it would go on until the guest is calmer: allow a longer downtime, or set a deadline"
