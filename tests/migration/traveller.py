"""A machine that moves between hosts, and everything that is checked of it: who runs it, what it printed, what it left behind."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Final

import msgspec

from qmpd import segments
from qmpd.errors import QmpdError
from qmpd.migration.qemu import SINCE_8_2
from qmpd.migrationviews import MigrationList
from qmpd.spec import MachineSpec
from qmpd.views import MachineView
from tests.guests.trace import Trace, check_trace
from tests.migration.hosts import Host, Hosts

#: Generous: hosts that run this are shared and slow, and only a hang may fail.
PATIENCE_S: Final = 180.0
LOOK_S: Final = 0.05
#: What a guest of ours prints first.
BANNER: Final = b"BM-OK "
CONSOLE: Final = "serial0"
DATABASE: Final = "qmpd.db"
#: A checkpoint takes milliseconds, and does not come at every copy.
COPIES: Final = 20


class Broken(Exception):
    """What must not be, in the words for a report."""


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """A line of a host's ledger, as it is in its database: read there, and not asked of its daemon."""

    id: str
    role: str
    machine: str
    phase: str
    reason: str = ""
    settled: bool = False


class Traveller:
    """One machine. `visits` are the pieces of its console's log at every host where it was, kept from being removed. `copied`: so are
    disks of it, when it moves."""

    def __init__(self, world: Hosts, spec: MachineSpec, *, copied: bool = False) -> None:
        self.world = world
        self._copied = copied
        self.spec = spec
        self.name = spec.name
        self.uuid = ""
        self._visits: list[tuple[str, dict[int, Path]]] = []
        self._kept = itertools.count()

    async def begin(self, host: Host) -> None:
        """Creates and starts it."""
        async with host.client() as client:
            self.uuid = (await client.create(self.spec, start=True)).uuid
        self.world.onlooker.mind(self.uuid)
        self.visit(host)

    def visit(self, host: Host) -> None:
        """Keeps what the machine prints at a host, whatever becomes of the files there. To be called whenever there may be new ones."""
        if not self._visits or self._visits[-1][0] != host.name:
            self._visits.append((host.name, {}))
        kept = self._visits[-1][1]
        for base, path in segments.pieces(str(host.own(self.name) / f"{CONSOLE}.log")):
            link = self.world.shared / f"{self.name}.{next(self._kept)}"
            try:
                os.link(path, link)
            except FileNotFoundError:
                continue
            if base in kept and kept[base].samefile(link):
                link.unlink()
            else:
                kept[base] = link

    def printed(self) -> bytes:
        """Everything it printed: what its last host has, and, where that begins in the middle, what those before it have."""
        found = b""
        for _, pieces in reversed(self._visits):
            found = b"".join(pieces[base].read_bytes() for base in sorted(pieces)) + found
            if found.lstrip(b"\0").startswith(BANNER):
                break
        return found.lstrip(b"\0")

    def size(self, host: Host) -> int:
        """How much of its console's output is in a host's files."""
        return sum(path.stat().st_size for _, path in segments.pieces(str(host.own(self.name) / f"{CONSOLE}.log")))

    async def grown(self, host: Host, count: int) -> None:
        """Returns when it has printed so many bytes more at a host. Raises Broken."""
        before = await asyncio.to_thread(self.size, host)
        await nothing(lambda: [f"{self.size(host) - before} bytes"] * (self.size(host) < before + count), f"no output at {host.name}")

    def trace(self) -> Trace:
        """Whether a counting guest lost, doubled or damaged a byte on its way."""
        return check_trace(self.printed())

    # Who has it.

    async def views(self) -> dict[str, MachineView]:
        """What each daemon that answers says of it, by host."""
        found: dict[str, MachineView] = {}
        for host in self.world.each:
            try:
                async with host.client() as client:
                    listed = (await client.machines()).machines
            except QmpdError:
                continue
            found.update((host.name, view) for view in listed if view.name == self.name)
        return found

    async def migrations(self, host: Host) -> MigrationList:
        """What a daemon says of its migrations."""
        async with host.client() as client:
            return await client.migrations(self.name)

    def lines(self, host: Host) -> list[Line]:
        """What a host's ledger has about it."""
        return [line for line in ledger(host.daemon.state_dir) if line.machine == self.name]

    def unsettled(self) -> list[str]:
        """What the ledgers say that is still to be done."""
        return [f"{host.name}: {line.phase} {line.reason}" for host in self.world.each for line in self.lines(host) if not line.settled]

    async def rest(self) -> None:
        """Returns when both ledgers are settled. Raises Broken."""
        await nothing(self.unsettled, "the journals are not settled")

    # What must never be, and what must be in the end.

    def twice(self) -> list[str]:
        """Each time at which two QEMUs ran it."""
        return [f"TWO COPIES: {overlap}" for overlap in self.world.onlooker.overlaps(self.uuid)]

    def left_at(self, host: Host) -> list[str]:
        """What there still is of it at a host that does not own it."""
        found = [f"{host.name}: QEMU {one.pid}" for one in host.qemus(self.name)]
        found += [f"{host.name}: {path}" for path in (host.own(self.name), host.running_dir(self.name)) if path.exists()]
        return found + [f"{host.name}: port {port}" for port in host.ports()]

    async def owner(self) -> tuple[Host, MachineView]:
        """The one host that has it. Raises Broken when none or several have."""
        views = await self.views()
        if len(views) != 1:
            raise Broken(f"{len(views)} hosts say that they have it: { {name: str(view.state) for name, view in views.items()} }")
        ((name, view),) = views.items()
        return next(host for host in self.world.each if host.name == name), view

    async def at_home(self) -> tuple[Host, MachineView]:
        """The owner, once everything is settled, and nothing is left anywhere else. Raises Broken."""
        await self.rest()
        await self.idle()
        host, view = await self.owner()
        for other in self.world.each:
            if other is not host:
                await nothing(partial(self.left_at, other), "something is left")
        kept = await self._servers(host) if view.pid is not None else 0
        await nothing(lambda: [str(port) for port in host.ports()[kept:]], "a port is left open")
        return host, view

    async def _servers(self, host: Host) -> int:
        """How many ports its QEMU may keep: the server of disks that were copied here, without a disk in it, as long as it cannot be ended
        (see `incoming.end_exports`)."""
        if not self._copied:
            return 0
        async with host.client() as client:
            commands = _items(await client.qmp(self.name, "query-commands"))
        return 0 if SINCE_8_2 in {command["name"] for command in commands} else 1

    async def untouched(self, host: Host) -> list[str]:
        """What a migration left in the QEMU of its owner: jobs, exports, objects, capabilities."""
        async with host.client() as client:
            jobs = await client.qmp(self.name, "query-block-jobs")
            exports = await client.qmp(self.name, "query-block-exports")
            objects = await client.qmp(self.name, "qom-list", {"path": "/objects"})
            switches = await client.qmp(self.name, "query-migrate-capabilities")
        found = [f"job {job}" for job in _items(jobs)] + [f"export {export}" for export in _items(exports)]
        found += [f"object {item['name']}" for item in _items(objects) if "migration" in str(item["name"]) or "tls" in str(item["name"])]
        return found + [f"capability {item['capability']}" for item in _items(switches) if item["state"]]

    async def idle(self) -> None:
        """Returns when no verb holds it anywhere. Raises Broken."""
        end = time.monotonic() + PATIENCE_S
        while busy := [f"{name}: {view.operation}" for name, view in (await self.views()).items() if view.operation is not None]:
            if time.monotonic() > end:
                raise Broken(f"an operation does not end: {busy}")
            await asyncio.sleep(LOOK_S)


async def nothing(found: Callable[[], list[str]], what: str) -> None:
    """Returns when nothing is found any more. Raises Broken with `what`, and with what there still is."""
    end = time.monotonic() + PATIENCE_S
    while still := await asyncio.to_thread(found):
        if time.monotonic() > end:
            raise Broken(f"{what}: {'; '.join(still)}")
        await asyncio.sleep(LOOK_S)


def ledger(state_dir: Path) -> list[Line]:
    """Every line of a ledger. The daemon has its database for itself, so what is read is a copy: one that is torn is made again."""
    for _ in range(COPIES):
        with tempfile.TemporaryDirectory(prefix="ql-") as directory:
            begun = _began(f"{state_dir}/{DATABASE}-wal")
            for suffix in ("", "-wal"):
                with contextlib.suppress(FileNotFoundError):
                    shutil.copy(f"{state_dir}/{DATABASE}{suffix}", directory)
            if _began(f"{directory}/{DATABASE}-wal") != begun:
                continue  # a checkpoint came between both: what it wrote is in neither copy
            try:
                with contextlib.closing(sqlite3.connect(f"{directory}/{DATABASE}")) as connection:
                    rows = connection.execute("SELECT entry FROM migration ORDER BY number").fetchall()
            except sqlite3.DatabaseError:
                continue
            return [msgspec.msgpack.decode(row[0], type=Line) for row in rows]
    raise Broken(f"the database of {state_dir} cannot be read")


def _began(log: str) -> bytes:
    """The head of a write-ahead log, which is another one each time it is begun anew (sqlite.org/fileformat2.html#walformat)."""
    try:
        with Path(log).open("rb") as file:
            return file.read(32)
    except FileNotFoundError:
        return b""


def _items(answer: object) -> list[dict[str, object]]:
    return [item for item in answer if isinstance(item, dict)] if isinstance(answer, list) else []
