"""Create and start over HTTP until `running`, against the same QEMU spawned by hand and driven over a raw socket."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Final

from qmpd_api.client import Client
from scripts.lib.bench_daemon import Bench, remove, small_pc
from scripts.lib.bench_figures import Row, paired
from scripts.lib.bench_floor import ByHand, command_line
from scripts.lib.bench_libvirt import Libvirt
from scripts.lib.progress import say

PAIRS: Final = 20
BAR: Final = 1.25


async def measure(bench: Bench) -> list[Row]:
    """Starts in turn by hand, by qmpd and by libvirt."""
    floor, ours, libvirt = [], [], []
    async with bench.daemon() as daemon:
        argv = await command_line(daemon.client, small_pc("warm-up"))
        for number in range(bench.repeat or PAIRS):
            floor.append(await asyncio.to_thread(_by_hand, argv))
            ours.append(await _by_qmpd(daemon.client, f"pair{number}"))
            if bench.libvirt is not None:
                libvirt.append(await asyncio.to_thread(_by_libvirt, bench.libvirt))
            say(f"  pair {number + 1}: by hand {floor[-1]:.1f} ms, qmpd {ours[-1]:.1f} ms")
    return [paired("start", "create + start until running", ours=ours, floor=floor, libvirt=libvirt, times=BAR)]


def _by_hand(argv: Sequence[str]) -> float:
    with ByHand(argv) as qemu:
        return qemu.seconds * 1e3


async def _by_qmpd(client: Client, name: str) -> float:
    began = time.perf_counter()
    view = await client.create(small_pc(name), start=True)
    took = time.perf_counter() - began
    if view.state != "running":
        raise RuntimeError(f"{name} is {view.state}")
    await remove(client, [name])
    return took * 1e3


def _by_libvirt(libvirt: Libvirt) -> float:
    with libvirt.shell() as virsh:
        took = virsh.seconds(f"create {libvirt.domain('pair')}")
        virsh.run("destroy pair")
    return took * 1e3
