"""The list of machines, kept up to date on the screen or line by line."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from typing import TYPE_CHECKING, Final

import click

from qmpctl.invocation import as_json
from qmpctl.tables import ago, drawn, plain, print_json, size
from qmpd.errors import QmpdError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from qmpd.lifecycle import State
    from qmpd.views import MachineList, MachineView
    from qmpd_api.client import Client

#: What no event announces (the last console line, ages) is at most this old on the screen.
LOOK_EVERY_S: Final = 2.0
#: Ten pictures a second are as many as anybody reads; events between them are drawn together.
PICTURE_EVERY_S: Final = 0.1
HEADERS: Final = ("NAME", "STATE", "BOARD", "ACCEL", "CPUS", "MEMORY", "SINCE", "CONSOLE")


def row(machine: MachineView) -> tuple[str, ...]:
    """A machine as a row of the table."""
    return (
        machine.name,
        str(machine.state),
        machine.board,
        machine.accel or "-",
        str(machine.cpus),
        size(machine.memory_mib),
        ago(machine.since),
        machine.console_line,
    )


async def watch_list(client: Client, labels: Mapping[str, str], state: State | None) -> None:
    """Show the machines until interrupted: redrawn on a terminal, as JSON lines, or as one line for each change of state."""
    async with aclosing(_listings(client, labels, state)) as listings:
        if as_json():
            await _print_documents(listings)
        elif sys.stdout.isatty():
            await _draw(listings)
        else:
            await _print_changes(listings)


async def _draw(listings: AsyncIterator[MachineList]) -> None:
    from rich.live import Live

    with Live(auto_refresh=False) as screen:
        async for listing in listings:
            screen.update(drawn(HEADERS, map(row, listing.machines)), refresh=True)


async def _print_documents(listings: AsyncIterator[MachineList]) -> None:
    shown: object = None
    async for listing in listings:
        if listing.machines != shown:
            print_json(listing, one_line=True)
            shown = listing.machines


async def _print_changes(listings: AsyncIterator[MachineList]) -> None:
    known: dict[str, MachineView] | None = None
    async for listing in listings:
        current = {machine.name: machine for machine in listing.machines}
        if known is None:
            lines = plain(HEADERS, map(row, listing.machines))
        else:
            changed = [name for name, machine in current.items() if name not in known or known[name].state != machine.state]
            lines = [f"{name} {current[name].state}" for name in changed] + [f"{name} gone" for name in known if name not in current]
        for line in lines:
            click.echo(line)
        known = current


async def _listings(client: Client, labels: Mapping[str, str], state: State | None) -> AsyncGenerator[MachineList, None]:
    """The list now, and again when something happened or enough time went by; waits for a daemon that restarts."""
    stirred = asyncio.Event()

    async def listen(since: int) -> None:
        try:
            async for _ in client.events(since):
                stirred.set()
        finally:
            stirred.set()

    latest = await client.machines(labels, state)
    yield latest
    listener = asyncio.create_task(listen(latest.event), name="qmpctl list: events")
    try:
        while not listener.done():
            await asyncio.sleep(PICTURE_EVERY_S)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_EVERY_S):
                    await stirred.wait()
            stirred.clear()
            try:
                latest = await client.machines(labels, state)
            except QmpdError as error:
                # The listener waits for a daemon that restarts, and ends when it gives up.
                if error.code != "daemon_unavailable":
                    raise
                continue
            yield latest
        listener.result()
    finally:
        listener.cancel()
