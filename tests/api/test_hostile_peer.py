"""Somebody at the door of a daemon who is no peer of it, or a peer that lies: nothing is made, and nothing is told.

Each attempt is followed by a look at what the daemon has: machines, tokens, certificates, jobs. TLS itself refuses before or after its
handshake, as OpenSSL pleases; that the daemon says nothing is what counts.
"""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from qmpd.access import Role
from qmpd.migration.protocol import VERSION
from qmpd.pki import certificates
from qmpd.pki.certificates import KeyPair
from qmpd.pki.directory import CLIENT, INVITATIONS, Pki
from qmpd.pki.invitations import invite, redeem
from qmpd.spec import MachineSpec
from qmpd.views import TokenRequest
from qmpd_api.limits import Limits
from qmpd_api.routes import ROUTES
from tests.api.lab import LOOPBACK, Daemon, authority, daemon, host, peer, port

#: Only what hangs takes so long.
PATIENCE_S = 60.0
#: Long enough for whoever is not silent, on a host that does other work; who is, is waited for so long.
SLOW_S = 2.0
SECRET = "unguessable"  # noqa: S105  what must not be told
#: Everything a stranger might ask of a peer; of `join` only with a token that is none.
PEER_ROUTES = [route for route in ROUTES if route.right == "peer"]


class Door:
    """A daemon, what it has, and the authority of its certificates."""

    def __init__(self, directory: Path, pki: Pki, daemon: Daemon) -> None:
        self.directory = directory
        self.pki = pki
        self.daemon = daemon

    async def belongings(self) -> object:
        """What there is to be changed."""
        service = self.daemon.service
        files = {
            path.name: path.read_bytes() for path in await asyncio.to_thread(lambda: list(self.pki.directory.iterdir())) if path.is_file()
        }
        jobs = (await service.jobs()).jobs
        return service.machines({}, None).machines, service.tokens.list(), service.bus.last, jobs, files

    def context(self, place: Path | None, *, version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> ssl.SSLContext:
        """Somebody's side of TLS, who believes anything. Blocks."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.maximum_version = version
        if place is not None:
            context.load_cert_chain(str(place / CLIENT[0]), str(place / CLIENT[1]))
        return context

    async def said(self, request: bytes, context: ssl.SSLContext) -> bytes:
        """Everything the daemon says before it closes; nothing when TLS does not come about."""
        try:
            async with asyncio.timeout(PATIENCE_S):
                reader, writer = await asyncio.open_connection(LOOPBACK, self.daemon.port, ssl=context)
        except (ssl.SSLError, ConnectionError):
            return b""
        answer = b""
        try:
            writer.write(request)
            async with asyncio.timeout(PATIENCE_S):
                answer = await reader.read(-1)
        except (ssl.SSLError, ConnectionError):
            pass
        finally:
            writer.transport.abort()
        return answer


@pytest.fixture
async def door(short_directory: Path) -> AsyncIterator[Door]:
    pki = await asyncio.to_thread(authority, short_directory / "ca")
    await asyncio.to_thread(host, pki, pki.directory, "a")
    limits = Limits(head_s=SLOW_S, idle_s=SLOW_S, body_s=SLOW_S, shutdown_s=0.1, refusals=1000)
    with port() as (listener, number):
        async with daemon("a", short_directory / "d", pki, listener, [peer("b", number)], limits=limits) as made:
            await made.service.create(MachineSpec(name=SECRET, board="x86_64-q35", labels={"word": SECRET}))
            await made.service.tokens.create(TokenRequest(name=SECRET, role="viewer"))
            yield Door(short_directory, pki, made)


def http(method: str, path: str, body: bytes = b"", *headers: str) -> bytes:
    """A request as it is sent."""
    lines = [f"{method} {path} HTTP/1.1", f"Host: {LOOPBACK}", "Connection: close", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def signed(door: Door, name: str, role: Role, ago: timedelta, days: int) -> KeyPair:
    request = certificates.new_request(name)
    now = datetime.now(UTC) - ago
    made = certificates.issue(door.pki.authority(), request.certificate, name=name, role=role, hosts=(LOOPBACK,), now=now, days=days)
    return KeyPair(certificate=made, key=request.key)


def nobody(_door: Door) -> Path | None:
    return None


def of_another_authority(door: Door) -> Path:
    other = authority(door.directory / "other")
    other.store(door.directory / "foreign", other.issue("b", "peer", (LOOPBACK,)))
    return door.directory / "foreign"


def _held(door: Door, pair: KeyPair, name: str) -> Path:
    door.pki.store(door.directory / name, pair)
    return door.directory / name


def expired(door: Door) -> Path:
    return _held(door, signed(door, "b", "peer", timedelta(days=20), 10), "expired")


def not_yet_valid(door: Door) -> Path:
    return _held(door, signed(door, "b", "peer", timedelta(days=-2), 10), "early")


def revoked(door: Door) -> Path:
    place = _held(door, door.pki.issue("b", "peer", (LOOPBACK,)), "revoked")
    door.pki.revoke("b")
    return place


def of_another_name(door: Door) -> Path:
    return _held(door, door.pki.issue("c", "peer", (LOOPBACK,)), "c")


def of_a_person_called_like_the_peer(door: Door) -> Path:
    return _held(door, door.pki.issue("b", "admin", ()), "ada")


def of_a_role_that_is_none(door: Door) -> Path:
    return _held(door, signed(door, "b", "ca", timedelta(), 10), "ca-role")  # type: ignore[arg-type]


Attacker = Callable[[Door], Path | None]
ATTACKERS: list[Attacker] = [
    nobody,
    of_another_authority,
    expired,
    not_yet_valid,
    revoked,
    of_another_name,
    of_a_person_called_like_the_peer,
    of_a_role_that_is_none,
]


@pytest.mark.parametrize("attacker", ATTACKERS)
async def test_nobody_but_the_peer_gets_through_a_peers_door(door: Door, attacker: Attacker) -> None:
    place = await asyncio.to_thread(attacker, door)
    context, before = await asyncio.to_thread(door.context, place), await door.belongings()
    for route in PEER_ROUTES:
        answer = await door.said(http(route.method, route.path.format(name=SECRET, id=SECRET, item="vars")), context)
        assert not answer or answer.split()[1] in {b"401", b"403"}, answer
        assert SECRET.encode() not in answer
    assert await door.belongings() == before


async def test_a_peer_gets_through_no_other_door(door: Door) -> None:
    place = await asyncio.to_thread(_held, door, await asyncio.to_thread(door.pki.issue, "b", "peer", (LOOPBACK,)), "b")
    context, before = await asyncio.to_thread(door.context, place), await door.belongings()
    for route in ROUTES:
        if route.right in {"peer", "known", "join"}:
            continue
        answer = await door.said(http(route.method, route.path.format(name=SECRET, id=SECRET, item="vars")), context)
        assert answer.split()[1] == b"403", (route.path, answer)
        assert SECRET.encode() not in answer
        assert await door.belongings() == before


NAMES = ("..", "../x", "%2e%2e", "..%2f..%2fetc%2fpasswd", "a%2fb", "a%00b", "a%0d%0aX: y", "%ff", "A" * 4000, "a b", "b%20", "-", ".")
PATHS = (
    ("GET", "/v1/peers/{}/health"),
    ("POST", "/v1/machines/{}/start"),
    ("DELETE", "/v1/machines/{}"),
    ("DELETE", "/v1/tokens/{}"),
    ("GET", "/v1/machines/{}/log"),
)


async def test_a_name_that_cannot_be_one_leads_nowhere(door: Door) -> None:
    pair = await asyncio.to_thread(door.pki.issue, "ada", "admin", ())
    context = await asyncio.to_thread(door.context, await asyncio.to_thread(_held, door, pair, "ada"))
    before = await door.belongings()
    for name in NAMES:
        for method, path in PATHS:
            answer = await door.said(http(method, path.format(name)), context)
            assert answer.split()[1] in {b"400", b"404", b"405"}, (name, path, answer)
            assert b"root:" not in answer
            assert b"\r\nX: y" not in answer
        assert await door.belongings() == before


OFFER: dict[str, object] = {
    "protocol": VERSION,
    "id": "0" * 16,
    "epoch": 1,
    "spec": {"name": "m1", "board": "x86_64-q35"},
    "uuid": "00000000-0000-4000-8000-000000000001",
    "created_at": "c",
    "changed_at": "c",
    "state": "running",
    "machine": "pc-q35-7.2",
    "accel": "tcg",
    "emulator_version": "7.2.22",
}
BAD: tuple[tuple[str, object], ...] = (
    ("uuid", "00000000-0000-4000-8000-00000000000G"),
    ("uuid", "00000000-0000-4000-8000-00000000000A\n"),
    ("uuid", "../../etc/passwd"),
    ("id", "../../etc/passwd"),
    ("epoch", 0),
    ("spec", {"name": "..", "board": "x86_64-q35"}),
    ("spec", {"name": "m1", "board": "x86_64-q35", "uuid": "x"}),
)


@pytest.mark.parametrize(("field", "value"), BAD, ids=str)
async def test_an_offer_that_cannot_be_right_is_refused_by_the_name_of_its_field(door: Door, field: str, value: object) -> None:
    place = await asyncio.to_thread(_held, door, await asyncio.to_thread(door.pki.issue, "b", "peer", (LOOPBACK,)), "b")
    context, before = await asyncio.to_thread(door.context, place), await door.belongings()
    body = json.dumps({**OFFER, field: value}).encode()
    answer = await door.said(http("POST", "/v1/peer/migrations", body, "Content-Type: application/json"), context)
    assert answer.split()[1] == b"422", answer
    (problem,) = json.loads(answer.partition(b"\r\n\r\n")[2])["details"]["problems"]
    assert problem["path"].startswith(f"$.{field}")
    assert await door.belongings() == before
    assert door.daemon.service.migration.list().migrations == ()
    assert not (door.directory / "d/s/machines/m1").exists()


@pytest.mark.parametrize("path", ["/v1/pki/join", "/v1/peer", "/v1/machines"])
async def test_a_body_that_is_too_large_is_not_read(door: Door, path: str) -> None:
    context, before = await asyncio.to_thread(door.context, None), await door.belongings()
    announced = http("POST", path, b"", "Content-Type: application/json").replace(b"Content-Length: 0", b"Content-Length: 99999999999")
    answer = await door.said(announced, context)
    assert answer.split()[1] in {b"401", b"405", b"413"}, answer
    chunked = (
        b"POST " + path.encode() + b" HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    answer = await door.said(chunked + b"".join(b"8000\r\n" + b" " * 0x8000 + b"\r\n" for _ in range(64)), context)
    assert not answer or answer.split()[1] in {b"401", b"405", b"413"}, answer
    assert await door.belongings() == before


@pytest.mark.parametrize("beginning", [b"", b"POST /v1/pki/join HTTP/1.1\r\nHost: 127.0.0.1\r\n", b"\x16\x03\x01"])
async def test_who_is_silent_after_the_handshake_is_sent_away(door: Door, beginning: bytes) -> None:
    context, before = await asyncio.to_thread(door.context, None), await door.belongings()
    reader, writer = await asyncio.open_connection(LOOPBACK, door.daemon.port, ssl=context)
    writer.write(beginning)
    async with asyncio.timeout(PATIENCE_S):
        answer = await reader.read(-1)
    writer.transport.abort()
    assert not answer or answer.split()[1] in {b"400", b"408"}, answer
    assert await door.belongings() == before


async def test_who_sends_a_body_slowly_is_sent_away(door: Door) -> None:
    context, before = await asyncio.to_thread(door.context, None), await door.belongings()
    body = http("POST", "/v1/pki/join", b"{", "Content-Type: application/json").replace(b"Content-Length: 1", b"Content-Length: 100")
    answer = await door.said(body, context)
    assert answer.split()[1] == b"408", answer
    assert await door.belongings() == before


async def test_an_older_tls_is_not_spoken(door: Door) -> None:
    before = await door.belongings()
    context = await asyncio.to_thread(lambda: door.context(None, version=ssl.TLSVersion.TLSv1_2))
    assert await door.said(http("GET", "/v1/peer"), context) == b""
    assert await door.belongings() == before


@pytest.mark.parametrize(
    "further",
    [{"role": "admin"}, {"name": "a"}, {"hosts": ["a"]}, {"days": 100_000}, {"token": 1}, {"request": ["x"]}, {"request": None}],
    ids=str,
)
async def test_an_invitation_says_who_one_is_and_the_request_does_not(door: Door, further: dict[str, object]) -> None:
    token = await asyncio.to_thread(lambda: invite(door.pki, "c", "peer", (), minutes=5))
    context, before = await asyncio.to_thread(door.context, None), await door.belongings()
    request = certificates.new_request("c").certificate.decode()
    body = json.dumps({"token": token, "request": request, **further}).encode()
    answer = await door.said(http("POST", "/v1/pki/join", body, "Content-Type: application/json"), context)
    assert answer.split()[1] == b"422", answer
    assert await door.belongings() == before


async def test_a_request_that_wants_more_gets_what_was_promised(door: Door) -> None:
    """A request that calls its sender somebody else, or an authority, is read for its key alone."""
    token = await asyncio.to_thread(lambda: invite(door.pki, "c", "viewer", (), minutes=5, days=1))
    request = certificates.new_request("a")
    admitted = await asyncio.to_thread(redeem, door.pki, token, request.certificate)
    facts = certificates.describe(admitted.certificate)
    assert (facts.name, facts.role, facts.hosts, facts.server, facts.authority, facts.signs) == ("c", "viewer", ("c",), False, False, False)
    assert facts.not_after - datetime.now(UTC) <= timedelta(days=1)


async def test_a_token_that_was_used_is_worth_nothing(door: Door) -> None:
    token = await asyncio.to_thread(lambda: invite(door.pki, "c", "peer", (), minutes=5))
    context = await asyncio.to_thread(door.context, None)
    body = json.dumps({"token": token, "request": certificates.new_request("c").certificate.decode()}).encode()
    ask = http("POST", "/v1/pki/join", body, "Content-Type: application/json")
    assert (await door.said(ask, context)).split()[1] == b"200"
    before = await door.belongings()
    for _ in range(3):
        answer = await door.said(ask, context)
        assert answer.split()[1] == b"401"
        assert b"CERTIFICATE" not in answer
    again = http("POST", "/v1/pki/join", body, "Content-Type: application/json", "Idempotency-Key: x")
    assert (await door.said(again, context)).split()[1] == b"401"
    assert await door.belongings() == before
    assert await asyncio.to_thread(door.pki.read, INVITATIONS) == b"[]\n"
