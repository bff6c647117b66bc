"""A daemon of the demo's own: private directories, a private socket, nothing of it outside of them."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from qmpd.errors import QmpdError
from qmpd_api.client import Client

#: The daemon lets go of its machines in well under a second; after this it is killed, and its machines are named.
STOP_LIMIT_S: Final = 20.0
LOG: Final = "qmpd.log"
SOCKET: Final = "qmpd.sock"
CONFIGURATION: Final = "qmpd.toml"
LOG_TAIL_BYTES: Final = 4096
#: Puts a listening socket where a daemon looks for one that was passed to it (sd_listen_fds(3)), then becomes the daemon.
HAND_OVER: Final = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1")
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


class DaemonFailed(Exception):
    """The daemon did not start; the message has the end of its log."""


@dataclass(kw_only=True)
class Daemon:
    """A running daemon, a client for it, and its directory. `kept`: both stay when the demo ends."""

    directory: Path
    process: subprocess.Popen[bytes]
    client: Client
    kept: bool = False

    async def replace(self) -> None:
        """SIGKILL, and another daemon in its place: it has been spawned when this returns. Connections of `client` are lost."""
        self.process.kill()
        await asyncio.to_thread(self.process.wait)
        path = self.directory / SOCKET
        path.unlink()
        self.process = _started(self.directory, path)


@asynccontextmanager
async def running(cache: Path, settings: Mapping[str, bool | str | Sequence[str]] | None = None) -> AsyncIterator[Daemon]:
    """A daemon that answers, with `settings` of its own; it ends, and its directory goes, when the block is left, unless it is kept.

    Raises:
        DaemonFailed: it ended before it answered, or did not answer in time.
    """
    directory = Path(tempfile.mkdtemp(prefix="qmpd-demo-"))
    path = directory / SOCKET
    _configure(directory, cache, settings or {})
    daemon = Daemon(directory=directory, process=_started(directory, path), client=Client(str(path)))
    try:
        async with daemon.client as client:
            await _answering(daemon, client)
            yield daemon
    finally:
        if not daemon.kept:
            await _end(daemon.process)
            shutil.rmtree(directory, ignore_errors=True)


async def _answering(daemon: Daemon, client: Client) -> None:
    try:
        await client.version()
    except QmpdError as error:
        raise DaemonFailed(f"the daemon did not start: {error.message}\n{_log_tail(daemon.directory)}") from error


def _configure(directory: Path, cache: Path, settings: Mapping[str, bool | str | Sequence[str]]) -> None:
    places = {
        "socket": directory / SOCKET,
        "state_dir": directory / "state",
        "run_dir": directory / "run",
        "cache_dir": cache,
        "pki_dir": directory / "pki",
    }
    values = {**{key: str(path) for key, path in places.items()}, **settings}
    lines = [f"{key} = {json.dumps(value)}\n" for key, value in values.items()]
    (directory / CONFIGURATION).write_text("".join(lines), encoding="utf-8")


def _started(directory: Path, path: Path) -> subprocess.Popen[bytes]:
    """The socket is bound before the daemon starts, so that the first request waits for the daemon, and nobody for the socket."""
    with socket.socket(socket.AF_UNIX) as listener, (directory / LOG).open("ab") as output:
        listener.bind(str(path))
        path.chmod(0o600)
        listener.listen()
        serve = ["-m", "qmpd", "serve", "--config", str(directory / CONFIGURATION)]
        return subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", HAND_OVER, str(listener.fileno()), *serve],
            pass_fds=(listener.fileno(),),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            # Ctrl-C is for the demo, which ends the machines first.
            start_new_session=True,
        )


def _log_tail(directory: Path) -> str:
    return (directory / LOG).read_bytes()[-LOG_TAIL_BYTES:].decode("utf-8", "replace")


async def _end(process: subprocess.Popen[bytes]) -> None:
    """Ask the daemon to end, and see that it does."""
    process.terminate()
    try:
        await asyncio.to_thread(process.wait, STOP_LIMIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        await asyncio.to_thread(process.wait)
