"""Starts and stops machines in a loop, and looks at what the daemon holds on to."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Final

import msgspec

from qmpd_api.client import Client
from scripts.lib.bench_figures import Row, limited, risen
from scripts.lib.progress import say
from scripts.lib.quiet_machines import AT_ONCE, create_running, quiet_guest, quiet_specs
from scripts.lib.restartable import Restartable, restartable

#: The daemon without machines, and what each running one may cost it.
DAEMON_BAR_MIB: Final = 60.0
MACHINE_BAR_KIB: Final = 150.0
#: Between the second fifth of the samples and the last one. Python's allocator moves by less than this with no leak at all.
RISE_BAR_KIB: Final = 2048.0
#: Descriptors and threads go up and down with what is under way at the moment of a sample; a leak of one per cycle is far above this.
HANDLES_BAR: Final = 8.0
#: Samples of the whole run.
SAMPLES: Final = 200
#: After a burst of starts the daemon still writes events and closes what ended.
SETTLE_S: Final = 2.0


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """What the daemon has after so many cycles."""

    cycles: int
    rss_kib: int
    descriptors: int
    threads: int


def sample(pid: int, cycles: int) -> Sample:
    """The daemon as the kernel sees it now. Blocks shortly."""
    process = Path("/proc") / str(pid)
    status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
    return Sample(
        cycles=cycles,
        rss_kib=int(status["VmRSS"].split()[0]),
        descriptors=sum(1 for _ in (process / "fd").iterdir()),
        threads=int(status["Threads"]),
    )


async def measure(root: Path, *, cycles: int, machines: int) -> tuple[list[Row], list[str]]:
    """The figures of so many cycles on so many machines (more than AT_ONCE), and every promise that was broken."""
    guest = await asyncio.to_thread(quiet_guest, root)
    async with restartable(root / ".cache", {}, prefix="qe-") as daemon:
        daemon.start()
        await asyncio.to_thread(daemon.wait_answer)
        async with Client(daemon.socket) as client:
            specs = quiet_specs(guest, machines)
            # A few first: what the first starts load is not what a machine costs.
            await create_running(client, specs[:AT_ONCE])
            await _stop_all(client, [spec.name for spec in specs[:AT_ONCE]])
            idle = await _settled(daemon, 0)
            await create_running(client, specs[AT_ONCE:])
            loaded = await _settled(daemon, 0)
            await _stop_all(client, [spec.name for spec in specs[AT_ONCE:]])
            more = machines - AT_ONCE
            say(f"  without machines {idle.rss_kib} KiB, with {more} running {loaded.rss_kib} KiB")
            samples = await _cycle(daemon, client, [spec.name for spec in specs], cycles)
            left = [f"{one.machine}: a QEMU is left (pid {one.pid})" for one in await asyncio.to_thread(daemon.qemus)]
    return _rows(more, idle, loaded, samples), left


def _rows(machines: int, idle: Sample, loaded: Sample, samples: list[Sample]) -> list[Row]:
    count, taken = samples[-1].cycles, len(samples)
    handles = {"descriptors": [one.descriptors for one in samples], "threads": [one.threads for one in samples]}
    memory = limited(
        "cycles", f"memory gained in {count} cycles", measured=risen([one.rss_kib for one in samples]), limit=RISE_BAR_KIB, unit="KiB",
        samples=taken, axis="cycles", points=[(one.cycles, one.rss_kib) for one in samples],
    )  # fmt: skip
    return [
        limited("cycles", "the daemon, no machine running", measured=idle.rss_kib / 1024, limit=DAEMON_BAR_MIB, unit="MiB", samples=1),
        limited(
            "cycles", f"each of {machines} running machines", measured=(loaded.rss_kib - idle.rss_kib) / machines,
            limit=MACHINE_BAR_KIB, unit="KiB", samples=1,
        ),
        memory,
        *(
            limited("cycles", f"{what} gained", measured=risen(held), limit=HANDLES_BAR, unit="", samples=taken)
            for what, held in handles.items()
        ),
    ]  # fmt: skip


async def _settled(daemon: Restartable, cycles: int) -> Sample:
    await asyncio.sleep(SETTLE_S)
    return await asyncio.to_thread(sample, daemon.pid, cycles)


async def _stop_all(client: Client, names: list[str]) -> None:
    """So many at a time: a daemon refuses more requests than it can keep up with."""
    for first in range(0, len(names), AT_ONCE):
        async with asyncio.TaskGroup() as group:
            for name in names[first : first + AT_ONCE]:
                group.create_task(client.stop(name), name=f"stop:{name}")


async def _cycle(daemon: Restartable, client: Client, names: list[str], cycles: int) -> list[Sample]:
    """Every worker has machines of its own, so that nobody waits for anybody."""
    samples: list[Sample] = []
    done = 0
    between = max(1, cycles // SAMPLES)

    async def work(own: list[str]) -> None:
        nonlocal done
        while done < cycles:
            for name in own:
                done += 1
                number = done
                await client.start(name)
                # Every other one by SIGKILL: both ends of a machine's life must let go of everything.
                await (client.stop(name) if number % 2 else client.kill(name))
                if number % between == 0:
                    samples.append(await asyncio.to_thread(sample, daemon.pid, number))
                    if number % (between * 20) == 0:
                        say(f"  {number} cycles: {samples[-1].rss_kib} KiB, {samples[-1].descriptors} descriptors")

    async with asyncio.TaskGroup() as group:
        for first in range(AT_ONCE):
            group.create_task(work(names[first::AT_ONCE]), name=f"worker{first}")
    samples.append(await _settled(daemon, done))
    return sorted(samples, key=lambda one: one.cycles)
