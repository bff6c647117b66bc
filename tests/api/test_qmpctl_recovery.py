"""The commands for QEMUs that are out of sight, and for those that somebody else started."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from qmpctl.__main__ import run
from qmpctl.exits import Exit
from qmpd.errors import MonitorUnavailable, NotProven
from qmpd.lifecycle import State
from qmpd.processviews import AdoptedView, ProcessView, TroubleView
from tests.api.standin import StandIn, for_qmpctl, machine, stopped

PROCESS = ProcessView(
    pid=7, kind="foreign", user="alice", started_at="2026-01-01T00:00:00.000Z", command=("qemu-system-x86_64", "-name", "a\x1b[2J")
)


@pytest.fixture
def daemon(short_directory: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    with for_qmpctl(short_directory, monkeypatch) as standin:
        yield standin


def test_reattach_shows_the_state_or_what_failed(daemon: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    daemon.answers["POST /v1/machines/lab/reattach"] = [machine(), MonitorUnavailable("no monitor at /x")]
    assert run(["reattach", "lab"]) == Exit.OK
    assert capsys.readouterr().out == "lab: running\n"
    assert run(["reattach", "lab"]) == Exit.QEMU
    assert capsys.readouterr().err == "qmpctl: lab: no monitor at /x\n"


def test_power_off_says_how_it_ended(daemon: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    daemon.answers["POST /v1/machines/lab/power-off"] = [stopped(), NotProven("process 7 is another QEMU")]
    assert run(["power-off", "lab"]) == Exit.OK
    assert capsys.readouterr().out == "lab: stopped (quit)\n"
    assert run(["power-off", "lab"]) == Exit.CONFLICT


def test_forget_needs_to_be_confirmed(daemon: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    daemon.answers["POST /v1/machines/lab/forget"] = None
    assert run(["forget", "lab"]) == Exit.USAGE
    assert "--yes" in capsys.readouterr().err
    assert daemon.asked == []
    assert run(["forget", "lab", "--yes"]) == run(["forget", "lab", "--yes", "--json"]) == Exit.OK
    assert daemon.asked[0].body == {"confirm": "lab"}
    first, *document = capsys.readouterr().out.splitlines()
    assert first == "lab: forgotten"
    assert json.loads("".join(document)) == {"machine": "lab", "forgotten": True}


def test_processes_are_a_table_that_cannot_steer_a_terminal(daemon: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    daemon.answers["GET /v1/processes"] = [[PROCESS]]
    assert run(["processes"]) == Exit.OK
    header, row = capsys.readouterr().out.splitlines()
    assert header.split() == ["PID", "KIND", "MACHINE", "USER", "AGE", "COMMAND"]
    assert row.split()[:4] == ["7", "foreign", "-", "alice"]
    assert row.endswith("qemu-system-x86_64 -name a\\x1b[2J")
    assert run(["processes", "--json"]) == Exit.OK
    assert json.loads(capsys.readouterr().out)[0]["pid"] == 7


def test_adopt_says_what_is_fixed_and_what_is_unknown(daemon: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    adopted = AdoptedView(at="t", qmp="/q", fixed=("console: stays",), unknown=("device odd",))
    daemon.answers["POST /v1/adopt"] = machine(adopted=adopted, pid=7)
    assert run(["adopt", "--pid", "7", "--name", "lab"]) == Exit.OK
    assert daemon.asked[0].body == {"pid": 7, "qmp": None, "name": "lab"}
    assert capsys.readouterr().out.splitlines()[1:] == ["  fixed    console: stays", "  unknown  device odd"]
    assert run(["adopt", "--qmp", "/q", "--json"]) == Exit.OK
    assert json.loads(capsys.readouterr().out)["adopted"]["unknown"] == ["device odd"]


@pytest.mark.parametrize("words", [[], ["--name", "lab"], ["--qmp", "relative"], ["--pid", "0"], ["--pid", "7", "--name", "No Name"]])
def test_a_process_must_be_named_well(daemon: StandIn, words: list[str]) -> None:
    assert run(["adopt", *words]) == Exit.USAGE
    assert daemon.asked == []


def test_show_tells_what_is_wrong_with_the_connection(daemon: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    trouble = TroubleView(reason="no monitor at /x", since="t", tried_at="t", attempts=3)
    daemon.answers["GET /v1/machines/lab"] = machine(state=State.UNREACHABLE, trouble=trouble, adopted=AdoptedView(at="t", qmp="/q"))
    assert run(["show", "lab"]) == Exit.OK
    shown = capsys.readouterr().out
    assert "no monitor at /x (tried 3 times)" in shown
    assert "t, monitor at /q" in shown
