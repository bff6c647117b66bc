"""What a machine takes along beside its memory, at its source: the logs of its serial ports, the firmware's variables, and its story.

Most of it goes while the guest runs. When the guest stands still only what is left is looked at, and when it is the other host's
the rest follows: whoever waits for the guest does not wait for its logs.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Final

from qmpd.errors import CannotMove, MigrationFailed, PeerError, PeerRefused
from qmpd.facts import MachinePaths
from qmpd.journal import Journal
from qmpd.machine import Machine
from qmpd.migration.consolelogs import LogSender
from qmpd.migration.fileitems import VariablesSender
from qmpd.migration.history import tell
from qmpd.migration.items import log_item
from qmpd.migration.parcels import VARIABLES, ItemStanding, Parcel
from qmpd.migration.protocol import TAIL_BYTES, ConsoleEnd, LogReceived, console_end
from qmpd.peers import PeerDaemon
from qmpd.spec import PflashFirmware
from qmpd.tasks import background

#: A log that could not be sent is tried again after this: nothing waits for it.
AGAIN_S: Final = 2.0
#: The guest stands still while the last of its variables are sent: half a megabyte, or nothing at all.
VARIABLES_LIMIT_S: Final = 5.0
#: The rest of the logs is a few bytes, or some megabytes where the peer could not be reached before. What has not gone by then is let go,
#: because a source holds memory and disks as long as it has not cleared up.
REST_LIMIT_S: Final = 120.0

_log = logging.getLogger(__name__)


def announced(machine: Machine, paths: MachinePaths) -> tuple[Parcel, ...]:
    """What a machine that runs will bring. Blocks.

    Logs come as well as they can: a host that is short of space takes the machine all the same.

    Raises:
        CannotMove: a file of it cannot be looked at.
    """
    parcels = [Parcel(item=log_item(port), size=console.end) for port, console in sorted(machine.consoles.items())]
    if has_variables(machine):
        try:
            size = Path(paths.variables).stat().st_size
        except OSError as error:
            raise CannotMove(f"the firmware's variables of machine {machine.name!r} are not there: {error}") from error
        parcels.append(Parcel(item=VARIABLES, size=size, allocated=size))
    return tuple(parcels)


def has_variables(machine: Machine) -> bool:
    """Whether the machine's firmware keeps variables in a file."""
    return isinstance(machine.definition.spec.firmware, PflashFirmware)


def bare_ends(machine: Machine) -> tuple[ConsoleEnd, ...]:
    """Where the logs of a machine ended, for who does not know what of them was sent: a daemon that was restarted, say."""
    return tuple(_bare_end(machine, port) for port in sorted(machine.consoles))


def _bare_end(machine: Machine, port: int) -> ConsoleEnd:
    end = machine.consoles[port].end
    return console_end(port, end, end)


class Belongings:
    """Those of one machine on its way by one migration."""

    def __init__(self, machine: Machine, paths: MachinePaths, migration: str, link: PeerDaemon, journal: Journal) -> None:
        self._machine = machine
        self._migration = migration
        self._link = link
        self._journal = journal
        self._logs = {port: LogSender(port, console, partial(self._send, port)) for port, console in sorted(machine.consoles.items())}
        self._variables = VariablesSender(link, migration, paths.variables) if has_variables(machine) else None
        self._ends: tuple[ConsoleEnd, ...] | None = None

    @asynccontextmanager
    async def following(self) -> AsyncIterator[None]:
        """Sends the logs as they grow, and the variables as they are, as long as the block lasts. What fails makes the rest longer, and
        nothing else."""
        async with background() as tasks:
            if self._variables is not None:
                tasks.start(self._ahead(self._variables), f"variables:{self._machine.name}")
            for port, log in self._logs.items():
                tasks.start(self._keep_up(log), f"log:{self._machine.name}:{port}")
            yield

    async def settle(self, *, runs: bool) -> None:
        """The guest stands still for good here: where its logs ended, and what of its variables has changed. `runs`: it goes on there.

        Raises:
            MigrationFailed: the variables of a guest that stays halted are not there.
        """
        self._ends = tuple(await asyncio.gather(*(self._end(port) for port in self._logs)))
        if self._variables is not None:
            await self._last(self._variables, runs=runs)

    async def _last(self, variables: VariablesSender, *, runs: bool) -> None:
        try:
            async with asyncio.timeout(VARIABLES_LIMIT_S):
                await variables.send()
        except (PeerError, TimeoutError, OSError) as error:
            if not runs:
                raise MigrationFailed(f"the firmware's variables are not at the destination: {str(error) or 'no answer'}") from error
            # QEMU has them in the guest's memory, and writes all of them when the guest goes on.
            _log.warning("firmware variables were not sent once more", extra={"machine": self._machine.name, "error": str(error)})

    async def _ahead(self, variables: VariablesSender) -> None:
        try:
            await variables.send()
        except (PeerError, OSError) as error:
            _log.info("firmware variables do not go ahead", extra={"machine": self._machine.name, "error": str(error)})

    @property
    def ends(self) -> tuple[ConsoleEnd, ...]:
        """What the new owner is told of the logs."""
        return bare_ends(self._machine) if self._ends is None else self._ends

    async def finish(self, received: tuple[LogReceived, ...]) -> None:
        """The machine is the other host's: sends what that `received` not of its logs, and tells what happened here.

        Raises:
            PeerError: it does not take it, or does not answer. May be repeated.
            OSError: a log cannot be read.
        """
        ends = {end.port: end.end for end in self.ends}
        for log in received:
            if log.port in ends:
                await self._logs[log.port].finish(log.received, ends[log.port])
                # An answer to this says that all of it outlives a crash of that host.
                await self._send(log.port, ends[log.port], b"")
        await tell(self._link, self._journal, self._migration, self._machine.name)

    async def _keep_up(self, log: LogSender) -> None:
        while True:
            try:
                await log.keep_up()
                break
            except PeerRefused as error:
                _log.warning("a log does not go ahead of its machine", extra={"machine": self._machine.name, "error": error.message})
                break
            except (PeerError, OSError) as error:
                _log.info("a log falls behind its machine", extra={"machine": self._machine.name, "error": str(error)})
            await asyncio.sleep(AGAIN_S)

    async def _end(self, port: int) -> ConsoleEnd:
        try:
            return await self._logs[port].tail(TAIL_BYTES)
        except OSError as error:
            _log.warning("the end of a log cannot be read", extra={"machine": self._machine.name, "error": str(error)})
            return _bare_end(self._machine, port)

    async def _send(self, port: int, offset: int, data: bytes) -> ItemStanding:
        return await self._link.put_item(self._migration, log_item(port), offset, data)
