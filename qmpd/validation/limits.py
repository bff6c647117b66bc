"""Checks on what a machine may take of the host."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from qmpd.errors import Problem
from qmpd.spec import Limits
from qmpd.validation.subject import Subject, problem

#: Which of the kernel's controllers keeps a limit.
CONTROLLER: Final = {"cpu_percent": "cpu", "cpu_weight": "cpu", "memory_max_mib": "memory", "io_weight": "io", "tasks_max": "pids"}
#: What any QEMU takes beside the guest's RAM before it does anything: itself, its libraries' data, the buffers of devices.
ROOM_MIB: Final = 128


def limits(subject: Subject) -> Iterator[Problem]:
    """Limits are kept or refused: there must be a way to, and a QEMU that they do not end at once."""
    asked = subject.spec.limits
    if asked == Limits():
        return
    confinement = subject.world.confinement
    if confinement.way is None:
        yield problem("limits", f"{confinement.obstacle}; {confinement.mend}")
    else:
        for name, controller in CONTROLLER.items():
            if getattr(asked, name) is not None and controller not in confinement.controllers:
                yield problem(f"limits.{name}", f"needs the cgroup controller {controller!r}, which is not there; `qmpd check` says more")
    memory = subject.spec.memory_mib or subject.board.memory.default_mib
    if asked.memory_max_mib is not None and asked.memory_max_mib < memory + ROOM_MIB:
        yield problem(
            "limits.memory_max_mib",
            f"{asked.memory_max_mib} MiB is too little for {memory} MiB of RAM and QEMU itself: it must be {memory + ROOM_MIB} at least",
        )
