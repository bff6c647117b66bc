"""The CA, its book and its files."""

from __future__ import annotations

import json
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from qmpd import __main__ as command
from qmpd.access import ROLES, Role
from qmpd.errors import AlreadyExists, HostError, Invalid, NotFound
from qmpd.pki import CERTIFICATE_DAYS, certificates
from qmpd.pki.certificates import Unreadable
from qmpd.pki.directory import AUTHORITY, AUTHORITY_KEY, CLIENT, INDEX, REVOKED, SECRET, SERVER, Pki

NOW = datetime(2026, 11, 1, tzinfo=UTC)
AUTHORITY_PAIR = certificates.new_authority("lab", NOW)


def issued(name: str = "hosta", role: Role = "peer", hosts: tuple[str, ...] = (), days: int = 10) -> certificates.KeyPair:
    request = certificates.new_request(name)
    signed = certificates.issue(AUTHORITY_PAIR, request.certificate, name=name, role=role, hosts=hosts, now=NOW, days=days)
    return certificates.KeyPair(certificate=signed, key=request.key)


def test_a_certificate_says_who_its_owner_is_and_until_when() -> None:
    facts = certificates.describe(issued("hosta", "peer", ("hosta.example", "10.0.0.1", "fd00::1")).certificate)
    assert (facts.name, facts.role, facts.organization, facts.issuer) == ("hosta", "peer", "qmpd", "lab")
    assert facts.hosts == ("hosta", "hosta.example", "10.0.0.1", "fd00::1")
    assert facts.not_before < NOW < facts.not_after == NOW + timedelta(days=10)
    assert (facts.authority, facts.signs, facts.server, facts.client) == (False, False, True, True)


@pytest.mark.parametrize("role", ["admin", "operator", "viewer"])
def test_a_person_cannot_pose_as_a_server(role: Role) -> None:
    facts = certificates.describe(issued("ada_l", role).certificate)
    assert (facts.role, facts.server, facts.client, facts.hosts) == (role, False, True, ())


def test_an_authority_signs_and_a_certificate_does_not() -> None:
    facts = certificates.describe(AUTHORITY_PAIR.certificate)
    assert (facts.authority, facts.signs) == (True, True)
    assert certificates.issued_by(issued().certificate, AUTHORITY_PAIR.certificate)
    other = certificates.new_authority("lab", NOW)
    assert not certificates.issued_by(issued().certificate, other.certificate)


def test_a_key_belongs_to_one_certificate() -> None:
    one, other = issued(), issued()
    assert certificates.fits(one.key, one.certificate)
    assert not certificates.fits(other.key, one.certificate)


@pytest.mark.parametrize("name", ["", "a/b", "..", ".", "-a", "a" * 65, "a b", "a\n", "a\0", "ä", "CN=x,OU=peer"])
def test_a_name_that_cannot_be_one_is_refused(name: str) -> None:
    with pytest.raises(Invalid, match=r"\$\.name"):
        issued(name)
    with pytest.raises(Invalid, match=r"\$\.name"):
        certificates.new_authority(name, NOW)


@pytest.mark.parametrize("host", ["", "a b", "*.example", "a/b", "host:443", "-a.example", "x" * 254])
def test_a_host_that_cannot_be_one_is_named_with_its_place(host: str) -> None:
    with pytest.raises(Invalid, match=r"\$\.hosts\[1\]"):
        issued("hosta", "peer", ("good.example", host))


def test_a_peer_needs_a_name_under_which_it_is_reached() -> None:
    with pytest.raises(Invalid, match=r"\$\.hosts"):
        issued("host_a", "peer")
    assert certificates.describe(issued("host_a", "peer", ("10.0.0.1",)).certificate).hosts == ("10.0.0.1",)


def test_a_time_that_is_over_before_it_begins_is_refused() -> None:
    with pytest.raises(Invalid, match=r"\$\.days"):
        issued(days=0)


@pytest.mark.parametrize("junk", [b"", b"junk", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", AUTHORITY_PAIR.key])
def test_what_is_no_certificate_cannot_be_read(junk: bytes) -> None:
    with pytest.raises(Unreadable):
        certificates.describe(junk)
    with pytest.raises(Unreadable):
        certificates.describe_der(junk)
    with pytest.raises(Unreadable):
        certificates.describe_list(junk, AUTHORITY_PAIR.certificate)
    with pytest.raises(Unreadable):
        certificates.issue(AUTHORITY_PAIR, junk, name="a", role="peer", hosts=(), now=NOW, days=1)


def test_what_is_no_key_cannot_be_read() -> None:
    with pytest.raises(Unreadable):
        certificates.fits(b"junk", AUTHORITY_PAIR.certificate)


def test_a_list_names_what_was_revoked_and_only_its_authority_can_make_it() -> None:
    serial = certificates.describe(issued().certificate).serial
    listed = certificates.revocation_list(AUTHORITY_PAIR, [(serial, NOW)], NOW, 7)
    facts = certificates.describe_list(listed, AUTHORITY_PAIR.certificate)
    assert (facts.number, facts.revoked) == (7, {serial: NOW})
    assert facts.since < NOW < facts.until
    with pytest.raises(Unreadable, match="not signed by this authority"):
        certificates.describe_list(listed, certificates.new_authority("lab", NOW).certificate)


def host(directory: Path) -> Pki:
    pki = Pki(directory / "pki")
    pki.init("lab")
    pki.install(pki.issue("localhost", "peer", ("127.0.0.1",)), pki.read(AUTHORITY) or b"", pki.read(REVOKED) or b"")
    return pki


def revoked_by(pki: Pki) -> dict[str, datetime]:
    return certificates.describe_list(pki.read(REVOKED) or b"", pki.read(AUTHORITY) or b"").revoked


def test_keys_are_for_their_owner_alone(tmp_path: Path) -> None:
    pki = host(tmp_path)
    assert stat.S_IMODE(pki.directory.stat().st_mode) == 0o700
    for name in (AUTHORITY, AUTHORITY_KEY, REVOKED, *SERVER, *CLIENT):
        assert stat.S_IMODE((pki.directory / name).stat().st_mode) == (0o600 if name in SECRET else 0o644)
    assert not [path for path in pki.directory.iterdir() if path.name.endswith(".new")]


def test_an_authority_is_made_once(tmp_path: Path) -> None:
    pki = host(tmp_path)
    before = pki.read(AUTHORITY)
    with pytest.raises(AlreadyExists):
        pki.init("another")
    assert pki.read(AUTHORITY) == before


def test_the_book_knows_everything_that_was_issued_and_revoked(tmp_path: Path) -> None:
    pki = host(tmp_path)
    made = pki.issue("hostb", "peer", ("10.0.0.2",))
    again = pki.renew("hostb", days=3)
    assert certificates.describe(again.certificate).hosts == certificates.describe(made.certificate).hosts
    assert made.key != again.key
    revoked = pki.revoke("hostb")
    serials = {certificates.describe(pair.certificate).serial for pair in (made, again)}
    assert {line.serial for line in revoked} == serials
    assert set(revoked_by(pki)) == serials
    assert [(line.name, line.revoked_at is None) for line in pki.issued()] == [("localhost", True), ("hostb", False), ("hostb", False)]
    for nobody in ("hostb", "nobody"):
        with pytest.raises(NotFound):
            pki.revoke(nobody)
    with pytest.raises(NotFound):
        pki.renew("hostb")
    certificates.describe(pki.issue("hostc", "peer", ()).certificate)
    assert set(revoked_by(pki)) == serials


def test_one_certificate_can_be_revoked_by_its_number(tmp_path: Path) -> None:
    pki = host(tmp_path)
    first, second = pki.issue("b", "peer", ()), pki.issue("b", "peer", ())
    assert [line.serial for line in pki.revoke(certificates.describe(first.certificate).serial)] == [
        certificates.describe(first.certificate).serial
    ]
    assert pki.renew("b").certificate != second.certificate


def test_without_an_authority_nothing_is_issued(tmp_path: Path) -> None:
    for pki in (Pki(tmp_path / "nothing"), Pki(tmp_path)):
        with pytest.raises(NotFound, match="qmpd pki init"):
            pki.issue("a", "peer", ())
        with pytest.raises(NotFound):
            pki.revoke("a")


def test_a_damaged_authority_is_not_used(tmp_path: Path) -> None:
    pki = host(tmp_path)
    (pki.directory / AUTHORITY_KEY).write_bytes(certificates.new_authority("x", NOW).key)
    with pytest.raises(HostError, match="is not the key of"):
        pki.issue("a", "peer", ())
    (pki.directory / AUTHORITY_KEY).write_bytes(b"junk")
    with pytest.raises(HostError, match="is damaged"):
        pki.issue("a", "peer", ())
    (pki.directory / INDEX).write_bytes(b'[{"name": 1}]')
    with pytest.raises(HostError, match="is damaged"):
        pki.issued()


def test_a_host_takes_only_what_fits_together(tmp_path: Path) -> None:
    pki = host(tmp_path)
    authority, revoked = pki.read(AUTHORITY) or b"", pki.read(REVOKED) or b""
    one, other = pki.issue("a", "peer", ()), pki.issue("b", "peer", ())
    new = Pki(tmp_path / "new")
    with pytest.raises(Invalid, match="this key"):
        new.install(certificates.KeyPair(certificate=one.certificate, key=other.key), authority, revoked)
    with pytest.raises(Invalid, match="of this authority"):
        new.install(one, AUTHORITY_PAIR.certificate, revoked)
    with pytest.raises(Invalid, match="of a peer, not of viewer"):
        new.install(pki.issue("ada", "viewer", ()), authority, revoked)
    assert not new.directory.exists()
    new.install(one, authority, revoked)
    foreign = Pki(tmp_path / "foreign")
    foreign.init("lab")
    with pytest.raises(AlreadyExists, match="trusts another authority"):
        new.install(foreign.issue("a", "peer", ()), foreign.read(AUTHORITY) or b"", foreign.read(REVOKED) or b"")
    assert new.read(SERVER[0]) == one.certificate


def run(*words: str, directory: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    status = command.main(["pki", "--dir", str(directory), *words])
    captured = capsys.readouterr()
    return status, captured.out + captured.err


def test_the_command_makes_lists_and_revokes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = tmp_path / "pki"
    assert run("init", "--host", "localhost", directory=place, capsys=capsys)[0] == 0
    status, said = run("issue", "hostb", "--host", "10.0.0.2", directory=place, capsys=capsys)
    assert (status, str(place / "issued" / "hostb") in said) == (0, True)
    assert (place / "issued" / "hostb" / SERVER[1]).exists()
    assert run("issue", "ada", "--role", "operator", "--days", "5", "--out", str(tmp_path / "ada"), directory=place, capsys=capsys)[0] == 0
    assert {path.name for path in (tmp_path / "ada").iterdir()} == {AUTHORITY, REVOKED, *CLIENT}
    assert run("renew", "ada", "--out", str(tmp_path / "ada"), directory=place, capsys=capsys)[0] == 0
    until = certificates.describe((tmp_path / "ada" / CLIENT[0]).read_bytes()).not_after
    assert timedelta(days=CERTIFICATE_DAYS - 1) < until - datetime.now(UTC) <= timedelta(days=CERTIFICATE_DAYS)
    assert run("revoke", "hostb", directory=place, capsys=capsys)[0] == 0
    _, listed = run("list", directory=place, capsys=capsys)
    assert [line.split()[:3] for line in listed.splitlines()[1:3]] == [["localhost", "peer", "valid"], ["hostb", "peer", "revoked"]]
    _, document = run("list", "--json", directory=place, capsys=capsys)
    assert [line["name"] for line in json.loads(document)] == ["localhost", "hostb", "ada", "ada"]


def test_the_first_certificate_is_called_by_a_name_where_there_is_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, said = run("init", "--host", "10.0.0.1", "--host", "lab.example", directory=tmp_path, capsys=capsys)
    assert "a certificate for lab.example" in said
    assert {"10.0.0.1", "lab.example"} <= set(certificates.describe(Pki(tmp_path).read(SERVER[0]) or b"").hosts)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("issue", "a/b"), "$.name"),
        (("issue", "a", "--host", "b c"), "$.hosts[0]"),
        (("issue", "a", "--days", "0"), "$.days"),
        (("renew", "nobody"), "no certificate of 'nobody'"),
        (("revoke", "nobody"), "nobody"),
        (("init",), "has an authority already"),
    ],
)
def test_a_step_that_cannot_be_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str) -> None:
    place = tmp_path / "pki"
    Pki(place).init("lab")
    status, said = run(*words, directory=place, capsys=capsys)
    assert status == 1
    assert message in said
    assert len(said.splitlines()) == 1
    assert not (place / "issued").exists()


def test_every_role_can_be_issued(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Pki(tmp_path).init("lab")
    for role in ROLES:
        assert run("issue", f"an-{role}", "--role", role, directory=tmp_path, capsys=capsys)[0] == 0
    assert [line.role for line in Pki(tmp_path).issued()] == list(ROLES)
