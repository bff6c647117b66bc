"""The list of a thousand machines."""

from __future__ import annotations

import time
from typing import Final

import aiohttp

from scripts.lib.bench_daemon import Bench, at_a_time, small_pc
from scripts.lib.bench_figures import Row, limited, percentile
from scripts.lib.bench_libvirt import Libvirt
from scripts.lib.progress import say

MACHINES: Final = 1000
REQUESTS: Final = 300
BAR_MS: Final = 50.0


async def measure(bench: Bench) -> list[Row]:
    """The p99 of many lists of a thousand defined machines, over the Unix socket, body read and counted."""
    times = []
    async with bench.daemon() as daemon:
        await at_a_time([small_pc(f"m{number:04}") for number in range(MACHINES)], daemon.client.create)
        say(f"  {MACHINES} machines defined")
        connector = aiohttp.UnixConnector(str(daemon.directory / "qmpd.sock"))
        async with aiohttp.ClientSession(connector=connector) as session:
            for _ in range(bench.repeat or REQUESTS):
                began = time.perf_counter()
                async with session.get("http://localhost/v1/machines") as response:
                    body = await response.read()
                times.append((time.perf_counter() - began) * 1e3)
                if response.status != 200 or body.count(b'"uuid"') != MACHINES:
                    raise RuntimeError(f"a list that is not right: {response.status}, {len(body)} bytes")
    libvirt = None if bench.libvirt is None else _by_libvirt(bench.libvirt, len(times))
    p99, unit = percentile(times, 99), "ms"
    return [
        limited("list", "list of 1,000 machines, p99", measured=p99, limit=BAR_MS, unit=unit, samples=len(times), libvirt=libvirt),
    ]


def _by_libvirt(libvirt: Libvirt, requests: int) -> float:
    names = [f"m{number:04}" for number in range(MACHINES)]
    with libvirt.shell() as virsh:
        for name in names:
            virsh.run(f"define {libvirt.domain(name)}")
        times = [virsh.seconds("list --all") * 1e3 for _ in range(requests)]
        for name in names:
            virsh.run(f"undefine {name}")
    return percentile(times, 99)
