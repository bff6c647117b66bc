"""A daemon that can be killed and started again over the same directories, and every process that runs from them.

What it launched is found in /proc, not asked of the daemon: who watches it must not believe it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import msgspec
import tomli_w

#: The daemon lets go of its machines in well under a second; on a host that is short of processors it may take longer.
STOP_LIMIT_S: Final = 180.0
#: A daemon that does not answer for this long has failed.
ANSWER_LIMIT_S: Final = 300.0
#: How often the socket of a daemon that starts is tried.
LOOK_S: Final = 0.001
#: A killed process is gone as soon as the kernel has given back its memory.
GONE_LIMIT_S: Final = 30.0
LOG: Final = "qmpd.log"
LOG_TAIL_BYTES: Final = 4096
_VERSION: Final = b"GET /v1/version HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"


class DaemonFailed(Exception):
    """The daemon ended, or does not answer; the message has the end of its log."""


class Running(msgspec.Struct, frozen=True, kw_only=True):
    """A QEMU as the kernel knows it: pid and start time together name it for ever."""

    pid: int
    started: int
    machine: str


class Restartable:
    """A private daemon. `generation` counts its lives; its settings may be more than the defaults.

    `within` is put before its command (`nsenter ...`), and must become it.
    """

    def __init__(
        self,
        directory: Path,
        cache: Path,
        settings: Mapping[str, object],
        state_dir: Path | None = None,
        within: Sequence[str] = (),
    ) -> None:
        self.directory = directory
        self._within = tuple(within)
        self.socket = str(directory / "qmpd.sock")
        self.state_dir = state_dir or directory / "s"
        self.run_dir = directory / "r"
        self.generation = 0
        self.process: subprocess.Popen[bytes] | None = None
        places = {"socket": self.socket, "state_dir": str(self.state_dir), "run_dir": str(self.run_dir), "cache_dir": str(cache)}
        values = {**places, "pools": ["/"], **settings}
        (directory / "qmpd.toml").write_text(tomli_w.dumps(values), encoding="utf-8")

    @property
    def pid(self) -> int:
        """The daemon's process id. Raises DaemonFailed when it does not run."""
        if self.process is None or self.process.poll() is not None:
            raise DaemonFailed(f"the daemon does not run\n{self.log_tail()}")
        return self.process.pid

    def start(self, **environ: str) -> float:
        """Starts the daemon, with `environ` in its environment, and returns the moment before (`time.perf_counter`)."""
        command = [*self._within, sys.executable, "-m", "qmpd", "serve", "--config", str(self.directory / "qmpd.toml")]
        with (self.directory / LOG).open("ab") as output:
            began = time.perf_counter()
            self.process = subprocess.Popen(
                command, env={**os.environ, **environ}, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )
        self.generation += 1
        return began

    def wait_answer(self) -> float:
        """The moment at which it first answered a request. Blocks. Raises DaemonFailed."""
        limit = time.monotonic() + ANSWER_LIMIT_S
        while not self._answers():
            if time.monotonic() > limit or self.process is None or self.process.poll() is not None:
                raise DaemonFailed(f"the daemon does not answer\n{self.log_tail()}")
            time.sleep(LOOK_S)
        return time.perf_counter()

    def end(self, number: signal.Signals) -> int:
        """Sends the daemon a signal and returns its status when it has ended. Blocks. One that does not obey is killed: DaemonFailed."""
        if self.process is None:
            return 0
        self.process.send_signal(number)
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, signal.SIGCONT)
        try:
            return self.process.wait(STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(STOP_LIMIT_S)
            raise DaemonFailed(f"the daemon did not end within {STOP_LIMIT_S:g} s of {number.name}\n{self.log_tail()}") from None

    def log_tail(self) -> str:
        """The end of what the daemon logged."""
        return (self.directory / LOG).read_bytes()[-LOG_TAIL_BYTES:].decode("utf-8", "replace")

    def qemus(self) -> list[Running]:
        """Every QEMU that runs from the directories, whoever knows of it. Blocks shortly."""
        return qemus_of(self.run_dir)

    def _answers(self) -> bool:
        with socket.socket(socket.AF_UNIX) as peer:
            peer.settimeout(ANSWER_LIMIT_S)
            try:
                peer.connect(self.socket)
                peer.sendall(_VERSION)
                return b" 200 " in peer.recv(256)
            except OSError:
                return False


def qemus_of(run_dir: Path) -> list[Running]:
    """The QEMUs whose command line names a file below this run directory. A gate that still waits to become QEMU is none."""
    mark = f"{run_dir}/m/".encode()
    found = []
    for entry in os.scandir("/proc"):
        if not entry.name.isdecimal():
            continue
        try:
            words = Path(entry.path, "cmdline").read_bytes().split(b"\0")
            if b"qemu-system" not in words[0] or not (named := [word for word in words if mark in word]):
                continue
            stat = Path(entry.path, "stat").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue
        name = named[0].partition(mark)[2].partition(b"/")[0].decode()
        found.append(Running(pid=int(entry.name), started=int(stat[stat.rindex(b")") + 2 :].split()[19]), machine=name))
    return found


def kill_qemus(run_dir: Path) -> int:
    """SIGKILL to every QEMU of this run directory, by its pid; how many there were, once all are gone. Blocks."""
    first = qemus_of(run_dir)
    limit = time.monotonic() + GONE_LIMIT_S
    while left := qemus_of(run_dir):
        for one in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(one.pid, signal.SIGKILL)
        if time.monotonic() > limit:
            raise DaemonFailed(f"processes that do not end: {[one.pid for one in left]}")
        time.sleep(0.02)
    return len(first)


@asynccontextmanager
async def restartable(
    cache: Path, settings: Mapping[str, object], *, prefix: str, state_dir: Path | None = None, within: Sequence[str] = ()
) -> AsyncIterator[Restartable]:
    """A daemon in a directory of its own, not started yet. Leaving the block ends it and all its QEMUs, and removes the directory."""
    directory = Path(tempfile.mkdtemp(prefix=prefix))
    daemon = Restartable(directory, cache, settings, state_dir, within)
    try:
        yield daemon
    finally:
        await asyncio.to_thread(_clear, daemon)


def _clear(daemon: Restartable) -> None:
    try:
        if daemon.process is not None and daemon.process.poll() is None:
            daemon.end(signal.SIGKILL)
    finally:
        kill_qemus(daemon.run_dir)
        shutil.rmtree(daemon.directory, ignore_errors=True)
