"""Waiting until machines and jobs are as they should be, where nobody tells us."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from qmpd.service import Service
from qmpd.views import JobView, MachineView

#: Generous: the hosts that run this are shared and slow, and only a hang may fail.
PATIENCE_S: Final = 120.0
#: Between two looks.
LOOK_S: Final = 0.05


async def until(service: Service, name: str, wanted: Callable[[MachineView], bool]) -> MachineView:
    """The machine once it is as it should be."""
    async with asyncio.timeout(PATIENCE_S):
        while not wanted(view := service.machine(name)):
            await asyncio.sleep(LOOK_S)
    return view


async def job_ended(service: Service, job: JobView) -> JobView:
    """The job when it has ended."""
    async with asyncio.timeout(PATIENCE_S):
        while (job := await service.job(job.id)).state == "running":
            await asyncio.sleep(LOOK_S)
    return job
