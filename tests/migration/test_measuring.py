"""What the samples of a migration mean, on real answers of QEMU and on made ones."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpd.migration.measuring import WINDOW_PASSES, Measuring, Rate, Sample, converging_s, sample_of
from qmpd.migration.progress import DiskProgress, Progress, read_progress

MIB = 1024 * 1024
#: QEMU 7.2, 256 MiB, a guest that writes to 32 MiB over and over, 20 MiB/s, in its seventh pass.
SEVENTH_PASS: dict[str, object] = {
    "expected-downtime": 1596,
    "status": "active",
    "setup-time": 1,
    "total-time": 10000,
    "cpu-throttle-percentage": 1,
    "ram": {
        "total": 268967936,
        "postcopy-requests": 0,
        "dirty-sync-count": 7,
        "multifd-bytes": 0,
        "pages-per-second": 5120,
        "page-size": 4096,
        "remaining": 23068672,
        "mbps": 168.1,
        "transferred": 212230144,
        "dirty-pages-rate": 5107,
        "duplicate": 57352,
    },
}


def test_an_answer_of_qemu_is_understood() -> None:
    sample = sample_of(read_progress(SEVENTH_PASS), 10.0)
    assert (sample.status, sample.passes, sample.throttle_percent) == ("active", 7, 1)
    assert (sample.total_bytes, sample.remaining_bytes, sample.transferred_bytes) == (268967936, 23068672, 212230144)
    assert sample.dirty_bytes_s == 5107 * 4096
    assert sample.height_bytes == pytest.approx(32 * MIB, rel=0.01)


def test_before_a_migration_qemu_says_nothing() -> None:
    assert sample_of(read_progress({}), 0.0) == Sample(at_s=0.0)


def test_expected_downtime_means_nothing_while_nothing_is_known_to_change() -> None:
    ram: dict[str, object] = {"total": 1, "remaining": 1, "mbps": 100.0, "dirty-pages-rate": 0}
    assert sample_of(read_progress({"status": "active", "expected-downtime": 300, "ram": ram}), 0.0).height_bytes == 0


def test_the_copies_of_disks_are_taken_together() -> None:
    following = DiskProgress(node="disk0", done_bytes=10, total_bytes=10, ready=True)
    copied = DiskProgress(node="disk1", done_bytes=30, total_bytes=100, ready=False)
    sample = sample_of(Progress(disks=(following, copied)), 1.0)
    assert (sample.disk_total_bytes, sample.disk_remaining_bytes, sample.disks_ready) == (110, 70, False)
    assert sample_of(Progress(disks=(following,)), 1.0).disks_ready


def test_a_rate_is_that_of_the_last_seconds() -> None:
    rate = Rate(window_s=5.0)
    assert rate.per_s is None
    rate.take(0, 0)
    assert rate.per_s is None
    rate.take(0, 10)
    assert rate.per_s is None
    for second in range(1, 11):
        rate.take(second, 10 + 100 * second)
    assert rate.per_s == 100
    for second in range(11, 30):
        rate.take(second, 1010)
    assert rate.per_s == 0


def test_a_count_that_begins_anew_is_another_stream() -> None:
    rate = Rate()
    rate.take(0, 1_000_000)
    rate.take(1, 2_000_000)
    rate.take(2, 5)
    assert rate.per_s is None
    rate.take(3, 15)
    assert rate.per_s == 10


def at(seconds: float, passes: int, remaining: int, height: int = 0, transferred: int = 0) -> Sample:
    return Sample(
        at_s=seconds, status="active", passes=passes, remaining_bytes=remaining, height_bytes=height, transferred_bytes=transferred
    )


def test_the_first_pass_says_nothing_about_changes() -> None:
    measuring = Measuring()
    assert measuring.halted_ms(5) is None
    for second in range(5):
        measuring.take(at(second, 1, 1000 - second))
    assert (measuring.lowest_bytes, measuring.highest_bytes, measuring.height_bytes) == (None, None, None)
    assert measuring.halted_ms(measuring.lowest_bytes) is None
    assert measuring.bytes_s is None


def test_the_height_of_a_pass_is_found_however_late_it_is_seen() -> None:
    measuring = Measuring()
    measuring.take(at(0, 1, 1000))
    measuring.take(at(1, 2, 300))
    measuring.take(at(2, 2, 100, height=500))
    assert measuring.height_bytes == 500
    measuring.take(at(3, 2, 50))
    assert measuring.height_bytes == 500


def test_passes_that_bring_nothing_are_counted_and_an_improvement_begins_anew() -> None:
    measuring = Measuring()
    for number, height in enumerate([1000, 600, 590, 610, 600], start=2):
        measuring.take(at(number, number, height))
    assert measuring.stalled_passes == 3
    measuring.take(at(9, 9, 580))  # two passes went by between two samples
    assert measuring.stalled_passes == 6
    measuring.take(at(10, 10, 100))
    assert measuring.stalled_passes == 0
    measuring.take(at(11, 11, 100))
    measuring.begin_counting_anew()
    assert measuring.stalled_passes == 0


def test_an_old_low_is_forgotten() -> None:
    measuring = Measuring()
    for number, height in enumerate([10, *[1000] * WINDOW_PASSES], start=2):
        measuring.take(at(number, number, height))
    assert measuring.lowest_bytes == 1000


def test_disks_that_do_not_move_have_no_end_in_sight() -> None:
    measuring = Measuring()
    for second in range(3):
        measuring.take(Sample(at_s=second, disk_total_bytes=100, disk_remaining_bytes=100, disks_ready=False))
    assert measuring.eta_s(300) is None


def test_memory_that_does_not_move_has_no_end_in_sight() -> None:
    measuring = Measuring()
    measuring.take(at(0, 1, 1000))
    measuring.take(at(1, 1, 1000))
    assert measuring.eta_s(300) is None


def test_convergence_is_a_sum_of_passes() -> None:
    # 100 + 50 + 25 + 12.5 seconds of sending at 1 byte/s until 12.5 bytes are within a limit of 20 s
    assert converging_s(100, 0.5, 1, 20_000) == pytest.approx(100 + 50 + 25 + 12.5)
    assert converging_s(100, 1.0, 1, 20_000) is None
    assert converging_s(100, 5.0, 1, 20_000, most_bytes=15) == pytest.approx(115)
    assert converging_s(100, 0.1, 1, 20_000, since_s=50) == pytest.approx(115)


@given(
    remaining=st.floats(1, 1e12),
    dirty=st.floats(0, 1e10),
    speed=st.floats(1e3, 1e10),
    limit=st.floats(1, 2e6),
    looser=st.floats(1, 10),
)
def test_a_looser_limit_or_a_calmer_guest_never_takes_longer(
    remaining: float, dirty: float, speed: float, limit: float, looser: float
) -> None:
    strict = converging_s(remaining, dirty, speed, limit)
    for other in (converging_s(remaining, dirty, speed, limit * looser), converging_s(remaining, dirty / looser, speed, limit)):
        if strict is not None:
            assert other is not None
            assert other <= strict * (1 + 1e-9)
