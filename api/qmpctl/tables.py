"""Output for people and for programs: tables, lists of facts, JSON; and nothing a guest printed reaches the terminal unescaped."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

import click

if TYPE_CHECKING:
    from rich.table import Table

#: What each word is coloured like wherever it stands in a table.
STYLES: Final = {
    "running": "green",
    "paused": "yellow",
    "starting": "cyan",
    "stopping": "cyan",
    "stopped": "dim",
    "crashed": "bold red",
    "unresponsive": "bold yellow",
    "unreachable": "bold yellow",
    "pass": "green",
    "warn": "yellow",
    "fail": "bold red",
    "succeeded": "green",
    "failed": "bold red",
    "cancelled": "yellow",
    "interrupted": "yellow",
}
_UNITS: Final = ((86_400, "d"), (3_600, "h"), (60, "m"), (1, "s"))


def printable(text: str) -> str:
    """Text in which everything but visible characters and spaces is escaped, so that it cannot steer a terminal or reorder a line."""
    return "".join(character if character.isprintable() else _escaped(character) for character in text)


def _escaped(character: str) -> str:
    code = ord(character)
    if code <= 0xFF:
        return {"\n": r"\n", "\r": r"\r", "\t": r"\t"}.get(character, f"\\x{code:02x}")
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"


def print_json(value: object, *, one_line: bool = False) -> None:
    """Print a view, or views, as JSON: indented, or as one line of a stream."""
    import msgspec

    encoded = msgspec.json.encode(value)
    click.echo(encoded if one_line else msgspec.json.format(encoded, indent=2))


def print_table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table: coloured and cut to the width on a terminal, plain and complete elsewhere."""
    if not sys.stdout.isatty():
        for line in plain(headers, rows):
            click.echo(line)
        return
    from rich.console import Console

    Console().print(drawn(headers, rows))


def print_facts(facts: Mapping[str, str | None]) -> None:
    """Print names and values, one per line; values of None are left out."""
    kept = {name: value for name, value in facts.items() if value is not None}
    width = max((len(name) for name in kept), default=0)
    for name, value in kept.items():
        click.echo(f"{printable(name):<{width}}  {printable(value)}".rstrip())


def plain(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A table as aligned lines without decoration."""
    cells = [list(headers), *([printable(cell) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(headers))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]


def drawn(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """A table for rich. Only the last column gives way when the terminal is narrow."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, header in enumerate(headers):
        last = index == len(headers) - 1
        table.add_column(header, no_wrap=True, overflow="ellipsis", min_width=0 if last else len(header))
    for row in rows:
        table.add_row(*(Text(printable(cell), style=STYLES.get(cell, "")) for cell in row))
    return table


def ago(moment: str | None, now: datetime | None = None) -> str:
    """How long ago an ISO 8601 time was, in its two largest units; the text itself if it is not one."""
    if not moment:
        return ""
    try:
        then = datetime.fromisoformat(moment)
    except ValueError:
        return moment
    then = then if then.tzinfo else then.replace(tzinfo=UTC)
    left = max(0, int(((now or datetime.now(UTC)) - then).total_seconds()))
    parts: list[str] = []
    for seconds, unit in _UNITS:
        count, left = divmod(left, seconds)
        if count:
            parts.append(f"{count}{unit}")
    return "".join(parts[:2]) or "0s"


def size(mib: int) -> str:
    """An amount of memory as people write it."""
    return f"{mib // 1024} GiB" if mib >= 1024 and mib % 1024 == 0 else f"{mib} MiB"


def yes(value: bool) -> str:
    """A flag as a word."""
    return "yes" if value else "no"
