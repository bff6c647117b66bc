"""A hundred machines started eight at a time, against the same number by hand with the same concurrency."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Final

from qmpd_api.client import Client
from scripts.lib.bench_daemon import AT_A_TIME, Bench, fleet, remove, small_pc
from scripts.lib.bench_figures import Row, paired
from scripts.lib.bench_floor import ByHand, command_line
from scripts.lib.bench_libvirt import Libvirt, Virsh
from scripts.lib.progress import say

PAIRS: Final = 3
BAR: Final = 1.25


async def measure(bench: Bench) -> list[Row]:
    """From the first request until all run; all of them run at the end, and none of the others does."""
    floor, ours, libvirt = [], [], []
    async with bench.daemon() as daemon:
        argv = await command_line(daemon.client, small_pc("warm-up"))
        for number in range(bench.repeat or PAIRS):
            floor.append(await asyncio.to_thread(_by_hand, argv, bench.machines))
            ours.append(await _by_qmpd(daemon.client, bench.machines))
            if bench.libvirt is not None and number == 0:
                libvirt.append(await asyncio.to_thread(_by_libvirt, bench.libvirt, bench.machines))
            say(f"  pair {number + 1}: by hand {floor[-1]:.2f} s, qmpd {ours[-1]:.2f} s")
    what = f"{bench.machines} machines started, {AT_A_TIME} at a time"
    return [paired("many", what, ours=ours, floor=floor, libvirt=libvirt, times=BAR, unit="s")]


def _by_hand(argv: Sequence[str], count: int) -> float:
    with ExitStack() as stack, ThreadPoolExecutor(AT_A_TIME) as pool:
        machines = [ByHand(argv) for _ in range(count)]
        for machine in machines:
            stack.push(machine)
        began = time.perf_counter()
        list(pool.map(ByHand.__enter__, machines))
        return time.perf_counter() - began


async def _by_qmpd(client: Client, count: int) -> float:
    began = time.perf_counter()
    names = await fleet(client, count)
    took = time.perf_counter() - began
    await remove(client, names)
    return took


def _by_libvirt(libvirt: Libvirt, count: int) -> float:
    files = [libvirt.domain(f"fleet{number}") for number in range(count)]
    with ExitStack() as stack, ThreadPoolExecutor(AT_A_TIME) as pool:
        shells = [stack.enter_context(libvirt.shell()) for _ in range(AT_A_TIME)]

        def start(share: tuple[int, Virsh]) -> None:
            number, virsh = share
            for path in files[number::AT_A_TIME]:
                virsh.run(f"create {path}")

        began = time.perf_counter()
        list(pool.map(start, enumerate(shells)))
        took = time.perf_counter() - began
    libvirt.clear()
    return took
