"""What the samples of a running migration mean: how fast it is, how much the guest changes meanwhile, and when it may end. Pure.

QEMU sends all memory once, then in passes what changed meanwhile. At the end of a pass it looks at what has changed since: the *height* of
the next pass, and what would be left to send if the guest were halted then. `remaining` falls within a pass and jumps at its end, so its
value at a moment says little. `expected-downtime` is the height divided by QEMU's own bandwidth of the last 100 ms: multiplied with that
again it is the height, exact, however late one asks.
"""

from __future__ import annotations

from collections import deque
from typing import Final

import msgspec

from qmpd.migration.progress import NONE, Progress

#: What is averaged over: short enough to follow a link that becomes slow, long enough to survive bursts.
WINDOW_S: Final = 5.0
#: The least of as many passes is what waiting for a quiet moment can be expected to bring.
WINDOW_PASSES: Final = 5
#: A pass is better than those before it if it left at most this part of the least of them.
IMPROVEMENT: Final = 0.9
#: The estimate gives up here: what takes more passes does not converge in any useful sense.
MOST_PASSES: Final = 200
_MS: Final = 1000.0


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """How far a migration is at one moment; `at_s` counts from its beginning. `status` is QEMU's, `none` before memory is sent.
    `dirty_bytes_s`: what the guest changed per second in the last pass; `height_bytes`: what was to be sent when it ended, 0 if unknown."""

    at_s: float
    status: str = NONE
    total_bytes: int = 0
    remaining_bytes: int = 0
    transferred_bytes: int = 0
    passes: int = 0
    dirty_bytes_s: float = 0.0
    height_bytes: int = 0
    throttle_percent: int = 0
    disk_total_bytes: int = 0
    disk_remaining_bytes: int = 0
    disks_ready: bool = True


def sample_of(progress: Progress, at_s: float) -> Sample:
    """What QEMU and the copies of disks said, as one sample."""
    changing = progress.dirty_bytes_per_s > 0  # before it is known, and while nothing changes, `expected-downtime` says something else
    total, done = (sum(getattr(disk, name) for disk in progress.disks) for name in ("total_bytes", "done_bytes"))
    return Sample(
        at_s=at_s,
        status=progress.status,
        total_bytes=progress.total_bytes,
        remaining_bytes=progress.remaining_bytes,
        transferred_bytes=progress.transferred_bytes,
        passes=progress.passes,
        dirty_bytes_s=float(progress.dirty_bytes_per_s),
        height_bytes=int(progress.expected_downtime_ms / _MS * progress.bytes_per_s) if changing else 0,
        throttle_percent=progress.throttle_percent,
        disk_total_bytes=total,
        disk_remaining_bytes=total - done,
        disks_ready=all(disk.ready for disk in progress.disks),
    )


class Rate:
    """The slope of a growing count over the last seconds."""

    def __init__(self, window_s: float = WINDOW_S) -> None:
        self._window_s = window_s
        self._points: deque[tuple[float, int]] = deque()

    def take(self, at_s: float, count: int) -> None:
        """One more reading. A count that fell begins anew: another stream has taken its place."""
        if self._points and count < self._points[-1][1]:
            self._points.clear()
        self._points.append((at_s, count))
        while len(self._points) > 2 and at_s - self._points[1][0] >= self._window_s:
            self._points.popleft()

    @property
    def per_s(self) -> float | None:
        """The rate, or None before there are two readings at different times."""
        if not self._points:
            return None
        (began, first), (ended, last) = self._points[0], self._points[-1]
        return (last - first) / (ended - began) if ended > began else None


class Measuring:
    """What is known of a migration from its samples."""

    def __init__(self) -> None:
        self.latest = Sample(at_s=0.0)
        self.stalled_passes = 0
        self._memory = Rate()
        self._disks = Rate()
        self._heights: deque[int] = deque(maxlen=WINDOW_PASSES)
        self._pass_began_s = 0.0

    def take(self, sample: Sample) -> None:
        """One more sample. Those after the first pass tell how much the guest changes."""
        began = sample.passes > self.latest.passes
        if sample.status != NONE:
            self._memory.take(sample.at_s, sample.transferred_bytes)
        self._disks.take(sample.at_s, sample.disk_total_bytes - sample.disk_remaining_bytes)
        height = max(sample.remaining_bytes, sample.height_bytes)
        if began:
            self._pass_began_s = sample.at_s
        if sample.passes > 1 and began:
            self._begin_pass(height, sample.passes - max(self.latest.passes, 1))
        elif self._heights:
            self._heights[-1] = max(self._heights[-1], height)
        self.latest = sample

    def _begin_pass(self, height: int, passes: int) -> None:
        improved = not self._heights or height <= min(self._heights) * IMPROVEMENT
        self.stalled_passes = 0 if improved else self.stalled_passes + passes
        self._heights.append(height)

    def begin_counting_anew(self) -> None:
        """Passes are counted as stalled from now on: something was done that may help."""
        self.stalled_passes = 0

    @property
    def bytes_s(self) -> float | None:
        """How fast memory goes over, on the average of the last seconds; None when it is not known or stands still."""
        return self._memory.per_s or None

    @property
    def disk_bytes_s(self) -> float | None:
        """How fast disks go over; None when it is not known or stands still."""
        return self._disks.per_s or None

    @property
    def lowest_bytes(self) -> int | None:
        """The least that any of the last passes began with; None within the first, which sends everything."""
        return min(self._heights) if self._heights else None

    @property
    def highest_bytes(self) -> int | None:
        """The most that any of the last passes began with."""
        return max(self._heights) if self._heights else None

    @property
    def height_bytes(self) -> int | None:
        """What the pass that goes on began with."""
        return self._heights[-1] if self._heights else None

    def halted_ms(self, left_bytes: float | None) -> float | None:
        """How long a halted guest would wait for `left_bytes`; None when unknown."""
        if left_bytes is None or self.bytes_s is None:
            return None
        return left_bytes / self.bytes_s * _MS

    def eta_s(self, limit_ms: float) -> float | None:
        """When a downtime of `limit_ms` will be enough; None: not in sight."""
        sample = self.latest
        if not sample.disks_ready:
            speed = self.disk_bytes_s
            return None if speed is None else (sample.disk_remaining_bytes + sample.total_bytes) / speed
        if self.bytes_s is None:
            return None
        since_s = sample.at_s - self._pass_began_s
        return converging_s(
            sample.remaining_bytes, sample.dirty_bytes_s, self.bytes_s, limit_ms, most_bytes=self.highest_bytes, since_s=since_s
        )


def converging_s(
    remaining_bytes: float,
    dirty_bytes_s: float,
    bytes_s: float,
    limit_ms: float,
    *,
    most_bytes: float | None = None,
    since_s: float = 0.0,
) -> float | None:
    """How long until a pass leaves so little that it is sent within `limit_ms`, that last part included; None if that never comes.

    `most_bytes`: no pass leaves more than that, because the guest changes the same places over and over. `since_s`: for how long the pass
    that goes on does so already; what was changed meanwhile comes on top.
    """
    enough = bytes_s * limit_ms / _MS
    elapsed, left = 0.0, remaining_bytes
    for _ in range(MOST_PASSES):
        took = left / bytes_s
        elapsed += took
        changed = dirty_bytes_s * (took + since_s)
        left, since_s = changed if most_bytes is None else min(changed, most_bytes), 0.0
        if left <= enough:
            return elapsed + left / bytes_s
    return None
