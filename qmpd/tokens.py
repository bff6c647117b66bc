"""Tokens: what a program or person shows instead of a certificate. Only a hash of each is stored.

A token is `qmpd_ID_SECRET`. The secret has 256 random bits, so one round of SHA-256 is enough to store it safely, and comparing
takes the same time whatever was shown. Every change is a committed record first; verifying is from memory.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import secrets
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Final

import msgspec

from qmpd.access import Caller, Role
from qmpd.errors import NotFound, Problem, Unauthorized, invalid
from qmpd.journal import timestamp, utc_now
from qmpd.store import Lost, Store
from qmpd.views import NewToken, TokenRequest, TokenView

PREFIX: Final = "token/"
MARK: Final = "qmpd"
#: Bytes of a token's id (as hex) and of its secret.
ID_BYTES: Final = 6
SECRET_BYTES: Final = 32
#: Longer than any token of ours: nothing longer is looked at.
LENGTH_LIMIT: Final = 128
#: What is lived with so that a verification does not depend on whether the id exists.
_NOBODY: Final = hashlib.sha256(b"").hexdigest()

_log = logging.getLogger(__name__)


class TokenRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A token as it is stored. `expires_at` is in seconds since the epoch."""

    id: str
    name: str
    role: Role
    labels: dict[str, str]
    digest: str
    created_at: str
    expires_at: float | None


class Tokens:
    """All tokens of this daemon, in memory."""

    def __init__(self, store: Store, now: Callable[[], datetime] = utc_now) -> None:
        self._store = store
        self._now = now
        self._known: dict[str, tuple[TokenRecord, int]] = {}
        self._used: dict[str, str] = {}

    async def load(self) -> None:
        """Reads what is stored; a record that cannot be read opens no door."""
        snapshot = await self._store.read(PREFIX)
        for key, record in snapshot.records.items():
            try:
                token = msgspec.msgpack.decode(record.value, type=TokenRecord)
            except (msgspec.DecodeError, msgspec.ValidationError, RecursionError) as error:
                _log.error("token is damaged and cannot be used", extra={"key": key, "error": str(error)})
                continue
            self._known[token.id] = (token, record.revision)

    async def create(self, request: TokenRequest) -> NewToken:
        """A new token; its text is in this answer and nowhere else.

        Raises:
            Invalid: a token in force has the name already.
        """
        if any(token.name == request.name and not self._expired(token) for token, _ in self._known.values()):
            raise invalid([Problem(path="$.name", message=f"a token in force is called {request.name!r} already")])
        identity, secret = secrets.token_hex(ID_BYTES), secrets.token_urlsafe(SECRET_BYTES)
        now = self._now()
        record = TokenRecord(
            id=identity,
            name=request.name,
            role=request.role,
            labels=dict(request.labels),
            digest=_digest(secret),
            created_at=timestamp(now),
            expires_at=None if request.days is None else (now + timedelta(days=request.days)).timestamp(),
        )
        revision = await self._store.commit({PREFIX + identity: 0}, {PREFIX + identity: msgspec.msgpack.encode(record)})
        self._known[identity] = (record, revision)
        return NewToken(token=f"{MARK}_{identity}_{secret}", about=self._view(record))

    async def revoke(self, name_or_id: str) -> None:
        """Ends a token at once. Raises NotFound."""
        found = [entry for entry in self._known.values() if name_or_id in {entry[0].id, entry[0].name}]
        if not found:
            raise NotFound(f"there is no token {name_or_id!r}", token=name_or_id)
        for token, revision in found:
            try:
                await self._store.commit({PREFIX + token.id: revision}, {PREFIX + token.id: None})
            except Lost:
                _log.info("token was revoked by somebody else", extra={"token": token.id})
            self._known.pop(token.id, None)

    def list(self) -> tuple[TokenView, ...]:
        """All tokens by name, expired ones too."""
        return tuple(sorted((self._view(token) for token, _ in self._known.values()), key=lambda view: (view.name, view.id)))

    def caller(self, text: str, address: str | None) -> Caller:
        """Who shows this token. Raises Unauthorized; the message does not say what is wrong with it, the log does."""
        words = text.split("_", 2) if len(text) <= LENGTH_LIMIT else []
        identity, secret = (words[1], words[2]) if len(words) == 3 and words[0] == MARK else ("", "")
        token, _ = self._known.get(identity, (None, 0))
        right = hmac.compare_digest(_digest(secret), token.digest if token is not None else _NOBODY)
        if token is None or not right or self._expired(token):
            reason = "unknown" if token is None else "wrong secret" if not right else "expired"
            _log.warning("token refused", extra={"token": identity[: 2 * ID_BYTES], "reason": reason, "address": address})
            raise Unauthorized("this token is not valid")
        self._used[token.id] = timestamp(self._now())
        return Caller(user=f"token:{token.name}", role=token.role, labels=token.labels, address=address, credential=token.id)

    def _expired(self, token: TokenRecord) -> bool:
        return token.expires_at is not None and token.expires_at <= self._now().timestamp()

    def _view(self, token: TokenRecord) -> TokenView:
        at = None if token.expires_at is None else timestamp(datetime.fromtimestamp(token.expires_at, tz=self._now().tzinfo))
        return TokenView(
            id=token.id,
            name=token.name,
            role=token.role,
            labels=dict(token.labels),
            created_at=token.created_at,
            expires_at=at,
            expired=self._expired(token),
            last_used_at=self._used.get(token.id),
        )


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()
