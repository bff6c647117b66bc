"""A guest that resets itself for ever, which makes QEMU emit more than a thousand events a second."""

from __future__ import annotations

import asyncio
import gc
import tracemalloc
from pathlib import Path

import pytest

from qmpd.backlog import BURST, TRICKLE_HZ
from qmpd.monitor import EventsLost, QmpEvent
from tests.process.emulator import PATIENCE_S, RESET_STORM, Emulator, Emulators

pytestmark = pytest.mark.qemu


#: Events that make a storm.
MANY = 100


@pytest.fixture
async def stormy(emulators: Emulators, directory: Path) -> Emulator:
    (directory / "bios").write_bytes(RESET_STORM)
    return await emulators.start("-bios", str(directory / "bios"), machine="pc")


async def test_a_storm_is_merged_costs_no_memory_and_starves_nobody(stormy: Emulator) -> None:
    items: list[QmpEvent | EventsLost] = []
    async with stormy.session() as monitor:

        async def read() -> None:
            async for item in monitor.events():
                items.append(item)  # noqa: PERF401  it is looked at meanwhile

        reader = asyncio.create_task(read(), name="reader")
        await monitor.execute("query-status")
        gc.collect()
        tracemalloc.start()
        try:
            began = asyncio.get_running_loop().time()
            await monitor.execute("cont")
            for _ in range(100):
                assert await monitor.execute("query-name") == {}
            async with asyncio.timeout(PATIENCE_S):
                while sum(item.count for item in items) <= MANY:  # on a busy host the guest has less to do with the time than we
                    assert await monitor.execute("query-name") == {}
            elapsed_s = asyncio.get_running_loop().time() - began
            gc.collect()
            grown, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        await monitor.execute("stop")
    async with asyncio.timeout(PATIENCE_S):
        await reader
    assert sum(item.count for item in items) > MANY
    assert len(items) < 2 * BURST + elapsed_s * TRICKLE_HZ
    assert {item.name for item in items if isinstance(item, QmpEvent)} <= {"RESUME", "RESET", "STOP"}
    assert grown < 512 * 1024


async def test_a_session_can_be_opened_in_the_middle_of_a_storm(stormy: Emulator) -> None:
    async with stormy.session() as monitor:
        await monitor.execute("cont")
    for _ in range(30):
        async with stormy.session() as monitor:
            assert await monitor.execute("query-name") == {}
