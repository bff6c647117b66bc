"""A guest's serial console on the user's terminal or pipes, across restarts of the daemon."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncGenerator
from contextlib import aclosing
from enum import StrEnum
from typing import TYPE_CHECKING, Final

import click

from qmpctl import terminal
from qmpctl.tables import printable
from qmpd.errors import QmpdError

if TYPE_CHECKING:
    from qmpd_api.client import Client
    from qmpd_api.streams_client import ConsoleFrame, ConsoleStream

#: Pacing of new attempts after the daemon went away.
RECONNECT_EVERY_S: Final = 0.25
#: A restart or an upgrade of the daemon takes seconds; after this it is not coming back by itself.
RECONNECT_LIMIT_S: Final = 60.0
#: A screenful or two of what was printed before: 80 columns, 50 lines, four bytes each for colours.
SCROLLBACK: Final = 16 * 1024
#: Errors after which another connection is worth a try: the daemon restarts; the guest did not take what was typed.
_PASSING: Final = frozenset({"daemon_unavailable", "daemon_silent", "too_many_requests"})
STDIN: Final = 0
STDOUT: Final = 1


class Ending(StrEnum):
    """Why a console was left."""

    DETACHED = "detached"
    ENDED = "ended"


class Feed:
    """A console over as many connections as it takes: its output from an offset on, and a way to type."""

    def __init__(self, client: Client, name: str, port: int | None, *, since: int | None = None, scrollback: int | None = None) -> None:
        self._client = client
        self._name = name
        self._port = port
        self._offset = since
        self._scrollback = scrollback
        self._console: ConsoleStream | None = None
        self._connected = asyncio.Event()

    async def frames(self) -> AsyncGenerator[ConsoleFrame, None]:
        """What the daemon says about the console, until the machine ends. Raises DaemonUnavailable when it stays away too long."""
        clock = asyncio.get_running_loop().time
        ever = False
        lost_at: float | None = None
        while True:
            try:
                async with aclosing(self._connection()) as frames:
                    async for frame in frames:
                        if lost_at is not None:
                            hint("connected again")
                        ever, lost_at = True, None
                        yield frame
                        if frame.kind == "ended":
                            return
            except QmpdError as error:
                if error.code not in _PASSING or not ever or (lost_at is not None and clock() - lost_at > RECONNECT_LIMIT_S):
                    raise
                if lost_at is None:
                    lost_at = clock()
                    hint(f"{printable(error.message)}; connecting again")
            finally:
                self._connected.clear()
            await asyncio.sleep(RECONNECT_EVERY_S)

    async def _connection(self) -> AsyncGenerator[ConsoleFrame, None]:
        scrollback = self._scrollback if self._offset is None else None
        async with self._client.console(self._name, port=self._port, since=self._offset, scrollback=scrollback) as console:
            self._console = console
            self._connected.set()
            async for frame in console:
                if frame.kind in {"output", "dropped"}:
                    self._offset = frame.offset + len(frame.data)
                yield frame

    async def type(self, data: bytes) -> None:
        """Type `data`, on the next connection if this one is gone."""
        while True:
            await self._connected.wait()
            try:
                if self._console is not None:
                    await self._console.write(data)
            except QmpdError as error:
                if error.code not in _PASSING:
                    raise
                self._connected.clear()
            else:
                return


async def attach(
    client: Client, name: str, port: int | None, *, escape: bytes | None, since: int | None = None, scrollback: int | None = None
) -> Ending:
    """Show the console on stdout and type stdin into it, until the escape key is pressed or the machine ends.

    On a terminal every key but `escape` goes to the guest; it is put back as it was however this ends. Where stdin is no terminal
    all of its bytes are typed, and its end does not end the attachment.
    """
    await client.machine(name)  # before the terminal is touched: most mistakes are misspelt names
    sys.stdout.flush()
    feed = Feed(client, name, port, since=since, scrollback=scrollback)
    with terminal.raw(STDIN) as is_terminal:
        detaching = escape if is_terminal else None
        hint(f"console of {name}" + (f", {terminal.key_name(detaching)} detaches" if detaching else ""))
        try:
            ending = await _exchange(feed, detaching)
        finally:
            if os.isatty(STDOUT):
                os.write(STDOUT, terminal.RESET)
        hint(f"detached from {name}, which goes on" if ending is Ending.DETACHED else f"{name} has ended")
        return ending


def hint(text: str) -> None:
    """A remark between the guest's lines, for people only."""
    if sys.stderr.isatty():
        click.echo(f"\n[qmpctl: {text}]", err=True)


async def _exchange(feed: Feed, escape: bytes | None) -> Ending:
    showing = asyncio.create_task(_show(feed), name="qmpctl console: output")
    typing = asyncio.create_task(_type(feed, escape), name="qmpctl console: input")
    try:
        await asyncio.wait({showing, typing}, return_when=asyncio.FIRST_COMPLETED)
        if typing.done() and typing.result():
            return Ending.DETACHED
        await showing
        return Ending.ENDED
    finally:
        showing.cancel()
        typing.cancel()
        await asyncio.gather(showing, typing, return_exceptions=True)


async def _show(feed: Feed) -> None:
    shown: int | None = None
    async with aclosing(feed.frames()) as frames:
        async for frame in frames:
            if frame.kind == "output":
                await terminal.write(STDOUT, frame.data)
                shown = frame.offset + len(frame.data)
            elif frame.kind == "dropped":
                hint(f"{frame.offset - shown} bytes are no longer kept" if shown is not None else "older output is no longer kept")
                shown = frame.offset


async def _type(feed: Feed, escape: bytes | None) -> bool:
    """True when the escape key was pressed, False at the end of stdin."""
    while data := await terminal.read(STDIN):
        typed, pressed, _ = data.partition(escape) if escape else (data, b"", b"")
        if typed:
            await feed.type(typed)
        if pressed:
            return True
    return False
