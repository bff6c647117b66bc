"""What the benchmark makes of its samples: figures, tables, JSON, charts; and one row measured for real."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.lib import bench_table
from scripts.lib.bench import PAGE, ROOT, SUBJECTS, as_json, read
from scripts.lib.bench_figures import Report, limited, paired, percentile, plain, risen
from scripts.lib.bench_plot import bar_of, draw
from tests.unavailable import tool

#: A daemon, two machines and a floor; on a shared host all of it takes a while.
REAL_LIMIT_S = 240


def report() -> Report:
    return Report(
        machine="a computer",
        versions="qmpd 1, QEMU 2",
        rows=(
            paired("start", "start", ours=[30.0, 20.0, 100.0], floor=[30.0, 20.0, 50.0], libvirt=[500.0], times=1.25),
            limited("memory", "memory", measured=50.0, limit=60.0, unit="MiB", samples=2, axis="cycles", points=[(1, 49.0), (2, 50.0)]),
            plain("events", "events", measured=1234.5, unit="/s", samples=1),
        ),
    )


def test_a_ratio_is_that_of_the_middle_pair_and_not_of_the_medians() -> None:
    row = paired("x", "x", ours=[10.0, 40.0, 9.0], floor=[5.0, 40.0, 10.0], times=1.25)

    assert (row.measured, row.floor, row.ratio, row.holds) == (10.0, 10.0, 1.0, True)


def test_a_ratio_above_its_bar_is_missed_and_one_without_a_bar_is_neither() -> None:
    assert paired("x", "x", ours=[13.0], floor=[10.0], times=1.25).holds is False
    assert paired("x", "x", ours=[13.0], floor=[10.0]).holds is None


def test_samples_that_are_not_pairs_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        paired("x", "x", ours=[1.0, 2.0], floor=[1.0])


def test_an_absolute_bar_holds_up_to_itself() -> None:
    assert limited("x", "x", measured=50.0, limit=50.0, unit="ms", samples=1).holds
    assert not limited("x", "x", measured=50.1, limit=50.0, unit="ms", samples=1).holds


@pytest.mark.parametrize(("percent", "expected"), [(0, 1), (50, 50), (99, 99), (100, 100)])
def test_a_percentile_is_one_of_the_samples(percent: float, expected: float) -> None:
    assert percentile([float(number) for number in range(100, 0, -1)], percent) == expected


def test_memory_that_rises_at_first_and_then_stays_is_flat() -> None:
    assert risen([10.0, 30.0, *[50.0] * 8]) == 0.0


def test_memory_that_rises_all_the_time_is_not_flat() -> None:
    assert risen([float(number) for number in range(100)]) == 60.0


def test_one_sample_has_not_risen() -> None:
    assert risen([50.0]) == 0.0


def test_a_report_misses_its_bars_when_one_row_does() -> None:
    missed = limited("x", "x", measured=2.0, limit=1.0, unit="s", samples=1)

    assert report().rows[0].holds
    assert report().holds
    assert not Report(machine="", versions="", rows=(*report().rows, missed)).holds


def test_the_table_has_a_line_per_row_and_its_numbers_end_in_line() -> None:
    machine, versions, empty, headings, *lines = bench_table.text(report()).splitlines()

    assert (machine, versions, empty) == ("a computer", "qmpd 1, QEMU 2", "")
    assert [line.split()[0] for line in lines] == ["start", "memory", "events"]
    end = headings.index("qmpd") + len("qmpd")
    assert [line[:end].split()[-1] for line in lines] == ["ms", "MiB", "/s"]
    assert lines[0].endswith("1.00  <= 1.25 x  holds")


@pytest.mark.parametrize(
    ("value", "unit", "expected"), [(None, "ms", ""), (0.123, "s", "0.12 s"), (12.34, "ms", "12.3 ms"), (123456.7, "us", "123,457 us")]
)
def test_a_number_has_as_many_digits_as_it_deserves(value: float | None, unit: str, expected: str) -> None:
    assert bench_table.amount(value, unit) == expected


def test_json_can_be_read_again(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(as_json(report()), encoding="utf-8")

    assert json.loads(as_json(report()))["rows"][0]["ratio"] == 1.0
    assert read(tmp_path / "report.json") == report()


def test_the_table_of_the_documentation_is_replaced_and_the_rest_stays(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{bench_table.BEGIN}\nyesterday\n{bench_table.END}\nafter\n", encoding="utf-8")

    bench_table.write_docs(page, report())
    once = page.read_text(encoding="utf-8")
    bench_table.write_docs(page, report())

    assert page.read_text(encoding="utf-8") == once
    assert once.startswith(f"before\n{bench_table.BEGIN}\na computer; qmpd 1, QEMU 2.\n\n| what |")
    assert once.endswith(f"{bench_table.END}\nafter\n")
    assert "yesterday" not in once


def test_a_page_without_a_place_for_the_table_is_left_alone(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("text\n", encoding="utf-8")

    with pytest.raises(ValueError, match="no place"):
        bench_table.write_docs(page, report())
    assert page.read_text(encoding="utf-8") == "text\n"


def test_the_page_explains_every_subject_and_has_a_place_for_the_table() -> None:
    text = PAGE.read_text(encoding="utf-8")

    assert not [subject for subject in SUBJECTS if f"`{subject}`" not in text]
    assert text.index(bench_table.BEGIN) < text.index(bench_table.END)


def test_a_bar_in_times_the_floor_is_drawn_and_an_absolute_one_is_not() -> None:
    assert [bar_of(row) for row in report().rows] == [1.25, None, None]


@pytest.mark.parametrize(("name", "begins"), [("charts.svg", b"<?xml"), ("charts.png", b"\x89PNG")])
def test_all_charts_go_into_one_picture(name: str, begins: bytes, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="charts need the extra `bench`")

    assert draw(report(), tmp_path / name) == [tmp_path / name]
    assert (tmp_path / name).read_bytes().startswith(begins)


def test_a_directory_gets_a_chart_each_and_the_same_figures_give_the_same_files(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="charts need the extra `bench`")

    written = draw(report(), tmp_path / "charts")
    first = [path.read_bytes() for path in written]

    assert [path.name for path in written] == ["summary.svg", "memory-1.svg"]
    assert [path.read_bytes() for path in draw(report(), tmp_path / "charts")] == first


@pytest.mark.qemu
def test_a_row_is_measured_for_real_and_leaves_nothing_behind(short_directory: Path) -> None:
    tool("qemu-system-x86_64", "qemu-system-x86")
    command = [sys.executable, "-m", "scripts.lib.bench", "stop", "--repeat", "1", "--no-libvirt", "--json"]
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(short_directory)}
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=REAL_LIMIT_S)

    assert done.returncode in {0, 1}, done.stderr
    (row,) = json.loads(done.stdout)["rows"]
    assert row["floor"] > 0
    assert row["ratio"] == pytest.approx(row["measured"] / row["floor"])
    assert row["holds"] is (row["ratio"] <= 1.5)
    assert done.returncode == (0 if row["holds"] else 1)
    assert not list(short_directory.iterdir())
