"""The daemon's memory: with a hundred running machines, and over many starts and stops."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Final

from qmpd.spec import MachineSpec
from qmpd_api.client import Client
from scripts.lib.bench_daemon import AT_A_TIME, Bench, at_a_time, fleet, remove
from scripts.lib.bench_figures import Row, limited, risen
from scripts.lib.bench_libvirt import Libvirt
from scripts.lib.progress import say

CYCLES: Final = 400
#: Samples of memory over all cycles: as many as a chart shows.
SAMPLES: Final = 100
BASE_MIB: Final = 60.0
MACHINE_MIB: Final = 150 / 1024
#: What allocators and caches breathe. A leak of one small object per cycle is above it after 10,000 cycles.
FLAT_MIB: Final = 2.0


async def measure(bench: Bench) -> list[Row]:
    """Two daemons: one whose memory is looked at while many machines run, and one that starts and stops them all the time."""
    async with bench.daemon() as daemon:
        await daemon.client.version()
        alone = resident_mib(daemon.process.pid)
        names = await fleet(daemon.client, bench.machines)
        loaded = resident_mib(daemon.process.pid)
        await remove(daemon.client, names)
    say(f"  {alone:.1f} MiB without a machine, {loaded:.1f} MiB with {len(names)} running")
    libvirt = None if bench.libvirt is None else await asyncio.to_thread(_by_libvirt, bench.libvirt, bench.machines)
    cycles = bench.repeat or CYCLES
    points = await _cycles(bench, cycles)
    return [
        limited(
            "memory", f"daemon memory, {bench.machines} machines running", measured=loaded, limit=BASE_MIB + MACHINE_MIB * bench.machines,
            unit="MiB", samples=1, libvirt=libvirt,
        ),
        limited(
            "memory", f"daemon memory, growth over {cycles:,} start/stop cycles", measured=risen([mib for _, mib in points]),
            limit=FLAT_MIB, unit="MiB", samples=len(points), axis="start/stop cycles", points=points,
        ),
    ]  # fmt: skip


async def _cycles(bench: Bench, cycles: int) -> list[tuple[float, float]]:
    """The daemon's memory after so many cycles each. Every cycle is a machine of its own, created, started, stopped and deleted."""
    done = 0
    points = []
    async with bench.daemon() as daemon:

        async def cycle(name: str) -> None:
            nonlocal done
            await _cycle(daemon.client, name)
            done += 1
            if done % max(1, cycles // SAMPLES) == 0:
                points.append((float(done), resident_mib(daemon.process.pid)))
            if done % max(1, cycles // 10) == 0:
                say(f"  {done} cycles: {resident_mib(daemon.process.pid):.1f} MiB")

        await at_a_time([f"cycle{number}" for number in range(cycles)], cycle, AT_A_TIME // 2)
    return points


async def _cycle(client: Client, name: str) -> None:
    await client.create(MachineSpec(name=name, board="x86_64-microvm", accel="tcg", memory_mib=16), start=True)
    await client.stop(name)
    await client.delete(name)


def resident_mib(pid: int) -> float:
    """Resident memory of a process, everything it shares with others included."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    kib = next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS:"))
    return int(kib) / 1024


def _by_libvirt(libvirt: Libvirt, count: int) -> float:
    names = [f"memory{number}" for number in range(count)]
    with libvirt.shell() as virsh:
        for name in names:
            virsh.run(f"create {libvirt.domain(name)}")
    loaded = resident_mib(libvirt.pid)
    libvirt.clear()
    return loaded
