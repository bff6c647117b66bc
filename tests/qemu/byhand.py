"""QEMUs that a test starts by hand, as somebody would who has never heard of qmpd."""

from __future__ import annotations

import asyncio
import socket
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from tests.guests.build import Guest
from tests.guests.running import asleep
from tests.unavailable import tool

EMULATOR: Final = "qemu-system-x86_64"
#: SO_ACCEPTCON among the flags in /proc/net/unix.
LISTENS: Final = " 00010000 "
#: Generous: the hosts that run this are shared and slow, and only a hang may fail.
PATIENCE_S: Final = 120.0
#: Between two looks.
LOOK_S: Final = 0.02


def emulator() -> str:
    """The emulator's path; without it there is no test."""
    return tool(EMULATOR, "qemu-system-x86")


@contextmanager
def started(directory: Path, guest: Guest, *further: str, argv: Sequence[str] | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """A QEMU that runs a guest of ours; ended with the block."""
    plain = [
        "-nodefaults", "-machine", "q35", "-accel", "tcg", "-m", "64", "-display", "none", "-serial", f"file:{directory}/serial.txt",
        "-drive", f"file={guest.file},format=raw,if=none,id=d0,read-only=on", "-device", "ide-cd,drive=d0",
    ]  # fmt: skip
    process = subprocess.Popen([emulator(), *(plain if argv is None else argv), *further], cwd=directory)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


async def there(path: Path) -> None:
    """Returns when the path exists."""
    async with asyncio.timeout(PATIENCE_S):
        while not await asyncio.to_thread(path.exists):
            await asyncio.sleep(LOOK_S)


async def listening(path: Path, hand: subprocess.Popen[bytes]) -> None:
    """Returns when a QEMU listens at a socket and has built its machine, without becoming a client of it.

    QEMU 7.2 may never hear a first client that comes while the monitor is being moved to its own thread: then its threads work.
    """
    async with asyncio.timeout(PATIENCE_S):
        while not any(line.endswith(f" {path}\n") and LISTENS in line for line in _unix_sockets()):
            await asyncio.sleep(LOOK_S)
        while not await asyncio.to_thread(asleep, hand.pid):
            await asyncio.sleep(LOOK_S)


def _unix_sockets() -> list[str]:
    with Path("/proc/net/unix").open() as table:
        return table.readlines()


@contextmanager
def client(path: Path) -> Iterator[socket.socket]:
    """Another client of a monitor, that has been greeted."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(PATIENCE_S)
        connection.connect(str(path))
        assert connection.recv(4096).startswith(b'{"QMP"')
        yield connection
