"""The directory of a host's certificates and, on one host, of the CA that issues them.

The names are those QEMU's `tls-creds-x509` looks for, so QEMU's migration and NBD channels use the same files:

    ca-cert.pem  ca-crl.pem                        the authority, and what it revoked
    server-cert.pem  server-key.pem                this host as a server
    client-cert.pem  client-key.pem                this host as a client (a peer's are the same)
    ca-key.pem  issued.json  invitations.json      only where certificates are issued

Every file is written whole or not at all; keys have mode 0600 from their first moment. What root writes belongs to whom the directory
belongs to: the daemon's user, who has to read it. All of this blocks.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

import msgspec

from qmpd.access import Role
from qmpd.errors import AlreadyExists, HostError, NotFound, Problem, invalid
from qmpd.pki import CERTIFICATE_DAYS, certificates
from qmpd.pki.certificates import KeyPair, Unreadable

AUTHORITY: Final = "ca-cert.pem"
AUTHORITY_KEY: Final = "ca-key.pem"
REVOKED: Final = "ca-crl.pem"
INDEX: Final = "issued.json"
INVITATIONS: Final = "invitations.json"
SERVER: Final = ("server-cert.pem", "server-key.pem")
CLIENT: Final = ("client-cert.pem", "client-key.pem")
#: Files that nobody but their owner may read.
SECRET: Final = frozenset({AUTHORITY_KEY, SERVER[1], CLIENT[1], INVITATIONS})
LOCK: Final = "issuing.lock"


class Issued(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One line of the authority's book."""

    serial: str
    name: str
    role: Role
    hosts: tuple[str, ...]
    not_after: datetime
    revoked_at: datetime | None = None


class Pki:
    """One such directory."""

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)

    # As an authority.

    def init(self, name: str) -> None:
        """Makes a CA here. Raises AlreadyExists when there is one already, whose certificates all would become worthless."""
        self.prepare()
        with self.locked():
            if self._path(AUTHORITY).exists() or self._path(AUTHORITY_KEY).exists():
                raise AlreadyExists(f"{self.directory} has an authority already")
            now = _now()
            made = certificates.new_authority(name, now)
            # The key first: with the certificate the authority is there.
            self.write({AUTHORITY_KEY: made.key, INDEX: b"[]", REVOKED: certificates.revocation_list(made, [], now, _number(now, 0))})
            self.write({AUTHORITY: made.certificate})

    def issue(self, name: str, role: Role, hosts: Sequence[str], *, days: int = CERTIFICATE_DAYS) -> KeyPair:
        """A new key and its certificate. Nothing of them is kept but the line in the book."""
        made = certificates.new_request(name)
        return KeyPair(certificate=self.sign(made.certificate, name, role, hosts, days=days), key=made.key)

    def sign(self, request: bytes, name: str, role: Role, hosts: Sequence[str], *, days: int = CERTIFICATE_DAYS) -> bytes:
        """A certificate for somebody else's key.

        Raises:
            NotFound: there is no authority here.
            Invalid: the name, a host or the time cannot be.
            Unreadable: the request is none.
        """
        with self.locked():
            authority, now = self.authority(), _now()
            signed = certificates.issue(authority, request, name=name, role=role, hosts=hosts, now=now, days=days)
            facts = certificates.describe(signed)
            line = Issued(serial=facts.serial, name=name, role=role, hosts=facts.hosts, not_after=facts.not_after)
            book = (*self.issued(), line)
            # Noted before it is handed out: what is not in the book cannot be revoked.
            self.write({INDEX: _encoded(book), REVOKED: self._list(authority, book, now)})
            return signed

    def renew(self, name: str, *, days: int = CERTIFICATE_DAYS) -> KeyPair:
        """A new key and certificate in place of somebody's newest. The old one stays valid until it expires or is revoked.

        Raises:
            NotFound: nobody of this name has a certificate that was not revoked.
        """
        current = [line for line in self.issued() if line.name == name and line.revoked_at is None]
        if not current:
            raise NotFound(f"no certificate of {name!r} is in force")
        newest = max(current, key=lambda line: line.not_after)
        return self.issue(name, newest.role, newest.hosts, days=days)

    def revoke(self, name_or_serial: str) -> tuple[Issued, ...]:
        """Revokes all certificates of a name, or the one of a serial number; what was revoked before stays so.

        Raises:
            NotFound: there is none.
        """
        with self.locked():
            authority, now = self.authority(), _now()
            wanted = [line for line in self.issued() if name_or_serial in {line.name, line.serial} and line.revoked_at is None]
            if not wanted:
                raise NotFound(f"no certificate in force is called or numbered {name_or_serial!r}")
            serials = {line.serial for line in wanted}
            book = tuple(msgspec.structs.replace(line, revoked_at=now) if line.serial in serials else line for line in self.issued())
            self.write({INDEX: _encoded(book), REVOKED: self._list(authority, book, now)})
            return tuple(line for line in book if line.serial in serials)

    def renew_list(self, within: timedelta) -> bool:
        """Makes the revocation list anew where it ends `within` this time. Raises NotFound without an authority."""
        with self.locked():
            authority, now = self.authority(), _now()
            try:
                if certificates.describe_list(self.read(REVOKED) or b"", authority.certificate).until - now > within:
                    return False
            except Unreadable:
                pass
            self.write({REVOKED: self._list(authority, self.issued(), now)})
            return True

    def issued(self) -> tuple[Issued, ...]:
        """The authority's book, oldest first. Raises HostError when it is damaged."""
        try:
            return msgspec.json.decode(self._path(INDEX).read_bytes(), type=tuple[Issued, ...])
        except FileNotFoundError:
            return ()
        except (msgspec.DecodeError, msgspec.ValidationError) as error:
            raise HostError(f"{self._path(INDEX)} is damaged: {error}") from error

    # As a host.

    def install(self, made: KeyPair, authority: bytes, revoked: bytes) -> None:
        """Puts a peer's certificate and key, and the authority's certificate and list, in their places."""
        facts = certificates.describe(made.certificate)
        if facts.role != "peer":
            raise invalid([Problem(path="$.role", message=f"a host needs the certificate of a peer, not of {facts.role or 'nobody'}")])
        self._check_made(made, authority)
        pairs = {name: data for names in (SERVER, CLIENT) for name, data in zip(names, (made.certificate, made.key), strict=True)}
        self.write({AUTHORITY: authority, REVOKED: revoked, **pairs})

    def take_list(self, listed: bytes) -> bool:
        """Puts a revocation list of this directory's authority in place of an older one; says whether it did.

        Raises:
            Unreadable: it is none, or of another authority.
        """
        authority = self.read(AUTHORITY) or b""
        new = certificates.describe_list(listed, authority)
        with self.locked():
            try:
                if certificates.describe_list(self.read(REVOKED) or b"", authority).number >= new.number:
                    return False
            except Unreadable:
                pass  # what cannot be read is replaced
            self.write({REVOKED: listed})
            return True

    def read(self, name: str) -> bytes | None:
        """A file of the directory, or None where there is none. Raises HostError where it may not be read."""
        try:
            return self._path(name).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise HostError(f"{self._path(name)} cannot be read: {error.strerror}; it must belong to the daemon's user") from error

    def store(self, directory: Path, made: KeyPair) -> None:
        """Puts somebody's certificate and key into a directory of their own, with the authority's, ready to be handed over."""
        authority, revoked = self.read(AUTHORITY), self.read(REVOKED)
        if authority is None or revoked is None:
            raise NotFound(f"there is no authority in {self.directory}")
        Pki(directory).take(made, authority, revoked)

    def take(self, made: KeyPair, authority: bytes, revoked: bytes) -> None:
        """Puts the certificate and key of a host or a person in their places, with the authority's. Raises as `install` does."""
        if certificates.describe(made.certificate).role == "peer":
            self.install(made, authority, revoked)
            return
        self._check_made(made, authority)
        self.write({AUTHORITY: authority, REVOKED: revoked, CLIENT[0]: made.certificate, CLIENT[1]: made.key})

    def authority(self) -> KeyPair:
        """The authority that is kept here. Raises NotFound where there is none, HostError where it is damaged or may not be read."""
        certificate, key = self.read(AUTHORITY), self.read(AUTHORITY_KEY)
        if certificate is None or key is None:
            raise NotFound(f"there is no authority in {self.directory}: make one with qmpd pki init")
        try:
            if certificates.fits(key, certificate):
                return KeyPair(certificate=certificate, key=key)
        except Unreadable as error:
            raise HostError(f"the authority in {self.directory} is damaged: {error}") from error
        raise HostError(f"{AUTHORITY_KEY} in {self.directory} is not the key of {AUTHORITY}")

    def _check_made(self, made: KeyPair, authority: bytes) -> None:
        if not certificates.issued_by(made.certificate, authority) or not certificates.fits(made.key, made.certificate):
            raise invalid([Problem(path="$.certificate", message="is not this key's, or not of this authority")])
        self.prepare()
        known = self.read(AUTHORITY)
        if known is not None and known != authority:
            raise AlreadyExists(f"{self.directory} trusts another authority already; move it away first")

    def _list(self, authority: KeyPair, book: Sequence[Issued], now: datetime) -> bytes:
        revoked = [(line.serial, line.revoked_at) for line in book if line.revoked_at is not None]
        try:
            last = certificates.describe_list(self.read(REVOKED) or b"", authority.certificate).number
        except Unreadable:
            last = 0
        return certificates.revocation_list(authority, revoked, now, _number(now, last))

    def _path(self, name: str) -> Path:
        return self.directory / name

    def prepare(self) -> None:
        """Makes the directory where it is missing. Raises HostError where it cannot be made or written to."""
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise HostError(f"the directory {self.directory} cannot be made: {error.strerror}") from error
        if not os.access(self.directory, os.W_OK | os.X_OK):
            raise HostError(f"the directory {self.directory} cannot be written to")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """One at a time writes the book, whichever process it is."""
        try:
            descriptor = os.open(self._path(LOCK), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except FileNotFoundError as error:
            raise NotFound(f"there is no authority in {self.directory}: make one with qmpd pki init") from error
        except OSError as error:
            raise HostError(f"{self._path(LOCK)} cannot be opened: {error.strerror}") from error
        try:
            _hand_over(descriptor, self.directory)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def write(self, files: Mapping[str, bytes]) -> None:
        """Writes files, each whole or not at all, in this order. Who changes what others change too holds `locked`. Raises HostError."""
        for name, data in files.items():
            try:
                _replace(self._path(name), data, 0o600 if name in SECRET else 0o644)
            except OSError as error:
                raise HostError(f"{self._path(name)} cannot be written: {error.strerror}") from error


def _replace(target: Path, data: bytes, mode: int) -> None:
    temporary = target.with_name(f".{target.name}.new")
    temporary.unlink(missing_ok=True)
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(file.fileno(), mode)
            _hand_over(file.fileno(), target.parent)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(target)
    finally:
        temporary.unlink(missing_ok=True)


def _hand_over(descriptor: int, directory: Path) -> None:
    """What root makes in a directory of the daemon's user belongs to that user."""
    if os.geteuid() == 0:
        status = directory.stat()
        os.fchown(descriptor, status.st_uid, status.st_gid)


def _number(now: datetime, last: int) -> int:
    """Grows with every list, also when the clock was set back, and when the last list was lost."""
    return max(last + 1, int(now.timestamp() * 1000))


def _encoded(book: Sequence[Issued]) -> bytes:
    return msgspec.json.format(msgspec.json.encode(book), indent=2) + b"\n"


def _now() -> datetime:
    return datetime.now(UTC).replace(microsecond=0)
