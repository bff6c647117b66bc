"""Logs are events with fields, and nothing that is logged can look like another event."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qmpd.logs import EventFormatter, JsonFormatter

ROOT = Path(__file__).parents[2]


def line(message: str, *, level: int = logging.INFO, **fields: object) -> str:
    record = logging.LogRecord("qmpd.test", level, "file.py", 1, message, (), None)
    vars(record).update(fields)
    return EventFormatter().format(record)


def test_an_event_is_a_line_with_its_fields() -> None:
    assert line("machine ended", machine="one", status=0, clean=True) == "INFO qmpd.test machine ended machine=one status=0 clean=True"
    assert line("nothing") == "INFO qmpd.test nothing"


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("two words", '"two words"'),
        ("", '""'),
        ("a\nERROR forged", '"a\\nERROR forged"'),
        ("\x1b[2J", "\\x1b[2J"),
        ("\u202e", "\\u202e"),
        ("\ud800", "\\ud800"),
        ("naïve", "naïve"),
        (b"bytes", "b'bytes'"),
    ],
)
def test_a_field_cannot_leave_its_place(value: object, shown: str) -> None:
    assert line("event", field=value) == f"INFO qmpd.test event field={shown}"


def test_a_field_is_cut_before_it_fills_the_disk() -> None:
    assert len(line("event", field="x" * 100_000)) < 600


def test_a_traceback_follows_on_lines_of_its_own() -> None:
    error = ValueError("of this")
    record = logging.LogRecord("qmpd.test", logging.ERROR, "file.py", 1, "failed", (), (ValueError, error, None))
    rows = EventFormatter().format(record).splitlines()
    assert rows[0] == "ERROR qmpd.test failed"
    assert rows[-1] == "ValueError: of this"


@pytest.mark.parametrize(("verbose", "levels"), [(False, ["INFO", "WARNING"]), (True, ["DEBUG", "INFO", "WARNING"])])
def test_logs_go_to_standard_error_in_the_detail_that_was_asked_for(verbose: bool, levels: list[str]) -> None:
    code = (
        "import logging\n"
        "from qmpd.logs import configure\n"
        f"configure(verbose={verbose})\n"
        "for level in (logging.DEBUG, logging.INFO, logging.WARNING):\n"
        "    logging.getLogger('qmpd').log(level, 'event', extra={'n': 1})\n"
        "    logging.getLogger('asyncio').log(level, 'chatter')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == ""
    assert done.stderr.splitlines() == [*(f"{level} qmpd event n=1" for level in levels), "WARNING asyncio chatter"]


def json_line(message: str, **fields: object) -> dict[str, Any]:
    record = logging.LogRecord("qmpd.test", logging.WARNING, "file.py", 1, message, (), None)
    vars(record).update(fields)
    text = JsonFormatter().format(record)
    assert "\n" not in text
    document: dict[str, Any] = json.loads(text)
    return document


def test_as_json_an_event_is_one_object_on_one_line() -> None:
    document = json_line("machine ended", machine="one\n", status=0, path=Path("/a"), odd="\ud800", none=None)
    assert document.pop("at").endswith("Z")
    fields = {"machine": "one\n", "status": 0, "path": "/a", "odd": "\\ud800", "none": None}
    assert document == {"level": "warning", "logger": "qmpd.test", "event": "machine ended", "fields": fields}


def test_as_json_a_traceback_is_a_value() -> None:
    assert json_line("failed", exc_info=(ValueError, ValueError("of this"), None))["traceback"] == "ValueError: of this"


def test_the_newest_lines_are_kept() -> None:
    code = (
        "import logging\n"
        "from qmpd.logs import KEPT_LINES, configure, recent_lines\n"
        "assert recent_lines() == []\n"
        "configure('json', verbose=False)\n"
        "for number in range(KEPT_LINES + 1):\n"
        "    logging.getLogger('qmpd').info('event', extra={'n': number})\n"
        "lines = recent_lines()\n"
        "print(len(lines) == KEPT_LINES, lines[0].endswith('Z INFO qmpd event n=1'))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "True True\n"
    assert json.loads(done.stderr.splitlines()[0])["fields"] == {"n": 0}
