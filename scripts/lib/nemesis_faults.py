"""What a nemesis run does to the daemon, to QEMUs and to files, chosen by chance; each mends itself or says what it damaged."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import shutil
import signal
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

from qmpd.errors import QmpdError
from qmpd_api.client import Client
from scripts.lib.nemesis_history import Life
from scripts.lib.nemesis_world import World

#: A killed process is gone when the kernel has given back its memory.
GONE_LIMIT_S: Final = 60.0
LOOK_S: Final = 0.02
#: What is left of the state file system while it is "full".
BALLAST: Final = "ballast"
RECORD: Final = "launch.msgpack"

Fault = Callable[[World, random.Random], Awaitable[None]]


async def kill_daemon(world: World, chance: random.Random) -> None:
    """SIGKILL, and a new daemon after a moment."""
    await _replace_daemon(world, chance, signal.SIGKILL)


async def end_daemon(world: World, chance: random.Random) -> None:
    """SIGTERM, and a new daemon."""
    await _replace_daemon(world, chance, signal.SIGTERM)


async def _replace_daemon(world: World, chance: random.Random, number: signal.Signals) -> None:
    with world.disturbance():
        with world.fault("fault-daemon", detail=number.name):
            await asyncio.to_thread(world.daemon.end, number)
        await asyncio.sleep(chance.choice((0, 0, 0.5)))
        with world.fault("daemon-start"):
            world.daemon.start()
            await asyncio.to_thread(world.daemon.wait_answer)


async def stop_daemon(world: World, chance: random.Random) -> None:
    """The daemon stands still for a while."""
    with world.disturbance(), world.fault("fault-daemon", detail="SIGSTOP"):
        pid = world.daemon.pid
        os.kill(pid, signal.SIGSTOP)
        try:
            await asyncio.sleep(chance.uniform(0.1, 2))
        finally:
            os.kill(pid, signal.SIGCONT)


async def kill_qemu(world: World, chance: random.Random) -> None:
    """A QEMU dies, of a signal it cannot or does not catch. Its pid is what the API says it is."""
    life = await _one_by_api(world, chance)
    if life is not None:
        await end_by_hand(world, life, chance.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM)))


async def end_by_hand(world: World, life: Life, number: signal.Signals) -> None:
    """Sends a QEMU this signal, and waits until it is gone."""
    limit = time.monotonic() + GONE_LIMIT_S
    with world.fault("fault-kill", life.machine, pid=life.pid, detail=number.name):
        while _is_alive(life) and time.monotonic() < limit:
            with contextlib.suppress(ProcessLookupError):
                os.kill(life.pid, number)
                os.kill(life.pid, signal.SIGCONT)
            await asyncio.sleep(LOOK_S)


async def stop_qemu(world: World, chance: random.Random) -> None:
    """A QEMU stands still for a while."""
    life = await _one_by_api(world, chance)
    if life is None:
        return
    with world.fault("fault-stop", life.machine, pid=life.pid), contextlib.suppress(ProcessLookupError):
        os.kill(life.pid, signal.SIGSTOP)
        try:
            await asyncio.sleep(chance.uniform(0.1, 4))
        finally:
            if _is_alive(life):
                os.kill(life.pid, signal.SIGCONT)


async def remove_run_directory(world: World, chance: random.Random) -> None:
    """Somebody tidied up /run."""
    name = _one(world, chance)
    if name is not None:
        world.damaged.add(name)
        with world.fault("fault-rundir", name):
            await asyncio.to_thread(shutil.rmtree, world.daemon.run_dir / "m" / name, ignore_errors=True)


async def remove_socket(world: World, chance: random.Random) -> None:
    """A monitor's socket is gone: the connection that is there goes on, a new one cannot be made."""
    name = _one(world, chance)
    if name is not None:
        world.damaged.add(name)
        with world.fault("fault-socket", name), contextlib.suppress(FileNotFoundError):
            (world.daemon.run_dir / "m" / name / "qmp.sock").unlink()


async def damage_record(world: World, chance: random.Random) -> None:
    """A launch record is cut short, or holds something else."""
    name = _one(world, chance)
    if name is None:
        return
    path = world.daemon.run_dir / "m" / name / RECORD
    world.damaged.add(name)
    with world.fault("fault-record", name), contextlib.suppress(FileNotFoundError):
        size = path.stat().st_size
        if chance.random() < 0.5:
            os.truncate(path, chance.randrange(size))
        else:
            path.write_bytes(chance.randbytes(chance.randrange(1, 2 * size)))


async def fill_disk(world: World, chance: random.Random) -> None:
    """The state file system is full for a moment, if it is one that may be filled."""
    if not await asyncio.to_thread(world.daemon.state_dir.is_mount):
        return
    world.disk_was_full = True
    with world.fault("fault-full"):
        ballast = world.daemon.state_dir / BALLAST
        try:
            await asyncio.to_thread(_fill, ballast)
            await asyncio.sleep(chance.uniform(0.2, 2))
        finally:
            ballast.unlink(missing_ok=True)


def _fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(b"\0" * 65_536):
            pass


#: How often each is chosen, of all.
FAULTS: Final[dict[str, tuple[Fault, int]]] = {
    "daemon-kill": (kill_daemon, 6), "daemon-term": (end_daemon, 2), "daemon-stop": (stop_daemon, 2), "qemu-kill": (kill_qemu, 6),
    "qemu-stop": (stop_qemu, 5), "run-directory": (remove_run_directory, 1), "socket": (remove_socket, 2), "record": (damage_record, 2),
    "disk-full": (fill_disk, 2),
}  # fmt: skip


async def _one_by_api(world: World, chance: random.Random) -> Life | None:
    """A QEMU, found as an administrator would: by the pid that the API shows; what the watcher knows of it makes sure it is one."""
    try:
        async with Client(world.daemon.socket) as client:
            pids = {view.pid for view in (await client.machines()).machines}
    except QmpdError:
        return None
    known = [life for life in await asyncio.to_thread(world.watcher.look) if life.pid in pids]
    return chance.choice(known) if known else None


def _one(world: World, chance: random.Random) -> str | None:
    """A machine with a QEMU."""
    alive = sorted({life.machine for life in world.watcher.look()})
    return chance.choice(alive) if alive else None


def _is_alive(life: Life) -> bool:
    try:
        stat = Path(f"/proc/{life.pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return False
    fields = stat[stat.rindex(b")") + 2 :].split()
    return int(fields[19]) == life.started and fields[0] not in {b"Z", b"X"}
