"""What `qmpd pki check` finds: each test breaks one thing of a set-up that is right."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest

from qmpd import __main__ as command
from qmpd.access import Role
from qmpd.inventory import certificate_lines
from qmpd.pki import certificates
from qmpd.pki.certificates import KeyPair
from qmpd.pki.checking import STALE, Daemon, check, in_short
from qmpd.pki.directory import AUTHORITY, AUTHORITY_KEY, CLIENT, REVOKED, SERVER, Pki
from qmpd.settings import user_defaults
from qmpd.views import CheckLine


def moment() -> datetime:
    """Now: not when this file was imported, because a whole run may take longer than certificates are dated back."""
    return datetime.now(UTC)


Break = Callable[[Pki], None]


@pytest.fixture
def pki(tmp_path: Path) -> Pki:
    made = Pki(tmp_path / "pki")
    made.init("lab")
    made.install(made.issue("localhost", "peer", ("127.0.0.1",)), made.read(AUTHORITY) or b"", made.read(REVOKED) or b"")
    return made


def found(pki: Pki, now: datetime | None = None, hosts: tuple[str, ...] = ("localhost",), **about: Any) -> list[CheckLine]:
    return [line for line in check(pki.directory, Daemon(hosts=hosts, **about), now or moment()) if line.verdict != "pass"]


def put(pki: Pki, name: str, data: bytes) -> None:
    (pki.directory / name).write_bytes(data)


def authority_of(pki: Pki) -> KeyPair:
    return KeyPair(certificate=pki.read(AUTHORITY) or b"", key=pki.read(AUTHORITY_KEY) or b"")


def signed(pki: Pki, role: Role, now: datetime | None = None, days: int = 90) -> KeyPair:
    request = certificates.new_request("localhost")
    made = certificates.issue(authority_of(pki), request.certificate, name="localhost", role=role, hosts=(), now=now or moment(), days=days)
    return KeyPair(certificate=made, key=request.key)


def replace(pki: Pki, names: tuple[str, str], pair: KeyPair) -> None:
    put(pki, names[0], pair.certificate)
    put(pki, names[1], pair.key)


def listed(pki: Pki, later: timedelta) -> bytes:
    return certificates.revocation_list(authority_of(pki), [], moment() + later, 1)


def foreign(pki: Pki) -> None:
    other = certificates.new_authority("lab", moment())
    request = certificates.new_request("localhost")
    made = certificates.issue(other, request.certificate, name="localhost", role="peer", hosts=(), now=moment(), days=90)
    replace(pki, SERVER, KeyPair(certificate=made, key=request.key))


def test_a_set_up_that_is_right_passes_and_was_really_tried(pki: Pki) -> None:
    lines = check(pki.directory, Daemon(hosts=("localhost",), listen=("127.0.0.1", "::"), uid=os.getuid()), moment())
    assert {line.verdict for line in lines} == {"pass"}
    assert lines[-1].subject == "TLS 1.3 with itself"


@pytest.mark.parametrize(
    ("breaks", "message"),
    [
        (lambda pki: (pki.directory / SERVER[0]).unlink(), "is missing"),
        (lambda pki: (pki.directory / REVOKED).unlink(), "is missing"),
        (lambda pki: (pki.directory / SERVER[1]).chmod(0o640), "is open to others"),
        (lambda pki: (pki.directory / AUTHORITY).chmod(0o666), "written to by others"),
        (lambda pki: pki.directory.chmod(0o777), "written to by others"),
        (lambda pki: put(pki, AUTHORITY, b"junk"), "not a certificate"),
        (lambda pki: put(pki, AUTHORITY, pki.read(SERVER[0]) or b""), "is not that of an authority"),
        (lambda pki: put(pki, AUTHORITY_KEY, pki.read(SERVER[1]) or b""), f"is not that of {AUTHORITY}"),
        (lambda pki: put(pki, REVOKED, b"junk"), "not a revocation list"),
        (lambda pki: put(pki, SERVER[0], b"junk"), "not a certificate"),
        (lambda pki: put(pki, SERVER[1], certificates.new_request("x").key), f"is not the key of {SERVER[0]}"),
        (foreign, "was not issued by the authority"),
        (lambda pki: pki.revoke("localhost"), "was revoked"),
        (lambda pki: replace(pki, SERVER, authority_of(pki)), "does not show who a host is"),
        (lambda pki: put(pki, REVOKED, listed(pki, timedelta(days=2))), "is valid from"),
        (lambda pki: put(pki, REVOKED, listed(pki, timedelta(days=-400))), "ended"),
        (lambda pki: replace(pki, CLIENT, signed(pki, "viewer")), "has the role viewer"),
        (lambda pki: replace(pki, SERVER, signed(pki, "operator")), "may not be used as a server"),
        (lambda pki: replace(pki, SERVER, signed(pki, "peer", moment() + timedelta(days=2))), "is valid from"),
        (lambda pki: replace(pki, SERVER, signed(pki, "peer", moment() - timedelta(days=9), 3)), "expired"),
    ],
)
def test_a_set_up_with_a_mistake_fails_and_says_which(pki: Pki, breaks: Break, message: str) -> None:
    breaks(pki)
    failures = [line for line in found(pki) if line.verdict == "fail"]
    assert any(message in line.found for line in failures), failures
    assert all(line.mend for line in failures)


def test_what_ends_soon_is_a_warning_and_what_has_ended_a_failure(pki: Pki) -> None:
    replace(pki, SERVER, signed(pki, "peer", moment(), 20))
    assert [(line.verdict, line.subject) for line in found(pki)] == [("warn", "as a server")]
    late = moment() + timedelta(days=350)
    assert ("warn", "revocation list") in {(line.verdict, line.subject) for line in found(pki, late)}
    later = moment() + timedelta(days=3660)
    assert {("fail", "certificate"), ("fail", "revocation list")} <= {(line.verdict, line.subject) for line in found(pki, later)}


def test_a_host_that_is_called_otherwise_is_warned(pki: Pki) -> None:
    lines = found(pki, hosts=("elsewhere",))
    assert [(line.verdict, line.subject) for line in lines] == [("warn", "names")]
    assert "elsewhere" in lines[0].found


def test_an_address_that_the_certificate_does_not_have_is_warned(pki: Pki) -> None:
    lines = found(pki, listen=("127.0.0.1", "192.0.2.1", "0.0.0.0"))  # noqa: S104  not listened at
    assert [(line.verdict, line.subject) for line in lines] == [("warn", "listen")]
    assert lines[0].found.startswith("192.0.2.1;")


def test_a_list_that_nobody_made_anew_is_warned(pki: Pki) -> None:
    put(pki, REVOKED, listed(pki, -STALE - timedelta(days=1)))
    (line,) = found(pki)
    assert (line.verdict, line.subject, line.found.startswith("is of ")) == ("warn", "revocation list", True)


def test_a_directory_of_somebody_elses_is_a_failure(pki: Pki) -> None:
    (line,) = found(pki, uid=os.getuid() + 1)
    assert (line.verdict, line.subject) == ("fail", "directory")
    assert "belongs to" in line.found


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
@pytest.mark.parametrize(
    ("name", "owners"), [(SERVER[1], (0, 1)), (SERVER[1], (1, 0)), (AUTHORITY, (0, 1)), (AUTHORITY_KEY, (1, 2))], ids=str
)
def test_a_file_of_somebody_elses_is_a_failure(pki: Pki, name: str, owners: tuple[int, int]) -> None:
    for path in pki.directory.iterdir():
        os.chown(path, owners[0], owners[0])
    os.chown(pki.directory, owners[0], owners[0])
    assert found(pki, uid=owners[0]) == []
    os.chown(pki.directory / name, owners[1], owners[1])
    (line,) = found(pki, uid=owners[0])
    assert (line.verdict, line.subject) == ("fail", name)
    assert (line.mend or "").startswith("chown ")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a file of somebody else's")
def test_what_root_makes_belongs_to_whom_the_directory_belongs(tmp_path: Path) -> None:
    pki = Pki(tmp_path / "pki")
    pki.directory.mkdir(mode=0o700)
    os.chown(pki.directory, 1, 1)
    pki.init("lab")
    pki.install(pki.issue("localhost", "peer", ()), pki.read(AUTHORITY) or b"", pki.read(REVOKED) or b"")
    assert {path.stat().st_uid for path in pki.directory.iterdir()} == {1}
    assert found(pki, uid=1) == []


def test_a_report_on_the_host_says_in_short_what_is_wrong(pki: Pki, tmp_path: Path) -> None:
    settings = msgspec.structs.replace(user_defaults("ada", str(tmp_path), {}), pki_dir=str(pki.directory))
    assert [(line.topic, line.verdict) for line in in_short(settings, ("localhost",), moment())] == [("Certificates", "pass")]
    (pki.directory / SERVER[1]).chmod(0o644)
    assert [(line.topic, line.verdict, line.subject) for line in in_short(settings, ("localhost",), moment())] == [
        ("Certificates", "warn", SERVER[1])
    ]
    assert [line.subject for line in certificate_lines(settings)] == [SERVER[1]]
    assert certificate_lines(msgspec.structs.replace(settings, pki_dir=str(tmp_path / "nothing"))) == []
    nothing = msgspec.structs.replace(settings, pki_dir=str(tmp_path / "nothing"), listen=("127.0.0.1:1",))
    assert [line.verdict for line in certificate_lines(nothing)] == ["warn"]


def test_the_command_says_by_its_status_whether_the_files_will_do(pki: Pki, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["pki", "--dir", str(pki.directory), "check", "--host", "localhost"]
    assert command.main(words) == 0
    assert "Daemons can trust each other" in capsys.readouterr().out
    pki.revoke("localhost")
    assert command.main([*words, "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert not report["ok"]
    assert "was revoked" in " ".join(line["found"] for line in report["lines"])
