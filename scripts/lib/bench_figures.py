"""The measured figures: what a row is, and how it is made from samples."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import msgspec


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """A figure with its floor and libvirt's, where it has them, and the bar it is held against.

    `ratio` is how many times the floor it is. `holds` is None where there is no bar. `points` are for a chart: x in `axis`, y in `unit`.
    """

    subject: str
    what: str
    unit: str
    measured: float
    samples: int
    floor: float | None = None
    libvirt: float | None = None
    ratio: float | None = None
    bar: str = ""
    holds: bool | None = None
    axis: str = ""
    points: tuple[tuple[float, float], ...] = ()


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """Everything one run measured, and on what."""

    machine: str
    versions: str
    rows: tuple[Row, ...]

    @property
    def holds(self) -> bool:
        """Whether no bar was missed."""
        return all(row.holds is not False for row in self.rows)


def paired(
    subject: str,
    what: str,
    *,
    ours: Sequence[float],
    floor: Sequence[float],
    libvirt: Sequence[float] = (),
    times: float | None = None,
    unit: str = "ms",
) -> Row:
    """Medians of samples that were taken in turn. The ratio is the median of the pairs' ratios: what else the host did hit both."""
    ratio = statistics.median(mine / low for mine, low in zip(ours, floor, strict=True))
    return Row(
        subject=subject,
        what=what,
        unit=unit,
        measured=statistics.median(ours),
        samples=len(ours),
        floor=statistics.median(floor),
        libvirt=statistics.median(libvirt) if libvirt else None,
        ratio=ratio,
        bar="" if times is None else f"<= {times:g} x",
        holds=None if times is None else ratio <= times,
    )


def limited(
    subject: str,
    what: str,
    *,
    measured: float,
    limit: float,
    unit: str,
    samples: int,
    libvirt: float | None = None,
    axis: str = "",
    points: Sequence[tuple[float, float]] = (),
) -> Row:
    """A figure with an absolute bar."""
    return Row(
        subject=subject,
        what=what,
        unit=unit,
        measured=measured,
        samples=samples,
        libvirt=libvirt,
        bar=f"<= {round(limit, 1):g} {unit}",
        holds=measured <= limit,
        axis=axis,
        points=tuple(points),
    )


def plain(subject: str, what: str, *, measured: float, unit: str, samples: int) -> Row:
    """A figure without a bar."""
    return Row(subject=subject, what=what, unit=unit, measured=measured, samples=samples)


def percentile(samples: Sequence[float], percent: float) -> float:
    """The smallest sample that `percent` of all samples do not exceed."""
    return sorted(samples)[max(0, math.ceil(len(samples) * percent / 100) - 1)]


def risen(samples: Sequence[float]) -> float:
    """How much the second half of a series lies above the first, fifth by fifth: 0 for a flat one.

    The first fifth is left out, as caches fill there. What is compared is the median of the second fifth with that of the last.
    """
    fifth = max(1, len(samples) // 5)
    return statistics.median(samples[-fifth:]) - statistics.median(samples[fifth : 2 * fifth] or samples[:1])
