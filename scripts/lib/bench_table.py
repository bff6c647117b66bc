"""A report as a table: for a terminal, and for the documentation."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from scripts.lib.bench_figures import Report, Row

#: What the measured table stands between in docs/performance.md.
BEGIN: Final = "<!-- written by scripts/bench --docs -->"
END: Final = "<!-- end of what scripts/bench --docs writes -->"
HEADINGS: Final = ("what", "floor", "qmpd", "libvirt", "ratio", "bar", "")
#: From here on no fraction is shown.
WHOLE_FROM: Final = 100


def text(report: Report) -> str:
    """For a terminal: columns in line."""
    rows = [HEADINGS, *(cells(row) for row in report.rows)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADINGS))]
    lines = [_line(row, widths) for row in rows]
    return "\n".join([report.machine, report.versions, "", *lines]) + "\n"


def markdown(report: Report) -> str:
    """For the documentation."""
    rule = "|---|--:|--:|--:|--:|---|---|"
    lines = ["| " + " | ".join(cell.strip() for cell in row) + " |" for row in (HEADINGS, *(cells(row) for row in report.rows))]
    return "\n".join([f"{report.machine}; {report.versions}.", "", lines[0], rule, *lines[1:]]) + "\n"


def write_docs(page: Path, report: Report) -> None:
    """Put the table in place of the one the page has. Raises ValueError if it has no place for one."""
    before, begin, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{page} has no place for the table: {BEGIN}")
    page.write_text(f"{before}{BEGIN}\n{markdown(report)}{END}{after}", encoding="utf-8")


def cells(row: Row) -> tuple[str, ...]:
    """A row's cells, in the order of the headings."""
    verdict = {True: "holds", False: "MISSED", None: ""}[row.holds]
    ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
    return (row.what, amount(row.floor, row.unit), amount(row.measured, row.unit), amount(row.libvirt, row.unit), ratio, row.bar, verdict)


def amount(value: float | None, unit: str) -> str:
    """A number with its unit, to three or four digits."""
    if value is None:
        return ""
    digits = 0 if abs(value) >= WHOLE_FROM else 1 if abs(value) >= 10 else 2
    return f"{value:,.{digits}f} {unit}"


def _line(row: tuple[str, ...], widths: list[int]) -> str:
    left = {0, len(widths) - 2, len(widths) - 1}
    aligned = [
        cell.ljust(width) if column in left else cell.rjust(width) for column, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]
    return "  ".join(aligned).rstrip()
