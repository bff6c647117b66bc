from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from aiohttp import web

from qmpctl import history
from qmpctl.__main__ import run
from qmpctl.exits import Exit
from qmpd.views import (
    Event,
    EventPage,
    ExpectResult,
    QmpAnswer,
)
from tests.api.standin import Asked, StandIn, for_qmpctl


@pytest.fixture
def daemon(short_directory: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    with for_qmpctl(short_directory, monkeypatch) as standin:
        yield standin


def test_qmp_prints_what_qemu_returned(daemon: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    daemon.answers["POST /v1/machines/lab/qmp"] = QmpAnswer(result={"status": "running"})
    assert run(["qmp", "lab", "device_add", "driver=x", "id=y", "--oob"]) == Exit.OK
    assert json.loads(capsys.readouterr().out) == {"status": "running"}
    assert daemon.asked[0].body == {"execute": "device_add", "arguments": {"driver": "x", "id": "y"}, "oob": True}


def test_a_screenshot_is_written_to_the_file(daemon: StandIn, tmp_path: Path, capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    daemon.answers["GET /v1/machines/lab/screenshot"] = lambda _: web.Response(body=b"\x89PNG", content_type="image/png")
    assert run(["screenshot", "lab", str(tmp_path / "x.png")]) == Exit.OK
    assert (tmp_path / "x.png").read_bytes() == b"\x89PNG"
    capsysbinary.readouterr()
    assert run(["screenshot", "lab", "-"]) == Exit.OK
    assert capsysbinary.readouterr().out == b"\x89PNG"


def test_a_screenshot_that_cannot_be_written_says_so(daemon: StandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    daemon.answers["GET /v1/machines/lab/screenshot"] = b"\x89PNG"
    assert run(["screenshot", "lab", str(tmp_path / "none" / "x.png")]) == Exit.OTHER
    assert "No such file" in capsys.readouterr().err


def test_chords_are_pressed_one_after_the_other(daemon: StandIn) -> None:
    daemon.answers["POST /v1/machines/lab/send-key"] = None
    assert run(["send-key", "lab", "ctrl-alt-del", "enter", "--hold", "20"]) == Exit.OK
    assert [asked.body for asked in daemon.asked] == [{"keys": ["ctrl", "alt", "delete"], "hold_ms": 20}, {"keys": ["ret"], "hold_ms": 20}]


def test_a_match_is_printed(daemon: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    daemon.answers["POST /v1/machines/lab/expect"] = ExpectResult(matched=True, reason="matched", text="login\x1b:")
    assert run(["expect", "lab", "log.n", "--send", r"\n", "--timeout", "2", "--from-start"]) == Exit.OK
    assert capsys.readouterr().out == "login\\x1b:\n"
    body = daemon.asked[0].body
    assert isinstance(body, dict)
    assert {key: body[key] for key in ("pattern", "send", "timeout_s", "from_start")} == {
        "pattern": "log.n", "send": "\n", "timeout_s": 2.0, "from_start": True
    }  # fmt: skip


def test_no_match_is_a_no_with_the_end_of_the_console(daemon: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    daemon.answers["POST /v1/machines/lab/expect"] = ExpectResult(matched=False, reason="timeout", tail="one\ntwo\x07")
    assert run(["expect", "lab", "x"]) == Exit.NO
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == ["qmpctl: no match within 30 s; the console ends with:", "  one", "  two\\x07"]


def test_an_empty_pattern_is_wrong_usage() -> None:
    assert run(["expect", "lab", ""]) == Exit.USAGE


def log_of(data: bytes, start: int = 0) -> Callable[[Asked], web.Response]:
    def answer(asked: Asked) -> web.Response:
        since = max(start, int(asked.query.get("since", ["0"])[0]))
        limit = int(asked.query["limit"][0])
        headers = {"X-Qmpd-Console-Start": str(start), "X-Qmpd-Console-End": str(len(data))}
        return web.Response(body=data[since : since + limit], headers=headers)

    return answer


def test_a_log_is_printed_byte_for_byte(
    daemon: StandIn, capsysbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qmpctl.consoles.CHUNK", 7)
    data = bytes(range(256))
    daemon.answers["GET /v1/machines/lab/log"] = log_of(data, start=10)
    assert run(["log", "lab"]) == Exit.OK
    assert capsysbinary.readouterr().out == data[10:]
    assert run(["log", "lab", "--since", "250"]) == Exit.OK
    assert capsysbinary.readouterr().out == data[250:]


@pytest.mark.parametrize(("lines", "shown"), [(0, b""), (1, b"three\n"), (2, b"two\nthree\n"), (9, b"one\ntwo\nthree\n")])
@pytest.mark.parametrize("chunk", [4, 1000])
def test_the_tail_of_a_log_is_its_last_lines(
    daemon: StandIn, capsysbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch, lines: int, shown: bytes, chunk: int
) -> None:
    monkeypatch.setattr("qmpctl.consoles.CHUNK", chunk)
    daemon.answers["GET /v1/machines/lab/log"] = log_of(b"one\ntwo\nthree\n")
    assert run(["log", "lab", "--tail", str(lines)]) == Exit.OK
    assert capsysbinary.readouterr().out == shown


def test_the_tail_of_an_unfinished_line_is_that_line(daemon: StandIn, capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    daemon.answers["GET /v1/machines/lab/log"] = log_of(b"boot\nlogin: ")
    assert run(["log", "lab", "--tail", "1"]) == Exit.OK
    assert capsysbinary.readouterr().out == b"login: "
    assert run(["log", "lab", "--tail", "1", "--since", "1"]) == Exit.USAGE


def test_a_log_as_json_is_lines_of_offset_and_text(daemon: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    daemon.answers["GET /v1/machines/lab/log"] = log_of(b"a\xffb\n", start=1)
    assert run(["log", "lab", "--json"]) == Exit.OK
    assert json.loads(capsys.readouterr().out) == {"offset": 1, "text": "\ufffdb\n"}


def events(*numbers: int) -> tuple[Event, ...]:
    return tuple(Event(number=number, at="t", kind="machine.state", machine="lab", data={"to": "x\x1b"}) for number in numbers)


def test_events_are_listed_page_by_page(daemon: StandIn, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "PAGE", 2)
    pages = [EventPage(events=events(6, 7), first=6, last=8, gap=True), EventPage(events=events(8), first=6, last=8)]
    daemon.answers["GET /v1/events"] = [*pages, EventPage(events=(), first=6, last=8)]
    assert run(["events", "--since", "2", "--machine", "lab"]) == Exit.OK
    captured = capsys.readouterr()
    assert [line.split()[0] for line in captured.out.splitlines()] == ["6", "7", "8"]
    assert "\x1b" not in captured.out
    assert captured.err == "qmpctl: events 3 to 5 are no longer kept\n"


def test_without_a_number_the_newest_events_are_listed(daemon: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    daemon.answers["GET /v1/events"] = [
        EventPage(events=events(1), first=1, last=900),
        EventPage(events=events(900), first=1, last=900),
        EventPage(events=(), first=1, last=900),
    ]
    assert run(["events", "--json"]) == Exit.OK
    assert json.loads(capsys.readouterr().out)["number"] == 900
    assert daemon.asked[1].query["since"] == ["880"]
