"""What a migration needs of a QEMU: to be asked, past a blocked main loop too, and to be heard at once.

`qmpd.monitor.Monitor` is one as long as its connection lasts, `qmpd.session.Session` as long as the process lives.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Final, Protocol

from qmpd.backlog import Hearer
from qmpd.errors import QemuDied, QemuRefused, QemuSilent

#: Everything that is made in a QEMU for a migration is called so, and what is called so may be removed by whoever tidies up.
PREFIX: Final = "qmpd-migration"
#: The connection that was handed to a QEMU under that name, as `migrate` and `migrate-incoming` take it.
HANDED: Final = f"fd:{PREFIX}"
#: A QEMU in trouble is given this long before it is asked past its main loop.
IMPATIENT_S: Final = 3.0
#: What there is to break may have gone when it is to be broken, and is looked for again so often.
YANKS: Final = 3


#: A command since QEMU 8.2.
SINCE_8_2: Final = "block-job-change"


class Qemu(Protocol):
    """A QEMU that answers its monitor, or may answer again."""

    @property
    def closed(self) -> str | None:
        """Why it will never answer again, or None."""

    async def execute(self, command: str, arguments: Mapping[str, object] | None = None, *, deadline_s: float | None = None) -> object:
        """As `Monitor.execute`; MonitorUnavailable while there is no connection."""

    async def execute_oob(self, command: str, arguments: Mapping[str, object] | None = None, *, deadline_s: float = ...) -> object:
        """As `Monitor.execute_oob`."""

    async def hand(self, name: str, line: socket.socket) -> None:
        """As `Monitor.hand`."""

    def hearing(self, take: Hearer) -> AbstractContextManager[None]:
        """Calls `take` on the loop for each event as it arrives. `EventsLost` means: ask again."""


async def ask_map(qemu: Qemu, command: str, arguments: Mapping[str, object] | None = None) -> dict[str, object]:
    """A query whose answer is a map."""
    answer = await qemu.execute(command, arguments)
    if not isinstance(answer, dict):
        raise QemuDied(f"QEMU's answer to {command} is not a map")
    return answer


async def ask_list(qemu: Qemu, command: str, arguments: Mapping[str, object] | None = None) -> list[dict[str, object]]:
    """A query whose answer is a list of maps."""
    answer = await qemu.execute(command, arguments)
    if not isinstance(answer, list):
        raise QemuDied(f"QEMU's answer to {command} is not a list")
    return [item for item in answer if isinstance(item, dict)]


async def has_command(qemu: Qemu, command: str) -> bool:
    """Whether the QEMU that runs, whose file may have been replaced since, has a command."""
    return command in {str(item.get("name")) for item in await ask_list(qemu, "query-commands")}


async def run_state(qemu: Qemu) -> str:
    """QEMU's word for the state of the guest (`query-status`)."""
    return str((await ask_map(qemu, "query-status")).get("status"))


async def yank(qemu: Qemu, *, migration: bool = False) -> bool:
    """Breaks the connections of all copies of disks and, if asked, of the migration, whatever QEMU's main loop waits for.

    Returns whether there was one to break.
    """
    for _ in range(YANKS):
        answer = await qemu.execute_oob("query-yank")
        instances = [found for found in answer if _is_meant(found, migration=migration)] if isinstance(answer, list) else []
        if not instances:
            return False
        try:
            await qemu.execute_oob("yank", {"instances": instances})
        except QemuRefused:  # one of them has ended since, and then none is broken
            continue
        return True
    return False


def _is_meant(instance: object, *, migration: bool) -> bool:
    match instance:
        case {"type": "migration"}:
            return migration
        case {"type": "block-node", "node-name": str(name)}:
            return name.startswith(PREFIX)
    return False


async def execute_or_yank(qemu: Qemu, command: str, arguments: Mapping[str, object]) -> None:
    """Runs a command that may wait for the other end of a copy, but not for as long as a dead one would keep all of QEMU waiting.

    Raises:
        QemuSilent: it took too long; the copies' connections were broken, and the command has failed or will.
        QemuRefused: QEMU could not do it.
    """
    try:
        await qemu.execute(command, arguments, deadline_s=IMPATIENT_S)
    except QemuSilent:
        await yank(qemu)
        raise
