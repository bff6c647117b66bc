"""The command that swaps the QEMU under a machine: what it asks the daemon for, and what it shows of the answer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from qmpctl.__main__ import run
from qmpctl.exits import Exit
from qmpd.migrationviews import UpgradeReport
from qmpd.views import JobView
from tests.api.standin import StandIn, for_qmpctl

BEGIN = "POST /v1/machines/lab/upgrade-emulator"
JOB = JobView(id="j1", kind="upgrade-emulator", machine="lab", state="running", created_at="2026-01-01T00:00:00.000Z")
REPORT = UpgradeReport(
    machine="lab",
    emulator="/usr/bin/qemu-system-x86_64",
    emulator_version="10.0.7",
    before="/usr/bin/qemu-system-x86_64",
    before_version="7.2.22",
    pid=12,
    before_pid=11,
    downtime_ms=48.0,
    total_ms=900.0,
    problems=("port 80 is taken\x1b[2J",),
)


@pytest.fixture
def daemon(short_directory: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    with for_qmpctl(short_directory, monkeypatch) as standin:
        standin.answers[BEGIN] = JOB
        yield standin


def ending(daemon: StandIn, **fields: object) -> None:
    daemon.answers["GET /v1/jobs/j1"] = msgspec.structs.replace(JOB, **fields)


def test_it_is_waited_for_and_says_which_qemu_took_whose_place(daemon: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    ending(daemon, state="succeeded", result=msgspec.to_builtins(REPORT))
    assert run(["upgrade-emulator", "lab"]) == Exit.OK
    assert capsys.readouterr().out.splitlines() == [
        "lab: QEMU 7.2.22 -> 10.0.7 (downtime 48 ms, pid 12)",
        r"  port 80 is taken\x1b[2J",
    ]
    assert run(["upgrade-emulator", "lab", "--json"]) == Exit.OK
    assert json.loads(capsys.readouterr().out)["pid"] == 12


def test_another_qemu_can_be_named_and_the_job_left_alone(daemon: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["upgrade-emulator", "lab", "--emulator", "/opt/qemu/bin/qemu-system-x86_64", "--detach"]) == Exit.OK
    assert capsys.readouterr().out == "j1\n"
    assert daemon.last(BEGIN).body == {"emulator": "/opt/qemu/bin/qemu-system-x86_64"}
    assert run(["upgrade-emulator", "lab", "--detach", "--json"]) == Exit.OK
    assert json.loads(capsys.readouterr().out)["id"] == "j1"
    assert run(["upgrade-emulator", "lab", "--emulator", "../qemu"]) == Exit.USAGE


def test_one_that_failed_is_told_with_its_reason(daemon: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    ending(daemon, state="failed", error={"code": "launch_failed", "message": "QEMU ended", "details": {}})
    assert run(["upgrade-emulator", "lab"]) != Exit.OK
    assert "QEMU ended" in capsys.readouterr().err
