from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import click
import msgspec
import pytest

from qmpctl.__main__ import COMMANDS, cli, run
from qmpctl.exits import EXPLAINED, Exit
from qmpd import errors
from qmpd.board import Board, Memory, NamedBoard
from qmpd.errors import QmpdError
from qmpd.lifecycle import State
from qmpd.views import (
    BoardView,
    CheckLine,
    CheckReport,
    DiskErrorView,
    EmulatorView,
    ErrorBody,
    ExitView,
    HostShutdownView,
    JobList,
    JobView,
    MachineEnd,
    Progress,
    Version,
)
from tests.api.standin import StandIn, documents_in, for_qmpctl, machine, machines, stopped

JOB = JobView(id="j1", kind="shutdown", machine="lab", state="running", created_at="t", progress=Progress(phase="waiting"))


@pytest.fixture
def daemon(short_directory: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    with for_qmpctl(short_directory, monkeypatch) as standin:
        yield standin


def test_every_command_can_be_asked_for_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == Exit.OK
    listed = capsys.readouterr().out
    for name in COMMANDS:
        assert f"  {name} " in listed
        assert run([name, "--help"]) == Exit.OK
        assert capsys.readouterr().out.startswith(f"Usage: qmpctl {name} ")


def test_every_command_takes_the_global_options() -> None:
    context = click.Context(cli)
    for name in set(COMMANDS) - {"completion"}:
        command = cli.get_command(context, name)
        assert command is not None
        assert {"json", "socket"} <= {parameter.name for parameter in command.get_params(context)}


def test_the_exit_codes_are_in_the_help() -> None:
    for code in Exit:
        assert f"{int(code)} " in EXPLAINED


@pytest.mark.parametrize("words", [["--json", "show", "lab"], ["show", "lab", "--json"], ["show", "--json", "lab"]])
def test_global_options_stand_before_or_after_the_command(daemon: StandIn, capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    daemon.answers["GET /v1/machines/lab"] = machine()
    assert run(words) == Exit.OK
    assert msgspec.json.decode(capsys.readouterr().out, type=type(machine())) == machine()


def test_the_socket_can_be_named_after_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["list", "--socket", "/nowhere/s"]) == Exit.UNAVAILABLE
    error = capsys.readouterr().err
    assert error.startswith("qmpctl: cannot connect to /nowhere/s: there is no such socket")
    assert "systemctl start qmpd" in error


@pytest.mark.parametrize(
    "words", [["fly"], ["show"], ["list", "--state", "asleep"], ["list", "--label", "x"], ["wait", "lab"], ["console", "--json", "x"]]
)
def test_wrong_usage_is_said_on_stderr(capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    assert run(words) == Exit.USAGE
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "qmpctl: " in captured.err


def test_no_command_shows_the_help_and_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([]) == Exit.USAGE
    assert "Commands:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.NotFound("m"), Exit.NOT_FOUND),
        (errors.WrongState("m"), Exit.CONFLICT),
        (errors.Held("m"), Exit.CONFLICT),
        (errors.AlreadyExists("m"), Exit.CONFLICT),
        (errors.StaleRevision("m"), Exit.CONFLICT),
        (errors.LaunchFailed("m"), Exit.QEMU),
        (errors.QemuSilent("m"), Exit.QEMU),
        (errors.MonitorUnavailable("m"), Exit.QEMU),
        (errors.NotYet("m"), Exit.NO),
        (errors.NoSpace("m"), Exit.OTHER),
        (errors.Forbidden("m"), Exit.OTHER),
        (QmpdError("m"), Exit.OTHER),
    ],
    ids=lambda value: value.code if isinstance(value, QmpdError) else "",
)
def test_the_exit_code_says_what_kind_of_failure_it_was(
    daemon: StandIn, capsys: pytest.CaptureFixture[str], error: QmpdError, code: Exit
) -> None:
    daemon.answers["GET /v1/machines/lab"] = error
    assert run(["show", "lab"]) == code
    assert capsys.readouterr().err == "qmpctl: m\n"


def test_a_failed_launch_shows_qemus_stderr_without_its_escapes(daemon: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    daemon.answers["POST /v1/machines/lab/start"] = errors.LaunchFailed("QEMU ended", stderr="bad \x1b[31moption\nsecond")
    assert run(["start", "lab"]) == Exit.QEMU
    assert capsys.readouterr().err == "qmpctl: lab: QEMU ended\n  stderr: bad \\x1b[31moption\n  stderr: second\n"


def test_show_says_how_a_machine_ended(daemon: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    how = ExitView(code=1, reason="guest-panic", at="t", stderr_tail="tail\x07")
    daemon.answers["GET /v1/machines/lab"] = machine(state=State.CRASHED, exit=how, labels={"b": "2", "a": "1"}, pid=5)
    assert run(["show", "lab"]) == Exit.OK
    shown = capsys.readouterr().out
    assert "not clean, exit code 1, guest-panic" in shown
    assert "stderr: tail\\x07" in shown
    assert "a=1, b=2" in shown


def test_several_machines_are_started_and_the_failures_named(daemon: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    daemon.answers |= {"POST /v1/machines/a/start": machine("a"), "POST /v1/machines/b/start": machine("b")}
    assert run(["start", "a", "none", "b", "a"]) == Exit.NOT_FOUND
    captured = capsys.readouterr()
    assert sorted(captured.out.splitlines()) == ["a: running", "b: running"]
    assert captured.err == "qmpctl: none: there is no /v1/machines/none/start\n"
    assert len([asked for asked in daemon.asked if asked.path == "/v1/machines/a/start"]) == 1


def test_the_end_of_a_machine_says_how(daemon: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    daemon.answers |= {"POST /v1/machines/lab/stop": stopped(), "POST /v1/machines/lab/kill": stopped()}
    assert run(["stop", "lab"]) == run(["kill", "lab", "--json"]) == Exit.OK
    first, second = capsys.readouterr().out.splitlines()
    assert first == "lab: stopped (quit)"
    assert json.loads(second)["method"] == "quit"


@pytest.mark.parametrize("verb", ["reset", "pause", "resume"])
def test_verbs_show_the_new_state(daemon: StandIn, capsys: pytest.CaptureFixture[str], verb: str) -> None:
    daemon.answers[f"POST /v1/machines/lab/{verb}"] = machine(state=State.PAUSED)
    assert run([verb, "lab"]) == Exit.OK
    assert capsys.readouterr().out == "lab: paused\n"


def test_a_shutdown_is_waited_for(daemon: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    ended = msgspec.structs.replace(JOB, state="succeeded", result={"method": "acpi"})
    daemon.answers |= {"POST /v1/machines/lab/shutdown": JOB, "GET /v1/jobs/j1": [JOB, ended]}
    assert run(["shutdown", "lab", "--timeout", "5", "--then", "kill"]) == Exit.OK
    assert daemon.asked[0].body == {"timeout_s": 5.0, "then": "kill"}
    assert "succeeded" in capsys.readouterr().out


def test_a_guest_that_does_not_obey_makes_shutdown_say_no(daemon: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    failed = msgspec.structs.replace(JOB, state="failed", error={"code": "not_yet", "message": "it still runs", "details": {}})
    daemon.answers |= {"POST /v1/machines/lab/shutdown": JOB, "GET /v1/jobs/j1": failed}
    assert run(["shutdown", "lab"]) == Exit.NO
    assert capsys.readouterr().err == "qmpctl: it still runs\n"


def test_all_machines_are_shut_down_and_how_each_ended_is_told(daemon: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    ends = HostShutdownView(machines=(MachineEnd(machine="a", method="acpi", clean=True), MachineEnd(machine="b", method="sigkill")))
    ended = msgspec.structs.replace(JOB, state="succeeded", result=msgspec.to_builtins(ends))
    daemon.answers |= {"POST /v1/shutdown": JOB, "GET /v1/jobs/j1": [JOB, ended]}
    assert run(["shutdown", "--all", "--timeout", "5", "--then", "kill"]) == Exit.OK
    assert daemon.asked[0].body == {"timeout_s": 5.0, "then": "kill"}
    assert capsys.readouterr().out == "a: ended (acpi)\nb: ended (sigkill, not clean)\n"
    assert run(["--json", "shutdown", "--all"]) == Exit.OK
    assert [json.loads(line)["method"] for line in capsys.readouterr().out.splitlines()] == ["acpi", "sigkill"]


def test_a_machine_that_is_still_there_after_all_were_shut_down_is_a_no(daemon: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    left = MachineEnd(machine="a", error=ErrorBody(code="qemu_silent", message="it is deaf"))
    ended = msgspec.structs.replace(JOB, state="succeeded", result=msgspec.to_builtins(HostShutdownView(machines=(left,), left=1)))
    daemon.answers |= {"POST /v1/shutdown": JOB, "GET /v1/jobs/j1": ended}
    assert run(["shutdown", "--all"]) == Exit.NO
    assert daemon.asked[0].body == {"timeout_s": None, "then": "stop"}
    assert capsys.readouterr().out == "a: still there: it is deaf\n"
    failed = msgspec.structs.replace(JOB, state="failed", error={"code": "internal", "message": "a mistake", "details": {}})
    daemon.answers["GET /v1/jobs/j1"] = failed
    assert run(["shutdown", "--all"]) != Exit.OK


@pytest.mark.parametrize("words", [["shutdown"], ["shutdown", "lab", "--all"], ["shutdown", "--all", "--then", "nothing"]])
def test_a_shutdown_is_of_one_machine_or_of_all(daemon: StandIn, words: list[str]) -> None:
    assert run(words) == Exit.USAGE
    assert daemon.asked == []


@pytest.mark.parametrize(("command", "protected"), [("protect", True), ("unprotect", False)])
def test_protection_is_a_change_of_the_definition_as_it_is(
    daemon: StandIn, capsys: pytest.CaptureFixture[str], command: str, protected: bool
) -> None:
    changed = machine(protected=protected)
    daemon.answers |= {"GET /v1/machines/lab": machine(revision=7), "PATCH /v1/machines/lab": changed}
    assert run([command, "lab"]) == Exit.OK
    asked = daemon.last("PATCH /v1/machines/lab")
    assert (asked.body, asked.headers["If-Match"]) == ({"protected": protected}, '"7"')
    assert capsys.readouterr().out == f"lab: {'protected' if protected else 'not protected'}\n"
    assert run(["--json", command, "lab"]) == Exit.OK
    assert json.loads(capsys.readouterr().out)["protected"] is protected


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (DiskErrorView(device="disk0-image", disk=0, nospace=True), "disks[0]: the host's disk is full; resume lets it go on"),
        (DiskErrorView(device="sda", reason="Input/output error"), "sda: Input/output error; resume lets it go on"),
        (DiskErrorView(device="sda"), "sda: an error of the host's disk; resume lets it go on"),
    ],
)
def test_a_machine_that_is_halted_by_its_disk_says_so(
    daemon: StandIn, capsys: pytest.CaptureFixture[str], error: DiskErrorView, told: str
) -> None:
    daemon.answers["GET /v1/machines/lab"] = machine(disk_error=error, protected=True)
    assert run(["show", "lab"]) == Exit.OK
    shown = capsys.readouterr().out
    assert told in shown
    assert "protected" in shown


def test_wait_passes_all_states_on(daemon: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    daemon.answers["GET /v1/machines/lab/wait"] = machine()
    assert run(["wait", "lab", "--state", "running", "--state", "paused", "--timeout", "3"]) == Exit.OK
    assert daemon.asked[0].query == {"state": ["running", "paused"], "timeout_s": ["3.0"]}
    assert capsys.readouterr().out == "lab: running\n"


def test_jobs_are_listed_and_shown(daemon: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    job = msgspec.structs.replace(JOB, progress=Progress(phase="copying", done=1, total=4, unit="MiB", eta_s=3))
    daemon.answers |= {"GET /v1/jobs": JobList(jobs=(job,)), "GET /v1/jobs/j1": job, "POST /v1/jobs/j1/cancel": job}
    assert run(["jobs", "--machine", "lab"]) == Exit.OK
    assert "copying 1/4 MiB 3 s left" in capsys.readouterr().out
    assert run(["job", "j1"]) == run(["cancel", "j1"]) == Exit.OK
    assert capsys.readouterr().out.count("progress  copying 1/4 MiB") == 2


@pytest.mark.parametrize(("state", "code"), [("succeeded", Exit.OK), ("cancelled", Exit.NO), ("interrupted", Exit.NO)])
def test_waiting_for_a_job_exits_as_it_ended(daemon: StandIn, state: str, code: Exit) -> None:
    ended = msgspec.convert({**msgspec.to_builtins(JOB), "state": state}, JobView)
    daemon.answers["GET /v1/jobs/j1"] = [JOB, JOB, ended]
    assert run(["job", "j1", "--wait"]) == code


@pytest.mark.parametrize("ok", [True, False])
def test_check_says_no_when_anything_failed(daemon: StandIn, capsys: pytest.CaptureFixture[str], ok: bool) -> None:
    line = CheckLine(topic="kvm", subject="/dev/kvm", verdict="pass" if ok else "fail", found="absent", meaning="slow", mend="modprobe kvm")
    daemon.answers["GET /v1/check"] = CheckReport(ok=ok, lines=(line,))
    assert run(["check"]) == (Exit.OK if ok else Exit.NO)
    assert ("mend: modprobe kvm" in capsys.readouterr().out) is not ok


def test_version_shows_its_own_even_without_a_daemon(daemon: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    daemon.answers["GET /v1/version"] = Version(version="9.9", pid=1, started_at="t", machines_running=0)
    assert run(["version"]) == Exit.OK
    assert "daemon            9.9 (API v1)" in capsys.readouterr().out
    assert run(["version", "--json"]) == Exit.OK
    assert json.loads(capsys.readouterr().out)["daemon"]["version"] == "9.9"
    assert run(["version", "--socket", "/nowhere"]) == Exit.UNAVAILABLE
    assert capsys.readouterr().out.startswith("qmpctl")


def test_a_list_is_plain_and_complete_without_a_terminal(daemon: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    line = "login: \x1b[5m" + "x" * 300
    daemon.answers["GET /v1/machines"] = machines(machine(console_line=line), machine("other", State.STOPPED, accel=None))
    assert run(["list", "--label", "a=b", "--state", "running"]) == Exit.OK
    header, first, second = capsys.readouterr().out.splitlines()
    assert header.split()[:3] == ["NAME", "STATE", "BOARD"]
    assert first.split()[:6] == ["lab", "running", "riscv64-virt", "tcg", "1", "256"]
    assert first.endswith(r"login: \x1b[5m" + "x" * 300)
    assert second.split()[:4] == ["other", "stopped", "riscv64-virt", "-"]
    assert daemon.asked[-1].query == {"label": ["a=b"], "state": ["running"]}


def test_the_catalogue_is_shown(daemon: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    view = BoardView(id="b", title="Board", arch="arm", machine="m", emulator="e", runnable=True, accel="tcg", memory_mib=128, max_cpus=1)
    board = NamedBoard(
        id="b", source="/x/b.toml", board=Board(title="B", arch="arm", emulators=("arm",), machine="m", memory=Memory(default_mib=8))
    )
    emulator = EmulatorView(
        name="arm", path="/e", target="arm", version="7", machines=1, cpus=2, devices=3, kvm=False, kvm_reason="foreign"
    )
    daemon.answers |= {"GET /v1/boards": [[view]], "GET /v1/boards/b": board, "GET /v1/emulators": [[emulator]]}
    assert run(["boards", "arm"]) == run(["board", "b"]) == run(["emulators"]) == Exit.OK
    out = capsys.readouterr().out
    assert all(text in out for text in ("128 MiB", "# b, from /x/b.toml", "default_mib = 8", "foreign"))
    assert run(["boards", "--json"]) == run(["board", "b", "--json"]) == run(["emulators", "--json"]) == Exit.OK
    assert json.loads(documents_in(capsys.readouterr().out)[0])[0]["id"] == "b"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script_for_each_shell(capsys: pytest.CaptureFixture[str], shell: str) -> None:
    assert run(["completion", shell]) == Exit.OK
    assert "_QMPCTL_COMPLETE" in capsys.readouterr().out


def complete(monkeypatch: pytest.MonkeyPatch, words: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    monkeypatch.setenv("_QMPCTL_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(len(words.split(" ")) - 1))
    with pytest.raises(SystemExit):
        run([])
    return [line.removeprefix("plain,") for line in capsys.readouterr().out.splitlines() if line]


def test_completion_knows_machines_and_boards(daemon: StandIn, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    board = BoardView(id="board-1", title="", arch="a", machine="m", emulator=None, runnable=False, accel=None, memory_mib=1, max_cpus=1)
    daemon.answers |= {
        "GET /v1/machines": machines(machine("lab-1"), machine("other")),
        "GET /v1/boards": [[board]],
        "GET /v1/jobs": JobList(jobs=(JOB,)),
    }
    assert complete(monkeypatch, "qmpctl show la", capsys) == ["lab-1"]
    assert complete(monkeypatch, "qmpctl run b", capsys) == ["board-1"]
    assert complete(monkeypatch, "qmpctl job ", capsys) == ["j1"]
    assert complete(monkeypatch, "qmpctl sh", capsys) == ["show", "shutdown"]


def test_completion_is_silent_without_a_daemon(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert complete(monkeypatch, "qmpctl --socket /nowhere show la", capsys) == []
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("answer", [errors.NotFound("x"), b"not json", {"machines": 5}, [["x"]], {"machines": [{"name": 5}]}])
def test_completion_is_silent_about_answers_it_cannot_read(
    daemon: StandIn, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], answer: object
) -> None:
    daemon.answers["GET /v1/machines"] = answer
    assert complete(monkeypatch, "qmpctl show la", capsys) == []
