from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
from aiohttp import web

from qmpd import errors
from qmpd.errors import Invalid, LaunchFailed, NotFound, NotYet, Problem, QemuRefused, QmpdError, WrongState
from qmpd.lifecycle import State
from qmpd.spec import ImageDisk, MachineSpec
from qmpd.views import (
    BoardView,
    CheckReport,
    ErrorBody,
    ExpectRequest,
    ExpectResult,
    QmpAnswer,
    Version,
)
from qmpd_api.client import Client
from qmpd_api.connection import DaemonSilent, DaemonUnavailable, Wire, error_of
from qmpd_api.dialling import PeerClient
from qmpd_api.endpoint import default_socket
from qmpd_api.routes import ROUTES
from tests.api.standin import Asked, StandIn, listening, machine, machines, stopped

VERSION = Version(version="1.2.3", pid=4, started_at="2026-01-02T03:04:05Z", machines_running=5)


@pytest.fixture
def path(short_directory: Path) -> Path:
    return short_directory / "s"


@pytest.fixture
async def daemon(path: Path) -> AsyncIterator[StandIn]:
    standin = StandIn()
    async with listening(standin, path):
        yield standin


@pytest.fixture
async def client(path: Path, daemon: StandIn) -> AsyncIterator[Client]:
    async with Client(str(path)) as opened:
        yield opened


def test_every_route_has_a_method() -> None:
    assert {route.name for route in ROUTES} <= set(dir(PeerClient))


@pytest.mark.parametrize("wire", ["msgpack", "json"])
async def test_documents_and_answers_travel_in_the_chosen_format(path: Path, daemon: StandIn, wire: Wire) -> None:
    spec = MachineSpec(name="lab", board="riscv64-virt", disks=(ImageDisk(path="/d.img", format="raw"),))
    daemon.answers["POST /v1/machines"] = machine()
    async with Client(str(path), wire=wire) as client:
        assert await client.create(spec, start=True) == machine()
    asked = daemon.last("POST /v1/machines")
    assert asked.headers["Content-Type"] == asked.headers["Accept"] == f"application/{wire}"
    assert msgspec.convert(asked.body, MachineSpec) == spec
    assert asked.query == {"start": ["true"]}


async def test_an_older_client_ignores_what_a_newer_daemon_adds(client: Client, daemon: StandIn) -> None:
    daemon.answers["GET /v1/version"] = {**msgspec.to_builtins(VERSION), "novelty": 1}
    assert await client.version() == VERSION


async def test_lists_and_filters_are_asked_for_as_the_routes_have_them(client: Client, daemon: StandIn) -> None:
    board = BoardView(id="b", title="B", arch="arm", machine="virt", emulator=None, runnable=False, accel=None, memory_mib=1, max_cpus=1)
    daemon.answers |= {"GET /v1/boards": [[board]], "GET /v1/machines": machines(machine())}
    assert await client.boards("arm") == (board,)
    assert daemon.last("GET /v1/boards").query == {"arch": ["arm"]}
    assert (await client.machines({"a": "1", "b": "x=y"}, State.RUNNING)).machines == (machine(),)
    assert daemon.last("GET /v1/machines").query == {"label": ["a=1", "b=x=y"], "state": ["running"]}


async def test_what_is_no_document_comes_back_as_it_is(client: Client, daemon: StandIn) -> None:
    daemon.answers |= {"GET /metrics": b"qmpd_machines 3\n", "GET /v1/openapi.json": {"openapi": "3.1.0"}}
    assert await client.metrics() == "qmpd_machines 3\n"
    assert await client.description() == {"openapi": "3.1.0"}


async def test_a_change_says_which_revision_it_was_made_from(client: Client, daemon: StandIn) -> None:
    daemon.answers |= {"PUT /v1/machines/lab": machine(), "DELETE /v1/machines/lab": None}
    await client.replace("lab", MachineSpec(name="lab", board="b"), 7)
    await client.delete("lab", 8)
    assert [asked.headers["If-Match"] for asked in daemon.asked] == ['"7"', '"8"']
    await client.delete("lab")
    assert "If-Match" not in daemon.asked[-1].headers


async def test_qmp_returns_what_qemu_returned(client: Client, daemon: StandIn) -> None:
    daemon.answers["POST /v1/machines/lab/qmp"] = QmpAnswer(result=[{"name": "x"}, 2**63])
    assert await client.qmp("lab", "query-x", {"deep": {"n": 1}}) == [{"name": "x"}, 2**63]
    assert daemon.last("POST /v1/machines/lab/qmp").body == {"execute": "query-x", "arguments": {"deep": {"n": 1}}, "oob": False}


async def test_verbs_send_their_requests(client: Client, daemon: StandIn) -> None:
    daemon.answers |= {
        "POST /v1/machines/lab/start": machine(state=State.PAUSED),
        "POST /v1/machines/lab/stop": stopped(),
        "POST /v1/machines/lab/send-key": None,
        "GET /v1/machines/lab/screenshot": b"\x89PNG",
        "GET /v1/machines/lab/wait": machine(),
        "POST /v1/machines/lab/expect": ExpectResult(matched=True, reason="matched", text="login:"),
    }
    assert (await client.start("lab", paused=True)).state is State.PAUSED
    assert (await client.stop("lab")).method == "quit"
    await client.send_key("lab", ["ctrl", "c"], 50)
    assert await client.screenshot("lab") == b"\x89PNG"
    await client.wait("lab", [State.RUNNING, State.PAUSED], 3)
    assert (await client.expect("lab", ExpectRequest(pattern="login:"))).text == "login:"
    bodies = [asked.body for asked in daemon.asked]
    assert bodies[:3] == [{"paused": True}, None, {"keys": ["ctrl", "c"], "hold_ms": 50}]
    assert daemon.last("GET /v1/machines/lab/wait").query == {"state": ["running", "paused"], "timeout_s": ["3"]}


@pytest.mark.parametrize(
    "raised",
    [
        NotFound("no machine 'x'"),
        WrongState("it runs", state="running", allowed=["stopped"]),
        QemuRefused("no", **{"class": "GenericError", "desc": "no"}),
        LaunchFailed("it ended", exit={"code": 1}, stderr="oops"),
        NotYet("still booting"),
    ],
    ids=lambda error: error.code,
)
@pytest.mark.parametrize("wire", ["msgpack", "json"])
async def test_errors_come_back_as_the_class_they_were_raised_as(path: Path, daemon: StandIn, raised: QmpdError, wire: Wire) -> None:
    daemon.answers["GET /v1/version"] = raised
    async with Client(str(path), wire=wire) as client:
        with pytest.raises(type(raised)) as caught:
            await client.version()
    assert type(caught.value) is type(raised)
    assert (caught.value.message, caught.value.details) == (raised.message, raised.details)


async def test_an_invalid_definition_comes_back_with_every_problem(client: Client, daemon: StandIn) -> None:
    problems = (Problem(path="$.a", message="x"), Problem(path="$.b", message="y"))
    daemon.answers["POST /v1/command"] = Invalid("2 problems", problems)
    with pytest.raises(Invalid) as caught:
        await client.command(MachineSpec(name="x", board="b"))
    assert caught.value.problems == problems


async def test_details_may_have_any_name(client: Client, daemon: StandIn) -> None:
    body = {"code": "held", "message": "held", "details": {"message": 1, "self": 2, "holder": "you"}}
    daemon.answers["GET /v1/version"] = lambda _: web.json_response(body, status=409)
    with pytest.raises(errors.Held) as caught:
        await client.version()
    assert caught.value.details == body["details"]


async def test_a_code_of_a_newer_daemon_is_a_plain_error_that_keeps_it(client: Client, daemon: StandIn) -> None:
    body = {"code": "flux_depleted", "message": "no flux", "details": {"a": 1}}
    daemon.answers["GET /v1/version"] = lambda _: web.json_response(body, status=418)
    with pytest.raises(QmpdError, match="no flux") as caught:
        await client.version()
    assert type(caught.value) is QmpdError
    assert caught.value.details == {"a": 1, "code": "flux_depleted"}


def test_every_error_the_daemon_raises_is_known() -> None:
    leaves = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, QmpdError)]
    for leaf in leaves:
        assert type(error_of(ErrorBody(code=leaf.code, message="m"))) is leaf


async def test_an_answer_that_is_no_document_names_the_route(client: Client, daemon: StandIn) -> None:
    daemon.answers["GET /v1/version"] = lambda _: web.Response(text="<html>", content_type="application/json")
    with pytest.raises(QmpdError, match=r"GET /v1/version cannot be understood"):
        await client.version()
    daemon.answers["GET /v1/version"] = lambda _: web.Response(status=502, text="proxy says no")
    with pytest.raises(QmpdError, match=r"answered 502 .* to GET /v1/version"):
        await client.version()


@pytest.mark.parametrize("name", ["", ".", ".."])
async def test_a_name_that_would_change_the_path_is_nobodys(client: Client, daemon: StandIn, name: str) -> None:
    with pytest.raises(NotFound):
        await client.delete(name)
    assert not daemon.asked


async def test_a_strange_name_stays_one_segment_of_the_path(client: Client, daemon: StandIn) -> None:
    with pytest.raises(NotFound):
        await client.machine("a/../b?x#y")
    assert daemon.asked[-1].path == "/v1/machines/a/../b?x#y"  # as aiohttp shows %2F and the like
    assert not daemon.asked[-1].query


async def test_a_missing_socket_is_named_with_the_command_that_starts_a_daemon(path: Path) -> None:
    async with Client(str(path)) as client:
        with pytest.raises(DaemonUnavailable) as caught:
            await client.version()
    assert str(path) in caught.value.message
    assert "systemctl start qmpd" in caught.value.message


async def test_a_socket_nobody_listens_on_says_so(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    async with Client(str(path)) as client:
        with pytest.raises(DaemonUnavailable, match="nobody listens"):
            await client.version()


async def test_a_daemon_that_does_not_answer_is_silent_not_gone(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as mute:
        mute.bind(str(path))
        mute.listen()
        async with Client(str(path)) as client:
            with pytest.raises(DaemonSilent, match=r"GET /v1/version within 0.05 s"):
                await client.connection.call("GET", "/v1/version", Version, deadline_s=0.05)


async def test_a_connection_that_breaks_leaves_the_outcome_unknown(client: Client, daemon: StandIn) -> None:
    def hang_up(_: Asked) -> object:
        return HangUp()

    daemon.answers["POST /v1/machines/lab/kill"] = hang_up
    with pytest.raises(DaemonUnavailable, match="outcome is unknown"):
        await client.kill("lab")


class HangUp(web.Response):
    async def prepare(self, request: web.BaseRequest) -> None:
        assert request.transport is not None
        request.transport.abort()
        raise ConnectionResetError


async def test_a_client_outside_of_its_block_says_so() -> None:
    with pytest.raises(RuntimeError, match="async with"):
        await Client("/nowhere").version()


def test_the_default_socket_is_the_variables_then_roots_then_the_users() -> None:
    assert default_socket({"QMPD_SOCKET": "/x"}, 0) == "/x"
    assert default_socket({}, 0) == "/run/qmpd/qmpd.sock"
    assert default_socket({"XDG_RUNTIME_DIR": "/run/user/5"}, 5) == "/run/user/5/qmpd/qmpd.sock"
    assert default_socket({"HOME": "/home/u"}, 5).startswith("/home/u/")


@pytest.mark.parametrize(("ask", "answer"), [("emulators", []), ("check", CheckReport(ok=True, lines=()))])
async def test_slow_questions_are_asked_like_any_other(client: Client, daemon: StandIn, ask: str, answer: object) -> None:
    daemon.answers[f"GET /v1/{ask}"] = lambda _: web.Response(body=msgspec.msgpack.encode(answer), content_type="application/msgpack")
    assert await getattr(client, ask)() == (answer or ())
