"""Hosts: daemons that know each other as peers, each in a network namespace of its own, and what can happen to them.

Everything is real: the daemon is the one that is installed, its certificate is one of `qmpd pki`, its QEMUs are those on PATH. What a
test does to a host it does from outside: signals to processes, a line that is cut. When the block is left nothing of it remains.
"""

from __future__ import annotations

import asyncio
import os
import signal
import tempfile
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Final

from qmpd.failpoint import VARIABLE
from qmpd.pki.directory import Pki
from qmpd_api.client import Client
from scripts.lib.restartable import Restartable, Running, restartable
from tests.conftest import CACHE, ROOT
from tests.migration.byhand import hosted
from tests.migration.emulators import emulators
from tests.migration.network import Network, Station, network
from tests.migration.onlooker import Onlooker, onlooking

PORT: Final = 8443
#: So many machines at a time come to a host.
PORTS: Final = "49152-49160"
#: Most of what the start of a daemon costs is compiling what it imports.
BYTECODE: Final = ROOT / ".cache" / "bytecode"
#: A signal is obeyed at once; on a busy host a little later.
STOPPED_LIMIT_S: Final = 60.0
LOOK_S: Final = 0.005


class Host:
    """A daemon, its machines, and its place in the network."""

    def __init__(self, name: str, station: Station, daemon: Restartable, certificates: Path) -> None:
        self.name = name
        self.certificates = certificates
        self.station = station
        self.daemon = daemon
        self._failpoints = ""

    @property
    def url(self) -> str:
        """Where peers find its API."""
        return f"https://{self.station.address}:{PORT}"

    async def start(self, failpoints: str = "") -> None:
        """Starts the daemon, with failpoints if they are named, and returns when it answers."""
        quick = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(BYTECODE)}
        self._failpoints = failpoints
        self.daemon.start(**{VARIABLE: failpoints}, **quick)
        await asyncio.to_thread(self.daemon.wait_answer)
        # It answers at its socket a moment before it listens to its peers.
        end = time.monotonic() + STOPPED_LIMIT_S
        while self.up and PORT not in await asyncio.to_thread(self._listening) and time.monotonic() < end:
            await asyncio.sleep(LOOK_S)

    async def kill(self) -> None:
        """The daemon is gone; its machines go on."""
        await asyncio.to_thread(self.daemon.end, signal.SIGKILL)

    async def stop(self) -> int:
        """Asks the daemon to end; its status."""
        return await asyncio.to_thread(self.daemon.end, signal.SIGTERM)

    async def restart(self, failpoints: str = "") -> None:
        """Another daemon in the place of this one, which is killed if it still runs."""
        await self.kill()
        await self.start(failpoints)

    async def armed(self, failpoints: str) -> None:
        """A daemon with these failpoints and no others: the one that runs, or another in its place."""
        if failpoints or self._failpoints or not self.up:
            await self.restart(failpoints)

    def client(self) -> Client:
        """To be used with `async with`."""
        return Client(self.daemon.socket)

    @property
    def up(self) -> bool:
        """Whether there is a daemon, and it does not stand still."""
        process = self.daemon.process
        return process is not None and process.poll() is None and not self.stands_still

    @property
    def stands_still(self) -> bool:
        """Whether the daemon is stopped: by SIGSTOP, or by a failpoint."""
        process = self.daemon.process
        return process is not None and process.poll() is None and _state(process.pid) == "T"

    def freeze(self) -> None:
        """The daemon stands still."""
        os.kill(self.daemon.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """The daemon goes on, if it is there and stood still."""
        if self.stands_still:
            os.kill(self.daemon.pid, signal.SIGCONT)

    def qemus(self, machine: str) -> list[Running]:
        """The QEMUs of a machine that run from this host's directories, whoever knows of them."""
        return [one for one in self.daemon.qemus() if one.machine == machine]

    def kill_qemu(self, machine: str) -> int:
        """SIGKILL to a machine's QEMUs; how many there were, once they are gone. Blocks."""
        found = self.qemus(machine)
        for one in found:
            with suppress(ProcessLookupError):  # it ended by itself just now
                os.kill(one.pid, signal.SIGKILL)
        end = time.monotonic() + STOPPED_LIMIT_S
        while set(self.qemus(machine)) & set(found) and time.monotonic() < end:
            time.sleep(LOOK_S)
        return len(found)

    def own(self, machine: str) -> Path:
        """The directory of a machine's disks and logs."""
        return self.daemon.state_dir / "machines" / machine

    def running_dir(self, machine: str) -> Path:
        """The directory of a machine's sockets and launch record."""
        return self.daemon.run_dir / "m" / machine

    def log(self) -> str:
        """What the daemon said, in all its lives."""
        return (self.daemon.directory / "qmpd.log").read_text(encoding="utf-8", errors="replace")

    def ports(self) -> list[int]:
        """The TCP ports at which somebody listens here, the API's left out."""
        return sorted(self._listening() - {PORT})

    def _listening(self) -> set[int]:
        lines = self.station.inside(lambda: Path("/proc/thread-self/net/tcp").read_text().splitlines()[1:])
        return {int(field[1].rpartition(":")[2], 16) for field in (line.split() for line in lines) if field[3] == "0A"}


class Hosts:
    """All of them, what joins them, who looks on, and a directory that all of them see under the same name."""

    def __init__(self, each: tuple[Host, ...], joined: Network, onlooker: Onlooker, shared: Path) -> None:
        self.each = each
        self.network = joined
        self.onlooker = onlooker
        self.shared = shared

    def __getitem__(self, number: int) -> Host:
        return self.each[number]

    def other(self, host: Host) -> Host:
        """Of two, the one that this one is not."""
        return next(one for one in self.each if one is not host)

    async def start(self) -> None:
        """Starts every daemon."""
        async with asyncio.TaskGroup() as group:
            for host in self.each:
                group.create_task(host.start(), name=f"start:{host.name}")


async def stopped(*hosts: Host) -> Host | None:
    """The first of these hosts whose daemon stands still; None when none has by the limit."""
    end = time.monotonic() + STOPPED_LIMIT_S
    while time.monotonic() < end:
        for host in hosts:
            if host.stands_still:
                return host
        await asyncio.sleep(LOOK_S)
    return None


@asynccontextmanager
async def hosts(count: int = 2, settings: Mapping[str, object] | None = None) -> AsyncIterator[Hosts]:
    """So many hosts, not started yet, that know each other as `host0`, `host1`, ... Raises NoNetworks."""
    async with AsyncExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="qh-", ignore_cleanup_errors=True)))
        joined = stack.enter_context(network(count))
        joined.belongs(directory)
        onlooker = stack.enter_context(onlooking())
        authority = Pki(directory / "authority")
        authority.init("testers")
        made = []
        for station in joined.stations:
            name = _name(station)
            hosted(authority, directory / name, name, station.address)
            own = {"pki_dir": str(directory / name), **_network_settings(station, joined), **(settings or {})}
            daemon = await stack.enter_async_context(restartable(CACHE, own, prefix=f"qh{station.number}-", within=station.within))
            joined.belongs(daemon.directory)
            made.append(Host(name, station, daemon, directory / name))
        shared = directory / "shared"
        shared.mkdir()
        yield Hosts(tuple(made), joined, onlooker, shared)


def _network_settings(station: Station, joined: Network) -> dict[str, object]:
    peers = [{"name": _name(other), "url": f"https://{other.address}:{PORT}"} for other in joined.stations if other is not station]
    return {
        "listen": [f"{station.address}:{PORT}"],
        "migration_ports": PORTS,
        "peers": peers,
        "emulators": [str(emulators().directory)],
    }


def _name(station: Station) -> str:
    return f"host{station.number}"


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""
