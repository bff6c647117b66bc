"""A hundred running machines, `kill -9` of the daemon, and another daemon: until the API answers, and until all can be used."""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Final

from qmpd.lifecycle import State
from qmpd_api.client import Client
from scripts.lib.bench_daemon import Bench, at_a_time, fleet
from scripts.lib.bench_figures import Row, limited
from scripts.lib.bench_libvirt import Libvirt
from scripts.lib.demo_daemon import Daemon
from scripts.lib.progress import say

KILLS: Final = 5
ANSWER_BAR_S: Final = 0.5
USABLE_BAR_S: Final = 2.0


async def measure(bench: Bench) -> list[Row]:
    """The slowest of several kills counts: a promise about restarts is one about each of them."""
    answered, usable = [], []
    async with bench.daemon() as daemon:
        names = await fleet(daemon.client, bench.machines)
        pids = await _pids(daemon.client)
        say(f"  {len(names)} machines run")
        for number in range(bench.repeat or KILLS):
            first, all_of_them = await _killed(daemon, names, pids)
            answered.append(first)
            usable.append(all_of_them)
            say(f"  kill {number + 1}: the API answers after {first:.2f} s, all machines can be used after {all_of_them:.2f} s")
    kills = len(usable)
    libvirt = None if bench.libvirt is None else await asyncio.to_thread(_by_libvirt, bench.libvirt, bench.machines, kills)
    points = [(float(number + 1), seconds) for number, seconds in enumerate(usable)]
    what = f"re-adopt {bench.machines} machines"
    return [
        limited("adopt", f"{what}: until the API answers", measured=max(answered), limit=ANSWER_BAR_S, unit="s", samples=kills),
        limited(
            "adopt", f"{what}: until all can be used", measured=max(usable), limit=USABLE_BAR_S, unit="s", samples=kills, libvirt=libvirt,
            axis="kill of the daemon", points=points,
        ),
    ]  # fmt: skip


async def _killed(daemon: Daemon, names: Sequence[str], pids: Mapping[str, int | None]) -> tuple[float, float]:
    """Seconds from spawning the next daemon until it answered, and until every machine was running and answered a QMP command."""
    await daemon.replace()
    began = time.perf_counter()
    async with Client(daemon.client.target) as client:
        await client.version()
        answered = time.perf_counter() - began
        for name in names:
            await client.wait(name, [State.RUNNING])
        await at_a_time(names, lambda name: client.qmp(name, "query-status"))
        usable = time.perf_counter() - began
        if await _pids(client) != pids:
            raise RuntimeError("machines were lost or started again")
    return answered, usable


async def _pids(client: Client) -> dict[str, int | None]:
    return {view.name: view.pid for view in (await client.machines()).machines}


def _by_libvirt(libvirt: Libvirt, count: int, kills: int) -> float:
    names = [f"fleet{number}" for number in range(count)]
    with libvirt.shell() as virsh:
        for name in names:
            virsh.run(f"create {libvirt.domain(name)}")
    times = []
    for _ in range(kills):
        libvirt.kill()
        began = time.perf_counter()
        libvirt.start()
        with libvirt.shell() as virsh:
            for name in names:
                virsh.run(f"qemu-monitor-command {name} '{json.dumps({'execute': 'query-status'})}'")
            times.append(time.perf_counter() - began)
    libvirt.clear()
    return statistics.median(times)
