"""Times and amounts as people write them, on the way in and on the way out."""

from __future__ import annotations

import re
from typing import Final

import click

#: What a limit is called that there is none of.
NONE: Final = "none"
_SECONDS: Final = {"ms": 0.001, "s": 1.0, "min": 60.0, "h": 3600.0, "d": 86_400.0}
_PART: Final = re.compile(r"(\d+(?:\.\d+)?)(ms|s|min|h|d)")
_MIB: Final = {"KiB": 1 / 1024, "MiB": 1.0, "GiB": 1024.0, "TiB": 1024.0 * 1024}
_SIZE: Final = re.compile(r"(\d+(?:\.\d+)?)(KiB|MiB|GiB|TiB)(?:/s)?")
_KIB: Final = 1024


class DurationType(click.ParamType[float]):
    """A time like `300ms`, `90s`, `1h30min`, in seconds; with `limit` also `none`, which is 0."""

    name = "time"

    def __init__(self, *, limit: bool = False) -> None:
        self._limit = limit

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The seconds; a usage error for what has no unit."""
        text = str(value)
        if self._limit and text == NONE:
            return 0.0
        parts = _PART.findall(text)
        if not parts or "".join(number + unit for number, unit in parts) != text:
            self.fail(f"{value!r} is not a time like 300ms, 90s, 20min, 1h30min", param, ctx)
        return float(sum(float(number) * _SECONDS[unit] for number, unit in parts))


class SizeType(click.ParamType[int]):
    """An amount like `100MiB` or `1.5GiB`, in whole MiB; with `limit` also `none`, which is 0."""

    name = "amount"

    def __init__(self, *, limit: bool = False) -> None:
        self._limit = limit

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The MiB; a usage error for what has no unit, or is less than one."""
        text = str(value)
        if self._limit and text == NONE:
            return 0
        found = _SIZE.fullmatch(text)
        mib = int(float(found[1]) * _MIB[found[2]]) if found else 0
        if mib < 1:
            self.fail(f"{value!r} is not an amount of at least 1 MiB, like 100MiB or 2GiB", param, ctx)
        return mib


def amount(count: float) -> str:
    """Bytes in the largest unit of which there is at least one."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < _KIB:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= _KIB
    return f"{count:.1f} TiB"


def duration(seconds: float) -> str:
    """A time in the units people think of it in."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
