"""One measured figure."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True, kw_only=True)
class Row:
    """A figure with its floor, where it has one, and the bar it is held against."""

    what: str
    unit: str
    measured: float
    bar: str
    holds: bool
    floor: float | None = None

    @property
    def ratio(self) -> float | None:
        """How many times the floor."""
        return None if self.floor is None else self.measured / self.floor

    def as_dict(self) -> dict[str, object]:
        """The figure for programs."""
        return {**asdict(self), "ratio": self.ratio}
