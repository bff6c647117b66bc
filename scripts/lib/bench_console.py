"""A guest that floods its serial port: bytes a second from guest to log to a WebSocket viewer, against QEMU writing a plain file."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Final

from qmpd.spec import Kernel, MachineSpec
from qmpd_api.client import Client
from scripts.lib.bench_daemon import Bench, remove
from scripts.lib.bench_figures import Row, paired
from scripts.lib.bench_floor import ByHand, command_line
from scripts.lib.progress import say
from tests.guests.build import build_all

GUEST: Final = "aarch64-virt-flood"
PAIRS: Final = 5
#: A guest that floods is at its pace within a tenth of that.
WARM_UP_S: Final = 1.0
#: How long bytes are counted, each time.
WINDOW_S: Final = 3.0
LOOK_S: Final = 0.01
KIB: Final = 1024


async def measure(bench: Bench) -> list[Row]:
    """In turn: the size of a file that QEMU alone writes, and what one viewer of qmpd's got, in the same time."""
    guest = await asyncio.to_thread(lambda: build_all(bench.root / ".cache" / "guests", only={GUEST})[GUEST])
    spec = MachineSpec(
        name="flood", board="aarch64-virt", accel="tcg", memory_mib=guest.memory_mib, kernel=Kernel(image=str(guest.file), console=False)
    )
    floor, ours = [], []
    async with bench.daemon() as daemon:
        argv = await command_line(daemon.client, spec)
        for number in range(bench.repeat or PAIRS):
            floor.append(await asyncio.to_thread(_by_hand, argv))
            ours.append(await _viewed(daemon.client, spec))
            say(f"  pair {number + 1}: plain file {floor[-1]:.0f} KiB/s, viewer {ours[-1]:.0f} KiB/s")
    return [paired("console", "console of a flooding guest, guest to viewer", ours=ours, floor=floor, unit="KiB/s")]


def _by_hand(argv: Sequence[str]) -> float:
    with ByHand(argv, plain_console=True) as qemu:
        time.sleep(WARM_UP_S)
        began, first = time.perf_counter(), qemu.console.stat().st_size
        time.sleep(WINDOW_S)
        return (qemu.console.stat().st_size - first) / (time.perf_counter() - began) / KIB


async def _viewed(client: Client, spec: MachineSpec) -> float:
    """Raises RuntimeError if a byte is missing: a viewer that loses some is no measure."""
    await client.create(spec, start=True)
    try:
        async with client.console(spec.name, since=0) as console:
            seen = 0
            first, began = 0, time.perf_counter() + WARM_UP_S
            async for frame in console:
                if frame.kind not in {"hello", "output"} or frame.offset != seen:
                    raise RuntimeError(f"bytes are missing: {frame.kind} at {frame.offset} after {seen}")
                seen += len(frame.data)
                now = time.perf_counter()
                if now < began or not first:
                    first, began = seen, max(now, began)
                elif now - began >= WINDOW_S:
                    return (seen - first) / (now - began) / KIB
        raise RuntimeError("the console ended")
    finally:
        await remove(client, [spec.name])
