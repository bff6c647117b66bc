"""Times and amounts are read and shown as people write them."""

from __future__ import annotations

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpctl.quantities import DurationType, SizeType, amount, duration

MIB = 1024 * 1024


@pytest.mark.parametrize(
    ("text", "seconds"), [("300ms", 0.3), ("90s", 90), ("1h30min", 5400), ("2d", 172_800), ("1.5min", 90), ("1min0.5s", 60.5)]
)
def test_times_are_written_as_people_do(text: str, seconds: float) -> None:
    assert DurationType().convert(text, None, None) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "1", "s", "1 s", "-1s", "1sec", "1s!", "none"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(click.UsageError):
        DurationType().convert(text, None, None)


@pytest.mark.parametrize(("text", "mib"), [("100MiB", 100), ("1.5GiB", 1536), ("2TiB", 2 * 1024 * 1024), ("2048KiB", 2), ("10MiB/s", 10)])
def test_amounts_are_written_as_people_do(text: str, mib: int) -> None:
    assert SizeType().convert(text, None, None) == mib


@pytest.mark.parametrize("text", ["", "1", "MiB", "1MB", "0.5MiB", "0MiB", "-1MiB", "none"])
def test_what_is_no_amount_is_refused(text: str) -> None:
    with pytest.raises(click.UsageError):
        SizeType().convert(text, None, None)


def test_a_limit_may_be_taken_away() -> None:
    assert DurationType(limit=True).convert("none", None, None) == SizeType(limit=True).convert("none", None, None) == 0


def test_amounts_and_times_are_shown_in_units_that_fit() -> None:
    assert [amount(count) for count in (0, 1023, 1536, 3 * MIB, 5 * 1024**3, 7 * 1024**4, 9 * 1024**5)] == [
        *("0 B", "1023 B", "1.5 KiB", "3.0 MiB", "5.0 GiB", "7.0 TiB", "9216.0 TiB")
    ]
    assert [duration(seconds) for seconds in (0, 0.041, 1, 59.94, 61, 3599.7, 3661)] == [
        *("0 ms", "41 ms", "1.0 s", "59.9 s", "1 min 1 s", "1 h 0 min", "1 h 1 min")
    ]


@given(st.floats(0, 1e15))
def test_every_amount_has_a_unit(count: float) -> None:
    assert amount(count).split()[1] in {"B", "KiB", "MiB", "GiB", "TiB"}
    assert duration(count)
