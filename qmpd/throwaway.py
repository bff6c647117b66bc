"""An emulator that is started to answer a few questions and then thrown away: QMP over its standard input and output.

Machines are never talked to like this; they have `monitor`. A throw-away emulator runs no guest of a user, is ours alone, and dies
with us: by SIGKILL when the block ends, and by the kernel (`PR_SET_PDEATHSIG`, through setpriv of util-linux) when the daemon is killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Final, TypeVar

import msgspec

from qmpd.errors import LaunchFailed, QemuRefused

T = TypeVar("T")

#: `query-qmp-schema` answers 0.25 MB in one line. The limit also bounds what an unread stderr may hold.
LINE_LIMIT_BYTES: Final = 16 * 2**20
#: How much of stderr goes into an error.
STDERR_TAIL_BYTES: Final = 2048
#: A SIGKILLed process is gone in milliseconds unless the kernel holds it; then nobody can do anything more.
KILL_WAIT_S: Final = 5.0
#: Options of every throw-away emulator: nothing on it but what is asked for.
BARE: Final = ("-S", "-nodefaults", "-no-user-config", "-display", "none", "-qmp", "stdio")
#: Nothing of ours is inherited; LANG keeps messages in English.
ENVIRONMENT: Final = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"}


class VersionNumbers(msgspec.Struct, frozen=True):
    """The version triple of a greeting."""

    major: int
    minor: int
    micro: int


class VersionInfo(msgspec.Struct, frozen=True):
    """The version part of a greeting."""

    qemu: VersionNumbers


class Offer(msgspec.Struct, frozen=True):
    """The body of a greeting."""

    version: VersionInfo


class Greeting(msgspec.Struct, frozen=True):
    """The first line a QMP server says."""

    offer: Offer = msgspec.field(name="QMP")


class Refusal(msgspec.Struct, frozen=True):
    """A QMP error."""

    kind: str = msgspec.field(name="class")
    desc: str


class Reply(msgspec.Struct, frozen=True):
    """A line that is an answer or, with neither field, an event. The result stays undecoded until its type is known."""

    result: msgspec.Raw | msgspec.UnsetType = msgspec.field(name="return", default=msgspec.UNSET)
    error: Refusal | None = None


class Throwaway:
    """A running throw-away emulator that has built its machine and waits before the first instruction."""

    def __init__(self, path: str, process: Process, requests: asyncio.StreamWriter, replies: asyncio.StreamReader) -> None:
        self._path = path
        self._process = process
        self._requests = requests
        self._replies = replies
        self.version = ""

    async def command(self, name: str, kind: type[T], arguments: Mapping[str, object] | None = None) -> T:
        """Send one command and wait for its answer; there is no limit but the caller's.

        Raises:
            QemuRefused: the emulator answered with an error.
            LaunchFailed: it ended instead, or said something that is not QMP or not of this type.
        """
        request = {"execute": name} if arguments is None else {"execute": name, "arguments": arguments}
        try:
            self._requests.write(msgspec.json.encode(request) + b"\n")
            await self._requests.drain()
        except ConnectionError as error:
            raise await self._ended() from error
        while True:
            reply = await self._read(Reply)
            if reply.error is not None:
                raise QemuRefused(f"{name}: {reply.error.desc}", **{"class": reply.error.kind, "desc": reply.error.desc})
            if isinstance(reply.result, msgspec.Raw):
                return self._decoded(bytes(reply.result), kind)

    async def exit_code(self) -> int:
        """Wait until the emulator ends by itself; its exit code, or the negative number of the signal that ended it."""
        return await self._process.wait()

    async def program(self) -> str | None:
        """The file that really runs: another one than was started where that was a script. None where it cannot be told."""
        try:
            return await asyncio.to_thread(os.readlink, f"/proc/{self._process.pid}/exe")
        except OSError:
            return None

    async def negotiate(self) -> None:
        """Read the greeting and wait until the machine is built: the greeting comes before that."""
        numbers = (await self._read(Greeting)).offer.version.qemu
        self.version = f"{numbers.major}.{numbers.minor}.{numbers.micro}"
        await self.command("qmp_capabilities", dict[str, object])

    async def _read(self, kind: type[T]) -> T:
        try:
            line = await self._replies.readline()
        except ValueError as error:
            raise LaunchFailed(f"{self._path} said more than {LINE_LIMIT_BYTES} bytes in one line, which is not QMP") from error
        if not line:
            raise await self._ended()
        return self._decoded(line, kind)

    def _decoded(self, data: bytes, kind: type[T]) -> T:
        try:
            return msgspec.json.decode(data, type=kind)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            said = printable(data[:200].decode(errors="replace").strip())
            raise LaunchFailed(f"{self._path} does not speak QMP as expected ({error}): {said}") from error

    async def _ended(self) -> LaunchFailed:
        """The error for an emulator that closed its output: with what it had to say about that."""
        stderr = self._process.stderr
        said = b"" if stderr is None else (await everything(stderr, LINE_LIMIT_BYTES))[-STDERR_TAIL_BYTES:]
        tail = printable(said.decode(errors="replace").strip())
        code = await self._process.wait()
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        return LaunchFailed(f"{self._path} {how}: {tail or 'it said nothing'}", exit=code, stderr=tail)


async def everything(stream: asyncio.StreamReader, limit_bytes: int) -> bytes:
    """What comes until the stream ends, or until there is this much of it."""
    chunks: list[bytes] = []
    left = limit_bytes
    while left > 0 and (chunk := await stream.read(left)):
        chunks.append(chunk)
        left -= len(chunk)
    return b"".join(chunks)


def printable(text: str) -> str:
    """The text with everything that could move a terminal's cursor or change its colour shown as an escape."""
    return "".join(char if char.isprintable() or char == "\n" else ascii(char)[1:-1] for char in text)


@contextlib.asynccontextmanager
async def throwaway(path: str, options: Sequence[str], pass_fds: Sequence[int] = ()) -> AsyncIterator[Throwaway]:
    """Start this emulator with these options and BARE ones, and negotiate QMP; it is gone when the block ends, however it ends.

    Waits without a limit of its own: the caller's `asyncio.timeout` goes around it.

    Raises:
        LaunchFailed: it cannot be executed, ended before its machine was built, or does not speak QMP.
    """
    argv = (*await asyncio.to_thread(leash), path, *options, *BARE)
    try:
        process = await asyncio.create_subprocess_exec(
            *argv,
            stdin=PIPE,
            stdout=PIPE,
            stderr=PIPE,
            limit=LINE_LIMIT_BYTES,
            env=ENVIRONMENT,
            cwd="/",
            start_new_session=True,
            pass_fds=pass_fds,
        )
    except OSError as error:
        raise LaunchFailed(f"{path} cannot be executed: {error.strerror}", exit=None, stderr="") from error
    try:
        if process.stdin is None or process.stdout is None:
            raise LaunchFailed(f"{path} was started without pipes")
        emulator = Throwaway(path, process, process.stdin, process.stdout)
        await emulator.negotiate()
        yield emulator
    finally:
        await _end(process)


def leash() -> tuple[str, ...]:
    """The words that tie a process to the thread that starts it; without setpriv it is started untied. Blocks."""
    setpriv = shutil.which("setpriv", path=ENVIRONMENT["PATH"])
    return () if setpriv is None else (setpriv, "--pdeathsig", "KILL", "--")


async def _end(process: Process) -> None:
    """Kill the emulator and everything a start script left in its session, and reap it."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # the leader is not reaped yet, so the group's number is still ours
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(KILL_WAIT_S):
            await process.wait()
