from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from aiohttp import web

from qmpctl import attachment
from qmpctl.__main__ import run
from qmpctl.exits import Exit
from qmpd import errors
from qmpd.lifecycle import State
from qmpd.views import ExitView, ExpectResult
from qmpd_api.streams_client import ConsoleFrame
from tests.api.standin import Asked, Channel, StandIn, for_qmpctl, machine, stopped


@pytest.fixture
def daemon(short_directory: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    monkeypatch.setattr(attachment, "RECONNECT_EVERY_S", 0)
    nothing = os.open(os.devnull, os.O_RDONLY)
    monkeypatch.setattr(attachment, "STDIN", nothing)
    with for_qmpctl(short_directory, monkeypatch) as standin:
        standin.answers |= {
            "POST /v1/machines": machine(state=State.STOPPED),
            "POST /v1/machines/lab/start": machine(),
            "GET /v1/machines/lab": machine(),
            "POST /v1/machines/lab/stop": stopped(),
            "POST /v1/machines/lab/kill": stopped(),
            "DELETE /v1/machines/lab": None,
        }
        standin.channels["/v1/machines/lab/console"] = printing(b"hello\n")
        yield standin
    os.close(nothing)


def printing(*pieces: bytes) -> Channel:
    """A console that prints the pieces, one per connection, and then ends."""
    left = list(pieces)

    async def guest(socket: web.WebSocketResponse, asked: Asked) -> None:
        offset = int(asked.query.get("since", ["0"])[0])
        frames = [ConsoleFrame(kind="hello", offset=offset), ConsoleFrame(kind="output", offset=offset, data=left.pop(0))]
        for frame in (*frames, *(() if left else (ConsoleFrame(kind="ended"),))):
            await socket.send_bytes(msgspec.msgpack.encode(frame))

    return guest


def routes(daemon: StandIn) -> list[str]:
    return [asked.route for asked in daemon.asked]


def test_run_defines_starts_and_attaches(daemon: StandIn, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    assert run(["run", "riscv64-virt", "--name", "lab", "--memory", "64", "--append", "x", "--kernel", "/k"]) == Exit.OK
    assert routes(daemon)[:2] == ["POST /v1/machines", "POST /v1/machines/lab/start"]
    assert daemon.asked[0].body == {
        "name": "lab", "board": "riscv64-virt", "memory_mib": 64, "kernel": {"image": "/k", "append": "x"}
    }  # fmt: skip
    assert daemon.last("GET /v1/machines/lab/console").query == {"since": ["0"]}
    assert capfdbinary.readouterr().out == b"hello\n"
    assert "DELETE /v1/machines/lab" not in routes(daemon)


def test_a_machine_that_is_not_kept_is_stopped_and_deleted(daemon: StandIn) -> None:
    assert run(["run", "b", "--name", "lab", "--rm"]) == Exit.OK
    assert routes(daemon)[-2:] == ["POST /v1/machines/lab/stop", "DELETE /v1/machines/lab"]


def test_a_machine_that_ended_by_itself_is_only_deleted(daemon: StandIn) -> None:
    daemon.answers["GET /v1/machines/lab"] = [machine(), machine(state=State.STOPPED)]
    assert run(["run", "b", "--name", "lab", "--rm"]) == Exit.OK
    assert "POST /v1/machines/lab/stop" not in routes(daemon)
    assert routes(daemon)[-1] == "DELETE /v1/machines/lab"


def test_a_machine_that_does_not_stop_is_killed_before_it_is_deleted(daemon: StandIn) -> None:
    daemon.answers["POST /v1/machines/lab/stop"] = errors.QemuSilent("silent")
    assert run(["run", "b", "--name", "lab", "--rm"]) == Exit.OK
    assert routes(daemon)[-2:] == ["POST /v1/machines/lab/kill", "DELETE /v1/machines/lab"]


def test_a_machine_that_cannot_be_deleted_is_named(daemon: StandIn, capfd: pytest.CaptureFixture[str]) -> None:
    daemon.answers["DELETE /v1/machines/lab"] = errors.Held("a backup runs")
    assert run(["run", "b", "--name", "lab", "--rm"]) == Exit.OK
    assert "qmpctl: lab could not be deleted: a backup runs" in capfd.readouterr().err


def test_a_failed_start_leaves_the_definition_and_says_so(daemon: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    daemon.answers["POST /v1/machines/lab/start"] = errors.LaunchFailed("QEMU ended", stderr="no such file")
    assert run(["run", "b", "--name", "lab"]) == Exit.QEMU
    error = capsys.readouterr().err
    assert "lab stays defined; `qmpctl delete lab` deletes it" in error
    assert "stderr: no such file" in error
    assert run(["run", "b", "--name", "lab", "--rm"]) == Exit.QEMU
    assert routes(daemon)[-1] == "DELETE /v1/machines/lab"


def test_a_name_is_made_of_the_boards_and_made_again_when_taken(daemon: StandIn) -> None:
    daemon.answers["POST /v1/machines"] = [errors.AlreadyExists("taken"), machine()]
    board = "b" * 63
    assert run(["run", board, "--no-console"]) == Exit.NOT_FOUND  # the stand-in does not know the name that was made up
    names = [asked.body["name"] for asked in daemon.asked[:2] if isinstance(asked.body, dict)]
    assert all(re.fullmatch(r"b{58}-[0-9a-f]{4}", name) for name in names)
    assert len(set(names)) == 2


def test_a_given_name_that_is_taken_is_a_conflict(daemon: StandIn) -> None:
    daemon.answers["POST /v1/machines"] = errors.AlreadyExists("taken")
    assert run(["run", "b", "--name", "lab"]) == Exit.CONFLICT
    assert len(daemon.asked) == 1


def test_without_a_console_the_machine_is_shown(daemon: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["run", "b", "--name", "lab", "--no-console"]) == Exit.OK
    assert capsys.readouterr().out == "lab: running\n"
    assert run(["run", "b", "--name", "lab", "--json"]) == Exit.OK
    assert json.loads(capsys.readouterr().out)["name"] == "lab"


def test_without_a_console_a_machine_that_is_not_kept_is_waited_for(daemon: StandIn) -> None:
    daemon.answers["GET /v1/machines/lab/wait"] = [errors.NotYet("it runs"), machine(state=State.STOPPED)]
    daemon.answers["GET /v1/machines/lab"] = machine(state=State.STOPPED)
    assert run(["run", "b", "--name", "lab", "--no-console", "--rm"]) == Exit.OK
    waits = "GET /v1/machines/lab/wait"
    assert routes(daemon)[-4:] == [waits, waits, "GET /v1/machines/lab", "DELETE /v1/machines/lab"]


@pytest.mark.parametrize(("matched", "code"), [(True, Exit.OK), (False, Exit.NO)])
def test_expect_decides_the_exit_code(daemon: StandIn, capsys: pytest.CaptureFixture[str], matched: bool, code: Exit) -> None:
    daemon.answers["POST /v1/machines/lab/expect"] = ExpectResult(
        matched=matched, reason="matched" if matched else "timeout", text="login:"
    )
    assert run(["run", "b", "--name", "lab", "--rm", "--expect", "login:", "--timeout", "9"]) == code
    body = daemon.last("POST /v1/machines/lab/expect").body
    assert isinstance(body, dict)
    assert (body["pattern"], body["timeout_s"], body["from_start"]) == ("login:", 9.0, True)
    assert "login:" in capsys.readouterr().out or not matched
    assert routes(daemon)[-1] == "DELETE /v1/machines/lab"


def test_a_crash_of_qemu_is_a_failure(daemon: StandIn, capfd: pytest.CaptureFixture[str]) -> None:
    crashed = machine(state=State.CRASHED, exit=ExitView(signal="SIGSEGV", stderr_tail="assertion"))
    daemon.answers["GET /v1/machines/lab"] = [machine(), crashed]
    assert run(["run", "b", "--name", "lab"]) == Exit.QEMU
    error = capfd.readouterr().err
    assert "QEMU crashed: not clean, signal SIGSEGV" in error
    assert "stderr: assertion" in error


@pytest.mark.parametrize("words", [["--timeout", "5"], ["--console", "--json"], ["--disk", "x.vmdk"], ["--append", "x"], ["--expect", ""]])
def test_options_that_contradict_each_other_are_wrong_usage(daemon: StandIn, words: list[str]) -> None:
    assert run(["run", "b", *words]) == Exit.USAGE
    assert not daemon.asked


def test_a_console_goes_on_where_it_was_cut(daemon: StandIn, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    daemon.channels["/v1/machines/lab/console"] = printing(b"one ", b"two ", b"three")
    assert run(["console", "lab"]) == Exit.OK
    assert capfdbinary.readouterr().out == b"one two three"
    consoles = [asked.query for asked in daemon.asked if asked.path.endswith("/console")]
    assert consoles == [{"scrollback": ["16384"]}, {"since": ["4"]}, {"since": ["8"]}]


def test_a_followed_log_is_what_there_was_and_what_comes(daemon: StandIn, capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    def log(asked: Asked) -> web.Response:
        since = int(asked.query.get("since", ["0"])[0])
        return web.Response(body=b"past "[since:], headers={"X-Qmpd-Console-Start": "0", "X-Qmpd-Console-End": "5"})

    daemon.answers["GET /v1/machines/lab/log"] = log
    daemon.channels["/v1/machines/lab/console"] = printing(b"present ", b"future")
    assert run(["log", "lab", "-f"]) == Exit.OK
    assert capsysbinary.readouterr().out == b"past present future"
    assert [asked.query["since"] for asked in daemon.asked if asked.path.endswith("/console")] == [["5"], ["13"]]


def test_a_console_whose_daemon_stays_away_gives_up(daemon: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attachment, "RECONNECT_LIMIT_S", 0.05)

    async def vanish(socket: web.WebSocketResponse, asked: Asked) -> None:
        if "since" not in asked.query:
            await socket.send_bytes(msgspec.msgpack.encode(ConsoleFrame(kind="output", data=b"x")))

    daemon.channels["/v1/machines/lab/console"] = vanish
    assert run(["console", "lab"]) == Exit.UNAVAILABLE
