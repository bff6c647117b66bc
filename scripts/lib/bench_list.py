"""The list of a thousand machines."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Final

import aiohttp

from qmpd.spec import MachineSpec
from scripts.lib.bench_figures import Row
from scripts.lib.demo_daemon import running
from scripts.lib.progress import say

MACHINES: Final = 1000
REQUESTS: Final = 300
BAR_MS: Final = 50.0


async def measure(root: Path, repeat: int | None) -> list[Row]:
    """The slowest of a hundred lists of a thousand defined machines, over the Unix socket, body read and counted."""
    times = []
    async with running(root / ".cache") as daemon:
        for number in range(MACHINES):
            await daemon.client.create(MachineSpec(name=f"m{number:04}", board="x86_64-q35", accel="tcg"))
        say(f"  {MACHINES} machines defined")
        connector = aiohttp.UnixConnector(str(daemon.directory / "qmpd.sock"))
        async with aiohttp.ClientSession(connector=connector) as session:
            for _ in range(repeat or REQUESTS):
                began = time.perf_counter()
                async with session.get("http://localhost/v1/machines") as response:
                    body = await response.read()
                times.append((time.perf_counter() - began) * 1e3)
                if response.status != 200 or body.count(b'"uuid"') != MACHINES:
                    raise RuntimeError(f"a list that is not right: {response.status}, {len(body)} bytes")
    p99 = sorted(times)[int(len(times) * 0.99)]
    return [Row(what="list of 1,000 machines, p99", unit="ms", measured=p99, bar=f"<= {BAR_MS:.0f} ms", holds=p99 <= BAR_MS)]
