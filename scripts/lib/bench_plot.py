"""A report as charts, with matplotlib (the extra `bench`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from scripts.lib.bench_figures import Report, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Who is shown, and in which colour (readable in grey, and to most who do not see all colours).
COLOURS: Final = {"floor": "#7f8c8d", "qmpd": "#1f77b4", "libvirt": "#e69f00"}
SUMMARY: Final = "summary"
WIDTH_IN: Final = 9.0
ROW_IN: Final = 0.5
CHART_IN: Final = 3.2
DOTS_PER_INCH: Final = 120


class NoCharts(Exception):
    """Charts cannot be drawn; the message says what is missing."""


def draw(report: Report, where: Path) -> list[Path]:
    """One file with all charts where `where` ends in .svg or .png; else a directory with an SVG per chart. Returns what was written.

    Raises:
        NoCharts: matplotlib is not installed.
    """
    charts = {SUMMARY: [row for row in report.rows if row.ratio is not None]}
    charts |= {f"{row.subject}-{number}": [row] for number, row in enumerate(report.rows) if row.points}
    charts = {name: rows for name, rows in charts.items() if rows}
    if where.suffix in {".svg", ".png"}:
        _save(report, list(charts.values()), where)
        return [where]
    where.mkdir(parents=True, exist_ok=True)
    for name, rows in charts.items():
        _save(report, [rows], where / f"{name}.svg")
    return [where / f"{name}.svg" for name in charts]


def _save(report: Report, charts: Sequence[Sequence[Row]], path: Path) -> None:
    try:
        from matplotlib import rcParams
        from matplotlib.figure import Figure
    except ImportError as error:
        raise NoCharts("matplotlib is not installed: scripts/setup --for bench, or pip install 'qmpd[bench]'") from error
    # The same figures give the same file.
    rcParams["svg.hashsalt"] = "qmpd"
    heights = [CHART_IN if rows[0].points else 1.2 + ROW_IN * len(rows) for rows in charts]
    figure = Figure(figsize=(WIDTH_IN, sum(heights) + 0.6), layout="constrained")
    figure.suptitle(f"{report.machine}\n{report.versions}", fontsize=8)
    axes = figure.subplots(len(charts), 1, squeeze=False, height_ratios=heights)[:, 0]
    for each, rows in zip(axes, charts, strict=True):
        if rows[0].points:
            _course(each, rows[0])
        else:
            _ratios(each, rows)
    figure.savefig(path, dpi=DOTS_PER_INCH, metadata={"Date": None} if path.suffix == ".svg" else None)


def _ratios(axes: Axes, rows: Sequence[Row]) -> None:
    """How many times the floor each row is, and its bar: ratios are what counts."""
    for place, row in enumerate(rows):
        if row.floor is None or row.ratio is None:
            continue
        axes.barh(place, row.ratio, height=0.5, color=COLOURS["qmpd"])
        axes.annotate(f" {row.ratio:.2f}", (row.ratio, place), va="center", fontsize=8)
        if row.libvirt is not None:
            axes.plot(row.libvirt / row.floor, place, marker="D", color=COLOURS["libvirt"], linestyle="none")
        if (limit := bar_of(row)) is not None:
            axes.plot([limit, limit], [place - 0.35, place + 0.35], color="black", linewidth=2)
    axes.axvline(1.0, color=COLOURS["floor"], linestyle="--", linewidth=1)
    axes.set_xscale("log")
    axes.set_yticks(range(len(rows)), [row.what.strip() for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("times the floor (dashed); blue: qmpd, diamond: libvirt, black: the bar", fontsize=8)


def _course(axes: Axes, row: Row) -> None:
    """A figure over the course of its measurement."""
    axes.plot([x for x, _ in row.points], [y for _, y in row.points], color=COLOURS["qmpd"], marker=".", markersize=3, linewidth=1)
    axes.set_title(row.what.strip(), fontsize=9)
    axes.set_xlabel(row.axis, fontsize=8)
    axes.set_ylabel(row.unit, fontsize=8)
    axes.set_ylim(0, 1.1 * max(y for _, y in row.points))


def bar_of(row: Row) -> float | None:
    """The bar of a row that is held against its floor, as a ratio."""
    words = row.bar.split()
    return float(words[1]) if row.bar.endswith(" x") else None
