"""What the measurements share: their options, a daemon each, and the machine they start."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

from qmpd.spec import MachineSpec
from qmpd_api.client import Client
from scripts.lib import demo_daemon
from scripts.lib.bench_libvirt import Libvirt, end_processes
from scripts.lib.demo_daemon import Daemon

T = TypeVar("T")
R = TypeVar("R")

#: How many machines are started at a time where there are many.
AT_A_TIME: Final = 8
MACHINES: Final = 100


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What the command line says. `repeat` None: as often as the figure needs. `libvirt` None: nothing to compare with."""

    root: Path
    repeat: int | None = None
    machines: int = MACHINES
    libvirt: Libvirt | None = None

    @asynccontextmanager
    async def daemon(self) -> AsyncIterator[Daemon]:
        """A daemon in private directories that takes any file; when the block is left, it and its machines are gone."""
        async with demo_daemon.running(self.root / ".cache", {"pools": ["/"]}) as daemon:
            try:
                yield daemon
            finally:
                await asyncio.to_thread(end_processes, str(daemon.directory))


def small_pc(name: str) -> MachineSpec:
    """The machine of every row that does not say otherwise."""
    return MachineSpec(name=name, board="x86_64-q35", accel="tcg", memory_mib=64)


async def fleet(client: Client, count: int) -> list[str]:
    """The names of so many running machines."""
    names = [f"fleet{number:04}" for number in range(count)]

    async def start(name: str) -> None:
        view = await client.create(small_pc(name), start=True)
        if view.state != "running":
            raise RuntimeError(f"{name} is {view.state}")

    await at_a_time(names, start)
    return names


async def remove(client: Client, names: Iterable[str]) -> None:
    """End and delete machines."""

    async def one(name: str) -> None:
        await client.kill(name)
        await client.delete(name)

    await at_a_time(list(names), one)


async def at_a_time(items: Sequence[T], work: Callable[[T], Awaitable[R]], width: int = AT_A_TIME) -> list[R]:
    """`work` for each item, so many at the same time; the results in the order of the items."""
    slots = asyncio.Semaphore(width)

    async def one(item: T) -> R:
        async with slots:
            return await work(item)

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one(item), name=f"bench:{number}") for number, item in enumerate(items)]
    return [task.result() for task in tasks]
