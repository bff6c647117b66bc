"""Create and start over HTTP until `running`, against the same QEMU spawned by hand and driven over a raw socket."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from qmpd.spec import MachineSpec
from qmpd_api.client import Client
from scripts.lib.bench_figures import Row
from scripts.lib.bench_libvirt import create as libvirt_create
from scripts.lib.demo_daemon import running
from scripts.lib.progress import say

PAIRS: Final = 20
BAR: Final = 1.25
#: A start that takes longer hangs.
DEADLINE_S: Final = 60.0


async def measure(root: Path, repeat: int | None) -> list[Row]:
    """Medians of alternating pairs, so that what else the machine does hits both alike."""
    floor, ours, libvirt = [], [], []
    async with running(root / ".cache") as daemon:
        client = daemon.client
        await _once(client, "warm-up")
        for number in range(repeat or PAIRS):
            spec = _spec(f"pair{number}")
            floor.append(await asyncio.to_thread(by_hand, (await client.command(spec)).argv))
            ours.append(await _once(client, spec.name))
            other = await asyncio.to_thread(libvirt_create)
            libvirt += [other] if other is not None else []
            say(f"  pair {number + 1}: by hand {floor[-1] * 1e3:.1f} ms, qmpd {ours[-1] * 1e3:.1f} ms")
    low, measured = statistics.median(floor) * 1e3, statistics.median(ours) * 1e3
    rows = [
        Row(
            what="create + start until running (q35, 64 MiB, TCG)",
            unit="ms",
            floor=low,
            measured=measured,
            bar=f"<= {BAR} x",
            holds=measured <= BAR * low,
        )
    ]
    if libvirt:
        rows.append(
            Row(
                what="  the same by libvirt, for comparison",
                unit="ms",
                floor=low,
                measured=statistics.median(libvirt) * 1e3,
                bar="",
                holds=True,
            )
        )
    return rows


def _spec(name: str) -> MachineSpec:
    return MachineSpec(name=name, board="x86_64-q35", accel="tcg", memory_mib=64)


async def _once(client: Client, name: str) -> float:
    began = time.perf_counter()
    view = await client.create(_spec(name), start=True)
    took = time.perf_counter() - began
    if view.state != "running":
        raise RuntimeError(f"{name} is {view.state}")
    await client.kill(name)
    await client.delete(name)
    return took


def by_hand(argv: Sequence[str]) -> float:
    """Seconds from spawning this command until `cont` was answered. Its sockets are passed in, as qmpd does."""
    directory = Path(tempfile.mkdtemp(prefix="qmpd-bench-"))
    try:
        with ExitStack() as stack:
            passed: list[socket.socket] = []
            words = [_with_descriptor(word, directory, passed, stack) for word in argv]
            began = time.perf_counter()
            descriptors = [sock.fileno() for sock in passed]
            with subprocess.Popen(words, pass_fds=descriptors, stdin=subprocess.DEVNULL, cwd="/") as process:
                try:
                    _drive(directory / "qmp.sock")
                    return time.perf_counter() - began
                finally:
                    process.kill()
    finally:
        shutil.rmtree(directory)


def _with_descriptor(word: str, directory: Path, passed: list[socket.socket], stack: ExitStack) -> str:
    if not word.startswith("socket,id="):
        return word
    fields = dict(field.partition("=")[::2] for field in word.split(",")[1:])
    listener = stack.enter_context(socket.socket(socket.AF_UNIX))
    listener.bind(str(directory / f"{fields['id']}.sock"))
    listener.listen()
    passed.append(listener)
    log = f",logfile={directory / 'serial.log'},logappend=on" if "logfile" in fields else ""
    return f"socket,id={fields['id']},fd={listener.fileno()},server=on,wait=off{log}"


def _drive(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(DEADLINE_S)
        client.connect(str(path))
        stream = client.makefile("rwb")
        stream.readline()
        for command in ("qmp_capabilities", "cont"):
            stream.write(json.dumps({"execute": command}).encode())
            stream.flush()
            while "return" not in json.loads(stream.readline()):
                pass
