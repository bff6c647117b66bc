"""A real QEMU that does not answer: stopped, or with a blocked main loop. It is not dead, and is treated so."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from pathlib import Path

import pytest

from qmpd.errors import QemuDied, QemuRefused, QemuSilent
from qmpd.monitor import Monitor
from qmpd.process import ExitStatus
from tests.process.emulator import PATIENCE_S, Emulator

pytestmark = pytest.mark.qemu

#: Long enough for an idle QEMU, and all of it is waited.
SHORT_S = 0.3


async def block_main_loop(monitor: Monitor, directory: Path) -> Path:
    """Make QEMU open a FIFO that nobody reads; returns the FIFO, which frees QEMU when it is opened for reading."""
    fifo = directory / "fifo"
    os.mkfifo(fifo)
    backend = {"type": "file", "data": {"out": str(fifo)}}
    with pytest.raises(QemuSilent):
        await monitor.execute("chardev-add", {"id": "blocked", "backend": backend}, deadline_s=SHORT_S)
    return fifo


async def free_main_loop(fifo: Path) -> int:
    return await asyncio.to_thread(os.open, fifo, os.O_RDONLY)


async def test_a_stopped_qemu_is_silent_and_recovers_by_its_late_answer(qemu: Emulator, monitor: Monitor) -> None:
    qemu.process.signal(signal.SIGSTOP)
    with pytest.raises(QemuSilent):
        await monitor.execute("query-status", deadline_s=SHORT_S)
    assert monitor.silent
    assert (monitor.closed, qemu.process.exit) == (None, None)
    qemu.process.signal(signal.SIGCONT)
    async with asyncio.timeout(PATIENCE_S):
        await monitor.wait_silent(False)
    assert await monitor.execute("query-status")


async def test_a_blocked_main_loop_leaves_the_out_of_band_commands(directory: Path, monitor: Monitor) -> None:
    fifo = await block_main_loop(monitor, directory)
    queued = [asyncio.create_task(monitor.execute("query-status"), name=f"queued {number}") for number in range(20)]
    assert await monitor.execute_oob("query-yank", deadline_s=PATIENCE_S)
    assert monitor.silent
    file = await free_main_loop(fifo)
    try:
        for call in queued:
            assert await call
        assert not monitor.silent
    finally:
        os.close(file)


async def test_a_blocked_main_loop_greets_no_new_session_until_it_is_free(qemu: Emulator, directory: Path) -> None:
    async with qemu.session() as monitor:
        fifo = await block_main_loop(monitor, directory)
    for _ in range(5):  # those that gave up wait in QEMU's backlog until it sees that they are gone
        with pytest.raises(QemuSilent, match=r"not ready|too many wait"):
            async with qemu.session(deadline_s=SHORT_S):
                pytest.fail("it cannot answer")
    assert qemu.process.exit is None
    file = await free_main_loop(fifo)
    try:
        async with qemu.session() as monitor:
            assert await monitor.execute("query-chardev")
            with pytest.raises(QemuRefused, match=r"duplicate|already exists"):
                await monitor.execute("chardev-add", {"id": "blocked", "backend": {"type": "null", "data": {}}})
    finally:
        os.close(file)


async def test_a_blocked_main_loop_outlives_sigterm_but_not_sigkill(qemu: Emulator, directory: Path, monitor: Monitor) -> None:
    await block_main_loop(monitor, directory)
    qemu.process.signal(signal.SIGTERM)
    assert await monitor.execute_oob("query-yank", deadline_s=PATIENCE_S)
    assert qemu.process.exit is None
    qemu.process.signal(signal.SIGKILL)
    assert await qemu.process.wait() == ExitStatus(signal="SIGKILL")
    async with asyncio.timeout(PATIENCE_S):
        await monitor.wait_closed()


async def test_leaving_does_not_wait_for_a_stopped_qemu_to_read(qemu: Emulator, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    callers: list[asyncio.Task[object]] = []
    async with qemu.session() as monitor:
        qemu.process.signal(signal.SIGSTOP)
        for number in range(8):  # more than the socket's buffers take
            call = monitor.execute_oob("yank", {"instances": ["x" * 60_000]}, deadline_s=PATIENCE_S)
            callers.append(asyncio.create_task(call, name=f"caller {number}"))
        await asyncio.sleep(0)
        assert monitor._session._writer is not None
        assert monitor._session._writer.transport.get_write_buffer_size() > 0
    for caller in callers:
        with pytest.raises(QemuDied, match="qmpd closed the connection"):
            await caller
    assert [record.message for record in caplog.records if record.name == "qmpd.monitor"] == ["monitor connected", "monitor closed"]
    qemu.process.signal(signal.SIGCONT)
    async with qemu.session() as monitor:  # its only slot is free
        assert await monitor.execute("query-status")


async def test_a_quit_that_was_accepted_by_a_process_that_stays_is_seen(qemu: Emulator, monitor: Monitor) -> None:
    qemu.process.signal(signal.SIGSTOP)
    with pytest.raises(QemuSilent, match="it may still take effect"):
        await monitor.execute("quit", deadline_s=SHORT_S)
    assert qemu.process.exit is None
    qemu.process.signal(signal.SIGCONT)
    async with asyncio.timeout(PATIENCE_S):
        assert await qemu.process.wait() == ExitStatus(code=0)
