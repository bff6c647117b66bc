"""Who is a peer, what each may do, and what QEMU is told of it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import cast

import pytest

from qmpd.access import Caller
from qmpd.credentials import admission, credentials, directory, distinguished_name
from qmpd.errors import Forbidden, HostError, NotFound, PeerUnavailable
from qmpd.peering import Peering, nowhere
from qmpd.peers import PeerDaemon, Peers
from qmpd.peerviews import PeerGreeting, RevocationView
from qmpd.pki.directory import AUTHORITY, REVOKED, SERVER, Pki
from qmpd.settings import Peer

B = Peer(name="b", url="https://b.example:1", certificate="b.example")
C = Peer(name="c", url="https://c.example:1", may_send=False, may_receive=False)
PEERS = Peers((C, B))


def asking(name: str | None) -> Caller:
    return Caller(user="x", role="peer", peer=name)


def test_a_peer_is_known_by_its_name_and_by_that_in_its_certificate() -> None:
    assert list(PEERS) == [B, C]
    assert (PEERS.get("b"), PEERS.owned_by("b.example"), PEERS.owned_by("c")) == (B, B, C)
    assert PEERS.owned_by("b") is None
    with pytest.raises(NotFound, match=r"no peer 'b\.example'"):
        PEERS.get("b.example")


def test_a_grant_is_asked_for_at_both_ends() -> None:
    assert PEERS.sender(asking("b")) == PEERS.receiver("b") == B
    with pytest.raises(Forbidden, match="may not send"):
        PEERS.sender(asking("c"))
    with pytest.raises(Forbidden, match="may not receive"):
        PEERS.receiver("c")
    with pytest.raises(NotFound):
        PEERS.receiver("d")
    with pytest.raises(Forbidden, match="is no peer"):
        PEERS.sender(Caller(user="admin:ada", role="admin"))
    with pytest.raises(NotFound):
        PEERS.sender(asking("gone"))


async def test_a_daemon_without_a_way_to_others_says_so() -> None:
    with pytest.raises(PeerUnavailable):
        nowhere(B)
    health = await Peering(PEERS).health("b")
    assert (health.reachable, health.code) == (False, "peer_unavailable")


class Says:
    """A peer that says one thing, whatever it is. Nothing is moved to it."""

    shown = None

    def __init__(self, time: str) -> None:
        self._time = time

    async def greeting(self) -> PeerGreeting:
        return PeerGreeting(version="1", peer="a", may_send=True, may_receive=True, time=self._time)

    async def revoked(self) -> RevocationView:
        return RevocationView(number=0, revoked="nothing that could be read")


@pytest.mark.parametrize(
    ("time", "ahead"), [("2026-11-01T00:01:00Z", 60.0), ("2026-10-31T23:59:00Z", -60.0), ("noon", None), ("2026-11-01", None), ("", None)]
)
async def test_a_peer_may_say_any_time_of_day(time: str, ahead: float | None) -> None:
    @asynccontextmanager
    async def dial(_peer: Peer) -> AsyncIterator[PeerDaemon]:
        yield cast("PeerDaemon", Says(time))

    health = await Peering(PEERS, dial, lambda: datetime(2026, 11, 1, tzinfo=UTC)).health("b")
    assert health.reachable
    assert health.clock_ahead_s == (None if ahead is None else pytest.approx(ahead, abs=30.0))


def test_qemu_is_told_the_name_of_one_peer() -> None:
    assert distinguished_name(B) == "O=qmpd,OU=peer,CN=b.example"
    assert admission("only-b", B) == {"qom-type": "authz-simple", "id": "only-b", "identity": "O=qmpd,OU=peer,CN=b.example"}
    assert credentials("tls", "/pki", "server") == {
        "qom-type": "tls-creds-x509",
        "id": "tls",
        "dir": "/pki",
        "endpoint": "server",
        "verify-peer": True,
    }


@pytest.mark.parametrize("missing", [AUTHORITY, REVOKED, SERVER[1]])
def test_qemu_is_not_sent_to_a_directory_that_lacks_a_file(tmp_path: Path, missing: str) -> None:
    pki = Pki(tmp_path / "pki")
    pki.init("lab")
    pki.install(pki.issue("localhost", "peer", ()), pki.read(AUTHORITY) or b"", pki.read(REVOKED) or b"")
    assert directory(str(pki.directory)) == str(pki.directory)
    (pki.directory / missing).unlink()
    with pytest.raises(HostError, match=f"{missing} is missing"):
        directory(str(pki.directory))
