"""Migrations of a modelled guest keep to their goals: within the downtime where that is possible, by the deadline's means where not."""

from __future__ import annotations

import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qmpd.migration.convergence import (
    LAST_PART,
    OVERHEAD_MS,
    UNLIMITED_BYTES_S,
    Abilities,
    Abort,
    Decision,
    Pause,
    Remark,
    Set,
    Tuner,
    limit_ms,
    opening,
    revised,
    unattainable,
)
from qmpd.migration.measuring import Sample
from qmpd.migrationviews import MAX_DOWNTIME_MS, Goal, GoalChanges, Then
from tests.migration.modelled import MIB, Curve, ModelQemu, Run, steady

ABLE = Abilities(auto_converge=True, postcopy=True)
UNABLE = Abilities(auto_converge=False, postcopy=False)
HOUR_S = 3600.0


def begun(
    goal: Goal,
    *,
    memory_mib: float = 1024,
    working_set_mib: float = 256,
    dirty_mib_s: Curve | float,
    link_mib_s: Curve | float,
    disk_mib: float = 0,
    abilities: Abilities = ABLE,
) -> Run:
    begin = opening(goal, abilities)
    qemu = ModelQemu(
        memory_mib=memory_mib,
        working_set_mib=working_set_mib,
        dirty_mib_s=dirty_mib_s if callable(dirty_mib_s) else steady(dirty_mib_s),
        link_mib_s=link_mib_s if callable(link_mib_s) else steady(link_mib_s),
        disk_mib=disk_mib,
    )
    return Run(qemu, Tuner(goal, abilities), capabilities=begin.capabilities, parameters=begin.parameters)


def downtime(run: Run) -> float:
    assert run.qemu.downtime_ms is not None
    return run.qemu.downtime_ms


def test_a_guest_that_converges_ends_within_the_goal_and_nothing_is_tuned() -> None:
    run = begun(Goal(downtime_ms=300), dirty_mib_s=20, link_mib_s=100).until(HOUR_S)
    assert run.qemu.outcome == "completed"
    assert downtime(run) <= 300
    assert run.decisions == []


def test_an_idle_guest_ends_after_one_pass() -> None:
    run = begun(Goal(), dirty_mib_s=0, link_mib_s=100).until(HOUR_S)
    assert run.qemu.outcome == "completed"
    assert run.qemu.now == pytest.approx(1024 / 100, rel=0.1)


def test_a_working_set_that_is_sent_in_time_converges_however_fast_it_changes() -> None:
    run = begun(Goal(downtime_ms=500), working_set_mib=30, dirty_mib_s=1000, link_mib_s=100).until(HOUR_S)
    assert run.qemu.outcome == "completed"
    assert downtime(run) <= 500


@pytest.mark.parametrize(("then", "outcome"), [("pause", "completed"), ("postcopy", "postcopy"), ("abort", "aborted")])
def test_a_guest_that_does_not_converge_ends_by_what_the_goal_says_around_the_deadline(then: Then, outcome: str) -> None:
    goal = Goal(deadline_s=120, then=then, auto_converge=False)
    run = begun(goal, dirty_mib_s=500, link_mib_s=100).until(HOUR_S)
    assert run.qemu.outcome == outcome
    assert 120 * LAST_PART <= run.qemu.now <= 125
    assert run.kinds()[-1] == {"pause": "Set", "postcopy": "Postcopy", "abort": "Abort"}[then]


def test_without_a_deadline_a_migration_that_does_not_converge_is_never_given_up() -> None:
    run = begun(Goal(auto_converge=False), dirty_mib_s=500, link_mib_s=100).until(4 * HOUR_S)
    assert run.qemu.outcome is None
    assert run.decisions == []


def test_auto_slows_the_guest_only_after_passes_that_brought_nothing_and_only_as_far_as_it_takes() -> None:
    run = begun(Goal(), dirty_mib_s=130, link_mib_s=100, working_set_mib=900).until(HOUR_S)
    assert run.qemu.outcome == "completed"
    assert downtime(run) <= 300
    assert set(run.kinds()) == {"Set"}
    assert run.qemu.parameters["max-cpu-throttle"] < 80
    assert run.decisions[0][0] > 3 * 1024 / 100
    assert "passes brought nothing" in run.decisions[0][1].reason


def test_auto_leaves_the_guest_a_part_of_its_speed() -> None:
    run = begun(Goal(), dirty_mib_s=10_000, link_mib_s=10, working_set_mib=512).until(4 * HOUR_S)
    assert run.qemu.parameters["max-cpu-throttle"] == 80
    assert run.kinds() == ["Set"] * 4


def test_until_it_is_needed_the_guest_is_hardly_slowed() -> None:
    run = begun(Goal(deadline_s=600, then="postcopy"), dirty_mib_s=500, link_mib_s=100).until(HOUR_S)
    assert run.qemu.throttle <= 1
    assert run.tuner.progress("memory").throttle_percent == 0
    assert run.kinds() == ["Postcopy"]


def test_where_auto_converge_is_wanted_qemu_does_it_by_itself() -> None:
    run = begun(Goal(auto_converge=True), dirty_mib_s=130, link_mib_s=100, working_set_mib=900).until(HOUR_S)
    assert run.qemu.outcome == "completed"
    assert run.decisions == []
    assert run.qemu.throttle >= 20
    assert run.tuner.progress("memory").throttle_percent >= 20


def test_near_the_deadline_a_quiet_moment_is_taken_rather_than_the_deadline_itself() -> None:
    def bursts(at: float) -> float:
        return 60 if at % 60 < 10 else 5000

    goal = Goal(downtime_ms=100, deadline_s=600, auto_converge=False)
    run = begun(goal, dirty_mib_s=bursts, link_mib_s=100, working_set_mib=800).until(HOUR_S)
    assert run.qemu.outcome == "completed"
    assert 600 * LAST_PART <= run.qemu.now < 600
    assert run.kinds()[-1] == "Set"
    assert downtime(run) < 8000 + OVERHEAD_MS  # what halting it in the middle of a burst costs
    assert "the deadline is near" in run.decisions[0][1].reason


def test_a_quiet_moment_before_the_last_part_ends_it_within_the_goal() -> None:
    run = begun(Goal(deadline_s=600, auto_converge=False), dirty_mib_s=lambda at: 500 if at < 200 else 1, link_mib_s=100).until(HOUR_S)
    assert run.qemu.outcome == "completed"
    assert run.decisions == []
    assert downtime(run) <= 300


def test_what_ends_by_itself_before_the_deadline_is_left_alone_in_the_last_part() -> None:
    goal = Goal(downtime_ms=100, deadline_s=19, auto_converge=False)
    run = begun(goal, dirty_mib_s=40, link_mib_s=100, working_set_mib=1024).until(HOUR_S)
    assert 19 * LAST_PART + 1 < run.qemu.now < 19
    assert run.decisions == []
    assert downtime(run) <= 100


def test_a_link_that_becomes_slow_costs_time_but_no_downtime() -> None:
    run = begun(Goal(downtime_ms=300), dirty_mib_s=5, link_mib_s=lambda at: 100 if at < 8 else 10).until(HOUR_S)
    assert run.qemu.outcome == "completed"
    assert downtime(run) <= 300
    assert run.decisions == []


def test_a_link_that_stands_still_is_waited_for() -> None:
    run = begun(Goal(), dirty_mib_s=1, link_mib_s=lambda at: 0 if 5 < at < 900 else 100).until(HOUR_S)
    assert run.qemu.outcome == "completed"
    assert run.decisions == []


def test_at_the_deadline_of_a_link_that_stands_still_the_reason_says_so() -> None:
    run = begun(Goal(deadline_s=60), dirty_mib_s=1, link_mib_s=lambda at: 100 if at < 5 else 0).until(100)
    assert isinstance(run.decisions[-1][1], Pause)
    assert "nothing goes over" in run.decisions[-1][1].reason
    assert run.tuner.progress("memory").eta_s is None


def test_a_link_that_stands_still_near_the_deadline_raises_nothing() -> None:
    goal = Goal(deadline_s=100, auto_converge=False)
    run = begun(goal, dirty_mib_s=500, link_mib_s=lambda at: 100 if at < 70 else 0).until(99)
    assert run.decisions == []
    assert run.qemu.outcome is None


def test_the_bandwidth_of_the_goal_is_kept() -> None:
    run = begun(Goal(bandwidth_mib_s=50), dirty_mib_s=1, link_mib_s=100).until(HOUR_S)
    assert run.qemu.now >= 1024 / 50 * 0.95
    assert run.qemu.parameters["max-bandwidth"] == run.qemu.parameters["max-postcopy-bandwidth"] == 50 * MIB


def test_a_deadline_waits_for_disks_and_says_so_once() -> None:
    run = begun(Goal(deadline_s=30, auto_converge=False), dirty_mib_s=500, link_mib_s=100, disk_mib=10_240).until(HOUR_S)
    assert run.kinds() == ["Remark", "Pause"]
    assert "disks are still being copied" in run.decisions[0][1].reason
    assert run.decisions[1][0] > 100
    assert run.qemu.outcome == "completed"


def test_a_deadline_that_means_to_give_up_does_so_while_disks_are_copied_too() -> None:
    run = begun(Goal(deadline_s=30, then="abort"), dirty_mib_s=500, link_mib_s=100, disk_mib=10_240).until(HOUR_S)
    assert run.kinds() == ["Abort"]
    assert run.qemu.now == pytest.approx(30, abs=1)


def test_a_deadline_before_memory_is_sent_is_waited_over() -> None:
    tuner = Tuner(Goal(deadline_s=1), ABLE)
    (remark,) = tuner.decide(Sample(at_s=2, status="setup"))
    assert isinstance(remark, Remark)
    assert "not being sent yet" in remark.reason
    assert tuner.decide(Sample(at_s=3, status="setup")) == ()


@pytest.mark.parametrize("status", ["pre-switchover", "device", "postcopy-active", "completed", "cancelling", "something-new"])
def test_nothing_is_decided_where_qemu_has_gone_further(status: str) -> None:
    assert Tuner(Goal(deadline_s=1, then="abort"), ABLE).decide(Sample(at_s=2, status=status)) == ()


def test_nothing_is_decided_after_the_last_word() -> None:
    tuner = Tuner(Goal(deadline_s=1, then="abort"), ABLE)
    assert isinstance(tuner.decide(Sample(at_s=2, status="active"))[0], Abort)
    assert tuner.decide(Sample(at_s=3, status="active")) == ()
    assert [entry.action for entry in tuner.tuned] == ["abort"]


def test_what_was_tuned_is_remembered_with_its_reason() -> None:
    run = begun(Goal(deadline_s=120, then="postcopy"), dirty_mib_s=500, link_mib_s=100).until(HOUR_S)
    (entry,) = run.tuner.tuned
    assert (entry.action, entry.parameters) == ("postcopy", {})
    assert entry.at_s == pytest.approx(run.qemu.now, abs=0.001)
    assert "MiB/s go over" in entry.reason
    assert "halting it now would take" in entry.reason


# What is asked of QEMU in the beginning


def test_the_limit_leaves_room_for_handing_over() -> None:
    assert limit_ms(Goal(downtime_ms=300), 50) == 250
    assert limit_ms(Goal(downtime_ms=60), 50) == 30
    assert limit_ms(Goal(downtime_ms=1), 50) == 1


def test_an_opening_uses_what_is_at_hand() -> None:
    everything = opening(Goal(then="postcopy"), ABLE)
    assert everything.capabilities == ("auto-converge", "postcopy-ram")
    assert everything.parameters["max-cpu-throttle"] == 1
    assert everything.parameters["max-bandwidth"] == UNLIMITED_BYTES_S
    assert opening(Goal(then="postcopy"), UNABLE).capabilities == ()
    assert opening(Goal(auto_converge=False), ABLE).capabilities == ()
    assert opening(Goal(auto_converge=True), ABLE).parameters["max-cpu-throttle"] == 99
    assert set(opening(Goal(), UNABLE).parameters) == {"downtime-limit", "max-bandwidth", "max-postcopy-bandwidth"}


def test_a_goal_that_needs_what_is_not_there_is_named() -> None:
    assert unattainable(Goal(), UNABLE) is None
    assert "postcopy" in (unattainable(Goal(then="postcopy"), UNABLE) or "")
    assert "auto-converge" in (unattainable(Goal(auto_converge=True), UNABLE) or "")


# Another goal while it runs


def test_a_goal_that_is_loosened_ends_a_migration_that_did_not_converge() -> None:
    run = begun(Goal(downtime_ms=100, auto_converge=False), dirty_mib_s=500, link_mib_s=100).until(300)
    assert run.qemu.outcome is None
    (decision,) = run.tuner.change(Goal(downtime_ms=5000, auto_converge=False), run.qemu.now)
    run.qemu.obey(decision)
    run.until(400)
    assert run.qemu.outcome == "completed"
    assert downtime(run) <= 5000
    assert run.tuner.limit_ms == 4950


def test_a_new_goal_changes_what_it_says_and_nothing_else() -> None:
    tuner = Tuner(Goal(), ABLE)
    assert tuner.change(Goal(deadline_s=60), 1) == ()
    (slower,) = tuner.change(Goal(deadline_s=60, bandwidth_mib_s=10), 2)
    assert isinstance(slower, Set)
    assert slower.parameters == {"max-bandwidth": 10 * MIB, "max-postcopy-bandwidth": 10 * MIB}
    (throttled,) = tuner.change(Goal(deadline_s=60, bandwidth_mib_s=10, auto_converge=True), 3)
    assert isinstance(throttled, Set)
    assert throttled.parameters["max-cpu-throttle"] == 99
    (freed,) = tuner.change(Goal(deadline_s=60, bandwidth_mib_s=10, auto_converge=False), 4)
    assert isinstance(freed, Set)
    assert freed.parameters["max-cpu-throttle"] == 1
    assert [entry.at_s for entry in tuner.tuned] == [2, 3, 4]
    assert {entry.reason for entry in tuner.tuned} == {"the goal was changed"}


@pytest.mark.parametrize(
    ("begin", "change", "abilities", "words"),
    [
        (Goal(), Goal(then="postcopy"), UNABLE, "postcopy is not possible"),
        (Goal(), Goal(then="postcopy"), ABLE, "when a migration begins"),
        (Goal(auto_converge=False), Goal(auto_converge=True), ABLE, "began with it switched off"),
    ],
)
def test_a_new_goal_cannot_ask_for_what_the_migration_began_without(begin: Goal, change: Goal, abilities: Abilities, words: str) -> None:
    tuner = Tuner(begin, abilities)
    with pytest.raises(ValueError, match=words):
        tuner.change(change, 1)
    assert tuner.goal == begin
    assert tuner.tuned == []


def test_auto_converge_of_a_qemu_without_it_can_be_changed_to_no_effect() -> None:
    assert Tuner(Goal(), UNABLE).change(Goal(auto_converge=False), 1) == ()


def test_changes_apply_to_what_they_name_and_zero_takes_a_limit_away() -> None:
    goal = Goal(downtime_ms=100, deadline_s=60, bandwidth_mib_s=10, auto_converge=True)
    assert revised(goal, GoalChanges()) == goal
    assert revised(goal, GoalChanges(deadline_s=0, bandwidth_mib_s=0)) == Goal(downtime_ms=100, auto_converge=True)
    assert revised(goal, GoalChanges(auto_converge=False, then="abort")).auto_converge is False
    assert revised(goal, GoalChanges(downtime_ms=5)).downtime_ms == 5


# Figures for people


def test_progress_says_what_is_known() -> None:
    run = begun(Goal(deadline_s=600, auto_converge=False), dirty_mib_s=500, link_mib_s=100).until(60)
    shown = run.tuner.progress("memory")
    assert (shown.phase, shown.memory_total_bytes) == ("memory", 1024 * MIB)
    assert shown.bandwidth_mib_s == pytest.approx(100, rel=0.02)
    assert shown.dirty_mib_s == pytest.approx(100, rel=0.1)  # 256 MiB are changed over and over, and sent in 2.56 s
    assert shown.expected_downtime_ms == pytest.approx(2560 + OVERHEAD_MS, rel=0.05)
    assert shown.eta_s == pytest.approx(540 + 2.56, abs=2)
    assert shown.downtime_limit_ms == 250
    assert shown.passes > 10


def test_progress_of_disks_counts_memory_as_still_to_come() -> None:
    run = begun(Goal(), dirty_mib_s=1, link_mib_s=100, disk_mib=2000).until(10)
    shown = run.tuner.progress("disks")
    assert shown.disk_total_bytes == 2000 * MIB
    assert shown.bandwidth_mib_s == pytest.approx(100, rel=0.02)
    assert shown.dirty_mib_s is None
    assert shown.eta_s == pytest.approx(10, rel=0.1)


def test_the_rest_of_a_halted_guest_is_its_eta() -> None:
    run = begun(Goal(deadline_s=8, auto_converge=False), dirty_mib_s=500, link_mib_s=100).until(9)
    assert run.kinds() == ["Pause"]
    assert run.tuner.progress("memory").eta_s == pytest.approx((1024 - 850) / 100, abs=1)


def test_an_abort_has_no_forced_end() -> None:
    run = begun(Goal(deadline_s=600, then="abort", auto_converge=False), dirty_mib_s=500, link_mib_s=100).until(60)
    assert run.tuner.progress("memory").eta_s is None


def test_a_migration_that_converges_before_its_deadline_says_when() -> None:
    run = begun(Goal(deadline_s=600), memory_mib=8192, working_set_mib=4096, dirty_mib_s=50, link_mib_s=100).until(100)
    assert run.qemu.outcome is None
    remaining = run.tuner.progress("memory").eta_s
    assert remaining is not None
    run.until(HOUR_S)
    assert 100 + remaining == pytest.approx(run.qemu.now, rel=0.02)


# What holds for every guest and link

goals = st.builds(
    Goal,
    downtime_ms=st.integers(min_value=2 * OVERHEAD_MS, max_value=5000),
    deadline_s=st.none() | st.floats(min_value=1, max_value=600),
    then=st.sampled_from(["pause", "postcopy", "abort"]),
    auto_converge=st.sampled_from([True, False, "auto"]),
)


@st.composite
def curves(draw: st.DrawFn, least: float) -> Curve:
    """A rate that is another every so often."""
    values = draw(st.lists(st.floats(min_value=least, max_value=1000), min_size=1, max_size=4))
    period = draw(st.floats(min_value=1, max_value=60))
    return lambda at: values[int(at / period) % len(values)]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(goal=goals, dirty=curves(0.0), link=curves(5.0), working_set=st.floats(min_value=1, max_value=1024))
def test_whatever_guest_and_link_limits_are_safe_and_the_end_is_the_one_the_goal_says(
    goal: Goal, dirty: Curve, link: Curve, working_set: float
) -> None:
    run = begun(goal, dirty_mib_s=dirty, link_mib_s=link, working_set_mib=working_set).until(1200)
    decisions: list[Decision] = [decision for _, decision in run.decisions]
    assert run.limits == sorted(run.limits)
    assert run.limits[-1] <= MAX_DOWNTIME_MS
    assert len(decisions) <= 30, "it goes back and forth"
    forced = [at for at, decision in run.decisions if isinstance(decision, Pause | Abort)]
    assert all(goal.deadline_s is not None and at >= goal.deadline_s for at in forced)
    if goal.deadline_s is None or goal.then != "pause":
        assert run.limits[-1] == limit_ms(goal, OVERHEAD_MS)
    if goal.deadline_s is not None:
        assert run.qemu.outcome in {"completed", {"pause": "completed", "postcopy": "postcopy", "abort": "aborted"}[goal.then]}
        assert run.qemu.now <= goal.deadline_s + 2048 / 5 + 2
    elif run.qemu.outcome is not None:
        assert run.qemu.outcome == "completed"
    if run.qemu.outcome == "completed" and not forced and run.limits[-1] == run.limits[0]:
        assert downtime(run) <= goal.downtime_ms
    assert math.isfinite(run.tuner.progress("").eta_s or 0)
