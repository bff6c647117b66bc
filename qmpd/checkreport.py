"""A check report as people read it on a terminal."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterator
from itertools import groupby
from typing import Final, TextIO

from qmpd.views import CheckLine, CheckReport

#: The conclusions of `qmpd check`.
GOOD: Final = "Machines can run here."
BAD: Final = "No machine can run here until the failures are mended."
#: ANSI colours of the verdicts, and of what is said beside them.
COLOURS: Final = {"pass": "32", "warn": "33", "fail": "1;31", "heading": "1", "meaning": "2"}
#: Narrower than this a report is not wrapped further: columns of ten letters help nobody.
MIN_WIDTH: Final = 60
#: Longer lines than this are hard to follow however wide the terminal is.
MAX_WIDTH: Final = 120
#: A longer subject than this pushes its own finding to the right, not everybody's.
MAX_MARGIN: Final = 22
#: Where explanations begin: below the subject.
INDENT: Final = " " * 8


def text(report: CheckReport, *, width: int = 100, colour: bool = False, conclusion: str | None = None) -> str:
    """The report with a heading per topic, a line per finding, and below what is to mend how; ends with a summary and the conclusion.

    Control characters that came from the host are shown as escapes.
    """
    width = min(max(width, MIN_WIDTH), MAX_WIDTH)
    margin = min(max((len(_shown(line.subject)) for line in report.lines), default=0), MAX_MARGIN)
    blocks = [
        "\n".join([_paint(topic, "heading", colour), *(row for line in lines for row in _rows(line, margin, width, colour))])
        for topic, lines in groupby(report.lines, key=lambda line: line.topic)
    ]
    return "\n\n".join([*blocks, _summary(report, colour, conclusion)]) + "\n"


def _rows(line: CheckLine, margin: int, width: int, colour: bool) -> Iterator[str]:
    found = _wrapped(line.found, width - margin - 10)
    yield f"  {_paint(line.verdict, line.verdict, colour)}  {_shown(line.subject):<{margin}}  {found[0]}"
    yield from (" " * (margin + 10) + row for row in found[1:])
    yield from (INDENT + _paint(row, "meaning", colour) for row in _wrapped(line.meaning, width - len(INDENT)) if row)
    if line.mend is not None:
        # Not wrapped: a command has to survive being copied.
        yield f"{INDENT}> {_shown(line.mend)}"


def _wrapped(words: str, width: int) -> list[str]:
    return textwrap.wrap(_shown(words), width, break_long_words=False, break_on_hyphens=False) or [""]


def _summary(report: CheckReport, colour: bool, conclusion: str | None) -> str:
    counts = {verdict: sum(line.verdict == verdict for line in report.lines) for verdict in ("pass", "warn", "fail")}
    numbers = ", ".join(_paint(f"{count} {verdict}", verdict, colour) for verdict, count in counts.items() if count)
    return f"{numbers}. {conclusion or (GOOD if report.ok else BAD)}"


def coloured(output: TextIO) -> bool:
    """Colour only for a terminal, and not where NO_COLOR asks for none."""
    return output.isatty() and not os.environ.get("NO_COLOR")


def _shown(words: str) -> str:
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in words)


def _paint(words: str, what: str, colour: bool) -> str:
    return f"\x1b[{COLOURS[what]}m{words}\x1b[0m" if colour else words
