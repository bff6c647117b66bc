"""Invitations: a host that has nothing yet shows a token, once, and gets a certificate for the key it made itself.

A token is `qmpd-join.ID.FINGERPRINT.SECRET`. The fingerprint is that of the certificate of the daemon that takes the token, so that
whoever joins knows to whom it speaks before it says the secret. Name, role and hosts are settled when the invitation is made: who has
the token chooses the key and nothing else. Kept is a hash of the secret; the secret has 256 random bits, so one round is enough.

An invitation is spent before its certificate is signed, under the lock that every writer of the directory takes. So one is never
used twice; a daemon that dies in between has spent it for nothing, and another has to be made.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import secrets
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Final

import msgspec

from qmpd.access import Role
from qmpd.errors import Busy, HostError, Invalid, NotFound, Problem, Unauthorized, invalid
from qmpd.pki import CERTIFICATE_DAYS, certificates
from qmpd.pki.certificates import Unreadable
from qmpd.pki.directory import AUTHORITY, INVITATIONS, REVOKED, SERVER, Pki

MARK: Final = "qmpd-join"
#: Bytes of an invitation's id (as hex) and of its secret.
ID_BYTES: Final = 6
SECRET_BYTES: Final = 32
MAX_MINUTES: Final = 7 * 24 * 60.0
#: More than anybody makes by hand; a script that never stops is stopped.
OPEN_AT_A_TIME: Final = 1000
#: What is wrong with a token is nobody's business who shows a wrong one.
REFUSED: Final = "this token is not valid"
_NOBODY: Final = hashlib.sha256(b"").hexdigest()


_log = logging.getLogger(__name__)


class Invitation(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One that was not used yet. `days` is how long the certificate will be valid."""

    id: str
    name: str
    role: Role
    hosts: tuple[str, ...]
    days: int
    digest: str
    expires_at: datetime


class Told(msgspec.Struct, frozen=True, kw_only=True):
    """What a token says."""

    id: str
    fingerprint: str
    secret: str


class Admitted(msgspec.Struct, frozen=True, kw_only=True):
    """What somebody gets who was invited: the certificate, and the authority's with its revocation list (all PEM)."""

    name: str
    role: Role
    certificate: bytes
    authority: bytes
    revoked: bytes


def told(token: str) -> Told:
    """The parts of a token. Raises Invalid."""
    parts = token.strip().split(".")
    if len(parts) != 4 or parts[0] != MARK or not all(parts):
        raise invalid([Problem(path="token", message=f"is not one of qmpd pki join-token: those begin with {MARK}.")])
    return Told(id=parts[1], fingerprint=parts[2], secret=parts[3])


def invite(pki: Pki, name: str, role: Role, hosts: Sequence[str], *, minutes: float, days: int = CERTIFICATE_DAYS) -> str:
    """A token with which somebody gets a certificate for this name, role and hosts, once. It is in this answer and nowhere else.

    Raises:
        NotFound: there is no authority here, or no certificate of a daemon that could take the token.
        Invalid: such a certificate cannot be issued, or the time cannot be.
        Busy: too many invitations are open.
    """
    if not 0 < minutes <= MAX_MINUTES:
        raise invalid([Problem(path="$.minutes", message=f"must be more than 0 and at most {MAX_MINUTES:g}")])
    certificates.check_owner(name, role, hosts, days)
    pki.authority()
    server = pki.read(SERVER[0])
    if server is None:
        raise NotFound(f"{pki.directory} has no certificate for the daemon of this host, to which the token would be shown")
    identity, secret = secrets.token_hex(ID_BYTES), secrets.token_urlsafe(SECRET_BYTES)
    made = Invitation(
        id=identity,
        name=name,
        role=role,
        hosts=tuple(hosts),
        days=days,
        digest=_digest(secret),
        expires_at=datetime.now(UTC) + timedelta(minutes=minutes),
    )
    with pki.locked():
        kept = _open(pki)
        if len(kept) >= OPEN_AT_A_TIME:
            raise Busy(f"{OPEN_AT_A_TIME} invitations are open: wait until some expire")
        pki.write({INVITATIONS: _encoded([*kept, made])})
    return f"{MARK}.{identity}.{certificates.describe(server).fingerprint}.{secret}"


def redeem(pki: Pki, token: str, request: bytes) -> Admitted:
    """The certificate that the token's owner was promised, for the key of `request`; the token is worth nothing from then on.

    Raises:
        Unauthorized: the token is unknown, used, expired or wrong; the message does not say which.
        Invalid: the request is none. The token can still be used.
        HostError: the authority cannot be used by this user. The token can still be used.
    """
    shown = _shown(token)
    if pki.read(INVITATIONS) is None:
        raise Unauthorized(REFUSED)
    with pki.locked():
        kept = _open(pki)
        found = next((invitation for invitation in kept if invitation.id == shown.id), None)
        right = hmac.compare_digest(_digest(shown.secret), found.digest if found is not None else _NOBODY)
        if found is None or not right:
            raise Unauthorized(REFUSED)
        try:
            certificates.requested_key(request)
        except Unreadable as error:
            raise invalid([Problem(path="$.request", message=str(error))]) from error
        pki.authority()
        pki.write({INVITATIONS: _encoded([invitation for invitation in kept if invitation is not found])})
    signed = pki.sign(request, found.name, found.role, found.hosts, days=found.days)
    return Admitted(
        name=found.name, role=found.role, certificate=signed, authority=pki.read(AUTHORITY) or b"", revoked=pki.read(REVOKED) or b""
    )


def _shown(token: str) -> Told:
    try:
        return told(token)
    except Invalid as error:
        raise Unauthorized(REFUSED) from error


def _open(pki: Pki) -> list[Invitation]:
    """Those that can still be used."""
    data = pki.read(INVITATIONS)
    try:
        kept = () if data is None else msgspec.json.decode(data, type=tuple[Invitation, ...])
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        _log.error("invitations are damaged", extra={"path": str(pki.directory / INVITATIONS), "error": str(error)})
        raise HostError("the invitations cannot be read: the log has the details") from error
    now = datetime.now(UTC)
    return [invitation for invitation in kept if invitation.expires_at > now]


def _encoded(kept: Sequence[Invitation]) -> bytes:
    return msgspec.json.encode(kept) + b"\n"


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()
