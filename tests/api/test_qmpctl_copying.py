"""The command that copies a machine: what it asks the daemon for, and what it shows of the answer."""

from __future__ import annotations

import pytest

from qmpctl.__main__ import run
from qmpctl.exits import Exit
from qmpd.migrationviews import CopyReport, DryRunReport
from tests.api.standin import StandIn
from tests.api.test_qmpctl_migrating import FINDING, MIB, REPORT, asked_for, daemon, ended, moving

__all__ = ["daemon"]


def test_a_copy_is_asked_for_and_says_what_was_made(daemon: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    bare, named = asked_for(daemon, "--copy"), asked_for(daemon, "--copy", "--as", "lab2")
    assert isinstance(bare, dict)
    assert isinstance(named, dict)
    assert (bare["copy"], named["copy"]) == ({"name": None}, {"name": "lab2"})
    capsys.readouterr()
    report = CopyReport(
        id="1",
        machine="lab",
        peer="hostb",
        name="lab2",
        uuid="6f0c2a52-0d0b-4c39-a3c8-31c55b1f4c0e",
        total_ms=1234.0,
        halted_ms=7.0,
        transferred_bytes=34 * MIB,
        findings=(FINDING,),
        disks=REPORT.disks,
    )
    moving(daemon, ended(report))
    assert run(["migrate", "lab", "hostb", "--copy", "--as", "lab2"]) == Exit.OK
    assert capsys.readouterr().out.splitlines() == [
        "lab: copied to hostb as lab2 (guest halted for 7 ms, total 1.2 s, 34.0 MiB sent)",
        "  uuid 6f0c2a52-0d0b-4c39-a3c8-31c55b1f4c0e",
        "  disk 0: copied, /pool/lab.qcow2, 2.0 MiB",
        "  disk 1: shared, /nfs/data",
        r"  warning  mac-taken ($.nics): machine db\x1b[2J has the same MAC address",
        "           > change one",
    ]
    moving(daemon, ended(DryRunReport(machine="lab", peer="hostb", possible=True)))
    assert run(["migrate", "lab", "hostb", "--copy", "--dry-run"]) == Exit.OK
    assert capsys.readouterr().out == "lab: can be copied to hostb: nothing is in the way\n"


@pytest.mark.parametrize(
    ("words", "complaint"),
    [(["--as", "lab2"], "give --copy"), (["--copy", "--as", "Lab 2"], "copy.name"), (["--copy", "--as", ""], "copy.name")],
)
def test_a_name_for_no_copy_and_one_that_is_none_are_wrong_usage(
    daemon: StandIn, words: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["migrate", "lab", "hostb", *words]) == Exit.USAGE
    assert complaint in capsys.readouterr().err
    assert daemon.asked == []
