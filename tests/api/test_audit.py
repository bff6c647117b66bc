"""What is in the audit log after a request: who, from where, what, and how it ended; and nothing that is a secret."""

from __future__ import annotations

import asyncio
import json
import os
import pwd
import shutil
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import aiohttp
import pytest

from qmpctl.__main__ import run
from qmpctl.exits import Exit
from qmpd.audit import NAME, Sought
from qmpd.auditviews import AuditEntry, AuditPage
from qmpd.errors import Forbidden, Invalid, NotFound, QmpdError, WrongState
from qmpd.pki import certificates
from qmpd.pki.directory import Pki
from qmpd.pki.invitations import invite
from qmpd.pki.joining import join
from qmpd.service import Service
from qmpd.settings import Settings
from qmpd.spec import MachineSpec
from qmpd.views import TokenRequest
from qmpd_api.application import create
from qmpd_api.auditing import IDENTITY
from qmpd_api.client import Client
from qmpd_api.connection import Remote
from qmpd_api.server import serve
from tests.api.lab import LOOPBACK, Daemon, authority, daemon, host, peer, port
from tests.api.standin import StandIn, for_qmpctl

ME = pwd.getpwuid(os.getuid()).pw_name


@pytest.fixture
async def client(service: Service, settings: Settings) -> AsyncIterator[Client]:
    async with serve(create(service), settings.socket), Client(settings.socket) as made:
        yield made


async def entries(service: Service, **sought: str) -> list[AuditEntry]:
    """The log, oldest first."""
    return [*reversed((await service.audit.read(Sought(**sought))).entries)]  # type: ignore[arg-type]


async def test_what_changes_something_is_noted_and_what_only_looks_is_not(client: Client, service: Service) -> None:
    await client.create(MachineSpec(name="m", board="x86_64-q35"))
    await client.machines({}, None)
    await client.machine("m")
    await client.validate(MachineSpec(name="n", board="x86_64-q35"))
    with pytest.raises(WrongState):
        await client.reset("m")
    with pytest.raises(NotFound):
        await client.delete("nothing")
    await client.delete("m")
    found = await entries(service)
    assert [(entry.method, entry.route, entry.machine, entry.status, entry.code) for entry in found] == [
        ("POST", "/v1/machines", "m", 201, None),
        ("POST", "/v1/machines/{name}/reset", "m", 409, "wrong_state"),
        ("DELETE", "/v1/machines/{name}", "nothing", 404, "not_found"),
        ("DELETE", "/v1/machines/{name}", "m", 204, None),
    ]
    assert {(entry.who, entry.role, entry.uid, entry.pid, entry.origin) for entry in found} == {
        (ME, "admin", os.getuid(), os.getpid(), None)
    }
    assert all(entry.duration_ms is not None and entry.duration_ms > 0 for entry in found)
    assert len({entry.request for entry in found}) == len(found)
    assert (await client.audit()).entries == tuple(reversed(found))


async def test_an_answer_carries_the_number_under_which_it_was_noted(client: Client, service: Service, settings: Settings) -> None:
    async with aiohttp.ClientSession("http://localhost", connector=aiohttp.UnixConnector(settings.socket)) as session:
        async with session.post("/v1/machines/m/start") as answer:
            number = answer.headers[IDENTITY]
        async with session.get("/v1/version", headers={IDENTITY: "forged"}) as answer:
            assert answer.headers[IDENTITY] not in {number, "forged"}
    assert [entry.request for entry in await entries(service)] == [number]


async def test_no_body_and_no_secret_is_in_the_log(client: Client, service: Service, settings: Settings) -> None:
    made = await client.create_token(TokenRequest(name="robot", role="viewer"))
    await client.create(MachineSpec(name="m", board="x86_64-q35", labels={"word": "s3cret"}))
    with pytest.raises(QmpdError):
        await client.send_key("m", ["s", "3", "c"])
    await client.revoke_token("robot")
    found = await entries(service)
    assert [(entry.route, entry.subject) for entry in found if entry.machine is None] == [
        ("/v1/tokens", "robot"),
        ("/v1/tokens/{id}", "robot"),
    ]
    text = await asyncio.to_thread((Path(settings.state_dir) / NAME).read_text)
    assert made.token.split("_", 2)[2] not in text
    assert "s3cret" not in text


@pytest.mark.usefixtures("client")
async def test_who_comes_to_the_wrong_door_is_noted(service: Service, settings: Settings) -> None:
    async with aiohttp.ClientSession("http://localhost", connector=aiohttp.UnixConnector(settings.socket)) as session:
        for headers in ({"Host": "evil.example"}, {"Origin": "https://evil.example"}):
            async with session.get("/v1/machines/x%2f..%2fy", headers=headers) as answer:
                assert answer.status in {421, 403}
    found = await entries(service)
    assert [(entry.status, entry.code, entry.who, entry.uid) for entry in found] == [
        (421, "misdirected", None, os.getuid()),
        (403, "forbidden", None, os.getuid()),
    ]
    assert {entry.route for entry in found} == {"/v1/machines/{name}"}


async def test_a_console_is_noted_when_it_is_opened_and_when_it_ends(client: Client, service: Service) -> None:
    await client.create(MachineSpec(name="m", board="x86_64-q35"))
    async with client.console("m"):
        pass
    async with asyncio.timeout(60):
        while len(found := [entry for entry in await entries(service) if entry.route.endswith("/console")]) < 2:
            await asyncio.sleep(0.01)
    assert [(entry.status, entry.machine, entry.duration_ms is None) for entry in found] == [(101, "m", True), (101, "m", False)]
    assert len({entry.request for entry in found}) == 1


class Lab:
    """A daemon that listens, and the authority of its callers."""

    def __init__(self, directory: Path, pki: Pki, daemon: Daemon) -> None:
        self.directory = directory
        self.pki = pki
        self.daemon = daemon

    def remote(self, name: str, role: str, token: str | None = None) -> tuple[Remote, str]:
        """Somebody with a certificate, and its serial number. Blocks."""
        pair = self.pki.issue(name, role, (LOOPBACK,))  # type: ignore[arg-type]
        place = self.directory / f"of-{role}-{name}"
        self.pki.store(place, pair)
        address = f"{LOOPBACK}:{self.daemon.port}"
        return Remote(address=address, pki_dir=str(place), token=token), certificates.describe(pair.certificate).serial


@pytest.fixture
async def lab(short_directory: Path) -> AsyncIterator[Lab]:
    pki = await asyncio.to_thread(authority, short_directory / "ca")
    own = await asyncio.to_thread(host, pki, short_directory / "pki", "a")
    with port() as (listener, number):
        async with daemon("a", short_directory / "d", own, listener, [peer("b", number)]) as made:
            yield Lab(short_directory, pki, made)


async def test_remote_callers_are_noted_by_certificate_and_token(lab: Lab) -> None:
    service = lab.daemon.service
    made = await service.tokens.create(TokenRequest(name="ci", role="viewer"))
    eve, eves = await asyncio.to_thread(lab.remote, "eve", "operator")
    robot, _ = await asyncio.to_thread(lab.remote, "ci", "viewer", made.token)
    b, bs = await asyncio.to_thread(lab.remote, "b", "peer")
    for remote in (eve, robot, b):
        async with Client(remote) as client:
            with pytest.raises(Forbidden):
                await client.create(MachineSpec(name="m", board="x86_64-q35"))
    found = await entries(service)
    assert [(entry.who, entry.role, entry.credential, entry.origin, entry.status, entry.code) for entry in found] == [
        ("operator:eve", "operator", eves, LOOPBACK, 403, "forbidden"),
        ("token:ci", "viewer", made.about.id, LOOPBACK, 403, "forbidden"),
        ("peer:b", "peer", bs, LOOPBACK, 403, "forbidden"),
    ]
    assert {entry.machine for entry in found} == {None}
    assert len(await entries(service, who=eves)) == 1


async def test_who_shows_nothing_or_guesses_is_noted_with_the_address(lab: Lab) -> None:
    remote, _ = await asyncio.to_thread(lab.remote, "eve", "viewer", "qmpd_0123_guess")
    async with Client(remote) as client:
        for _ in range(2):
            with pytest.raises(QmpdError):
                await client.machines({}, None)
    found = await entries(lab.daemon.service)
    assert [(entry.status, entry.code, entry.who, entry.origin, entry.route) for entry in found] == [
        (401, "unauthorized", None, LOOPBACK, "/v1/machines")
    ] * 2
    assert "guess" not in await asyncio.to_thread((lab.directory / "d" / "s" / NAME).read_text)


async def test_who_joined_is_noted(lab: Lab) -> None:
    await asyncio.to_thread(host, lab.pki, lab.pki.directory, "a")
    pki = Pki(lab.directory / "here")
    await asyncio.to_thread(shutil.copytree, lab.pki.directory, pki.directory)
    with port() as (listener, _):
        async with daemon("ca", lab.directory / "j", pki, listener) as made:
            token = await asyncio.to_thread(lambda: invite(pki, "ada", "viewer", (), minutes=5))
            await asyncio.to_thread(join, Pki(lab.directory / "ada"), f"https://{LOOPBACK}:{made.port}", token)
            (entry,) = await entries(made.service)
    assert (entry.route, entry.status, entry.subject, entry.who, entry.origin) == ("/v1/pki/join", 200, "ada", None, LOOPBACK)


async def test_questions_of_peers_are_no_news(lab: Lab) -> None:
    b, _ = await asyncio.to_thread(lab.remote, "b", "peer")
    async with Client(b) as client:
        await client.greeting()
        await client.revoked()
    assert await entries(lab.daemon.service) == []


async def test_only_an_admin_may_read_the_log_and_that_is_noted(lab: Lab) -> None:
    eve, _ = await asyncio.to_thread(lab.remote, "eve", "operator")
    ada, _ = await asyncio.to_thread(lab.remote, "ada", "admin")
    async with Client(eve) as client:
        with pytest.raises(Forbidden):
            await client.audit()
    async with Client(ada) as client:
        page = await client.audit(who="operator:eve")
        assert [entry.status for entry in page.entries] == [403]
        with pytest.raises(Invalid, match="since"):
            await client.audit(since="yesterday")
        page = await client.audit(who="admin:ada", since="2020-01-01T00:00:00+00:00")
    assert [(entry.route, entry.status) for entry in page.entries] == [("/v1/audit", 422), ("/v1/audit", 200)]


@pytest.fixture
def standin(short_directory: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    with for_qmpctl(short_directory, monkeypatch) as made:
        yield made


ONE = AuditEntry(
    at="2026-11-01T00:00:00Z", request="r-1", method="POST", route="/v1/machines", status=201, who="root", uid=0, pid=7, machine="m"
)
TWO = AuditEntry(
    at="2026-11-01T00:00:01Z",
    request="r-2",
    method="DELETE",
    route="/v1/tokens/{id}",
    status=403,
    origin="::1",
    code="forbidden",
    subject="x",
)


def test_the_command_shows_the_newest_last(standin: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    standin.answers["GET /v1/audit"] = AuditPage(entries=(TWO, ONE), more=True)
    assert run(["audit", "--machine", "m", "--who", "root", "--since", "2026-11-01T01:00:00+01:00", "--limit", "2"]) == Exit.OK
    assert standin.last("GET /v1/audit").query == {
        "machine": ["m"],
        "who": ["root"],
        "since": ["2026-11-01T00:00:00+00:00"],
        "limit": ["2"],
    }
    shown = capsys.readouterr()
    assert [line.split("  ")[-1] for line in shown.out.splitlines()[1:]] == ["POST /v1/machines", "DELETE /v1/tokens/{id} x"]
    assert "uid 0 pid 7" not in shown.out.splitlines()[2]
    assert "more than 2" in shown.err
    assert run(["audit", "--since", "2h", "--json"]) == Exit.OK
    assert [entry["request"] for entry in json.loads(capsys.readouterr().out)["entries"]] == ["r-2", "r-1"]


@pytest.mark.parametrize("since", ["yesterday", "2x", "", "-1h", "9999999999999d"])
def test_a_time_that_is_none_is_wrong_usage(standin: StandIn, capsys: pytest.CaptureFixture[str], since: str) -> None:
    assert run(["audit", f"--since={since}"]) == Exit.USAGE
    assert "like 2h" in capsys.readouterr().err
    assert standin.asked == []
