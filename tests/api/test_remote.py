"""The API over TLS: who gets in with which certificate or token, and what each may do. Real sockets on the loopback."""

from __future__ import annotations

import asyncio
import shutil
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import aiohttp
import pytest

from qmpd.access import RIGHTS, ROLES, Role
from qmpd.errors import Busy, Forbidden, HostError, Invalid, NotFound, QmpdError, Unauthorized
from qmpd.peers import Peers
from qmpd.pki import certificates
from qmpd.pki.certificates import KeyPair
from qmpd.pki.directory import AUTHORITY, AUTHORITY_KEY, CLIENT, REVOKED, Pki
from qmpd.service import Service
from qmpd.settings import Settings
from qmpd.spec import MachineSpec
from qmpd.trust import LOOK_S, loaded
from qmpd.views import NewToken, TokenRequest
from qmpd_api.application import create
from qmpd_api.client import Client
from qmpd_api.connection import DaemonUnavailable, Remote
from qmpd_api.limits import Limits
from qmpd_api.routes import ROUTES
from qmpd_api.server import answering_remotely

LOCALHOST = "localhost"
GUESS = "qmpd_0123_guess"


class Host:
    """A daemon that listens with TLS, and the authority that people get their certificates from."""

    def __init__(self, pki: Pki, directory: Path) -> None:
        self.pki = pki
        self.port = 0
        self._directory = directory

    @property
    def address(self) -> str:
        return f"{LOCALHOST}:{self.port}"

    def person(self, name: str, role: Role, pair: KeyPair | None = None) -> Remote:
        place = self._directory / name
        self.pki.store(place, self.pki.issue(name, role, ()) if pair is None else pair)
        return Remote(address=self.address, pki_dir=str(place))

    def signed(self, role: str, *, days: int = 10, ago: int = 0) -> KeyPair:
        """A certificate that this authority would not issue by itself."""
        authority = KeyPair(certificate=self.pki.read(AUTHORITY) or b"", key=self.pki.read(AUTHORITY_KEY) or b"")
        request = certificates.new_request("mallory")
        now = datetime.now(UTC) - timedelta(days=ago)
        made = certificates.issue(authority, request.certificate, name="mallory", role=role, hosts=(), now=now, days=days)  # type: ignore[arg-type]
        return KeyPair(certificate=made, key=request.key)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pki = Pki(tmp_path_factory.mktemp("pki") / "pki")
    pki.init("lab")
    pki.install(pki.issue(LOCALHOST, "peer", ("127.0.0.1",)), pki.read(AUTHORITY) or b"", pki.read(REVOKED) or b"")
    return pki.directory


@pytest.fixture
def pki(authority: Path, tmp_path: Path) -> Pki:
    shutil.copytree(authority, tmp_path / "pki")
    return Pki(tmp_path / "pki")


@pytest.fixture
async def host(pki: Pki, service: Service, tmp_path: Path) -> AsyncIterator[Host]:
    made = Host(pki, tmp_path)
    trust = await asyncio.to_thread(loaded, str(pki.directory), Peers())
    app = create(service, Limits(refusals=5, refusals_forgotten_s=1000.0, shutdown_s=0.1), names=trust.names)
    async with answering_remotely(app, trust, [f"{LOCALHOST}:0"]) as where:
        made.port = where[0][1]
        yield made


async def test_a_certificate_opens_the_door_and_its_role_says_how_far(host: Host) -> None:
    async with Client(host.person("eve", "viewer")) as eve, Client(host.person("ada", "admin")) as ada:
        assert (await eve.machines({}, None)).machines == ()
        with pytest.raises(Forbidden, match="viewer:eve is viewer"):
            await eve.create(MachineSpec(name="m", board="x86_64-q35"))
        assert (await ada.create(MachineSpec(name="m", board="x86_64-q35"))).name == "m"
        assert [machine.name for machine in (await eve.machines({}, None)).machines] == ["m"]


async def test_streams_work_over_tls(host: Host) -> None:
    async with Client(host.person("ada", "admin")) as ada:
        await ada.create(MachineSpec(name="m", board="x86_64-q35"))
        assert [event.kind for event in (await ada.events_page(0)).events][-1] == "machine.created"


async def test_nobody_in_particular_gets_nothing(host: Host, service: Service) -> None:
    context = ssl.create_default_context(cafile=str(host.pki.directory / AUTHORITY))
    async with aiohttp.ClientSession() as session:
        for path in ("/v1/machines", "/v1/version", "/metrics"):
            async with session.get(f"https://{host.address}{path}", ssl=context) as answer:
                assert (answer.status, answer.headers["WWW-Authenticate"]) == (401, "Bearer")
    assert service.machines({}, None).machines == ()


async def test_a_revoked_certificate_is_refused_on_a_connection_that_is_open(host: Host) -> None:
    async with Client(host.person("eve", "viewer")) as eve:
        await eve.version()
        await asyncio.to_thread(host.pki.revoke, "eve")
        with pytest.raises(Unauthorized, match="revoked"):
            await _until_refused(eve)
        await _refused(host, Remote(address=host.address, pki_dir=eve.target.pki_dir if isinstance(eve.target, Remote) else ""))


async def _until_refused(client: Client) -> None:
    async with asyncio.timeout(20 * LOOK_S):
        while True:
            await client.version()
            await asyncio.sleep(LOOK_S / 4)


async def _refused(host: Host, remote: Remote) -> None:
    assert host.port
    with pytest.raises((DaemonUnavailable, Unauthorized)):
        async with Client(remote) as client:
            await client.version()


async def test_a_certificate_that_is_not_right_is_refused(host: Host, tmp_path: Path) -> None:
    other = Pki(tmp_path / "other")
    other.init("lab")
    foreign = tmp_path / "foreign"
    other.store(foreign, other.issue("ada", "admin", ()))
    for name in (AUTHORITY, REVOKED):  # it trusts us, we do not trust it
        shutil.copyfile(host.pki.directory / name, foreign / name)
    await _refused(host, Remote(address=host.address, pki_dir=str(foreign)))
    await _refused(host, host.person("late", "admin", host.signed("admin", ago=20)))
    await _refused(host, host.person("early", "admin", host.signed("admin", ago=-2)))
    await _refused(host, host.person("king", "admin", host.signed("king")))


async def test_a_daemon_of_another_authority_or_name_is_not_spoken_to(host: Host, tmp_path: Path) -> None:
    other = Pki(tmp_path / "other")
    other.init("lab")
    place = tmp_path / "stranger"
    other.store(place, other.issue("ada", "admin", ()))
    async with Client(Remote(address=host.address, pki_dir=str(place), token=GUESS)) as client:
        with pytest.raises(DaemonUnavailable, match="not trusted"):
            await client.version()
    wrong_name = Remote(address=f"127.0.0.2:{host.port}", pki_dir=str(host.pki.directory))
    async with Client(wrong_name) as client:
        with pytest.raises(DaemonUnavailable):
            await client.version()


async def test_certificates_that_are_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="qmpd pki check"):
        async with Client(Remote(address="localhost:1", pki_dir=str(tmp_path / "nothing"))):
            pytest.fail("there are none")
    with pytest.raises(HostError, match="qmpd pki check"):
        await asyncio.to_thread(loaded, str(tmp_path / "nothing"), Peers())


async def test_a_token_is_good_for_its_machines_only(host: Host, service: Service) -> None:
    for name, team in (("ours", "a"), ("theirs", "b")):
        await service.create(MachineSpec(name=name, board="x86_64-q35", labels={"team": team}))
    new = await service.tokens.create(TokenRequest(name="robot", role="admin", labels={"team": "a"}))
    async with Client(Remote(address=host.address, pki_dir=str(host.pki.directory), token=new.token)) as robot:
        assert [machine.name for machine in (await robot.machines({}, None)).machines] == ["ours"]
        assert (await robot.machine("ours")).name == "ours"
        for verb in (robot.machine, robot.start, robot.kill, robot.definition, robot.delete):
            with pytest.raises(NotFound, match="there is no machine 'theirs'"):
                await verb("theirs")
        for question in (robot.events_page(0), robot.check(), robot.tokens()):
            with pytest.raises(Forbidden, match="whole host"):
                await question
        with pytest.raises(Forbidden, match="team=a"):
            await robot.create(MachineSpec(name="new", board="x86_64-q35", labels={"team": "b"}))
        assert (await robot.create(MachineSpec(name="new", board="x86_64-q35", labels={"team": "a", "x": "y"}))).name == "new"
    assert {machine.name for machine in service.machines({}, None).machines} == {"ours", "theirs", "new"}


async def test_the_text_of_a_token_is_stored_nowhere_whatever_the_request_wants(host: Host, settings: Settings) -> None:
    request, key = TokenRequest(name="robot", role="viewer"), {"Idempotency-Key": "again"}
    async with Client(host.person("ada", "admin")) as ada:
        made = await ada.connection.call("POST", "/v1/tokens", NewToken, body=request, headers=key)
        with pytest.raises(Invalid, match="called 'robot' already"):
            await ada.connection.call("POST", "/v1/tokens", NewToken, body=request, headers=key)
    secret = made.token.split("_", 2)[2].encode()
    for path in await asyncio.to_thread(lambda: list(Path(settings.state_dir).glob("qmpd.db*"))):
        assert secret not in await asyncio.to_thread(path.read_bytes)


async def test_who_guesses_has_to_wait_and_others_need_not(host: Host) -> None:
    guess = Remote(address=host.address, pki_dir=str(host.pki.directory), token=GUESS)
    async with Client(guess) as client:
        outcomes = [await _outcome(client) for _ in range(12)]
    assert outcomes[:5] == [Unauthorized] * 5
    assert outcomes[-4:] == [Busy] * 4


async def _outcome(client: Client) -> type[QmpdError] | None:
    try:
        await client.version()
    except QmpdError as error:
        return type(error)
    return None


@pytest.mark.parametrize("header", ["Basic YTpi", "Bearer", "Bearer ", "qmpd_a_b", "Bearer a b c", "Bearer " + "x" * 5000], ids=range(6))
async def test_an_authorization_that_is_none_is_unauthorized(host: Host, header: str) -> None:
    context = ssl.create_default_context(cafile=str(host.pki.directory / AUTHORITY))
    async with (
        aiohttp.ClientSession() as session,
        session.get(f"https://{host.address}/v1/version", ssl=context, headers={"Authorization": header}) as answer,
    ):
        assert answer.status == 401


async def test_the_host_header_must_be_a_name_of_the_certificate(host: Host) -> None:
    context = ssl.create_default_context(cafile=str(host.pki.directory / AUTHORITY))
    async with aiohttp.ClientSession() as session:
        for name, status in ((f"127.0.0.1:{host.port}", 401), ("evil.example", 421)):
            async with session.get(f"https://{host.address}/v1/version", ssl=context, headers={"Host": name}) as answer:
                assert answer.status == status


async def test_only_tls_1_3_is_spoken(host: Host) -> None:
    context = ssl.create_default_context(cafile=str(host.pki.directory / AUTHORITY))
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises((ssl.SSLError, ConnectionError)):
        await asyncio.open_connection(LOCALHOST, host.port, ssl=context)
    reader, writer = await asyncio.open_connection(LOCALHOST, host.port)
    writer.write(b"GET /v1/version HTTP/1.1\r\nHost: localhost\r\n\r\n")
    answer = b""
    with suppress(ConnectionError):
        answer = await reader.read()
    writer.close()
    assert b"HTTP" not in answer


async def test_a_scan_of_the_port_harms_nobody(host: Host) -> None:
    silent = [socket.create_connection((LOCALHOST, host.port)) for _ in range(20)]
    try:
        for number, connection in enumerate(silent):
            connection.send(bytes([number]) * number)
        async with Client(host.person("ada", "admin")) as ada:
            await ada.version()
    finally:
        for connection in silent:
            connection.close()


@pytest.mark.parametrize("address", ["256.1.1.1:1", "nobody.invalid:1", "127.0.0.1:99999"])
async def test_an_address_that_cannot_be_listened_at_is_named(pki: Pki, service: Service, address: str) -> None:
    trust = await asyncio.to_thread(loaded, str(pki.directory), Peers())
    with pytest.raises(Invalid, match=r"listen\[0\]"):
        async with answering_remotely(create(service), trust, [address]):
            pytest.fail("it cannot listen there")


def test_every_route_declares_a_right_that_somebody_has() -> None:
    for route in ROUTES:
        holders = {role for role in ROLES if route.right in RIGHTS[role]}
        assert holders or route.right == "join", route.path
        if route.method != "GET" and route.path not in {"/v1/validate", "/v1/command"}:
            assert route.right != "read", route.path


@pytest.mark.parametrize("role", ROLES)
async def test_every_route_refuses_every_role_that_has_not_its_right(host: Host, role: Role) -> None:
    remote = host.person(f"an-{role}", role)
    context = await asyncio.to_thread(_context, Path(remote.pki_dir))
    async with aiohttp.ClientSession(f"https://{host.address}") as session:
        for route in ROUTES:
            path = route.path.format(name="nothing", id="nothing", item="vars")
            if route.right in RIGHTS[role] or route.right == "join":
                continue
            async with session.request(route.method, path, ssl=context) as answer:
                assert answer.status == 403, (role, route.method, route.path)
                assert (await answer.json())["code"] == "forbidden"


def _context(place: Path) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(place / AUTHORITY))
    context.load_cert_chain(str(place / CLIENT[0]), str(place / CLIENT[1]))
    return context
