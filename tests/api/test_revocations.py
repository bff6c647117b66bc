"""How a revocation reaches the daemons: from peer to peer, believed for the authority's signature and not for who said it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from qmpd.access import ROLES, Role
from qmpd.authority import Authority
from qmpd.errors import NotFound
from qmpd.peering import Peering
from qmpd.peers import Peers
from qmpd.peerviews import RevocationView
from qmpd.pki import certificates
from qmpd.pki.certificates import ListFacts, Unreadable
from qmpd.pki.directory import AUTHORITY, REVOKED, Pki
from qmpd_api.client import Client
from qmpd_api.connection import Remote
from tests.api.lab import LOOPBACK, Daemon, authority, daemon, host, known, peer, port


def listed(pki: Pki) -> ListFacts:
    """The list in a directory."""
    return certificates.describe_list(pki.read(REVOKED) or b"", pki.read(AUTHORITY) or b"")


class Lab:
    """Three daemons in a row: `ca` where the authority is, `b` that knows it, `c` that knows `b` alone."""

    def __init__(self, pki: Pki, daemons: dict[str, Daemon], directory: Path) -> None:
        self.pki = pki
        self.daemons = daemons
        self.directory = directory

    async def looks(self, name: str) -> ListFacts:
        """One of them asks its peers."""
        await self.daemons[name].service.authority.look()
        return await asyncio.to_thread(listed, self.daemons[name].pki)


@pytest.fixture
async def lab(short_directory: Path) -> AsyncIterator[Lab]:
    ca = await asyncio.to_thread(authority, short_directory / "ca")
    async with AsyncExitStack() as stack:
        listeners = {name: stack.enter_context(port()) for name in ("ca", "b", "c")}
        peers = {"ca": ("b",), "b": ("ca", "c"), "c": ("b",)}
        daemons = {}
        for name, (listener, _) in listeners.items():
            pki = await asyncio.to_thread(host, ca, ca.directory if name == "ca" else short_directory / f"{name}-pki", name)
            others = [peer(other, listeners[other][1]) for other in peers[name]]
            daemons[name] = await stack.enter_async_context(daemon(name, short_directory / name, pki, listener, others))
        yield Lab(ca, daemons, short_directory)


async def test_a_revocation_goes_from_peer_to_peer(lab: Lab) -> None:
    await asyncio.to_thread(lab.pki.issue, "mallory", "peer", ())
    (line,) = await asyncio.to_thread(lab.pki.revoke, "mallory")
    assert set((await lab.looks("b")).revoked) == {line.serial}
    assert set((await lab.looks("c")).revoked) == {line.serial}
    assert await asyncio.to_thread(lab.daemons["c"].pki.read, REVOKED) == await asyncio.to_thread(lab.pki.read, REVOKED)


async def test_a_peer_that_was_revoked_is_cut_off_by_those_who_heard_of_it(lab: Lab) -> None:
    await asyncio.to_thread(lab.pki.revoke, "c")
    await lab.looks("b")
    assert not (await lab.daemons["b"].health("c")).reachable
    assert (await lab.daemons["b"].health("ca")).reachable


async def test_an_older_list_does_not_undo_a_revocation(lab: Lab) -> None:
    old = await asyncio.to_thread(lab.pki.read, REVOKED) or b""
    (line,) = await asyncio.to_thread(lab.pki.revoke, "c")
    await lab.looks("b")
    assert not await asyncio.to_thread(lab.daemons["b"].pki.take_list, old)
    assert set((await lab.looks("b")).revoked) == {line.serial}


async def test_where_the_authority_is_nobody_else_says_what_was_revoked(lab: Lab) -> None:
    pair, b = await asyncio.to_thread(lab.pki.authority), lab.daemons["b"].pki
    future = certificates.revocation_list(pair, [("1", datetime.now(UTC))], datetime.now(UTC), listed(b).number + 1)
    assert await asyncio.to_thread(b.take_list, future)
    assert (await lab.looks("ca")).revoked == {}


@pytest.mark.parametrize("lie", ["", "junk", "foreign"])
async def test_a_peer_that_lies_is_not_believed(short_directory: Path, lie: str) -> None:
    def made() -> tuple[Pki, str]:
        ca, other = authority(short_directory / "ca"), authority(short_directory / "other")
        other.issue("x", "viewer", ())
        other.revoke("x")
        return host(ca, short_directory / "b", "b"), (other.read(REVOKED) or b"").decode() if lie == "foreign" else lie

    b, said = await asyncio.to_thread(made)
    before = await asyncio.to_thread(b.read, REVOKED)

    class Liar(Peering):
        async def revocations(self, name: str) -> RevocationView:
            return RevocationView(number=2**60, revoked=said)

    await Authority(str(b.directory), Liar(known(peer("a", 1)))).look()
    assert await asyncio.to_thread(b.read, REVOKED) == before
    with pytest.raises(Unreadable):
        await asyncio.to_thread(b.take_list, said.encode())


async def test_a_list_that_ends_is_made_anew_where_it_is_made(tmp_path: Path) -> None:
    pki = await asyncio.to_thread(authority, tmp_path)
    await asyncio.to_thread(pki.issue, "x", "viewer", ())
    (line,) = await asyncio.to_thread(pki.revoke, "x")
    ends = listed(pki).until
    assert not await asyncio.to_thread(pki.renew_list, timedelta(days=180))
    pair = await asyncio.to_thread(pki.authority)
    old = certificates.revocation_list(pair, [(line.serial, datetime.now(UTC))], datetime.now(UTC) - timedelta(days=300), 1)
    await asyncio.to_thread(pki.write, {REVOKED: old})
    await Authority(str(tmp_path), Peering(Peers())).look()
    facts = await asyncio.to_thread(listed, pki)
    assert facts.until >= ends
    assert set(facts.revoked) == {line.serial}
    await asyncio.to_thread(pki.write, {REVOKED: b"junk"})
    await Authority(str(tmp_path), Peering(Peers())).look()
    assert set((await asyncio.to_thread(listed, pki)).revoked) == {line.serial}


@pytest.mark.parametrize("role", ROLES)
async def test_everybody_who_is_known_may_ask_what_was_revoked(lab: Lab, role: Role) -> None:
    name = "b" if role == "peer" else "ada"
    place = lab.directory / "asking"
    await asyncio.to_thread(lab.pki.store, place, await asyncio.to_thread(lab.pki.issue, name, role, ()))
    async with Client(Remote(address=f"{LOOPBACK}:{lab.daemons['ca'].port}", pki_dir=str(place))) as client:
        view = await client.revoked()
    assert view.revoked.encode() == await asyncio.to_thread(lab.pki.read, REVOKED)
    assert view.number == listed(lab.pki).number


async def test_a_daemon_without_certificates_has_no_list(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no certificates"):
        await Authority(str(tmp_path), Peering(Peers())).revoked()
    await Authority(str(tmp_path / "nothing"), Peering(Peers())).look()
