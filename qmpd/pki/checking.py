"""Whether a directory of certificates will do: for the API over TCP, and for QEMU's own migration and NBD channels.

Each file is looked at by itself, then those that belong together, and at last a TLS 1.3 connection is made in memory with them.
"""

from __future__ import annotations

import ssl
import stat
from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final

from qmpd.hostcheck.line import Topic
from qmpd.pki import certificates
from qmpd.pki.certificates import CertificateFacts, Unreadable
from qmpd.pki.context import client_context, server_context
from qmpd.pki.directory import AUTHORITY, AUTHORITY_KEY, CLIENT, REVOKED, SECRET, SERVER, Pki
from qmpd.views import CheckLine

#: Long enough to renew without hurry.
SOON: Final = timedelta(days=30)
#: A handshake in memory needs three exchanges; more means that it does not end.
ROUNDS: Final = 10

#: What mends most of it.
ANEW: Final = "qmpd pki issue HOST where certificates are issued, and copy its files here"

_FILES: Final = Topic("Files")
_AUTHORITY: Final = Topic("Authority")
_HOST: Final = Topic("This host")
_TOGETHER: Final = Topic("Together")


def check(directory: str | Path, hosts: Sequence[str], now: datetime) -> list[CheckLine]:
    """Every finding about a directory, for a host that is reached under `hosts`. Blocks."""
    pki = Pki(directory)
    lines = list(_files(pki))
    if any(line.verdict == "fail" for line in lines):
        return lines
    lines += [*_authority(pki, now), *_list(pki, now)]
    for names, subject in ((SERVER, "as a server"), (CLIENT, "as a client")):
        lines += _own(pki, names, subject, hosts, now)
    if not any(line.verdict == "fail" for line in lines):
        lines.append(_handshake(pki))
    return lines


def _files(pki: Pki) -> Iterator[CheckLine]:
    where = pki.directory
    try:
        mode = stat.S_IMODE(where.stat().st_mode)
    except OSError as error:
        yield _FILES.failed(
            "directory", f"{where}: {error.strerror}", "There are no certificates.", f"qmpd pki --dir {where} init, or {ANEW}"
        )
        return
    if mode & 0o022:
        yield _FILES.failed("directory", f"{where} can be written to by others (mode {mode:04o})", "", f"chmod go-w {where}")
    for name in (AUTHORITY, REVOKED, *SERVER, *CLIENT, AUTHORITY_KEY):
        path = where / name
        try:
            status = path.stat()
            path.open("rb").close()
        except FileNotFoundError:
            if name != AUTHORITY_KEY:
                mend = ANEW if name in {*SERVER, *CLIENT} else "copy it from the host where certificates are issued"
                yield _FILES.failed(name, "is missing", "", mend)
            continue
        except OSError as error:
            yield _FILES.failed(name, f"cannot be read: {error.strerror}", "The daemon and QEMU run as this user.", f"chown to it: {path}")
            continue
        mode = stat.S_IMODE(status.st_mode)
        if name in SECRET and mode & 0o077:
            yield _FILES.failed(name, f"is open to others (mode {mode:04o})", "Whoever read it can be this host.", f"chmod 600 {path}")
        elif mode & 0o022:
            yield _FILES.failed(name, f"can be written to by others (mode {mode:04o})", "", f"chmod go-w {path}")
        else:
            yield _FILES.passed(name, f"mode {mode:04o}")


def _authority(pki: Pki, now: datetime) -> Iterator[CheckLine]:
    try:
        facts = certificates.describe(pki.read(AUTHORITY) or b"")
    except Unreadable as error:
        yield _AUTHORITY.failed("certificate", str(error), "Nobody can be trusted with it.", "copy it again")
        return
    if not facts.authority or not facts.signs:
        yield _AUTHORITY.failed("certificate", f"{facts.name} is not that of an authority", "", "qmpd pki init")
        return
    yield _dated(_AUTHORITY, "certificate", facts, now, "qmpd pki init, and new certificates for all")
    key = pki.read(AUTHORITY_KEY)
    if key is not None:
        try:
            right = certificates.fits(key, pki.read(AUTHORITY) or b"")
        except Unreadable:
            right = False
        if right:
            yield _AUTHORITY.passed("key", "here", "Certificates are issued on this host: keep a copy of the key off line.")
        else:
            yield _AUTHORITY.failed("key", f"is not that of {AUTHORITY}", "Nothing can be issued or revoked.", "restore both files")


def _list(pki: Pki, now: datetime) -> Iterator[CheckLine]:
    try:
        found = certificates.describe_list(pki.read(REVOKED) or b"", pki.read(AUTHORITY) or b"")
        revoked, until = found.revoked, found.until
    except Unreadable as error:
        yield _AUTHORITY.failed("revocation list", str(error), "No connection is accepted without it.", "copy it again")
        return
    if until <= now:
        yield _AUTHORITY.failed("revocation list", f"ended {until:%Y-%m-%d}", "", "copy a new one; any qmpd pki issue or revoke makes it")
    elif until - now < SOON:
        yield _AUTHORITY.warned("revocation list", f"ends {until:%Y-%m-%d}", "", "copy a new one; any qmpd pki issue or revoke makes it")
    else:
        yield _AUTHORITY.passed("revocation list", f"{len(revoked)} revoked, valid until {until:%Y-%m-%d}")


def _own(pki: Pki, names: tuple[str, str], subject: str, hosts: Sequence[str], now: datetime) -> Iterator[CheckLine]:
    certificate, key, authority = (pki.read(name) or b"" for name in (*names, AUTHORITY))
    try:
        facts = certificates.describe(certificate)
        trusted, own = certificates.issued_by(certificate, authority), certificates.fits(key, certificate)
        revoked = certificates.describe_list(pki.read(REVOKED) or b"", authority).revoked
    except Unreadable as error:
        yield _HOST.failed(subject, str(error), "", ANEW)
        return
    if not trusted:
        yield _HOST.failed(subject, f"{names[0]} was not issued by the authority of {AUTHORITY}", "", ANEW)
    if not own:
        yield _HOST.failed(subject, f"{names[1]} is not the key of {names[0]}", "", ANEW)
    if facts.serial in revoked:
        yield _HOST.failed(subject, f"was revoked {revoked[facts.serial]:%Y-%m-%d}", "Every peer refuses it.", ANEW)
    if facts.role != "peer":
        yield _HOST.failed(subject, f"has the role {facts.role or 'none'}", "Only a peer may send and take machines.", ANEW)
    server = names is SERVER
    if not (facts.server if server else facts.client):
        yield _HOST.failed(subject, f"{names[0]} may not be used {subject}", "Its ExtendedKeyUsage says so.", ANEW)
    if server and not set(hosts) & set(facts.hosts):
        known = ", ".join(facts.hosts) or "nobody"
        meaning = "Peers refuse a certificate without the name under which they reach this host."
        yield _HOST.warned("names", f"{known}; this host calls itself {', '.join(hosts)}", meaning, ANEW)
    yield _dated(_HOST, subject, facts, now, "qmpd pki renew where certificates are issued")


def _dated(topic: Topic, subject: str, facts: CertificateFacts, now: datetime, mend: str) -> CheckLine:
    until = f"{facts.name}, valid until {facts.not_after:%Y-%m-%d}"
    if now < facts.not_before:
        return topic.failed(
            subject, f"{facts.name} is valid from {facts.not_before:%Y-%m-%d %H:%M} UTC on", "", "set the clock of this host"
        )
    if now >= facts.not_after:
        return topic.failed(subject, f"{facts.name} expired {facts.not_after:%Y-%m-%d}", "", mend)
    if facts.not_after - now < SOON:
        return topic.warned(subject, until, "", mend)
    return topic.passed(subject, until)


def _handshake(pki: Pki) -> CheckLine:
    """A connection of this host with itself, as server and as client, over two buffers."""
    name = certificates.describe(pki.read(SERVER[0]) or b"").hosts[0]
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    try:
        server = server_context(pki).wrap_bio(to_server, to_client, server_side=True)
        client = client_context(pki).wrap_bio(to_client, to_server, server_hostname=name)
        waiting = [client, server]
        for _ in range(ROUNDS):
            waiting = [side for side in waiting if not _shaken(side)]
            if not waiting:
                return _TOGETHER.passed("TLS 1.3 with itself", f"as {name}")
    except ssl.SSLError as error:
        return _TOGETHER.failed("TLS 1.3 with itself", error.reason or str(error), "", ANEW)
    return _TOGETHER.failed("TLS 1.3 with itself", "the handshake does not end", "", ANEW)


def _shaken(side: ssl.SSLObject) -> bool:
    try:
        side.do_handshake()
    except ssl.SSLWantReadError:
        return False
    return True
