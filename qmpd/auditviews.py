"""Who did what, and who was refused: the entries of the audit log."""

from __future__ import annotations

from qmpd.viewbase import View


class AuditEntry(View, frozen=True, kw_only=True, omit_defaults=True):
    """One request. Neither its body nor any secret is in it.

    `who` is a user of this host, or like `admin:ada` the owner of a certificate, `token:ci` of a token, `peer:lab2` another daemon;
    null: nobody known. `credential` is the serial number of the certificate, or the token's id. `origin` is the address on the network;
    on the Unix socket there are `uid` and `pid` instead. `subject` is what else than a machine the request was about. `code` says why it
    was refused. A WebSocket has two entries with the same `request`: when it was opened, without `duration_ms`, and when it ended.
    """

    at: str
    request: str
    method: str
    route: str
    status: int
    who: str | None = None
    role: str | None = None
    credential: str | None = None
    origin: str | None = None
    uid: int | None = None
    pid: int | None = None
    machine: str | None = None
    subject: str | None = None
    code: str | None = None
    duration_ms: float | None = None
    lost: int = 0


class AuditPage(View, frozen=True, kw_only=True):
    """Entries, newest first. `more`: there are older ones that fit."""

    entries: tuple[AuditEntry, ...]
    more: bool
