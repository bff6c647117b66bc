"""The world of a nemesis run: the daemon, its machines, what may be done when, and what has been broken on purpose."""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Final

from qmpd.errors import QmpdError
from qmpd.spec import MachineSpec
from qmpd_api.client import Client
from qmpd_api.connection import DaemonSilent, DaemonUnavailable
from scripts.lib.nemesis_history import REFUSED, UNKNOWN, Entry, History
from scripts.lib.nemesis_watch import Watcher
from scripts.lib.restartable import Restartable
from tests.guests.build import Guest
from tests.machines import spec_of

#: Longer than any verb may take with a QEMU that is stopped for a few seconds: the daemon's longest ladder is 30 s + 10 s.
OPERATION_LIMIT_S: Final = 90.0
#: The state file system of a run that may fill it.
STATE_MIB: Final = 96
#: What runs on the machines in turn: one guest never falls silent, and needs a processor for that; the others print a banner and halt.
GUESTS: Final = ("x86_64-microvm", "x86_64-q35-quiet", *("x86_64-microvm-quiet",) * 4)


class World:
    """What operations and faults share."""

    def __init__(self, daemon: Restartable, history: History, watcher: Watcher, guests: dict[str, Guest], machines: int) -> None:
        self.daemon = daemon
        self.history = history
        self.watcher = watcher
        self.names = tuple(f"n{number:02}" for number in range(machines))
        self.gate = Gate()
        self.files = daemon.directory
        #: Machines whose files were damaged on purpose: such a QEMU may be out of reach, and has to be ended by hand.
        self.damaged: set[str] = set()
        #: The disk was full: QEMU may have lost what its guest printed meanwhile, and the daemon events.
        self.disk_was_full = False
        #: Times from which on, and until which, the daemon could not be expected to answer at once.
        self.disturbed: list[tuple[float, float | None]] = []
        #: What was read of each console, by the UUID of its machine.
        self.consoles: dict[str, bytearray] = {}
        self._guests = guests

    def guest(self, name: str) -> Guest:
        """The guest of a machine; it never changes."""
        return self._guests[GUESTS[self.names.index(name) % len(GUESTS)]]

    def spec(self, name: str, mark: str, chance: random.Random) -> MachineSpec:
        """A definition of a machine that carries this mark."""
        labels = {"mark": mark, "group": chance.choice("abc")}
        return spec_of(self.guest(name), name, labels=labels, title=f"written as {mark}")

    @asynccontextmanager
    async def operation(self, who: str, kind: str, machine: str = "", **facts: object) -> AsyncIterator[tuple[Client, Entry]]:
        """One operation of a client with a connection of its own, so that nothing is sent twice. Its outcome is written down.

        What the daemon answers is an outcome; an answer that says that the daemon made a mistake is a broken promise.
        """
        async with self.gate.passed():
            entry = self.history.begin(who, kind, machine, **facts)
            outcome = UNKNOWN
            try:
                async with Client(self.daemon.socket) as client, asyncio.timeout(OPERATION_LIMIT_S):
                    yield client, entry
                outcome = "ok"
            except DaemonUnavailable as error:
                outcome = REFUSED if error.message.startswith("cannot connect") else UNKNOWN
            except (DaemonSilent, TimeoutError):
                entry.detail += " no answer in time"
            except QmpdError as error:
                outcome = str(error.details.get("code", error.code))
                entry.detail += f" {error.message[:160]}"
            finally:
                self.history.end(entry, outcome)
            if outcome == "internal":
                self.history.broken("errors", f"{kind} was answered with an internal error:{entry.detail}", machine)

    @contextmanager
    def fault(self, kind: str, machine: str = "", **facts: object) -> Iterator[Entry]:
        """A fault, written down like an operation."""
        entry = self.history.begin("nemesis", kind, machine, **facts)
        try:
            yield entry
        finally:
            self.history.end(entry)

    @contextmanager
    def disturbance(self) -> Iterator[None]:
        """A time in which the daemon cannot be expected to answer."""
        index = len(self.disturbed)
        self.disturbed.append((self.history.now(), None))
        try:
            yield
        finally:
            self.disturbed[index] = (self.disturbed[index][0], self.history.now())

    def was_disturbed(self, begin: float) -> bool:
        """Whether there was such a time between a moment and now."""
        return any(until is None or until >= begin for _, until in self.disturbed)


class Gate:
    """Operations pass one by one; a rest closes it, and waits until all that passed are done."""

    def __init__(self) -> None:
        self._open = asyncio.Event()
        self._open.set()
        self._inside = 0
        self._empty = asyncio.Event()
        self._empty.set()

    @asynccontextmanager
    async def passed(self) -> AsyncIterator[None]:
        """Waits for the gate to be open, and holds off the next rest."""
        await self._open.wait()
        self._inside += 1
        self._empty.clear()
        try:
            yield
        finally:
            self._inside -= 1
            if not self._inside:
                self._empty.set()

    @asynccontextmanager
    async def closed(self) -> AsyncIterator[None]:
        """Nobody is inside, and nobody comes in."""
        self._open.clear()
        try:
            await self._empty.wait()
            yield
        finally:
            self._open.set()


@contextmanager
def small_file_system(directory: Path) -> Iterator[Path | None]:
    """A file system that can be filled without harm to anybody else, mounted at `directory`; None for a user who may not mount one."""
    directory.mkdir()
    if os.geteuid() != 0:
        yield None
        return
    command = ["mount", "-t", "tmpfs", "-o", f"size={STATE_MIB}m,mode=0700", "qmpd-nemesis", str(directory)]
    if subprocess.run(command, check=False, capture_output=True).returncode != 0:
        yield None
        return
    try:
        yield directory
    finally:
        subprocess.run(["umount", "-l", str(directory)], check=False)
