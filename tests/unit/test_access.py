"""Who may pass which QMP command through."""

from __future__ import annotations

import pytest

from qmpd.access import OUT_OF_BAND, OWN, Caller, check_command, only_reads
from qmpd.errors import Forbidden, Invalid

ANYBODY = Caller(uid=1000)
TRUSTED = Caller(user="admin", unrestricted=True)


@pytest.mark.parametrize("command", ["query-status", "query-anything-new", "qom-get", "qom-list", "qom-list-types"])
def test_everybody_may_read(command: str) -> None:
    assert only_reads(command)
    check_command(command, ANYBODY, oob=False)


@pytest.mark.parametrize("command", ["stop", "quit", "qom-set", "x-query-status", "human-monitor-command", "querystatus"])
def test_only_trusted_callers_change_something(command: str) -> None:
    assert not only_reads(command)
    check_command(command, TRUSTED, oob=False)
    with pytest.raises(Forbidden, match="qmp_users") as refused:
        check_command(command, ANYBODY, oob=False)
    assert refused.value.details["command"] == command


@pytest.mark.parametrize("command", sorted(OWN))
def test_nobody_touches_the_monitor_session_itself(command: str) -> None:
    for caller in (ANYBODY, TRUSTED):
        with pytest.raises(Forbidden, match="never passed through"):
            check_command(command, caller, oob=False)


@pytest.mark.parametrize("command", sorted(OUT_OF_BAND))
def test_out_of_band_is_for_trusted_callers_and_few_commands(command: str) -> None:
    check_command(command, TRUSTED, oob=True)
    with pytest.raises(Forbidden):
        check_command(command, ANYBODY, oob=True)


def test_a_command_that_cannot_go_out_of_band_is_told_which_can() -> None:
    with pytest.raises(Invalid, match="migrate-pause") as refused:
        check_command("query-status", TRUSTED, oob=True)
    assert refused.value.problems[0].path == "$.oob"


@pytest.mark.parametrize(("caller", "name"), [(Caller(user="ada", uid=7), "ada"), (Caller(uid=7), "uid 7"), (Caller(), "this caller")])
def test_a_refusal_names_the_caller(caller: Caller, name: str) -> None:
    with pytest.raises(Forbidden, match=f"^{name} may send only"):
        check_command("stop", caller, oob=False)
