"""How far a migration is, in figures: QEMU's `query-migrate` and the jobs that copy disks, as one value. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import msgspec

#: There is no migration, or none yet.
NONE: Final = "none"
#: States that nothing follows, of the end of a migration and of the end of an attempt.
FINAL: Final = frozenset({"completed", "failed", "cancelled", NONE})
#: States in which both ends have a part of the guest: one of them alone is nothing any more.
POSTCOPY: Final = frozenset(
    {
        "postcopy-device",
        "postcopy-active",
        "postcopy-paused",
        "postcopy-recover",
        "postcopy-recover-setup",
    }
)
_BITS: Final = 1_000_000 / 8


class DiskProgress(msgspec.Struct, frozen=True, kw_only=True):
    """A disk that is copied; `ready` when the copy has caught up and follows the guest."""

    node: str
    done_bytes: int
    total_bytes: int
    ready: bool


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """What QEMU says of the migration. `status` is QEMU's word; figures that it does not give (yet) are 0."""

    status: str = NONE
    error: str | None = None
    transferred_bytes: int = 0
    remaining_bytes: int = 0
    total_bytes: int = 0
    bytes_per_s: int = 0
    dirty_bytes_per_s: int = 0
    passes: int = 0
    throttle_percent: int = 0
    postcopy_requests: int = 0
    setup_ms: int = 0
    total_ms: int = 0
    expected_downtime_ms: int = 0
    downtime_ms: int = 0
    disks: tuple[DiskProgress, ...] = ()


def read_progress(answer: Mapping[str, object], disks: Sequence[DiskProgress] = ()) -> Progress:
    """An answer to `query-migrate`."""
    ram = answer.get("ram")
    ram = ram if isinstance(ram, dict) else {}
    error = answer.get("error-desc")
    return Progress(
        status=str(answer.get("status", NONE)),
        error=error if isinstance(error, str) else None,
        transferred_bytes=_number(ram, "transferred"),
        remaining_bytes=_number(ram, "remaining"),
        total_bytes=_number(ram, "total"),
        bytes_per_s=int(_number(ram, "mbps") * _BITS),
        dirty_bytes_per_s=_number(ram, "dirty-pages-rate") * _number(ram, "page-size"),
        passes=_number(ram, "dirty-sync-count"),
        throttle_percent=_number(answer, "cpu-throttle-percentage"),
        postcopy_requests=_number(ram, "postcopy-requests"),
        setup_ms=_number(answer, "setup-time"),
        total_ms=_number(answer, "total-time"),
        expected_downtime_ms=_number(answer, "expected-downtime"),
        downtime_ms=_number(answer, "downtime"),
        disks=tuple(disks),
    )


def _number(table: Mapping[str, object], name: str) -> int:
    value = table.get(name)
    return int(value) if isinstance(value, int | float) else 0
