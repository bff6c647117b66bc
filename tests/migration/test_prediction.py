"""What is predicted is what the model does, and what cannot be known is not said."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpd.migration.convergence import OVERHEAD_MS, Abilities, Tuner, opening
from qmpd.migration.prediction import predicted, predicted_at_rest
from qmpd.migrationviews import Goal, Prediction, Then
from tests.migration.modelled import MIB, ModelQemu, Run, steady


def prediction(
    goal: Goal | None = None,
    *,
    memory_mib: float = 1024,
    disk_mib: float = 0,
    bandwidth_mib_s: float = 100,
    dirty_mib_s: float | None = 10,
) -> Prediction:
    return predicted(
        memory_bytes=int(memory_mib * MIB),
        disk_bytes=int(disk_mib * MIB),
        bandwidth_mib_s=bandwidth_mib_s,
        dirty_mib_s=dirty_mib_s,
        goal=goal or Goal(),
    )


def test_a_calm_guest_takes_one_pass_and_a_little() -> None:
    found = prediction()
    assert found.reachable
    assert found.total_s == pytest.approx(10.24 + 1.024 + 0.1024, rel=0.01)
    assert found.downtime_ms == pytest.approx(102.4 + OVERHEAD_MS, rel=0.01)
    assert "about 11 s" in found.explanation
    assert "10.0 MiB/s" in found.explanation


def test_disks_come_first() -> None:
    assert prediction(disk_mib=10_240).total_s == pytest.approx(102.4 + 11.4, rel=0.01)


def test_the_bandwidth_of_the_goal_is_the_most() -> None:
    assert prediction(Goal(bandwidth_mib_s=50)).bandwidth_mib_s == 50
    assert prediction(Goal(bandwidth_mib_s=500)).bandwidth_mib_s == 100


@pytest.mark.parametrize(
    ("then", "words"), [("pause", "halted then"), ("postcopy", "run on at the destination"), ("abort", "the machine would stay")]
)
def test_a_guest_that_changes_too_much_does_not_reach_the_goal_by_itself(then: Then, words: str) -> None:
    found = prediction(Goal(deadline_s=60, then=then), dirty_mib_s=200)
    assert (found.reachable, found.total_s, found.downtime_ms) == (False, None, None)
    assert "does not end within 300 ms" in found.explanation
    assert words in found.explanation


def test_without_a_deadline_it_says_what_would_help() -> None:
    assert "set a deadline" in prediction(dirty_mib_s=200).explanation
    assert "a longer downtime" in prediction(Goal(auto_converge=False), dirty_mib_s=200).explanation


def test_a_deadline_that_is_too_short_is_told() -> None:
    found = prediction(Goal(deadline_s=5))
    assert not found.reachable
    assert found.total_s is None
    assert "takes 11 s, and 5 s are allowed" in found.explanation


def test_what_was_not_measured_is_not_said() -> None:
    found = prediction(dirty_mib_s=None)
    assert found.reachable
    assert found.downtime_ms is None
    assert "could not be measured" in found.explanation


def test_a_guest_that_changes_nothing_has_no_downtime_but_the_handing_over() -> None:
    assert prediction(dirty_mib_s=0).downtime_ms == OVERHEAD_MS


def test_of_a_machine_at_rest_its_bytes_say_how_long_it_takes() -> None:
    found = predicted_at_rest(sent_bytes=512 * MIB, bandwidth_mib_s=100, goal=Goal(bandwidth_mib_s=50, deadline_s=5))
    assert (found.memory_bytes, found.disk_bytes, found.bandwidth_mib_s) == (0, 512 * MIB, 50)
    assert found.total_s == pytest.approx(10.24)
    assert (found.downtime_ms, found.dirty_mib_s, found.reachable) == (None, None, True)
    assert found.explanation == "512.0 MiB are to be sent, and 50.0 MiB/s go over: it takes 10 s at least"


def test_a_machine_at_rest_stays_at_its_deadline_if_that_was_asked_for() -> None:
    found = predicted_at_rest(sent_bytes=512 * MIB, bandwidth_mib_s=50, goal=Goal(deadline_s=5, then="abort"))
    assert not found.reachable
    assert "and 5 s are allowed; after 5 s the machine would stay" in found.explanation
    assert predicted_at_rest(sent_bytes=100 * MIB, bandwidth_mib_s=50, goal=Goal(deadline_s=5, then="abort")).reachable


@given(dirty=st.floats(0, 60), memory=st.integers(64, 4096), limit=st.integers(2 * OVERHEAD_MS, 2000))
def test_the_model_does_what_was_predicted(dirty: float, memory: int, limit: int) -> None:
    goal = Goal(downtime_ms=limit)
    said = prediction(goal, memory_mib=memory, dirty_mib_s=dirty)
    qemu = ModelQemu(memory_mib=memory, working_set_mib=memory, dirty_mib_s=steady(dirty), link_mib_s=steady(100))
    begin = opening(goal, Abilities())
    Run(qemu, Tuner(goal, Abilities()), capabilities=begin.capabilities, parameters=begin.parameters).until(3600)
    assert said.reachable
    assert qemu.outcome == "completed"
    assert said.total_s is not None
    assert said.downtime_ms is not None
    assert said.downtime_ms <= limit
    assert qemu.now == pytest.approx(said.total_s, rel=0.3, abs=1 + limit / 1000)


def test_a_qemu_that_loses_track_halts_its_guest_for_all_that_was_changed_meanwhile() -> None:
    def foretold(*, tracks: bool) -> Prediction:
        goal = Goal(downtime_ms=300)
        size = 1000 * MIB
        return predicted(memory_bytes=size, disk_bytes=0, bandwidth_mib_s=100.0, dirty_mib_s=50.0, goal=goal, tracks=tracks, overhead_ms=0)

    once = foretold(tracks=False)
    assert (once.total_s, once.downtime_ms) == (15.0, 5000.0)
    assert "sent once" in once.explanation
    assert "sent once" not in foretold(tracks=True).explanation
