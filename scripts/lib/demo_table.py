"""What the demo shows: a live table on a terminal, a line per finished machine elsewhere, one JSON object per machine for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from scripts.lib.demo_boots import REMOVED, Boot

STYLES = {"running": "green", "paused": "green", "crashed": "bold red", "waiting": "dim", REMOVED: "dim"}


class Display(Protocol):
    """Somebody who is told how far the machines are, again and again."""

    def update(self, boots: Sequence[Boot], now: float) -> None:
        """Take in the present state."""


class Lines:
    """One line, or one JSON object, for each machine as it finishes."""

    def __init__(self, *, as_json: bool) -> None:
        self._as_json = as_json
        self._told: set[str] = set()

    def update(self, boots: Sequence[Boot], now: float) -> None:
        """Print those that have finished since."""
        for boot in boots:
            if boot.over and boot.showing.spec.name not in self._told:
                self._told.add(boot.showing.spec.name)
                print(json.dumps(fields(boot)) if self._as_json else _line(boot), flush=True)


class LiveTable:
    """A table that is drawn again in place."""

    def __init__(self, live: Live) -> None:
        self._live = live

    def update(self, boots: Sequence[Boot], now: float) -> None:
        """Draw the table anew."""
        self._live.update(table(boots, now), refresh=True)


@contextmanager
def display(*, as_json: bool) -> Iterator[Display]:
    """The display that fits stdout and the wish."""
    if as_json or not sys.stdout.isatty():
        yield Lines(as_json=as_json)
        return
    with Live(console=Console(), auto_refresh=False) as live:
        yield LiveTable(live)


def table(boots: Sequence[Boot], now: float) -> Table:
    """The machines, one row each; milestone and console share what the terminal has left."""
    drawn = Table(box=None, pad_edge=False, header_style="bold", expand=True)
    rows = [_row(boot, now) for boot in boots]
    for index, header in enumerate(("MACHINE", "ARCH", "ACCEL", "STATE", "SECONDS")):
        width = max((len(header), *(row[index].cell_len for row in rows)))
        drawn.add_column(header, no_wrap=True, min_width=width, justify="right" if header == "SECONDS" else "left")
    drawn.add_column("MILESTONE", no_wrap=True, overflow="ellipsis", ratio=1)
    drawn.add_column("CONSOLE", no_wrap=True, overflow="ellipsis", ratio=1)
    for row in rows:
        drawn.add_row(*row)
    return drawn


def _row(boot: Boot, now: float) -> tuple[Text, ...]:
    mark = "✓" if boot.reached else "✗" if boot.problem else " "
    return (
        Text(boot.showing.spec.name),
        Text(boot.showing.arch),
        Text(boot.accel or ""),
        Text(boot.state, style=STYLES.get(boot.state, "")),
        Text(_seconds(boot, now)),
        Text(f"{mark} {boot.showing.guest.summary}", style="green" if boot.reached else "red" if boot.problem else ""),
        Text(boot.line.strip()) if boot.problem is None else Text(boot.problem, style="red"),
    )


def fields(boot: Boot) -> dict[str, object]:
    """A machine as `--json` prints it."""
    return {
        "board": boot.showing.board,
        "arch": boot.showing.arch,
        "accel": boot.accel,
        "milestone": boot.showing.guest.summary,
        "reached": boot.reached,
        "seconds": None if boot.seconds is None else round(boot.seconds, 2),
        "console_tail": boot.tail,
        "problem": boot.problem,
    }


def failure(boot: Boot) -> str:
    """What there is to see of a machine that did not make it."""
    tail = "\n".join(f"    | {line}" for line in boot.tail.splitlines()[-12:])
    return f"{boot.showing.spec.name}: {boot.problem}\n{tail or '    | (nothing on the console)'}"


def _line(boot: Boot) -> str:
    took = "" if boot.seconds is None else f"{boot.seconds:.1f} s"
    verdict = "ok" if boot.reached else "FAILED"
    return f"{verdict:<6} {boot.showing.spec.name:<24} {boot.accel or '':<4} {took:>8}  {boot.showing.guest.summary}"


def _seconds(boot: Boot, now: float) -> str:
    if boot.seconds is not None:
        return f"{boot.seconds:.1f}"
    return "" if boot.began is None else f"{now - boot.began:.0f}"
