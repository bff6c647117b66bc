"""Real emulators for the tests of this directory and of tests/qmp: tiny guests, and processes that never outlive their test."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import signal
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from qmpd.capture import stderr_tail
from qmpd.listeners import bound_listeners
from qmpd.monitor import Monitor, connected
from qmpd.process import Identity, QemuProcess, gate, launch

#: The one that PATH leads to: `scripts/test --qemu` puts another in front. Without any, tests fail with the name of the usual one.
QEMU = shutil.which("qemu-system-x86_64") or "/usr/bin/qemu-system-x86_64"
#: Far above what any step takes on a busy machine: when it passes, the test has failed.
PATIENCE_S = 60.0

ROM_BYTES = 64 * 1024
_RESET_VECTOR = ROM_BYTES - 16


def rom(code: bytes) -> bytes:
    """A BIOS that does nothing but run 16 bytes of 16-bit code at the reset vector."""
    return bytes(_RESET_VECTOR) + code.ljust(16, b"\xf4")


#: mov dx,0xcf9; mov al,6; out dx,al; hlt: a full reset, for ever.
RESET_STORM = rom(bytes.fromhex("ba f9 0c b0 06 ee f4"))
#: jmp $
SPIN = rom(bytes.fromhex("eb fe"))


def unrecorded(_identity: Identity) -> None:
    """A recorder for tests that are not about recording."""


@dataclass(frozen=True)
class Emulator:
    """A QEMU of a test and where it is."""

    process: QemuProcess
    qmp: str
    stderr: str

    def session(self, *, name: str = "test", deadline_s: float = PATIENCE_S) -> AbstractAsyncContextManager[Monitor]:
        """`connected`, to this QEMU."""
        return connected(self.qmp, name=name, peer_pid=self.process.identity.pid, deadline_s=deadline_s)


class Emulators:
    """Starts QEMUs in one directory; all are killed, and their standard error shown, when the test is over."""

    def __init__(self, directory: Path, owned: AsyncExitStack) -> None:
        self.directory = directory
        self._owned = owned
        self._count = 0

    async def start(
        self,
        *options: str,
        machine: str = "none",
        halted: bool = True,
        record: Callable[[Identity], None] = unrecorded,
        program: str = QEMU,
    ) -> Emulator:
        """Launch a QEMU with a monitor, as the daemon does; returns when its gate was opened."""
        self._count += 1
        qmp, stderr = str(self.directory / f"qmp{self._count}"), str(self.directory / f"stderr{self._count}")
        async with bound_listeners({"qmp": qmp}) as listeners:
            argv = [program, "-nodefaults", "-no-user-config", "-display", "none", "-machine", f"{machine},accel=tcg", "-m", "16"]
            argv += ["-S"] if halted else []
            argv += ["-chardev", f"socket,id=qmp,fd={listeners['qmp'].fileno()},server=on,wait=off", "-qmp", "chardev:qmp"]
            inherited = [listeners["qmp"].fileno()]
            process = await launch(partial(gate, [*argv, *options], inherited=inherited, cwd="/", stderr=stderr, record=record))
        self._owned.push_async_callback(_end, process, stderr)
        return Emulator(process, qmp, stderr)


async def _end(process: QemuProcess, stderr: str) -> None:
    process.signal(signal.SIGKILL)
    async with asyncio.timeout(PATIENCE_S):
        ended = await process.wait()
    sys.stdout.write(f"--- process {process.identity.pid} ended with {ended}, standard error:\n{await stderr_tail(stderr)}\n")


def size(path: Path | str) -> int:
    """The file's length, holes included."""
    return Path(path).stat().st_size


def held(path: Path | str) -> int:
    """The disk space the file takes."""
    return Path(path).stat().st_blocks * 512


def content(path: Path | str) -> bytes:
    """The file's bytes, zero in holes."""
    return Path(path).read_bytes()


def names(directory: Path) -> set[str]:
    """What is in the directory."""
    return {entry.name for entry in directory.iterdir()}


def descriptors() -> int:
    """How many files this process has open."""
    return len(names(Path("/proc/self/fd")))


def children() -> set[str]:
    """This process's children, zombies too, by number and name."""
    tasks = Path("/proc/self/task")
    found = set()
    for task in tasks.iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread that ended meanwhile
            found |= {child for pid in (task / "children").read_text().split() for child in _named(pid)}
    return found


def _named(pid: str) -> Iterator[str]:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it was reaped meanwhile
        yield f"{pid} {Path('/proc', pid, 'comm').read_text()}"


def program_of(identity: Identity) -> Path:
    """What the process runs now."""
    return Path(f"/proc/{identity.pid}/exe").readlink()


def alive(identity: Identity) -> bool:
    """Whether the number is taken, be it by a zombie."""
    return Path(f"/proc/{identity.pid}").exists()


async def quiet() -> None:
    """Return when no task but the caller's is left, and none is about to be made by one that has just ended."""
    async with asyncio.timeout(PATIENCE_S):
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        while others := asyncio.all_tasks() - {asyncio.current_task()}:
            await asyncio.wait(others)


@asynccontextmanager
async def emulators_in(directory: Path) -> AsyncIterator[Emulators]:
    """Emulators that end with the block."""
    async with AsyncExitStack() as owned:
        yield Emulators(directory, owned)
