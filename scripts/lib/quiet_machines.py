"""Many machines that cost the host as little as can be: a kernel of our own that halts, in 16 MiB, under TCG."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Final

from qmpd.spec import MachineSpec
from qmpd_api.client import Client
from tests.guests.build import Guest, build_all
from tests.machines import spec_of

#: What one start needs of processors is the same whether or not others start beside it.
AT_ONCE: Final = 4


def quiet_guest(root: Path) -> Guest:
    """The guest, built if it is not there yet. Blocks. Raises MissingTools."""
    return build_all(root / ".cache" / "guests")["x86_64-microvm-quiet"]


def quiet_specs(guest: Guest, count: int) -> list[MachineSpec]:
    """Definitions of so many machines."""
    return [spec_of(guest, f"m{number:04}") for number in range(count)]


async def create_running(client: Client, specs: list[MachineSpec]) -> None:
    """Creates and starts them all, a few at a time."""
    limit = asyncio.Semaphore(AT_ONCE)

    async def one(spec: MachineSpec) -> None:
        async with limit:
            await client.create(spec, start=True)

    async with asyncio.TaskGroup() as group:
        for spec in specs:
            group.create_task(one(spec), name=f"create:{spec.name}")
