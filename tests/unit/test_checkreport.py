"""The report of `qmpd check`, as people and as programs read it."""

from __future__ import annotations

import io
from pathlib import Path

import msgspec
import pytest

from qmpd import checkcommand, checkreport
from qmpd.settings import user_defaults
from qmpd.views import CheckLine, CheckReport
from tests.unit.standin_emulator import make

REPORT = CheckReport(
    ok=False,
    lines=(
        CheckLine(topic="One", subject="good", verdict="pass", found="there"),
        CheckLine(
            topic="One", subject="odd \x1b[2J", verdict="warn", found="w " * 60, meaning="It\nmatters.", mend="sudo mend " + "it " * 60
        ),
        CheckLine(topic="Two", subject="bad", verdict="fail", found="gone", meaning="Nothing works."),
    ),
)


def test_a_report_reads_like_a_list() -> None:
    rows = checkreport.text(REPORT, width=60).splitlines()
    assert rows[:2] == ["One", "  pass  good         there"]
    assert rows[-5:] == ["Two", "  fail  bad          gone", "        Nothing works.", "", rows[-1]]
    assert rows[-1] == "1 pass, 1 warn, 1 fail. No machine can run here until the failures are mended."
    assert "        It\\nmatters." in rows


def test_a_report_wraps_prose_but_not_commands() -> None:
    rows = checkreport.text(REPORT, width=60).splitlines()
    assert [row for row in rows if len(row) > 60 and not row.startswith("        > ")] == [rows[-1]]
    assert str(REPORT.lines[1].mend) in "\n".join(rows)


def test_a_report_cannot_move_the_cursor() -> None:
    assert "\x1b" not in checkreport.text(REPORT)


def test_a_report_is_coloured_only_when_asked() -> None:
    assert "\x1b[32mpass\x1b[0m" in checkreport.text(REPORT, colour=True)


def test_an_empty_report_is_a_summary() -> None:
    assert checkreport.text(CheckReport(ok=True, lines=())).strip().endswith("Machines can run here.")


def test_the_command_prints_the_report_and_tells_the_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "bin" / "qemu-system-toy")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    settings = user_defaults("ada", str(tmp_path), {})
    output = io.StringIO()
    assert checkcommand.run(True, settings, output=output) == 0
    report = msgspec.json.decode(output.getvalue(), type=CheckReport)
    assert report.ok
    assert "QEMU 9.8.7" in {line.subject for line in report.lines}
    output = io.StringIO()
    assert checkcommand.run(False, settings, output=output) == 0
    assert output.getvalue().endswith("Machines can run here.\n")
    assert "\x1b" not in output.getvalue()


def test_the_command_fails_where_nothing_can_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    output = io.StringIO()
    assert checkcommand.run(False, user_defaults("ada", str(tmp_path), {}), output=output) == 1
    assert "No machine can run here" in output.getvalue()


class Terminal(io.StringIO):
    """Something people look at."""

    def isatty(self) -> bool:
        """Terminals are."""
        return True


def test_on_a_terminal_the_command_says_that_it_is_busy_and_takes_it_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("NO_COLOR", raising=False)
    output, progress = Terminal(), Terminal()
    checkcommand.run(False, user_defaults("ada", str(tmp_path), {}), output=output, progress=progress)
    assert progress.getvalue() == checkcommand.PATIENCE + checkcommand.ERASE
    assert "\x1b[1;31mfail\x1b[0m" in output.getvalue()
