"""Whether a directory of certificates will do: for the API over TCP, and for QEMU's own migration and NBD channels.

Each file is looked at by itself, then those that belong together, and at last a TLS 1.3 connection is made in memory with them.
"""

from __future__ import annotations

import pwd
import ssl
import stat
from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final

import msgspec

from qmpd.hostcheck.line import Topic
from qmpd.pki import certificates
from qmpd.pki.certificates import CertificateFacts, Unreadable
from qmpd.pki.context import client_context, server_context
from qmpd.pki.directory import AUTHORITY, AUTHORITY_KEY, CLIENT, INVITATIONS, REVOKED, SECRET, SERVER, Pki
from qmpd.settings import Settings
from qmpd.views import CheckLine

#: Long enough to renew without hurry.
SOON: Final = timedelta(days=30)
#: A handshake in memory needs three exchanges; more means that it does not end.
ROUNDS: Final = 10

#: Where a list is made, it is made anew at least this often (`qmpd.authority`).
STALE: Final = timedelta(days=200)
#: What mends a clock, and a list.
CLOCK: Final = "set the clock of this host, and keep it so (chrony, systemd-timesyncd)"
LIST: Final = "copy a new one from where certificates are issued; a peer's daemon fetches it by itself (see qmpctl peers)"
#: What mends most of it.
ANEW: Final = "qmpd pki issue HOST where certificates are issued, and copy its files here"

#: Addresses that mean all of a host.
_EVERYWHERE: Final = frozenset({"0.0.0.0", "::", "*"})  # noqa: S104  they are recognised, not listened at
_SHORT: Final = Topic("Certificates")
_FILES: Final = Topic("Files")
_AUTHORITY: Final = Topic("Authority")
_HOST: Final = Topic("This host")
_TOGETHER: Final = Topic("Together")


class Daemon(msgspec.Struct, frozen=True, kw_only=True):
    """Of the daemon that uses the files: under which names it is reached, where it listens, and its user (None: not known)."""

    hosts: tuple[str, ...]
    listen: tuple[str, ...] = ()
    uid: int | None = None


def daemon_of(settings: Settings, hosts: Sequence[str]) -> Daemon:
    """The daemon of these settings; its state directory says whose it is. Blocks."""
    try:
        uid: int | None = Path(settings.state_dir).stat().st_uid
    except OSError:
        uid = None
    listen = tuple(address.rpartition(":")[0].strip("[]") for address in settings.listen)
    return Daemon(hosts=tuple(hosts), listen=listen, uid=uid)


def check(directory: str | Path, daemon: Daemon, now: datetime) -> list[CheckLine]:
    """Every finding about a directory. Blocks."""
    pki = Pki(directory)
    lines = list(_files(pki, daemon))
    if any(line.verdict == "fail" for line in lines):
        return lines
    lines += [*_authority(pki, now), *_list(pki, now)]
    for names, subject in ((SERVER, "as a server"), (CLIENT, "as a client")):
        lines += _own(pki, names, subject, daemon, now)
    if not any(line.verdict == "fail" for line in lines):
        lines.append(_handshake(pki))
    return lines


def in_short(settings: Settings, hosts: Sequence[str], now: datetime) -> list[CheckLine]:
    """The same for a report on the whole host: machines run without certificates, so that none of it is a failure there. Blocks."""
    lines = check(settings.pki_dir, daemon_of(settings, hosts), now)
    bad = [msgspec.structs.replace(line, topic=_SHORT.name, verdict="warn") for line in lines if line.verdict != "pass"]
    return bad or [_SHORT.passed("in order", settings.pki_dir, "qmpd pki check says more")]


def _files(pki: Pki, daemon: Daemon) -> Iterator[CheckLine]:
    where = pki.directory
    try:
        status = where.stat()
    except OSError as error:
        yield _FILES.failed(
            "directory", f"{where}: {error.strerror}", "There are no certificates.", f"qmpd pki --dir {where} init, or {ANEW}"
        )
        return
    owner, mode = status.st_uid, stat.S_IMODE(status.st_mode)
    if mode & 0o022:
        yield _FILES.failed("directory", f"{where} can be written to by others (mode {mode:04o})", "", f"chmod go-w {where}")
    if daemon.uid is not None and owner != daemon.uid:
        meaning = "It can read neither the keys nor note what was revoked."
        mend = f"chown -R {_user(daemon.uid)}: {where}"
        yield _FILES.failed("directory", f"{where} belongs to {_user(owner)}, the daemon is {_user(daemon.uid)}", meaning, mend)
    for name in (AUTHORITY, REVOKED, *SERVER, *CLIENT, AUTHORITY_KEY, INVITATIONS):
        yield from _file(where / name, owner)


def _file(path: Path, owner: int) -> Iterator[CheckLine]:
    name = path.name
    try:
        status = path.stat()
        path.open("rb").close()
    except FileNotFoundError:
        if name not in {AUTHORITY_KEY, INVITATIONS}:
            mend = ANEW if name in {*SERVER, *CLIENT} else "copy it from the host where certificates are issued"
            yield _FILES.failed(name, "is missing", "", mend)
        return
    except OSError as error:
        yield _FILES.failed(name, f"cannot be read: {error.strerror}", "The daemon and QEMU run as this user.", f"chown to it: {path}")
        return
    mode = stat.S_IMODE(status.st_mode)
    if status.st_uid not in ({owner} if name in SECRET else {owner, 0}):
        meaning = "The daemon cannot read it." if name in SECRET else "That user can change it."
        found = f"belongs to {_user(status.st_uid)}, the directory to {_user(owner)}"
        yield _FILES.failed(name, found, meaning, f"chown {_user(owner)}: {path}")
    elif name in SECRET and mode & 0o077:
        yield _FILES.failed(name, f"is open to others (mode {mode:04o})", "Whoever read it can be this host.", f"chmod 600 {path}")
    elif mode & 0o022:
        yield _FILES.failed(name, f"can be written to by others (mode {mode:04o})", "", f"chmod go-w {path}")
    else:
        yield _FILES.passed(name, f"mode {mode:04o}")


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid {uid}"


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
    except Unreadable as error:
        yield _AUTHORITY.failed("revocation list", str(error), "No connection is accepted without it.", "copy it again")
        return
    if found.since > now:
        yield _AUTHORITY.failed("revocation list", f"is valid from {found.since:%Y-%m-%d %H:%M} UTC on", "", CLOCK)
    elif found.until <= now:
        yield _AUTHORITY.failed("revocation list", f"ended {found.until:%Y-%m-%d}", "No connection is accepted with it.", LIST)
    elif found.until - now < SOON:
        yield _AUTHORITY.warned("revocation list", f"ends {found.until:%Y-%m-%d}", "", LIST)
    elif now - found.since > STALE:
        meaning = "Where certificates are issued it was made anew since: what was revoked meanwhile is accepted here."
        yield _AUTHORITY.warned("revocation list", f"is of {found.since:%Y-%m-%d}", meaning, LIST)
    else:
        yield _AUTHORITY.passed("revocation list", f"{len(found.revoked)} revoked, valid until {found.until:%Y-%m-%d}")


def _own(pki: Pki, names: tuple[str, str], subject: str, daemon: Daemon, now: datetime) -> Iterator[CheckLine]:
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
    if facts.authority or not facts.proves:
        yield _HOST.failed(subject, f"{names[0]} does not show who a host is", "Its BasicConstraints or KeyUsage say so.", ANEW)
    if server:
        yield from _names(facts, daemon)
    yield _dated(_HOST, subject, facts, now, "qmpd pki renew where certificates are issued")


def _names(facts: CertificateFacts, daemon: Daemon) -> Iterator[CheckLine]:
    known = ", ".join(facts.hosts) or "nobody"
    meaning = "Peers refuse a certificate without the name under which they reach this host."
    if not set(daemon.hosts) & set(facts.hosts):
        yield _HOST.warned("names", f"{known}; this host calls itself {', '.join(daemon.hosts)}", meaning, ANEW)
    missing = [host for host in daemon.listen if host not in {*facts.hosts, *_EVERYWHERE}]
    if missing:
        yield _HOST.warned("listen", f"{', '.join(missing)}; the certificate is for {known}", meaning, ANEW)


def _dated(topic: Topic, subject: str, facts: CertificateFacts, now: datetime, mend: str) -> CheckLine:
    until = f"{facts.name}, valid until {facts.not_after:%Y-%m-%d}"
    if now < facts.not_before:
        return topic.failed(subject, f"{facts.name} is valid from {facts.not_before:%Y-%m-%d %H:%M} UTC on", "", CLOCK)
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
