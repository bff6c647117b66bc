"""QEMU processes: launched through a gate, found again after a restart, and their exit.

The gate is a shell of the same process id that QEMU will have. It waits for a line on a pipe that only we hold, so that QEMU
runs only after the caller has recorded who it is; if we die first, the pipe's end closes and the gate exits.

A process is known by boot id, pid and start time together, and held through a pidfd: its exit is an event of the loop, also when
it is not our child, and a signal never reaches a stranger.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import signal
import subprocess
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Final

import msgspec

from qmpd.capture import open_appending
from qmpd.errors import HostError, LaunchFailed
from qmpd.failpoint import failpoint, passing
from qmpd.offload import off_loop
from qmpd.shortage import shortage

#: Plain POSIX shell. A line without its end (we died while writing it) makes `read` fail, and nothing runs.
_GATE: Final = 'read -r go && exec "$@" </dev/null'
_GO: Final = b"go\n"
#: Nothing of the daemon's environment reaches QEMU: it must not depend on who started the daemon. Messages are not translated.
#: QEMU 7.2 would look for a sound card for boards that have one soldered on.
_ENVIRONMENT: Final = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "LC_ALL": "C.UTF-8",
    "QEMU_AUDIO_DRV": "none",
}

#: A line of /proc/PID/stat: 52 numbers of at most 20 digits, and a name of at most 64.
STAT_BYTES: Final = 2048
#: Writes down who the process is. Blocks.
Recorder = Callable[["Identity"], None]


class NotOurs(Exception):
    """The process that was recorded is gone, whoever has its number now."""


class Identity(msgspec.Struct, frozen=True, kw_only=True):
    """Which process it is, for ever: `start_time` is in the kernel's clock ticks since the boot called `boot_id`."""

    boot_id: str
    pid: int
    start_time: int


class ExitStatus(msgspec.Struct, frozen=True, kw_only=True):
    """How a process ended: its exit code, or the name of the signal. Neither, if it was not our child: only its parent learns."""

    code: int | None = None
    signal: str | None = None


def describe(status: ExitStatus) -> str:
    """An exit status in words."""
    if status.signal is not None:
        return status.signal
    return "an unknown status" if status.code is None else f"status {status.code}"


class QemuProcess:
    """A process that runs, or ran. Belongs to the event loop it was made in; `close` it when it is of no interest any more.

    `exit` is None while it runs. `companion` is the process beside it that was let go together with it, if any, `forsaken` how that
    ended before it. `stderr_start` is where its own standard error begins in the file it is appended to. `over` is for `asyncio.wait`, and
    settled when it has ended or is not watched any more.
    """

    def __init__(self, identity: Identity, pidfd: int, *, stderr_start: int = 0) -> None:
        self.identity = identity
        self.stderr_start = stderr_start
        self.exit: ExitStatus | None = None
        self.companion: QemuProcess | None = None
        self.forsaken: str | None = None
        self._pidfd = pidfd
        self._loop = asyncio.get_running_loop()
        self.over: asyncio.Future[None] = self._loop.create_future()
        self._loop.add_reader(pidfd, self._ended)

    async def wait(self) -> ExitStatus:
        """Return how it ended, once it has; for any number of callers. Raises NotOurs if it was closed before."""
        if not self.over.done():
            await asyncio.wait([self.over])
        if self.exit is None:
            raise NotOurs(f"process {self.identity.pid} is not watched any more")
        return self.exit

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal; does nothing once it has ended or was closed.

        Raises:
            HostError: the kernel does not let this daemon; the process has changed its user, say.
        """
        if self._pidfd < 0:
            return
        try:
            failpoint("signal-send")
            signal.pidfd_send_signal(self._pidfd, number)
        except ProcessLookupError:
            pass  # it ended just now
        except OSError as error:
            raise HostError(f"{number.name} cannot be sent to process {self.identity.pid}: {error.strerror}") from error

    async def binary_replaced(self) -> bool:
        """Whether the file it was started from is another one now, or none: an upgrade came by. False once it has ended."""
        return self.exit is None and await asyncio.to_thread(_binary_replaced, self.identity.pid)

    def close(self) -> None:
        """Stop watching it; it lives on. Its exit is not reaped then, so this is for a daemon that ends."""
        if self._pidfd >= 0:
            self._loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1
        if not self.over.done():
            self.over.set_result(None)

    def _ended(self) -> None:
        self.exit = _reap(self._pidfd)
        self.close()


class Gate(msgspec.Struct, frozen=True, kw_only=True):
    """A process that is recorded and waits to become the program: who it is, and the pipe's end that lets it go on.

    `companion` is that of a program which runs beside it, and is let go right after it: when we die in between, it never runs, and the
    first one notices.
    """

    identity: Identity
    pidfd: int
    pipe: int
    stderr_start: int
    companion: Gate | None = None


def gate(argv: Sequence[str], *, inherited: Sequence[int], cwd: str, stderr: str, record: Recorder) -> Gate:
    """A gate before `argv` (an absolute path first), in a new session, with the descriptors `inherited` under their own numbers. Blocks.

    `record` is called with the identity and must have written it down when it returns; if it raises, or this process dies, the
    program never runs. Standard output and error are appended to the file `stderr`. Whether the program can be run at all shows in
    how the process ends: code 126 or 127, with the shell's words in `stderr`.

    Raises:
        Busy, NoSpace: the host is out of descriptors, processes, memory or disk.
        LaunchFailed: the kernel refused otherwise (`cwd` does not exist, the command line is too long).
        Exception: whatever `record` raises; the gate is gone then.
    """
    try:
        made = _spawn(tuple(argv), inherited, cwd, stderr)
    except (OSError, ValueError) as error:
        known = shortage(error) if isinstance(error, OSError) else None
        raise known or LaunchFailed(f"cannot start {argv[0]}: {error}") from error
    try:
        record(made.identity)
    except BaseException:
        discard(made)
        raise
    return made


async def launch(make: Callable[[], Gate], *, undo: Callable[[], object] = lambda: None) -> QemuProcess:
    """Call `make` in a thread, and let the program run behind the gate that it returns.

    A caller that is cancelled meanwhile leaves nothing: the program never runs, and `undo` (it may block) is called when the gate
    is gone. Raises whatever `make` raises.
    """

    def given_up(made: Gate) -> None:
        discard(made)
        undo()

    return await opened(await off_loop(make, undo=given_up, name="qmpd-spawn"))


async def opened(made: Gate) -> QemuProcess:
    """The process behind a gate, which is told to become its program; and its companion, if it has one."""
    process, beside = _held(made), made.companion
    try:
        with contextlib.suppress(BrokenPipeError):  # somebody killed the gate: the exit tells
            await passing("gate-go")
            os.write(made.pipe, _GO)
        if beside is not None:
            process.companion = _held(beside)
            with contextlib.suppress(BrokenPipeError):
                await passing("tpm-go")
                os.write(beside.pipe, _GO)
    finally:
        os.close(made.pipe)
        if beside is not None:
            os.close(beside.pipe)
    await passing("gate-gone")
    return process


def _held(made: Gate) -> QemuProcess:
    return QemuProcess(made.identity, made.pidfd, stderr_start=made.stderr_start)


async def adopt(identity: Identity) -> QemuProcess:
    """The process that was recorded as `identity`, which some earlier daemon launched. It may have ended and not been reaped yet.

    Raises:
        NotOurs: it is gone: another boot, no such process, or another one under its number.
        Busy: the host is out of descriptors or memory. It may well be there.
    """
    try:
        pidfd = await off_loop(partial(_claim, identity), undo=os.close, name="qmpd-adopt")
    except OSError as error:
        if known := shortage(error):
            raise known from error
        raise
    return QemuProcess(identity, pidfd)


def _spawn(argv: tuple[str, ...], inherited: Sequence[int], cwd: str, stderr: str) -> Gate:
    with contextlib.ExitStack() as passed, contextlib.ExitStack() as undo:
        output = open_appending(stderr)
        passed.callback(os.close, output)
        stderr_start = os.fstat(output).st_size
        stdin, pipe = os.pipe()
        passed.callback(os.close, stdin)
        undo.callback(os.close, pipe)
        os.set_blocking(pipe, False)
        failpoint("gate-spawn")
        # No preexec_fn: without one the child is made by vfork, which costs the same however large the daemon is.
        child = subprocess.Popen(
            ["/bin/sh", "-c", _GATE, "qmpd-gate", *argv],
            stdin=stdin,
            stdout=output,
            stderr=output,
            pass_fds=inherited,
            cwd=cwd,
            env=_ENVIRONMENT,
            umask=0o077,
            start_new_session=True,
        )
        undo.callback(child.wait)
        undo.callback(child.kill)
        pidfd = os.pidfd_open(child.pid)
        undo.callback(os.close, pidfd)
        resource.prlimit(child.pid, resource.RLIMIT_CORE, (0, 0))  # a core holds the guest's memory
        identity = Identity(boot_id=boot_id(), pid=child.pid, start_time=start_time(child.pid))
        undo.pop_all()
        child.returncode = 0  # Popen is done with it: it is reaped through the pidfd, once, when that says so
        return Gate(identity=identity, pidfd=pidfd, pipe=pipe, stderr_start=stderr_start)


def discard(made: Gate) -> None:
    """Closes a gate for good, with that of its companion: their programs never run, and they are gone when this returns. Blocks."""
    os.close(made.pipe)
    with contextlib.suppress(ChildProcessError):
        os.waitid(os.P_PIDFD, made.pidfd, os.WEXITED)  # the gate reads the end of the pipe, and exits
    os.close(made.pidfd)
    if made.companion is not None:
        discard(made.companion)


def _claim(identity: Identity) -> int:
    if identity.pid < 1:
        raise NotOurs(f"there is no process {identity.pid}")
    if identity.boot_id != boot_id():
        raise NotOurs(f"process {identity.pid} belonged to an earlier boot of this host")
    try:
        pidfd = os.pidfd_open(identity.pid)
    except (ProcessLookupError, ValueError, OverflowError) as error:
        raise NotOurs(f"there is no process {identity.pid}") from error
    with contextlib.ExitStack() as undo:
        undo.callback(os.close, pidfd)
        # Read after the pidfd was opened: if the start time is right, the pidfd is the process that was recorded.
        if start_time(identity.pid) != identity.start_time:
            raise NotOurs(f"process {identity.pid} is another one, started at another time")
        undo.pop_all()
    return pidfd


@cache
def boot_id() -> str:
    """What the kernel calls this boot of the host. Blocks."""
    return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()


def start_time(pid: int) -> int:
    """When a process was started, in the kernel's clock ticks since the boot. Blocks. Raises NotOurs when there is none."""
    try:
        with open(f"/proc/{pid}/stat", "rb", buffering=0) as file:  # noqa: PTH123  a start waits for this, and the adoption of a hundred
            stat = file.read(STAT_BYTES) or b""
    except (FileNotFoundError, ProcessLookupError) as error:
        raise NotOurs(f"there is no process {pid}") from error
    # The second field is the name in parentheses, and may hold anything; the start time is the 22nd (proc(5)).
    return int(stat[stat.rindex(b")") + 2 :].split()[19])


def _reap(pidfd: int) -> ExitStatus:
    try:
        result = os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)
    except ChildProcessError:
        return ExitStatus()
    if result is None:
        return ExitStatus()
    if result.si_code == os.CLD_EXITED:
        return ExitStatus(code=result.si_status)
    try:
        return ExitStatus(signal=signal.Signals(result.si_status).name)
    except ValueError:
        return ExitStatus(signal=f"SIG{result.si_status}")  # real-time signals have no names


def _binary_replaced(pid: int) -> bool:
    running = Path(f"/proc/{pid}/exe")
    try:
        path = running.readlink()
        held = running.stat()
        if running.readlink() != path:
            return False  # the gate became it just now
    except (FileNotFoundError, ProcessLookupError):
        return False
    try:
        now = path.stat()
    except FileNotFoundError:
        return True
    return (held.st_dev, held.st_ino) != (now.st_dev, now.st_ino)
