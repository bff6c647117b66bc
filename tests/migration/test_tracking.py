"""QEMUs that lose track of what their guest changes send its memory once, and halt it for the rest."""

from __future__ import annotations

import msgspec
import pytest

from qmpd.migration.convergence import MIB, Abilities, Pause, Set, Tuner, keeps_track, opening
from qmpd.migration.measuring import Sample
from qmpd.migrationviews import Goal

LOSES = Abilities(tracks=False)


@pytest.mark.parametrize(
    ("accelerator", "version", "tracks"),
    [
        ("tcg", (7, 2, 22), False),
        ("tcg", (8, 2, 10), False),
        ("tcg", (9, 0, 0), True),
        ("tcg", (10, 0, 13), True),
        ("kvm", (7, 2, 22), True),
    ],
)
def test_who_keeps_track(accelerator: str, version: tuple[int, ...], tracks: bool) -> None:
    assert keeps_track(accelerator, version) is tracks


def test_memory_is_sent_once_whatever_the_goal_becomes() -> None:
    goal = Goal(downtime_ms=300, deadline_s=10.0, then="pause")
    assert opening(goal, LOSES).parameters["downtime-limit"] == 0
    tuner = Tuner(goal, LOSES)
    assert tuner.change(msgspec.structs.replace(goal, downtime_ms=900), 1.0) == ()
    assert tuner.limit_ms == 0


def test_with_bitmaps_the_guest_is_halted_when_memory_was_sent() -> None:
    """QEMU sends them at the very end, and would not come to that by itself."""
    tuner = Tuner(Goal(downtime_ms=300), Abilities(tracks=False, bitmaps=True))
    during = Sample(at_s=1.0, status="active", total_bytes=MIB, remaining_bytes=MIB, transferred_bytes=0, passes=1)
    assert tuner.decide(during) == ()
    pause, rest = tuner.decide(msgspec.structs.replace(during, at_s=2.0, remaining_bytes=0, transferred_bytes=MIB))
    assert isinstance(pause, Pause)
    assert isinstance(rest, Set)
    assert rest.parameters == {"downtime-limit": 250}
    assert tuner.decide(msgspec.structs.replace(during, at_s=3.0, remaining_bytes=0)) == ()
