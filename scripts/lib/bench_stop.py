"""Stop (`quit`) until the process is gone, against `quit` over a raw socket."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Final

from qmpd_api.client import Client
from scripts.lib.bench_daemon import Bench, small_pc
from scripts.lib.bench_figures import Row, paired
from scripts.lib.bench_floor import ByHand, command_line
from scripts.lib.bench_libvirt import Libvirt
from scripts.lib.progress import say

PAIRS: Final = 20
BAR: Final = 1.5
#: SeaBIOS is done by then, and the machine idle.
SETTLE_S: Final = 1.0


async def measure(bench: Bench) -> list[Row]:
    """Ends in turn by hand, by qmpd and, with `destroy`, by libvirt, of machines that have come to rest."""
    floor, ours, libvirt = [], [], []
    async with bench.daemon() as daemon:
        argv = await command_line(daemon.client, small_pc("stop"))
        await daemon.client.create(small_pc("stop"))
        for number in range(bench.repeat or PAIRS):
            floor.append(await asyncio.to_thread(_by_hand, argv))
            ours.append(await _by_qmpd(daemon.client, "stop"))
            if bench.libvirt is not None:
                libvirt.append(await asyncio.to_thread(_by_libvirt, bench.libvirt))
            say(f"  pair {number + 1}: by hand {floor[-1]:.1f} ms, qmpd {ours[-1]:.1f} ms")
    return [paired("stop", "stop (quit) until gone", ours=ours, floor=floor, libvirt=libvirt, times=BAR)]


def _by_hand(argv: Sequence[str]) -> float:
    with ByHand(argv) as qemu:
        time.sleep(SETTLE_S)
        return qemu.quit() * 1e3


async def _by_qmpd(client: Client, name: str) -> float:
    await client.start(name)
    await asyncio.sleep(SETTLE_S)
    began = time.perf_counter()
    ended = await client.stop(name)
    took = time.perf_counter() - began
    if ended.method != "quit" or not ended.clean:
        raise RuntimeError(f"{name} was not ended by quit: {ended.method}")
    return took * 1e3


def _by_libvirt(libvirt: Libvirt) -> float:
    with libvirt.shell() as virsh:
        virsh.run(f"create {libvirt.domain('stop')}")
        time.sleep(SETTLE_S)
        return virsh.seconds("destroy stop") * 1e3
