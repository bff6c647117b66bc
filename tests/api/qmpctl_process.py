"""Qmpctl as a process of its own: on a pseudo-terminal, or between pipes."""

from __future__ import annotations

import asyncio
import os
import pty
import re
import sys
import termios
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from qmpctl import terminal

ROOT = Path(__file__).parents[2]

#: Exit code, stdout and stderr of qmpctl with these words.
Piped = Callable[..., Awaitable[tuple[int, bytes, bytes]]]


def environment(socket: Path, **more: str) -> dict[str, str]:
    """The environment of a qmpctl that talks to `socket`."""
    return {**os.environ, "QMPD_SOCKET": str(socket), "TERM": "xterm", "PYTHONPATH": f"{ROOT}:{ROOT / 'api'}", **more}


async def between_pipes(socket: Path, *words: str, stdin: bytes = b"") -> tuple[int, bytes, bytes]:
    """Run qmpctl to its end."""
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "qmpctl", *words, stdin=pipe, stdout=pipe, stderr=pipe, env=environment(socket)
    )
    out, err = await process.communicate(stdin)
    assert process.returncode is not None
    return process.returncode, out, err


class Screen:
    """A pseudo-terminal with qmpctl on it."""

    def __init__(self, master: int, slave: int, before: list[Any], process: asyncio.subprocess.Process) -> None:
        self.master = master
        #: How the terminal was set before qmpctl had it.
        self.before = before
        self.slave = slave
        self.process = process
        self.shown = b""

    async def until(self, pattern: bytes) -> bytes:
        """Wait until the screen has shown a match; what came after it stays for the next call."""
        while True:
            found = re.search(pattern, self.shown, re.DOTALL)
            if found:
                before, self.shown = self.shown[: found.end()], self.shown[found.end() :]
                return before
            self.shown += await terminal.read(self.master)

    def press(self, keys: bytes) -> None:
        """Type."""
        os.write(self.master, keys)

    @property
    def raw(self) -> bool:
        """Whether the terminal hands keys on as they are."""
        return not termios.tcgetattr(self.slave)[3] & (termios.ICANON | termios.ECHO | termios.ISIG)

    async def ended(self) -> int:
        """Wait for qmpctl, reading what it still says; returns its exit code, negative for a signal."""
        reading = asyncio.create_task(self.until(rb"(?!)"), name="screen")
        try:
            return await self.process.wait()
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)


@asynccontextmanager
async def on_screen(socket: Path, *words: str, **more: str) -> AsyncIterator[Screen]:
    """Qmpctl on a terminal of its own; killed at the end."""
    master, slave = pty.openpty()
    before = termios.tcgetattr(slave)
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "qmpctl",
        *words,
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env=environment(socket, **more),
        start_new_session=True,
    )
    try:
        yield Screen(master, slave, before, process)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        os.close(slave)
        os.close(master)
