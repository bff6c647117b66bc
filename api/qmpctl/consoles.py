"""Commands on serial consoles."""

from __future__ import annotations

import re
import sys
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import TYPE_CHECKING, Final

import click

from qmpctl.attachment import SCROLLBACK, Feed, attach
from qmpctl.completion import machine_names
from qmpctl.exits import Exit
from qmpctl.invocation import Verb, as_json, perform
from qmpctl.tables import print_json, printable
from qmpctl.terminal import control_key

if TYPE_CHECKING:
    from qmpd.views import ExpectRequest, ExpectResult
    from qmpd_api.client import Client, LogSlice

#: One request's worth of log.
CHUNK: Final = 256 * 1024
ESCAPES: Final = {"n": "\n", "r": "\r", "t": "\t", "e": "\x1b", "0": "\0", "\\": "\\"}
_ESCAPE: Final = re.compile(r"\\(x[0-9a-fA-F]{2}|.)", re.DOTALL)

port_option = click.option("--port", type=click.IntRange(0, 3), metavar="N", help="Which serial port (default: the board's console).")


class KeyType(click.ParamType[bytes | None]):
    """A key: `^]`, a character, or `none`."""

    name = "key"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> bytes | None:
        """The byte of the key."""
        if value is None or isinstance(value, bytes):
            return value
        try:
            return control_key(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


@click.command("console", cls=Verb)
@click.argument("name", shell_complete=machine_names)
@port_option
@click.option("--escape", type=KeyType(), default="^]", show_default=True, metavar="KEY", help="The key that detaches; none: no key does.")
@click.option(
    "--scrollback", type=click.IntRange(min=0), default=SCROLLBACK, show_default=True, metavar="BYTES", help="What to show first."
)
def console_command(name: str, port: int | None, escape: bytes | None, scrollback: int) -> None:
    """Use a serial console, until Ctrl-] is pressed or the machine ends.

    With a pipe or a file as stdin all of it is typed, and output goes on until the machine ends.
    """
    if as_json():
        raise click.UsageError("a console is a stream of bytes: use log --json or expect --json")
    perform(lambda client: attach(client, name, port, escape=escape, scrollback=scrollback))


@click.command("log", cls=Verb)
@click.argument("name", shell_complete=machine_names)
@port_option
@click.option("-f", "--follow", is_flag=True, help="Go on until the machine ends.")
@click.option("--tail", type=click.IntRange(min=0), metavar="N", help="Only the last N lines.")
@click.option("--since", type=click.IntRange(min=0), metavar="OFFSET", help="Only from this offset on.")
def log_command(name: str, port: int | None, follow: bool, tail: int | None, since: int | None) -> None:
    """Print what a console printed, byte for byte; with --json as lines of offset and text."""
    if tail is not None and since is not None:
        raise click.UsageError("--tail and --since both say where to begin: give one")
    perform(lambda client: _log(client, name, port, tail, since, follow=follow))


async def _log(client: Client, name: str, port: int | None, tail: int | None, since: int | None, *, follow: bool) -> None:
    begin = since if tail is None else await _tail(client, name, port, tail)
    async for piece in _pieces(client, name, port, begin):
        _print_log(piece.offset, piece.data)
        begin = piece.offset + len(piece.data)
    if not follow:
        return
    async with aclosing(Feed(client, name, port, since=begin or 0).frames()) as frames:
        async for frame in frames:
            if frame.kind == "output":
                _print_log(frame.offset, frame.data)


async def _pieces(client: Client, name: str, port: int | None, since: int | None) -> AsyncIterator[LogSlice]:
    """The log as it is when this begins: a guest that prints faster than we read does not keep us here."""
    end: int | None = None
    while True:
        piece = await client.log(name, port=port, since=since, limit=CHUNK)
        end = piece.end if end is None else end
        if not piece.data:
            return
        yield piece
        since = piece.offset + len(piece.data)
        if since >= end:
            return


async def _tail(client: Client, name: str, port: int | None, lines: int) -> int:
    """The offset at which the last `lines` lines begin."""
    bounds = await client.log(name, port=port, limit=1)
    reach = CHUNK
    while True:
        begin = max(bounds.start, bounds.end - reach)
        data = b"".join([piece.data async for piece in _pieces(client, name, port, begin)])
        breaks = [match.end() for match in re.finditer(b"\n", data)]
        if breaks and breaks[-1] == len(data):
            breaks.pop()
        if lines == 0:
            return begin + len(data)
        if len(breaks) >= lines:
            return begin + breaks[-lines]
        if begin == bounds.start:
            return begin
        reach *= 4


def _print_log(offset: int, data: bytes) -> None:
    if as_json():
        print_json({"offset": offset, "text": data.decode(errors="replace")}, one_line=True)
        return
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


@click.command("expect", cls=Verb)
@click.argument("name", shell_complete=machine_names)
@click.argument("pattern", metavar="REGEX")
@click.option("--send", metavar="TEXT", help=r"Type this first; \n \r \t \e \\ and \xHH are understood.")
@click.option("--timeout", type=click.FloatRange(0, 3600), default=30.0, show_default=True, metavar="S", help="How long to wait.")
@click.option("--from-start", is_flag=True, help="Look at what was printed before, too.")
@port_option
def expect_command(name: str, pattern: str, send: str | None, timeout: float, from_start: bool, port: int | None) -> int:
    """Wait until a console prints something that matches. Prints the match; exits with 1 if there was none in time."""
    request = expectation(pattern, send=send, timeout_s=timeout, from_start=from_start, port=port)
    return show_match(perform(lambda client: client.expect(name, request)), timeout)


def expectation(pattern: str, *, send: str | None, timeout_s: float, from_start: bool, port: int | None) -> ExpectRequest:
    """The request for a wait; a usage error if it cannot be one."""
    import msgspec

    from qmpd.views import ExpectRequest

    typed = None if send is None else unescaped(send)
    fields = {"pattern": pattern, "send": typed, "timeout_s": timeout_s, "from_start": from_start, "port": port}
    try:
        return msgspec.convert(fields, ExpectRequest)
    except msgspec.ValidationError as error:
        raise click.UsageError(str(error)) from error


def show_match(result: ExpectResult, timeout_s: float) -> int:
    """Print what was found, or on stderr what the console ends with; returns the exit code."""
    if as_json():
        print_json(result)
    elif result.matched:
        click.echo(printable(result.text))
    else:
        why = "the machine ended before" if result.reason == "ended" else f"no match within {timeout_s:g} s"
        click.echo(f"qmpctl: {why}; the console ends with:", err=True)
        for line in result.tail.splitlines():
            click.echo(f"  {printable(line)}", err=True)
    return Exit.OK if result.matched else Exit.NO


def unescaped(text: str) -> str:
    """Text with `\\n`, `\\r`, `\\t`, `\\e`, `\\0`, `\\\\` and `\\xHH` replaced; other backslashes stay."""

    def replaced(match: re.Match[str]) -> str:
        word = match[1]
        return chr(int(word[1:], 16)) if len(word) == 3 else ESCAPES.get(word, match[0])

    return _ESCAPE.sub(replaced, text)
