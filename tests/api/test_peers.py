"""Two daemons that know each other, over real TLS: who is taken for whom, and what each hears of the other."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import pytest

from qmpctl.__main__ import run
from qmpctl.exits import Exit
from qmpd.errors import HostError, NotFound, PeerRefused, PeerSilent, PeerUnavailable
from qmpd.peering import HEALTH_S
from qmpd.peerviews import PeerCertificate, PeerGreeting, PeerHealth, PeerView
from qmpd.pki import certificates
from qmpd.pki.asking import ask
from qmpd.pki.certificates import KeyPair
from qmpd.pki.directory import AUTHORITY, AUTHORITY_KEY, CLIENT, REVOKED, SERVER, Pki
from qmpd.settings import Peer
from qmpd.trust import LOOK_S
from qmpd.views import CheckLine
from qmpd_api.client import Client
from qmpd_api.connection import Remote
from qmpd_api.dialling import dialled
from tests.api.lab import LOOPBACK, Daemon, authority, daemon, host, peer, port, reserved
from tests.api.standin import StandIn, for_qmpctl


class Lab:
    """An authority, and the daemons `a` and `b`."""

    def __init__(self, authority: Pki, a: Daemon, b: Daemon, directory: Path) -> None:
        self.authority = authority
        self.a = a
        self.b = b
        self.directory = directory

    def posing(self, name: str, pair: KeyPair | None = None) -> Pki:
        """The certificates of somebody else of the same authority. Blocks."""
        return host(self.authority, self.directory / name, name, pair)


@pytest.fixture
async def lab(short_directory: Path) -> AsyncIterator[Lab]:
    made = await asyncio.to_thread(authority, short_directory / "ca")
    async with AsyncExitStack() as stack:
        listeners = [stack.enter_context(port()) for _ in range(2)]
        (first, a_port), (second, b_port) = listeners
        a_pki, b_pki = [await asyncio.to_thread(host, made, short_directory / f"{name}-pki", name) for name in ("a", "b")]
        a = await stack.enter_async_context(daemon("a", short_directory / "a", a_pki, first, [peer("b", b_port)]))
        b = await stack.enter_async_context(daemon("b", short_directory / "b", b_pki, second, [peer("a", a_port, may_send=False)]))
        yield Lab(made, a, b, short_directory)


async def test_daemons_reach_each_other_and_hear_what_they_may(lab: Lab) -> None:
    health = await lab.a.health("b")
    assert (health.name, health.reachable, health.problem) == ("b", True, None)
    assert health.greeting is not None
    assert (health.greeting.peer, health.greeting.may_send, health.greeting.may_receive) == ("a", False, True)
    assert health.certificate is not None
    assert (health.certificate.name, health.certificate.role) == ("b", "peer")
    assert health.clock_ahead_s is not None
    assert abs(health.clock_ahead_s) < HEALTH_S
    back = await lab.b.health("a")
    assert back.greeting is not None
    assert (back.greeting.peer, back.greeting.may_send) == ("b", True)


async def test_the_settings_are_told_without_asking_anybody(lab: Lab) -> None:
    url = f"https://{LOOPBACK}:{lab.b.port}"
    expected = PeerView(name="b", url=url, certificate="b", may_send=True, may_receive=True, migration_address=LOOPBACK)
    assert lab.a.service.peering.list() == (expected,)
    with pytest.raises(NotFound):
        await lab.a.health("c")


async def test_a_peer_that_the_settings_do_not_name_is_refused(lab: Lab) -> None:
    pki = await asyncio.to_thread(lab.posing, "c")
    async with dialled(peer("b", lab.b.port), str(pki.directory)) as client:
        with pytest.raises(PeerRefused, match="c is no peer") as caught:
            await client.greeting()
    assert isinstance(caught.value.details["error"], dict)
    assert caught.value.details["error"]["code"] == "forbidden"


async def test_a_peer_may_not_do_what_people_do(lab: Lab) -> None:
    async with Client(Remote(address=f"{LOOPBACK}:{lab.b.port}", pki_dir=str(lab.a.pki.directory))) as client:
        assert (await client.greeting()).peer == "a"
    async with dialled(peer("b", lab.b.port), str(lab.a.pki.directory)) as client:
        with pytest.raises(PeerRefused, match="peer:a is peer"):
            await client.machines({}, None)


async def test_another_peer_in_the_place_of_the_one_that_was_meant_is_not_spoken_to(lab: Lab) -> None:
    """The certificate of `b` is good, and good for this address: it is still not that of `c`."""
    async with dialled(peer("c", lab.b.port), str(lab.a.pki.directory)) as client:
        with pytest.raises(PeerUnavailable, match=r"not trusted: it is peer:b, not peer:c$"):
            await client.greeting()


async def test_a_person_cannot_pose_as_a_peer(lab: Lab) -> None:
    pair = await asyncio.to_thread(lab.authority.issue, "a", "admin", ())
    place = lab.directory / "ada"
    await asyncio.to_thread(lab.authority.store, place, pair)
    async with dialled(peer("b", lab.b.port), str(place)) as client:
        with pytest.raises(PeerRefused, match="admin:a is admin; this is for peer"):
            await client.greeting()


async def test_a_peer_that_was_revoked_is_refused(lab: Lab) -> None:
    await asyncio.to_thread(lab.authority.revoke, "a")
    listed = await asyncio.to_thread(lab.authority.read, REVOKED) or b""
    await asyncio.to_thread((lab.b.pki.directory / REVOKED).write_bytes, listed)
    async with asyncio.timeout(20 * LOOK_S):
        while (health := await lab.a.health("b")).reachable:
            await asyncio.sleep(LOOK_S / 4)
    assert health.code in {"peer_refused", "peer_unavailable", "peer_silent"}


async def test_who_revoked_a_peer_does_not_speak_to_it(lab: Lab) -> None:
    await asyncio.to_thread(lab.authority.revoke, "b")
    listed = await asyncio.to_thread(lab.authority.read, REVOKED) or b""
    await asyncio.to_thread((lab.a.pki.directory / REVOKED).write_bytes, listed)
    health = await lab.a.health("b")
    assert (health.reachable, health.code) == (False, "peer_unavailable")
    assert health.problem is not None
    assert "revoked" in health.problem


@pytest.mark.parametrize("ago", [20, -2], ids=["expired", "not yet valid"])
async def test_a_peer_whose_time_is_not_now_is_refused(lab: Lab, ago: int) -> None:
    def signed() -> Pki:
        keys = KeyPair(certificate=lab.authority.read(AUTHORITY) or b"", key=lab.authority.read(AUTHORITY_KEY) or b"")
        request = certificates.new_request("a")
        now = datetime.now(UTC) - timedelta(days=ago)
        made = certificates.issue(keys, request.certificate, name="a", role="peer", hosts=(LOOPBACK,), now=now, days=10)
        return lab.posing("late", KeyPair(certificate=made, key=request.key))

    pki = await asyncio.to_thread(signed)
    async with dialled(peer("b", lab.b.port), str(pki.directory)) as client:
        with pytest.raises((PeerUnavailable, PeerSilent)):
            await client.greeting()


async def test_without_certificates_nobody_is_reached(lab: Lab, tmp_path: Path) -> None:
    with pytest.raises(HostError, match="qmpd pki check"):
        async with dialled(peer("b", lab.b.port), str(tmp_path)):
            pytest.fail("there are none")
    for name in (*SERVER, *CLIENT):
        await asyncio.to_thread((lab.a.pki.directory / name).unlink)
    health = await lab.a.health("b")
    assert (health.reachable, health.code) == (False, "host_error")


async def test_a_peer_that_is_not_there_is_said_to_be_so(lab: Lab) -> None:
    with reserved() as gone:
        async with dialled(peer("b", gone), str(lab.a.pki.directory)) as client:
            with pytest.raises(PeerUnavailable, match="cannot connect"):
                await client.greeting()


async def asked(lab: Lab, *peers: Peer) -> list[CheckLine]:
    """What `qmpd pki check` says of peers on the host of `a`."""
    return await asyncio.to_thread(ask, lab.a.pki, peers, datetime.now(UTC))


async def test_a_check_without_a_daemon_asks_the_peers_as_well(lab: Lab) -> None:
    (line,) = await asked(lab, peer("b", lab.b.port))
    assert (line.verdict, line.subject, "certificate until" in line.found) == ("pass", "b", True)
    assert await asked(lab) == []


async def test_a_check_says_what_is_wrong_with_a_peer_and_what_mends_it(lab: Lab) -> None:
    localhost = msgspec.structs.replace(peer("b", lab.b.port), url=f"https://localhost:{lab.b.port}")
    with reserved() as number:
        lines = await asked(lab, peer("c", lab.b.port), peer("b", number), localhost)
    assert [(line.verdict, line.subject) for line in lines] == [("fail", "c"), ("warn", "b"), ("fail", "b")]
    assert "is peer:b, not peer:c" in lines[0].found
    assert "port is open" in (lines[1].mend or "")
    assert "ismatch" in lines[2].found
    assert "--host HOST" in (lines[2].mend or "")
    stranger = await asyncio.to_thread(lab.posing, "c")
    (line,) = await asyncio.to_thread(ask, stranger, (peer("b", lab.b.port),), datetime.now(UTC))
    assert (line.verdict, "c is no peer" in line.found) == ("fail", True)
    (line,) = await asyncio.to_thread(ask, lab.a.pki, (peer("b", lab.b.port),), datetime.now(UTC) + timedelta(days=390))
    assert line.verdict == "warn"


async def test_a_doctor_names_a_peer_that_is_gone_and_certificates_that_will_not_do(lab: Lab) -> None:
    report = await lab.b.service.upkeep.doctor()
    assert [finding.where for finding in report.findings if finding.where.startswith(("peer", "certificates"))] == ["certificates, names"]
    await asyncio.to_thread(lab.authority.revoke, "b")
    listed = await asyncio.to_thread(lab.authority.read, REVOKED) or b""
    await asyncio.to_thread((lab.a.pki.directory / REVOKED).write_bytes, listed)
    await asyncio.to_thread((lab.a.pki.directory / SERVER[1]).chmod, 0o644)
    report = await lab.a.service.upkeep.doctor()
    found = {finding.where: (finding.severity, finding.what) for finding in report.findings}
    assert found["certificates, server-key.pem"] == ("fail", "is open to others (mode 0644)")
    assert "revoked" in found["peer b"][1]


@pytest.fixture
def standin(short_directory: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    with for_qmpctl(short_directory, monkeypatch) as made:
        yield made


GREETING = PeerGreeting(version="1.2", peer="a", may_send=True, may_receive=True, time="2026-11-01T00:00:00.000Z")
SHOWN = PeerCertificate(name="b", role="peer", expires_at="2027-11-01T00:00:00.000Z", fingerprint="00")


def test_the_command_lists_peers_and_asks_each(standin: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    views = [
        PeerView(name=name, url=f"https://{name}:1", certificate=name, may_send=True, may_receive=False, migration_address=name)
        for name in ("b", "c")
    ]
    standin.answers["GET /v1/peers"] = tuple(views)
    standin.answers["GET /v1/peers/b/health"] = PeerHealth(
        name="b", url="https://b:1", reachable=True, greeting=GREETING, certificate=SHOWN, round_trip_ms=1.0, clock_ahead_s=-3.25
    )
    assert run(["peers", "--no-ask"]) == Exit.OK
    assert "reachable" not in capsys.readouterr().out
    standin.answers["GET /v1/peers/c/health"] = PeerHealth(
        name="c", url="https://c:1", reachable=False, code="peer_unavailable", problem="cannot connect"
    )
    assert run(["peers"]) == Exit.NO
    shown = capsys.readouterr()
    rows = [line.split() for line in shown.out.splitlines()]
    assert rows[1] == ["b", "https://b:1", "yes", "no", "reachable", "1.2", "-3.2", "s", "2027-11-01"]
    assert rows[2][:6] == ["c", "https://c:1", "yes", "no", "peer", "unavailable"]
    assert shown.err == "c: cannot connect\n"
    assert run(["peers", "--json"]) == Exit.NO
    assert [health["reachable"] for health in json.loads(capsys.readouterr().out)] == [True, False]
