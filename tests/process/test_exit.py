from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest

from qmpd.errors import Busy
from qmpd.process import ExitStatus, Identity, NotOurs, QemuProcess, adopt
from tests.process.conftest import Starter
from tests.process.emulator import PATIENCE_S, alive, descriptors

#: An earlier daemon: launches a program, says who it is, and does as it is told: "leave" it, or stay and never reap it.
EARLIER_DAEMON = """
import asyncio, sys
from functools import partial
import msgspec
from qmpd.process import gate, launch

def record(identity):
    print(msgspec.json.encode(identity).decode(), flush=True)

async def main():
    process = await launch(partial(gate, sys.argv[3:], inherited=(), cwd="/", stderr=sys.argv[2], record=record))
    process.close()

asyncio.run(main())
if sys.argv[1] == "stay":
    sys.stdin.read()
"""


class Earlier:
    """The earlier daemon and the identity of what it launched."""

    def __init__(self, daemon: asyncio.subprocess.Process, identity: Identity) -> None:
        self.daemon = daemon
        self.identity = identity


async def earlier(directory: Path, conduct: str) -> Earlier:
    daemon = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        EARLIER_DAEMON,
        conduct,
        str(directory / "stderr"),
        "/bin/sleep",
        "1000",
        cwd=Path(__file__).parents[2],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert daemon.stdout is not None
    return Earlier(daemon, msgspec.json.decode(await daemon.stdout.readline(), type=Identity))


@pytest.fixture
async def orphan(directory: Path) -> AsyncIterator[QemuProcess]:
    """A program of a daemon that is gone."""
    left = await earlier(directory, "leave")
    assert await left.daemon.wait() == 0
    process = await adopt(left.identity)
    yield process
    process.signal(signal.SIGKILL)
    async with asyncio.timeout(PATIENCE_S):
        await process.wait()


async def test_an_exit_code_is_reported(start: Starter) -> None:
    process = await start("/bin/sh", "-c", "exit 7")
    assert await process.wait() == ExitStatus(code=7)
    assert process.exit == ExitStatus(code=7)


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT, signal.SIGSYS, signal.SIGKILL, signal.SIGTERM])
async def test_a_signal_that_ended_it_is_reported_by_name(start: Starter, number: signal.Signals) -> None:
    process = await start("/bin/sleep", "1000")
    assert process.exit is None
    process.signal(number)
    assert await process.wait() == ExitStatus(signal=number.name)


async def test_a_signal_without_a_name_is_reported_by_number(start: Starter) -> None:
    process = await start("/bin/sh", "-c", "kill -40 $$")
    assert await process.wait() == ExitStatus(signal="SIG40")


async def test_everyone_who_waits_learns_of_the_exit(start: Starter) -> None:
    process = await start("/bin/sleep", "1000")
    async with asyncio.TaskGroup() as group:
        waiting = [group.create_task(process.wait(), name=f"waiter {number}") for number in range(5)]
        process.signal(signal.SIGKILL)
    assert {task.result() for task in waiting} == {ExitStatus(signal="SIGKILL")}
    assert await process.wait() == ExitStatus(signal="SIGKILL")


async def test_a_waiter_that_goes_away_does_not_disturb_the_others(start: Starter) -> None:
    process = await start("/bin/sleep", "1000")
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0):
            await process.wait()
    process.signal(signal.SIGKILL)
    assert await process.wait() == ExitStatus(signal="SIGKILL")


async def test_an_ended_process_is_reaped_and_its_pidfd_closed(start: Starter) -> None:
    before = descriptors()
    for _ in range(5):
        process = await start("/bin/true")
        await process.wait()
        assert not alive(process.identity)
    assert descriptors() == before


async def test_an_ended_process_takes_no_signals_and_is_closed_again_without_harm(start: Starter) -> None:
    process = await start("/bin/true")
    await process.wait()
    process.signal(signal.SIGKILL)
    process.close()
    assert await process.wait() == ExitStatus(code=0)


async def test_a_process_that_ends_between_two_signals_is_not_an_error(start: Starter) -> None:
    process = await start("/bin/sleep", "1000")
    for _ in range(100):
        process.signal(signal.SIGKILL)
    assert await process.wait() == ExitStatus(signal="SIGKILL")


async def test_who_waits_for_a_process_that_is_closed_is_told(start: Starter) -> None:
    process = await start("/bin/sleep", "1000")
    again = await adopt(process.identity)
    waiting = asyncio.create_task(again.wait(), name="waiter")
    again.close()
    with pytest.raises(NotOurs):
        await waiting
    assert process.exit is None


async def test_an_adopted_process_is_seen_to_end_but_only_its_parent_knows_how(orphan: QemuProcess) -> None:
    orphan.signal(signal.SIGTERM)
    async with asyncio.timeout(PATIENCE_S):
        assert await orphan.wait() == ExitStatus()


async def test_an_adopted_process_that_is_our_child_after_all_tells_how_it_ended(start: Starter) -> None:
    process = await start("/bin/sleep", "1000")
    again = await adopt(process.identity)
    process.close()
    again.signal(signal.SIGTERM)
    assert await again.wait() == ExitStatus(signal="SIGTERM")


async def test_a_zombie_counts_as_ended(directory: Path) -> None:
    kept = await earlier(directory, "stay")
    process = await adopt(kept.identity)
    process.signal(signal.SIGKILL)
    async with asyncio.timeout(PATIENCE_S):
        await process.wait()
    os.kill(kept.identity.pid, 0)  # the old way to ask says that it lives
    zombie = await adopt(kept.identity)
    async with asyncio.timeout(PATIENCE_S):
        assert await zombie.wait() == ExitStatus()
    await kept.daemon.communicate(b"")


async def test_a_process_of_an_earlier_boot_is_not_ours(orphan: QemuProcess) -> None:
    with pytest.raises(NotOurs, match="earlier boot"):
        await adopt(msgspec.structs.replace(orphan.identity, boot_id="8a2b1ee6-0000-4000-8000-000000000000"))


async def test_another_process_under_the_same_number_is_not_ours(orphan: QemuProcess) -> None:
    with pytest.raises(NotOurs, match="another one"):
        await adopt(msgspec.structs.replace(orphan.identity, start_time=orphan.identity.start_time - 1))
    assert orphan.exit is None


@pytest.mark.parametrize("pid", [0, -1, 2**22 + 1, 2**31, 2**70])
async def test_a_number_that_no_process_has_is_not_ours(orphan: QemuProcess, pid: int) -> None:
    with pytest.raises(NotOurs, match="no process"):
        await adopt(msgspec.structs.replace(orphan.identity, pid=pid))


async def test_without_descriptors_nothing_is_said_about_a_process(start: Starter, few_descriptors: Callable[[int], None]) -> None:
    process = await start("/bin/sleep", "1000")
    few_descriptors(0)
    with pytest.raises(Busy, match="Too many open files"):
        await adopt(process.identity)


async def test_a_process_that_is_gone_is_not_ours(start: Starter) -> None:
    process = await start("/bin/true")
    await process.wait()
    with pytest.raises(NotOurs):
        await adopt(process.identity)


async def test_a_program_that_was_replaced_or_removed_under_its_process_is_seen(start: Starter, directory: Path) -> None:
    async with running_copy(start, directory / "cat)") as process:
        assert not await process.binary_replaced()
        shutil.copy("/bin/cat", directory / "new")
        (directory / "new").replace(directory / "cat)")
        assert await process.binary_replaced()
        (directory / "cat)").unlink()
        assert await process.binary_replaced()
    assert await process.wait() == ExitStatus(code=0)
    assert not await process.binary_replaced()


async def test_a_name_that_looks_like_the_end_of_a_field_does_not_confuse_adoption(start: Starter, directory: Path) -> None:
    async with running_copy(start, directory / "a) S 1 1") as process:
        again = await adopt(process.identity)
        again.close()


@asynccontextmanager
async def running_copy(start: Starter, program: Path) -> AsyncIterator[QemuProcess]:
    """A copy of `cat` that runs for the block, and has taken the gate's place when the block begins."""
    fifo = program.with_name("fifo")
    os.mkfifo(fifo)
    shutil.copy("/bin/cat", program)
    process = await start(str(program), str(fifo))
    with await asyncio.to_thread(fifo.open, "wb"):  # until the program opens it too
        yield process
