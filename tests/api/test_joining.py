"""Joining with an invitation, over real TLS: what a host gets, and what nobody gets who was not invited."""

from __future__ import annotations

import asyncio
import json
import ssl
import stat
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpd import __main__ as command
from qmpd.errors import AlreadyExists, Busy, HostError, Invalid, NotFound, QmpdError, Unauthorized
from qmpd.pki import certificates
from qmpd.pki.directory import AUTHORITY, AUTHORITY_KEY, CLIENT, INVITATIONS, REVOKED, SECRET, SERVER, Pki
from qmpd.pki.invitations import MARK, OPEN_AT_A_TIME, Invitation, invite, redeem, told
from qmpd.pki.joining import join
from qmpd_api.client import Client
from qmpd_api.connection import Remote
from qmpd_api.limits import Limits
from qmpd_api.routes import JOIN_BYTES
from tests.api.lab import LOOPBACK, Daemon, authority, daemon, host, port, reserved

REQUEST = certificates.new_request("anybody").certificate


class Lab:
    """A daemon on the authority's host, and a directory for those who join."""

    def __init__(self, directory: Path, pki: Pki, daemon: Daemon) -> None:
        self.directory = directory
        self.pki = pki
        self.daemon = daemon

    @property
    def url(self) -> str:
        return f"https://{LOOPBACK}:{self.daemon.port}"

    async def invited(self, name: str, **how: Any) -> str:
        """A token."""
        said = {"role": "peer", "hosts": (), "minutes": 60.0, **how}
        return await asyncio.to_thread(invite, self.pki, name, said.pop("role"), said.pop("hosts"), **said)

    async def joined(self, place: str, token: str, url: str | None = None) -> Pki:
        """A directory after `join`."""
        pki = Pki(self.directory / place)
        await asyncio.to_thread(join, pki, url or self.url, token)
        return pki

    async def asked(self, body: bytes, **headers: str) -> tuple[int, dict[str, Any]]:
        """The answer to a body that somebody made by hand, who shows no certificate."""
        context = ssl.create_default_context(cafile=str(self.pki.directory / AUTHORITY))
        sent = {"Content-Type": "application/json", **headers}
        async with (
            aiohttp.ClientSession() as session,
            session.post(f"{self.url}/v1/pki/join", data=body, headers=sent, ssl=context) as answer,
        ):
            return answer.status, await answer.json()

    def book(self) -> list[str]:
        """Who has a certificate."""
        return [line.name for line in self.pki.issued()]


@pytest.fixture
async def lab(short_directory: Path) -> AsyncIterator[Lab]:
    pki = await asyncio.to_thread(authority, short_directory / "ca")
    await asyncio.to_thread(host, pki, pki.directory, "ca")
    with port() as (listener, _):
        async with daemon("ca", short_directory / "d", pki, listener, limits=Limits(refusals=5, refusals_forgotten_s=1000.0)) as made:
            yield Lab(short_directory, pki, made)


async def test_a_host_that_was_invited_gets_a_certificate_for_a_key_that_stays_with_it(lab: Lab) -> None:
    pki = await lab.joined("b", await lab.invited("b", hosts=("10.0.0.2",), days=7))
    facts = certificates.describe(pki.read(SERVER[0]) or b"")
    assert (facts.name, facts.role, facts.hosts) == ("b", "peer", ("b", "10.0.0.2"))
    assert certificates.fits(pki.read(SERVER[1]) or b"", pki.read(SERVER[0]) or b"")
    assert pki.read(AUTHORITY) == lab.pki.read(AUTHORITY)
    assert pki.read(REVOKED) == lab.pki.read(REVOKED)
    for name in (*SERVER, *CLIENT):
        assert stat.S_IMODE((pki.directory / name).stat().st_mode) == (0o600 if name in SECRET else 0o644)
    assert pki.read(SERVER[1]) not in [path.read_bytes() for path in lab.pki.directory.iterdir()]
    assert lab.book() == ["ca", "b"]
    assert (await asyncio.to_thread(lab.pki.revoke, "b"))[0].serial == facts.serial


async def test_a_person_who_was_invited_gets_in(lab: Lab) -> None:
    pki = await lab.joined("ada", await lab.invited("ada", role="admin"))
    assert pki.read(SERVER[0]) is None
    async with Client(Remote(address=f"{LOOPBACK}:{lab.daemon.port}", pki_dir=str(pki.directory))) as ada:
        assert (await ada.machines({}, None)).machines == ()


async def test_a_token_is_good_once(lab: Lab) -> None:
    token = await lab.invited("b")
    await lab.joined("b", token)
    before = await asyncio.to_thread(lab.pki.read, "issued.json")
    with pytest.raises(Unauthorized, match="not valid"):
        await lab.joined("again", token)
    assert not await asyncio.to_thread((lab.directory / "again" / SERVER[0]).exists)
    assert await asyncio.to_thread(lab.pki.read, "issued.json") == before


async def test_of_many_who_show_one_token_at_once_one_gets_in(lab: Lab) -> None:
    token = await lab.invited("b")
    shown = json.dumps({"token": token, "request": REQUEST.decode()}).encode()
    outcomes = await asyncio.gather(*(lab.asked(shown) for _ in range(4)))
    assert sorted(status for status, _ in outcomes) == [200, 401, 401, 401]
    assert lab.book() == ["ca", "b"]


async def test_a_token_ends(lab: Lab) -> None:
    token = await lab.invited("b", minutes=0.0001)
    await asyncio.sleep(0.05)
    with pytest.raises(Unauthorized, match="not valid"):
        await lab.joined("b", token)
    assert lab.book() == ["ca"]


async def test_the_secret_is_not_kept_and_no_other_opens(lab: Lab) -> None:
    token, other = await lab.invited("b"), await lab.invited("c")
    kept = (await asyncio.to_thread(lab.pki.read, INVITATIONS) or b"").decode()
    assert told(token).secret not in kept
    mixed = ".".join([*token.split(".")[:3], told(other).secret])
    for wrong in (mixed, token[:-1], token + "x", f"{MARK}.a.b.c"):
        status, answer = await lab.asked(json.dumps({"token": wrong, "request": REQUEST.decode()}).encode())
        assert (status, answer["code"], answer["message"]) == (401, "unauthorized", "this token is not valid")
    assert lab.book() == ["ca"]
    await lab.joined("b", token)


async def test_who_guesses_has_to_wait(lab: Lab) -> None:
    body = json.dumps({"token": f"{MARK}.a.b.c", "request": REQUEST.decode()}).encode()
    statuses = [(await lab.asked(body))[0] for _ in range(8)]
    assert (statuses[:5], statuses[-2:]) == ([401] * 5, [429] * 2)


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"{}", 422),
        (b"[" * 100_000, 413),
        (b" " * (JOIN_BYTES + 1), 413),
        (json.dumps({"token": "x" * 257, "request": ""}).encode(), 422),
        (json.dumps({"token": "x", "request": "y" * 4097}).encode(), 422),
        (json.dumps({"token": "x", "request": "", "role": "admin"}).encode(), 422),
        (json.dumps({"token": "x", "request": "", "hosts": ["evil"]}).encode(), 422),
        (json.dumps({"token": "x", "request": "\ud800"}).encode(), 400),
    ],
    ids=range(9),
)
async def test_a_body_that_is_none_is_refused_and_nothing_is_made(lab: Lab, body: bytes, status: int) -> None:
    assert (await lab.asked(body))[0] == status
    assert lab.book() == ["ca"]


@pytest.mark.parametrize("request_", ["", "junk", REQUEST.decode().replace("M", "N", 3)])
async def test_a_request_that_is_none_does_not_cost_the_token(lab: Lab, request_: str) -> None:
    token = await lab.invited("b")
    status, answer = await lab.asked(json.dumps({"token": token, "request": request_}).encode())
    assert (status, answer["code"]) == (422, "invalid")
    await lab.joined("b", token)


async def test_an_authority_whose_key_the_daemon_cannot_use_says_so_and_keeps_the_token(lab: Lab) -> None:
    token = await lab.invited("b")
    key = await asyncio.to_thread(lab.pki.read, AUTHORITY_KEY) or b""
    await asyncio.to_thread(lab.pki.write, {AUTHORITY_KEY: b"junk"})
    with pytest.raises(QmpdError, match="is damaged"):
        await lab.joined("b", token)
    await asyncio.to_thread(lab.pki.write, {AUTHORITY_KEY: key})
    await lab.joined("b", token)


async def test_the_token_is_not_told_to_a_daemon_that_it_was_not_made_for(lab: Lab) -> None:
    """Somebody in between shows a certificate of the same authority, good for the same address."""
    token = await lab.invited("b")
    mallory = await asyncio.to_thread(host, lab.pki, lab.directory / "mallory", "mallory")
    with port() as (listener, number):
        async with daemon("mallory", lab.directory / "m", mallory, listener):
            with pytest.raises(HostError, match="was told nothing"):
                await lab.joined("b", token, f"https://{LOOPBACK}:{number}")
    assert not await asyncio.to_thread((lab.directory / "b" / SERVER[0]).exists)
    await lab.joined("b", token)


async def test_a_directory_that_belongs_to_another_authority_keeps_it_and_the_token_its_worth(lab: Lab) -> None:
    other = await asyncio.to_thread(authority, lab.directory / "other")
    place = await asyncio.to_thread(host, other, lab.directory / "b", "b")
    token, before = await lab.invited("b"), await asyncio.to_thread(place.read, SERVER[0])
    with pytest.raises(AlreadyExists, match="trusts another authority"):
        await lab.joined("b", token)
    with pytest.raises(AlreadyExists, match="that of an authority"):
        await lab.joined("other", token)
    assert await asyncio.to_thread(place.read, SERVER[0]) == before
    await lab.joined("c", token)


@pytest.mark.parametrize("url", ["", "http://a:1", "https://a", "https://a:0", "https://a:1/x", "https://a b:1", "https://u@a:1"])
async def test_a_url_that_is_none_is_refused(lab: Lab, url: str) -> None:
    with pytest.raises(Invalid, match="url"):
        await asyncio.to_thread(join, Pki(lab.directory / "b"), url, f"{MARK}.a.b.c")


async def test_a_daemon_that_is_not_there_is_named(lab: Lab) -> None:
    with reserved() as number, pytest.raises(HostError, match="cannot be joined"):
        await lab.joined("b", await lab.invited("b"), f"https://{LOOPBACK}:{number}")


@given(st.text())
def test_what_is_no_token_is_refused(text: str) -> None:
    with pytest.raises(Invalid, match="join-token"):
        told(text)


WRONG = (("a/b", (), 1.0, 1), ("b", ("a b",), 1.0, 1), ("a_b", (), 1.0, 1), ("b", (), 0.0, 1), ("b", (), 1.0, 0))


def test_an_invitation_that_could_not_be_met_is_not_made(tmp_path: Path) -> None:
    pki = authority(tmp_path / "ca")
    with pytest.raises(NotFound, match="no certificate for the daemon"):
        invite(pki, "b", "peer", (), minutes=1)
    host(pki, pki.directory, "ca")
    for name, hosts, minutes, days in WRONG:
        with pytest.raises(Invalid):
            invite(pki, name, "peer", hosts, minutes=minutes, days=days)
    assert pki.read(INVITATIONS) is None
    with pytest.raises(Unauthorized):
        redeem(pki, f"{MARK}.a.b.c", REQUEST)
    with pytest.raises(NotFound, match="qmpd pki init"):
        invite(Pki(tmp_path), "b", "peer", (), minutes=1)


def test_open_invitations_have_an_end(tmp_path: Path) -> None:
    pki = authority(tmp_path / "ca")
    host(pki, pki.directory, "ca")
    ends = datetime.now(UTC) + timedelta(hours=1)
    one = Invitation(id="0", name="b", role="peer", hosts=(), days=1, digest="", expires_at=ends)
    pki.write({INVITATIONS: msgspec.json.encode([one] * OPEN_AT_A_TIME)})
    with pytest.raises(Busy, match="are open"):
        invite(pki, "d", "peer", (), minutes=1)
    past = msgspec.structs.replace(one, expires_at=ends - timedelta(hours=2))
    pki.write({INVITATIONS: msgspec.json.encode([past] * OPEN_AT_A_TIME)})
    invite(pki, "d", "peer", (), minutes=1)
    assert len(msgspec.json.decode(pki.read(INVITATIONS) or b"")) == 1


def test_damaged_invitations_open_no_door_and_tell_no_path(tmp_path: Path) -> None:
    pki = authority(tmp_path / "ca")
    host(pki, pki.directory, "ca")
    token = invite(pki, "b", "peer", (), minutes=1)
    pki.write({INVITATIONS: b"[{}]"})
    with pytest.raises(HostError) as caught:
        redeem(pki, token, REQUEST)
    assert str(tmp_path) not in str(caught.value)


async def test_the_command_invites_and_joins(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*words: str) -> tuple[int, str]:
        status = command.main(["pki", *words])
        captured = capsys.readouterr()
        return status, captured.out + captured.err

    status, token = await asyncio.to_thread(run, "--dir", str(lab.pki.directory), "join-token", "b", "--host", LOOPBACK, "--ttl", "5")
    assert (status, token.startswith(f"{MARK}.")) == (0, True)
    place = ("--dir", str(lab.directory / "b"))
    status, said = await asyncio.to_thread(run, *place, "join", lab.url, "--token", token.strip())
    assert (status, said.startswith("peer b, valid until")) == (0, True)
    status, said = await asyncio.to_thread(run, *place, "join", lab.url, "--token", token.strip())
    assert (status, said) == (1, "qmpd: the daemon answered: this token is not valid\n")
    status, said = await asyncio.to_thread(run, *place, "check", "--host", "b")
    assert status == 0, said
