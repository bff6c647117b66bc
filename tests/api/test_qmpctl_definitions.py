from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from qmpctl.__main__ import run
from qmpctl.exits import Exit
from qmpd import errors
from qmpd.errors import Invalid, Problem
from qmpd.spec import MachineSpec
from qmpd.views import (
    CheckReport,
    CommandView,
    DefinitionView,
    ExpectResult,
    JobList,
    JobView,
    Progress,
    ValidationReport,
)
from tests.api.standin import StandIn, documents_in, for_qmpctl, machine

SPEC = MachineSpec(name="lab", board="riscv64-virt", memory_mib=256)


DEFINITION = DefinitionView(spec=SPEC, revision=7, created_at="t", changed_at="t")


PROBLEMS = (Problem(path="$.cpu.count", message="too many"), Problem(path="$.disks[0].path", message="missing \x1b[2J"))


JOB = JobView(id="j1", kind="shutdown", machine="lab", state="running", created_at="t", progress=Progress(phase="waiting"))


@pytest.fixture
def daemon(short_directory: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    with for_qmpctl(short_directory, monkeypatch) as standin:
        yield standin


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "lab.toml"
    path.write_text('name = "lab"\nboard = "riscv64-virt"\nmemory_mib = 256\n')
    return str(path)


def test_validate_prints_every_problem_with_file_and_path(daemon: StandIn, file: str, capsys: pytest.CaptureFixture[str]) -> None:
    warning = (Problem(path="$.cpu", message="odd"),)
    daemon.answers["POST /v1/validate"] = ValidationReport(ok=False, problems=PROBLEMS, warnings=warning)
    assert run(["validate", file]) == Exit.NO
    assert capsys.readouterr().out.splitlines() == [
        f"{file}: $.cpu.count: too many",
        f"{file}: $.disks[0].path: missing \\x1b[2J",
        f"{file}: $.cpu: warning: odd",
    ]
    daemon.answers["POST /v1/validate"] = ValidationReport(ok=True)
    assert run(["validate", file]) == Exit.OK


def test_validate_finds_structural_problems_without_a_daemon(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.toml").write_text('name = "lab"\nbaord = "b"\ncpu.count = "2"\n')
    assert run(["validate", str(tmp_path / "x.toml"), "--socket", "/nowhere"]) == Exit.NO
    out = capsys.readouterr().out
    assert all(path in out for path in ("$.baord", "$.cpu.count", "$.board: this field is required"))
    assert run(["validate", str(tmp_path / "x.toml"), "--json"]) == Exit.NO
    assert json.loads(capsys.readouterr().out)["ok"] is False


def test_validate_says_what_is_no_document(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.toml").write_text("name = ")
    assert run(["validate", str(tmp_path / "x.toml")]) == Exit.NO
    assert "x.toml: Invalid value (at end of document" in capsys.readouterr().err


def test_create_names_every_problem(daemon: StandIn, file: str, capsys: pytest.CaptureFixture[str]) -> None:
    daemon.answers["POST /v1/machines"] = Invalid("$.cpu.count: too many (and 1 more)", PROBLEMS)
    assert run(["create", file]) == Exit.NO
    assert capsys.readouterr().err.splitlines() == [
        "qmpctl: 2 problems in what was asked for",
        "  $.cpu.count: too many",
        "  $.disks[0].path: missing \\x1b[2J",
    ]


def test_create_can_name_and_start_the_machine(daemon: StandIn, file: str, capsys: pytest.CaptureFixture[str]) -> None:
    daemon.answers["POST /v1/machines"] = machine("other")
    assert run(["create", file, "--name", "other", "--start"]) == Exit.OK
    assert daemon.asked[0].body == {"name": "other", "board": "riscv64-virt", "memory_mib": 256}
    assert daemon.asked[0].query == {"start": ["true"]}
    assert capsys.readouterr().out == "other: created, running\n"
    assert run(["create", file, "--paused"]) == Exit.USAGE


def test_replace_is_made_from_the_stored_revision_or_the_given_one(daemon: StandIn, file: str) -> None:
    daemon.answers |= {"GET /v1/machines/lab/definition": DEFINITION, "PUT /v1/machines/lab": machine()}
    assert run(["replace", file]) == Exit.OK
    assert daemon.last("PUT /v1/machines/lab").headers["If-Match"] == '"7"'
    assert run(["replace", file, "--revision", "3"]) == Exit.OK
    assert daemon.last("PUT /v1/machines/lab").headers["If-Match"] == '"3"'


def test_delete_names_what_is_gone(daemon: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    daemon.answers |= {"DELETE /v1/machines/a": None, "DELETE /v1/machines/b": None}
    assert run(["delete", "a", "b"]) == Exit.OK
    assert sorted(capsys.readouterr().out.splitlines()) == ["a: deleted", "b: deleted"]


def test_a_printed_definition_is_what_replace_reads(daemon: StandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    daemon.answers |= {"GET /v1/machines/lab/definition": DEFINITION, "PUT /v1/machines/lab": machine()}
    for form in ("toml", "json"):
        assert run(["definition", "lab", "--format", form]) == Exit.OK
        path = tmp_path / f"lab.{form}"
        path.write_text(capsys.readouterr().out)
        assert run(["replace", str(path)]) == Exit.OK
        assert msgspec.convert(daemon.last("PUT /v1/machines/lab").body, MachineSpec) == SPEC
        capsys.readouterr()


def test_the_command_of_a_file_or_a_machine_is_one_option_per_line(daemon: StandIn, file: str, capsys: pytest.CaptureFixture[str]) -> None:
    view = CommandView(argv=("q", "-S"), text="q \\\n  -S\n", emulator_version="7.2", accel="tcg", accel_reason="foreign")
    daemon.answers |= {"POST /v1/command": view, "GET /v1/machines/lab/command": view}
    for source in (file, "lab"):
        assert run(["command", source]) == Exit.OK
        assert capsys.readouterr().out == "q \\\n  -S\n"


@pytest.mark.parametrize(
    ("words", "route", "answer"),
    [
        (["definition", "lab"], "GET /v1/machines/lab/definition", DEFINITION),
        (["cancel", "j1"], "POST /v1/jobs/j1/cancel", JOB),
        (["jobs"], "GET /v1/jobs", JobList(jobs=(JOB,))),
        (
            ["command", "lab"],
            "GET /v1/machines/lab/command",
            CommandView(argv=("q",), text="q", emulator_version="7", accel="tcg", accel_reason=""),
        ),
        (["start", "lab"], "POST /v1/machines/lab/start", machine()),
        (["check"], "GET /v1/check", CheckReport(ok=True, lines=())),
        (["expect", "lab", "x"], "POST /v1/machines/lab/expect", ExpectResult(matched=True, reason="matched", text="x")),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_json_is_the_view_itself(
    daemon: StandIn, capsys: pytest.CaptureFixture[str], words: list[str], route: str, answer: msgspec.Struct
) -> None:
    daemon.answers[route] = answer
    assert run([*words, "--json"]) == Exit.OK
    assert msgspec.json.decode(capsys.readouterr().out, type=type(answer)) == answer


def test_changes_as_json_are_documents_too(daemon: StandIn, file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    daemon.answers |= {
        "POST /v1/machines": machine(),
        "PUT /v1/machines/lab": machine(),
        "DELETE /v1/machines/lab": None,
        "POST /v1/machines/lab/send-key": None,
        "GET /v1/machines/lab/screenshot": b"PNG",
    }
    commands = (
        ["create", file],
        ["replace", file, "--revision", "1"],
        ["delete", "lab"],
        ["send-key", "lab", "a"],
        ["screenshot", "lab", str(tmp_path / "x")],
    )
    for words in commands:
        assert run(["--json", *words]) == Exit.OK
    documents = [json.loads(text) for text in documents_in(capsys.readouterr().out)]
    assert [set(document) for document in documents[2:]] == [{"deleted"}, {"machine", "pressed"}, {"file", "bytes"}]


@pytest.fixture
def editor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Sets $EDITOR to a sed script."""

    def set_script(script: str) -> None:
        monkeypatch.setenv("VISUAL", f"sed -i -e '{script}'")

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return set_script


def test_edit_replaces_what_was_changed(daemon: StandIn, editor: Callable[[str], None], capsys: pytest.CaptureFixture[str]) -> None:
    editor("s/256/512/")
    daemon.answers |= {"GET /v1/machines/lab/definition": DEFINITION, "PUT /v1/machines/lab": machine(revision=8)}
    assert run(["edit", "lab"]) == Exit.OK
    assert daemon.last("PUT /v1/machines/lab").body == {"name": "lab", "board": "riscv64-virt", "memory_mib": 512}
    assert daemon.last("PUT /v1/machines/lab").headers["If-Match"] == '"7"'
    assert capsys.readouterr().out == "lab: replaced, now revision 8\n"


def test_edit_without_a_change_does_nothing(daemon: StandIn, editor: Callable[[str], None], capsys: pytest.CaptureFixture[str]) -> None:
    editor("")
    daemon.answers["GET /v1/machines/lab/definition"] = DEFINITION
    assert run(["edit", "lab"]) == Exit.OK
    assert capsys.readouterr().out == "lab: not changed\n"


def test_edit_keeps_what_was_refused(daemon: StandIn, editor: Callable[[str], None], capsys: pytest.CaptureFixture[str]) -> None:
    editor("s/256/-1/")
    daemon.answers["GET /v1/machines/lab/definition"] = DEFINITION
    assert run(["edit", "lab"]) == Exit.NO
    error = capsys.readouterr().err
    assert "$.memory_mib" in error
    kept = error.splitlines()[-1].removeprefix("qmpctl: what you wrote is in ")
    assert "memory_mib = -1" in Path(kept).read_text()


def test_edit_that_comes_too_late_is_a_conflict(daemon: StandIn, editor: Callable[[str], None]) -> None:
    editor("s/256/512/")
    daemon.answers |= {"GET /v1/machines/lab/definition": DEFINITION, "PUT /v1/machines/lab": errors.StaleRevision("changed", revision=9)}
    assert run(["edit", "lab"]) == Exit.CONFLICT
