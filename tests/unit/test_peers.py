"""Who is a peer, what each may do, and what QEMU is told of it."""

from __future__ import annotations

import base64
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import cast

import pytest

from qmpd.access import Caller
from qmpd.credentials import FFDHE2048, PARAMETERS, directory, distinguished_name, server_directory
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


@pytest.mark.parametrize("missing", [AUTHORITY, REVOKED, SERVER[1]])
def test_qemu_is_not_sent_to_a_directory_that_lacks_a_file(tmp_path: Path, missing: str) -> None:
    pki = lab(tmp_path / "pki")
    assert directory(str(pki.directory)) == str(pki.directory)
    (pki.directory / missing).unlink()
    with pytest.raises(HostError, match=f"{missing} is missing"):
        directory(str(pki.directory))


def lab(place: Path) -> Pki:
    """A host's certificates, and their authority."""
    pki = Pki(place)
    pki.init("lab")
    pki.install(pki.issue("localhost", "peer", ()), pki.read(AUTHORITY) or b"", pki.read(REVOKED) or b"")
    return pki


@pytest.mark.parametrize("version", ["7.2.22", "10.0.13", "10.1.0"])
async def test_an_older_qemu_that_waits_gets_parameters_beside_the_certificates(tmp_path: Path, version: str) -> None:
    pki = lab(tmp_path / "pki")
    async with server_directory(str(pki.directory), str(tmp_path), version) as made:
        assert Path(made).parent == tmp_path
        assert (Path(made) / SERVER[1]).read_bytes() == pki.read(SERVER[1])
        assert (Path(made) / PARAMETERS).read_text() == FFDHE2048
        assert not (pki.directory / PARAMETERS).exists()
    assert [entry.name for entry in os.scandir(tmp_path)] == ["pki"]
    (pki.directory / PARAMETERS).write_text("its own")
    async with server_directory(str(pki.directory), str(tmp_path), version) as made:
        assert (Path(made) / PARAMETERS).read_text() == "its own"


async def test_a_newer_qemu_gets_the_directory_as_it_is(tmp_path: Path) -> None:
    pki = lab(tmp_path / "pki")
    for version in ("10.2.0", "11.1.3"):
        async with server_directory(str(pki.directory), str(tmp_path), version) as found:
            assert found == str(pki.directory)


async def test_a_directory_of_certificates_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    pki = lab(tmp_path / "pki")
    with pytest.raises(HostError, match=f"cannot be made in {tmp_path}/nowhere: No such file"):
        async with server_directory(str(pki.directory), f"{tmp_path}/nowhere", "7.2.22"):
            pytest.fail("there is no such directory")


def test_the_parameters_are_those_of_rfc_7919() -> None:
    """p = 2^2048 - 2^1984 + ((2^1918 * e) + 560316) * 2^64 - 1, and 2 (appendix A.1), with e to 2200 bits."""
    term, e, number = 1 << 2200, 0, 0
    while term:
        e, number = e + term, number + 1
        term //= number
    prime = 2**2048 - 2**1984 + ((e >> (2200 - 1918)) + 560316) * 2**64 - 1
    encoded = base64.b64decode("".join(FFDHE2048.splitlines()[1:-1]))
    assert encoded.endswith(prime.to_bytes(256) + b"\x02\x01\x02")
