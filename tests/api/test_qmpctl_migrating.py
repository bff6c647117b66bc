"""The commands that move machines: what they ask the daemon for, and what they show of its answers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from qmpctl.__main__ import run
from qmpctl.exits import Exit
from qmpctl.journeys import progress_text
from qmpd.errors import NotFound, PeerUnavailable, WrongState
from qmpd.lifecycle import State
from qmpd.migrationviews import (
    DryRunReport,
    Goal,
    MigrationFinding,
    MigrationList,
    MigrationProgress,
    MigrationReport,
    MigrationView,
    MovedDisk,
    Prediction,
    Tuning,
)
from qmpd.views import JobView, Progress
from tests.api.qmpctl_process import on_screen
from tests.api.standin import StandIn, beside, documents_in, for_qmpctl, machine, machines

MIB = 1024 * 1024
FINDING = MigrationFinding(
    severity="warning", code="mac-taken", path="$.nics", message="machine db\x1b[2J has the same MAC address", mend="change one"
)
REPORT = MigrationReport(
    id="0123456789abcdef",
    machine="lab",
    peer="hostb",
    owner="destination",
    owner_name="hostb",
    total_ms=1234.0,
    downtime_ms=41.0,
    transferred_bytes=34 * MIB,
    passes=2,
    tuned=(Tuning(at_s=12.0, action="set", parameters={"downtime-limit": 500}, reason="the deadline is near"),),
    findings=(FINDING,),
    disks=(MovedDisk(disk=0, how="copied", path="/pool/lab.qcow2", bytes=2 * MIB), MovedDisk(disk=1, how="shared", path="/nfs/data")),
)
FIGURES = MigrationProgress(
    phase="memory",
    memory_total_bytes=64 * MIB,
    memory_remaining_bytes=12 * MIB,
    bandwidth_mib_s=101.5,
    dirty_mib_s=20.0,
    passes=3,
    throttle_percent=40,
    expected_downtime_ms=40.0,
    eta_s=8.0,
)


@pytest.fixture
def daemon(short_directory: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    with for_qmpctl(short_directory, monkeypatch) as standin:
        yield standin


def job(**changes: object) -> JobView:
    view = JobView(id="j1", kind="migrate", machine="lab", state="running", created_at="2026-01-01T00:00:00.000Z")
    return msgspec.structs.replace(view, **changes)


def ended(result: msgspec.Struct) -> JobView:
    return job(state="succeeded", result=msgspec.to_builtins(result))


def moving(daemon: StandIn, *endings: JobView) -> None:
    """Has the daemon begin a job that is seen under way once, and then as it ended."""
    daemon.answers["POST /v1/machines/lab/migrate"] = job()
    daemon.answers["GET /v1/jobs/j1"] = [job(progress=Progress(phase="memory", migration=FIGURES)), *endings]


def asked_for(daemon: StandIn, *words: str) -> object:
    daemon.answers["POST /v1/machines/lab/migrate"] = job()
    assert run(["migrate", "lab", "hostb", "--detach", *words]) == Exit.OK
    return daemon.last("POST /v1/machines/lab/migrate").body


def test_a_migration_is_waited_for_and_says_who_owns_the_machine(daemon: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    moving(daemon, ended(REPORT))
    assert run(["migrate", "lab", "hostb"]) == Exit.OK
    shown = capsys.readouterr()
    assert shown.out.splitlines() == [
        "lab: moved to hostb (downtime 41 ms, total 1.2 s, 34.0 MiB sent, 2 passes)",
        "  disk 0: copied, /pool/lab.qcow2, 2.0 MiB",
        "  disk 1: shared, /nfs/data",
        "  after 12.0 s: downtime-limit=500: the deadline is near",
        r"  warning  mac-taken ($.nics): machine db\x1b[2J has the same MAC address",
        "           > change one",
    ]
    assert shown.err == ""


def test_the_options_are_the_request(daemon: StandIn) -> None:
    body = asked_for(
        daemon,
        *("--downtime", "1s", "--deadline", "1h30min", "--then", "postcopy", "--bandwidth", "1GiB", "--auto-converge", "off"),
        *("--channels", "4", "--tunnel", "--copy-storage", "--accept", "known-trouble"),
        *("--disk", "1=shared", "--disk", "0=copy,path=/pool/x.qcow2,format=qcow2,base=/pool/b.raw"),
    )
    assert body == {
        "peer": "hostb",
        "dry_run": False,
        "goal": {"downtime_ms": 1000, "deadline_s": 5400.0, "then": "postcopy", "bandwidth_mib_s": 1024, "auto_converge": False},
        "storage": "copy",
        "disks": [
            {"disk": 1, "how": "shared", "path": None, "format": None, "base": None},
            {"disk": 0, "how": "copy", "path": "/pool/x.qcow2", "format": "qcow2", "base": "/pool/b.raw"},
        ],
        "channels": 4,
        "tunnel": True,
        "accept": ["known-trouble"],
        "copy": None,
    }


def test_without_options_the_daemon_decides(daemon: StandIn) -> None:
    body = asked_for(daemon)
    assert isinstance(body, dict)
    assert msgspec.convert(body["goal"], Goal) == Goal()
    assert (body["storage"], body["disks"], body["channels"]) == ("auto", [], 0)
    shared = asked_for(daemon, "--shared-storage")
    assert isinstance(shared, dict)
    assert shared["storage"] == "shared"


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--then", "pause"], "give a --deadline"),
        (["--copy-storage", "--shared-storage"], "either copied"),
        (["--downtime", "300"], "is not a time like 300ms"),
        (["--downtime", "2h"], "downtime_ms"),
        (["--bandwidth", "100"], "is not an amount"),
        (["--bandwidth", "1KiB"], "is not an amount"),
        (["--deadline", "none"], "is not a time"),
        (["--disk", "copy"], "is not N=copy"),
        (["--disk", "0=copy,path"], "is not N=copy"),
        (["--disk", "0=copy,size=3"], "is not N=copy"),
        (["--disk", "0=move"], "how"),
    ],
)
def test_what_makes_no_sense_is_wrong_usage(daemon: StandIn, words: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["migrate", "lab", "hostb", *words]) == Exit.USAGE
    assert complaint in capsys.readouterr().err
    assert daemon.asked == []


def test_a_migration_that_is_not_waited_for_is_a_job(daemon: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    asked_for(daemon)
    assert capsys.readouterr().out == "j1\n"
    assert run(["migrate", "lab", "hostb", "--detach", "--json"]) == Exit.OK
    assert json.loads(capsys.readouterr().out)["id"] == "j1"


@pytest.mark.parametrize(
    ("report", "line"),
    [
        ({"owner": "source", "owner_name": "hosta", "reason": "the deadline has passed"}, "lab: stays at hosta: the deadline has passed"),
        ({"owner": "unknown", "owner_name": ""}, "lab: nobody can say who owns it: no reason is known"),
    ],
)
def test_a_machine_that_did_not_arrive_says_where_it_is(
    daemon: StandIn, report: dict[str, str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    moving(daemon, ended(msgspec.structs.replace(REPORT, **report)))
    assert run(["migrate", "lab", "hostb"]) == Exit.NO
    assert capsys.readouterr().out.splitlines()[0] == line


def test_a_report_says_what_is_out_of_the_ordinary(daemon: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    bare = MigrationReport(id="1", machine="lab", peer="b", owner="destination", owner_name="b")
    moving(daemon, ended(bare))
    assert run(["migrate", "lab", "b"]) == Exit.OK
    assert capsys.readouterr().out == "lab: moved to b\n"
    moving(daemon, ended(msgspec.structs.replace(bare, postcopy=True, tunnelled=True, encrypted=False)))
    assert run(["migrate", "lab", "b"]) == Exit.OK
    assert capsys.readouterr().out == "lab: moved to b (postcopy, through the API, not encrypted)\n"
    moving(daemon, ended(bare))
    assert run(["migrate", "lab", "b", "--json"]) == Exit.OK
    assert json.loads(capsys.readouterr().out)["owner"] == "destination"


def test_an_error_of_the_job_is_shown_with_what_was_in_the_way(daemon: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    details = {"findings": [msgspec.to_builtins(FINDING)]}
    moving(daemon, job(state="failed", error={"code": "wrong_state", "message": "it cannot be moved", "details": details}))
    assert run(["migrate", "lab", "hostb"]) == Exit.CONFLICT
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "it cannot be moved" in shown.err
    assert r"warning  mac-taken ($.nics): machine db\x1b[2J has" in shown.err


def test_a_migration_that_was_cancelled_left_the_machine_where_it_was(daemon: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    moving(daemon, job(state="cancelled"))
    assert run(["migrate", "lab", "hostb"]) == Exit.NO
    assert capsys.readouterr().err == "lab: cancelled: the machine is where it was\n"


def test_a_dry_run_lists_what_is_in_the_way_and_what_it_would_take(daemon: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    prediction = Prediction(memory_bytes=1, disk_bytes=0, bandwidth_mib_s=100, reachable=True, explanation="it takes about 11 s at most")
    error = MigrationFinding(severity="error", code="name-taken", message="taken")
    report = DryRunReport(machine="lab", peer="hostb", possible=False, findings=(error, FINDING, FINDING), prediction=prediction)
    moving(daemon, ended(report))
    assert run(["migrate", "lab", "hostb", "--dry-run"]) == Exit.NO
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "lab: cannot be moved to hostb: 1 error, 2 warnings"
    assert lines[1] == "  error    name-taken: taken"
    assert lines[-1] == "  it takes about 11 s at most"
    moving(daemon, ended(DryRunReport(machine="lab", peer="hostb", possible=True)))
    assert run(["migrate", "lab", "hostb", "--dry-run"]) == Exit.OK
    assert capsys.readouterr().out == "lab: can be moved to hostb: nothing is in the way\n"


async def test_a_terminal_shows_how_far_it_is_and_an_interrupt_leaves_it_alone(short_directory: Path) -> None:
    standin = StandIn()
    standin.answers["POST /v1/machines/lab/migrate"] = job()
    standin.answers["GET /v1/jobs/j1"] = job(progress=Progress(phase="memory", done=52.0, total=64.0, migration=FIGURES))
    with beside(standin, short_directory / "s"):
        async with on_screen(short_directory / "s", "migrate", "lab", "hostb") as screen:
            await screen.until(b"moving lab to hostb")
            await screen.until(b"12.0 MiB left")
            screen.process.send_signal(2)
            await screen.until(b"goes on; it is cancelled with: qmpctl cancel j1")
            assert await screen.ended() == 130
    assert all(asked.method == "GET" or asked.path.endswith("/migrate") for asked in standin.asked)


def test_progress_is_one_line_with_what_is_known() -> None:
    assert progress_text(FIGURES) == (
        "memory, 12.0 MiB left, 101.5 MiB/s, 8.0 s to go, downtime ≈ 40 ms, 20.0 MiB/s changed, pass 3, slowed by 40 %"
    )
    assert progress_text(MigrationProgress(phase="done", downtime_ms=1500.0)) == "done, downtime 1.5 s"
    assert progress_text(MigrationProgress()) == ""


def test_jobs_show_the_figures_of_a_migration(daemon: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    daemon.answers["GET /v1/jobs/j1"] = job(progress=Progress(phase="memory", migration=FIGURES))
    assert run(["job", "j1"]) == Exit.OK
    assert "12.0 MiB left" in capsys.readouterr().out


VIEW = MigrationView(
    id="0123456789abcdef",
    machine="lab",
    role="source",
    peer="hostb",
    phase="prepared",
    owner="source",
    began_at="2026-01-01T00:00:00.000Z",
    goal=Goal(deadline_s=60, bandwidth_mib_s=10),
    progress=FIGURES,
)


def test_a_goal_is_changed_by_what_is_given(daemon: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    daemon.answers["PATCH /v1/machines/lab/migration"] = VIEW
    assert (
        run(["migration-tune", "lab", "--deadline", "none", "--bandwidth", "none", "--auto-converge", "on", "--downtime", "2s"]) == Exit.OK
    )
    body = daemon.last("PATCH /v1/machines/lab/migration").body
    assert body == {"downtime_ms": 2000, "deadline_s": 0.0, "then": None, "bandwidth_mib_s": 0, "auto_converge": True}
    shown = capsys.readouterr().out
    assert "deadline   60 s, then pause" in shown
    assert "10 MiB/s" in shown
    assert "hostb (to there)" in shown
    assert run(["migration-tune", "lab", "--then", "abort", "--json"]) == Exit.OK
    assert json.loads(capsys.readouterr().out)["phase"] == "prepared"


def test_a_goal_is_not_changed_by_nothing(daemon: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["migration-tune", "lab"]) == Exit.USAGE
    assert "say what is to change" in capsys.readouterr().err
    assert daemon.asked == []


def test_migrations_are_a_table(daemon: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    over = msgspec.structs.replace(VIEW, role="destination", progress=None, report=REPORT)
    doubt = msgspec.structs.replace(VIEW, doubt="hostb does not answer")
    bare = msgspec.structs.replace(VIEW, progress=None)
    daemon.answers["GET /v1/migrations"] = MigrationList(migrations=(VIEW, over, doubt, bare))
    assert run(["migrations", "--machine", "lab"]) == Exit.OK
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ["MIGRATION", "MACHINE", "PEER", "PHASE", "OWNER", "BEGAN", "REMARK"]
    assert "12.0 MiB left" in rows[0]
    assert "from hostb" in rows[1]
    assert "lab: moved to hostb" in rows[1]
    assert rows[2].endswith("hostb does not answer")
    assert daemon.last("GET /v1/migrations").query == {"machine": ["lab"]}
    assert run(["migrations", "--json"]) == Exit.OK
    assert len(json.loads(capsys.readouterr().out)["migrations"]) == 4


def test_a_migration_is_resolved_on_somebodys_word_only(daemon: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    bare = msgspec.structs.replace(VIEW, goal=None, progress=None, role="destination", doubt="its source does not answer")
    daemon.answers["POST /v1/machines/lab/migration/resolve"] = bare
    assert run(["migration-resolve", "lab", "--yes"]) == Exit.USAGE
    assert run(["migration-resolve", "lab", "--take"]) == Exit.USAGE
    assert "--yes" in capsys.readouterr().err
    assert daemon.asked == []
    for action in ("keep", "take", "discard", "moved"):
        assert run(["migration-resolve", "lab", f"--{action}", "--yes"]) == Exit.OK
        assert daemon.last("POST /v1/machines/lab/migration/resolve").body == {"action": action, "confirm": "lab"}
    assert "hostb (from there)" in capsys.readouterr().out


async def test_on_a_terminal_it_is_asked_for(short_directory: Path) -> None:
    standin = StandIn()
    standin.answers["POST /v1/machines/lab/migration/resolve"] = VIEW
    with beside(standin, short_directory / "s"):
        async with on_screen(short_directory / "s", "migration-resolve", "lab", "--keep") as screen:
            await screen.until(b"does not run at the destination. Did you make sure")
            screen.press(b"n\n")
            assert await screen.ended() == 130
    assert standin.asked == []


# Draining


def test_a_host_is_drained_to_its_peers_in_turn(daemon: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    daemon.answers["GET /v1/machines"] = machines(machine("a"), machine("b", State.PAUSED), machine("c"), machine("off", State.STOPPED))
    for name in "abc":
        daemon.answers[f"POST /v1/machines/{name}/migrate"] = job(id=f"j-{name}", machine=name)
        daemon.answers[f"GET /v1/jobs/j-{name}"] = ended(msgspec.structs.replace(REPORT, machine=name))
    assert run(["drain", "hostb", "hostc", "--parallel", "1", "--label", "tier=web"]) == Exit.OK
    shown = capsys.readouterr()
    assert [line for line in shown.out.splitlines() if not line.startswith(" ")] == [
        f"{name}: moved to hostb (downtime 41 ms, total 1.2 s, 34.0 MiB sent, 2 passes)" for name in "abc"
    ]
    assert shown.err == "off: left here: it is stopped\n"
    bodies = [daemon.last(f"POST /v1/machines/{name}/migrate").body for name in "abc"]
    assert [body["peer"] for body in bodies if isinstance(body, dict)] == ["hostb", "hostc", "hostb"]
    assert daemon.last("GET /v1/machines").query == {"label": ["tier=web"]}


def test_what_does_not_run_is_drained_as_well(daemon: StandIn) -> None:
    daemon.answers["GET /v1/machines"] = machines(machine("lab", State.STOPPED))
    moving(daemon, ended(REPORT))
    assert run(["drain", "hostb", "--all"]) == Exit.OK
    moving(daemon, ended(DryRunReport(machine="lab", peer="hostb", possible=True)))
    assert run(["drain", "hostb", "--all", "--dry-run"]) == Exit.OK
    bodies = [asked.body for asked in daemon.asked if asked.route.endswith("/migrate")]
    assert [body["dry_run"] for body in bodies if isinstance(body, dict)] == [False, True]


def test_what_one_peer_does_not_take_another_one_may(daemon: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    daemon.answers["GET /v1/machines"] = machines(machine("lab"))
    refused = job(state="failed", error={"code": "cannot_move", "message": "no room", "details": {}})
    daemon.answers["POST /v1/machines/lab/migrate"] = [PeerUnavailable("hostb is down"), job(), job()]
    daemon.answers["GET /v1/jobs/j1"] = [refused, ended(msgspec.structs.replace(REPORT, owner_name="hostd"))]
    assert run(["drain", "hostb", "hostc", "hostd", "--json"]) == Exit.OK
    (document,) = documents_in(capsys.readouterr().out)
    assert json.loads(document)["owner_name"] == "hostd"
    posted = [asked.body for asked in daemon.asked if asked.method == "POST"]
    assert [body["peer"] for body in posted if isinstance(body, dict)] == ["hostb", "hostc", "hostd"]


def test_what_no_peer_takes_stays_and_is_told(daemon: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    daemon.answers["GET /v1/machines"] = machines(machine("lab"), machine("web"))
    daemon.answers["POST /v1/machines/lab/migrate"] = PeerUnavailable("hostb is down")
    daemon.answers["POST /v1/machines/web/migrate"] = WrongState("it is being saved", state="running", allowed=[])
    assert run(["drain", "hostb", "hostc", "--parallel", "1"]) == Exit.UNAVAILABLE
    assert capsys.readouterr().err.splitlines() == ["qmpctl: lab: hostb is down", "qmpctl: web: it is being saved"]
    assert len([asked for asked in daemon.asked if asked.path == "/v1/machines/web/migrate"]) == 1


def test_a_drain_that_is_rehearsed_says_which_could_move(daemon: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    daemon.answers["GET /v1/machines"] = machines(machine("lab"))
    moving(daemon, ended(DryRunReport(machine="lab", peer="hostb", possible=True)))
    assert run(["drain", "hostb", "--dry-run"]) == Exit.OK
    assert capsys.readouterr().out == "lab: can be moved to hostb: nothing is in the way\n"
    body = daemon.last("POST /v1/machines/lab/migrate").body
    assert isinstance(body, dict)
    assert body["dry_run"] is True


def test_draining_takes_a_goal_that_makes_sense(daemon: StandIn) -> None:
    assert run(["drain", "hostb", "--then", "abort"]) == Exit.USAGE
    assert run(["drain"]) == Exit.USAGE
    assert daemon.asked == []


def test_an_unknown_machine_is_said_to_be_one(daemon: StandIn) -> None:
    daemon.answers["POST /v1/machines/lab/migrate"] = NotFound("there is no machine lab")
    assert run(["migrate", "lab", "hostb"]) == Exit.NOT_FOUND
