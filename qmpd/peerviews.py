"""What daemons tell each other, and what is told of them: more types behind the API's answers."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from qmpd.viewbase import Request, View


class PeerView(View, frozen=True, kw_only=True):
    """Another daemon, as the settings name it. `certificate` is the name that its certificate must have."""

    name: str
    url: str
    certificate: str
    may_send: bool
    may_receive: bool
    migration_address: str


class PeerGreeting(View, frozen=True, kw_only=True):
    """What a daemon says to a peer: what it is, what it calls the peer, and what it lets it do. `time` is its clock."""

    version: str
    api: str = "v1"
    peer: str
    may_send: bool
    may_receive: bool
    time: str


class PeerCertificate(View, frozen=True, kw_only=True):
    """The certificate that a peer showed. `fingerprint` is the SHA-256 of its DER form, in hex."""

    name: str
    role: str
    expires_at: str
    fingerprint: str


class PeerHealth(View, frozen=True, kw_only=True):
    """Whether a peer can be reached now, and what it said; else `problem` says why not.

    `clock_ahead_s` is how far its clock is ahead of ours, give or take half of `round_trip_ms`.
    """

    name: str
    url: str
    reachable: bool
    code: str | None = None
    problem: str | None = None
    greeting: PeerGreeting | None = None
    certificate: PeerCertificate | None = None
    round_trip_ms: float | None = None
    clock_ahead_s: float | None = None


class JoinRequest(Request, frozen=True, kw_only=True):
    """What somebody sends who was invited: the token, and a certificate request (PEM) for a key of their own."""

    token: Annotated[str, Meta(max_length=256)]
    request: Annotated[str, Meta(max_length=4096)]


class JoinAnswer(View, frozen=True, kw_only=True):
    """What they get: the certificate, the authority's own, and its revocation list (all PEM); and whose it is."""

    name: str
    role: str
    certificate: str
    authority: str
    revoked: str


class RevocationView(View, frozen=True, kw_only=True):
    """The revocation list of this daemon's authority (PEM). Its signature says that it is one; `number` grows with each."""

    number: int
    revoked: str
