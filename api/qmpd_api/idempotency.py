"""`Idempotency-Key`: a client that lost an answer asks again with the same key and gets the answer, not a second effect.

Answers are kept in the daemon's database, so that they survive its restart. A key belongs to the user who sent it. An answer that
says "try again" is not kept. What happens when the daemon is killed between the effect and the keeping of its answer is what
happens without a key: the second request meets the effect of the first (409 for a second creation).
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Final

import msgspec
from aiohttp import web

from qmpd.errors import Busy, Problem, QmpdError, invalid
from qmpd_api.echo import echo

if TYPE_CHECKING:
    from qmpd.access import Caller
    from qmpd.journal import Journal

HEADER: Final = "Idempotency-Key"
#: A UUID has 36 characters; some clients put words in front.
MAX_KEY: Final = 200
#: Statuses that ask the client to come back: the next attempt must be a real one.
PASSING: Final = frozenset({429, 500, 503, 507})

_log = logging.getLogger(__name__)


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """A whole response: what is sent, and what is kept."""

    status: int
    headers: dict[str, str] = {}
    body: bytes = b""

    def response(self) -> web.Response:
        """The answer as aiohttp sends it."""
        return web.Response(status=self.status, headers=self.headers, body=self.body or None)


class Attempts:
    """The requests with a key that are under way now, so that a second one waits for the first."""

    def __init__(self) -> None:
        self._under_way: dict[str, tuple[str, asyncio.Future[Answer]]] = {}

    async def once(self, journal: Journal, key: str, fingerprint: str, attempt: Callable[[], Awaitable[Answer]]) -> Answer:
        """What the first request with this key was answered; `attempt` runs only if this is the first.

        Raises:
            Invalid: the key was used for another request.
            Busy: the first request was under way and did not come to an answer.
        """
        if key in self._under_way:
            earlier, future = self._under_way[key]
            _check_same(earlier, fingerprint)
            await asyncio.wait({future})
            if future.cancelled():
                raise Busy("the first request with this Idempotency-Key did not come to an answer: ask again")
            return future.result()
        future = asyncio.get_running_loop().create_future()
        self._under_way[key] = (fingerprint, future)
        try:
            answer = await _recalled(journal, key, fingerprint)
            if answer is None:
                answer = await attempt()
                await _keep(journal, key, fingerprint, answer)
            future.set_result(answer)
            return answer
        finally:
            del self._under_way[key]
            future.cancel()


ATTEMPTS: Final = web.AppKey("attempts", Attempts)


def key_of(request: web.BaseRequest, caller: Caller) -> str | None:
    """The key of this request, unique to its user; None if it has none. Raises Invalid if it is not one."""
    given = request.headers.getall(HEADER, [])
    if not given:
        return None
    key = given[0].strip()
    if len(given) > 1 or not key or len(key) > MAX_KEY or not (key.isascii() and key.isprintable()):
        raise invalid([Problem(path=HEADER, message=f"must be 1 to {MAX_KEY} printable ASCII characters, not '{echo(key)}'")])
    return f"{caller.user if caller.uid is None else caller.uid}:{key}"


def fingerprint_of(request: web.BaseRequest, body: bytes) -> str:
    """What makes two requests the same: method, target and body."""
    digest = hashlib.sha256(f"{request.method} {request.rel_url.raw_path_qs}\n".encode())
    digest.update(body)
    return digest.hexdigest()


def _check_same(earlier: str, fingerprint: str) -> None:
    if earlier != fingerprint:
        raise invalid([Problem(path=HEADER, message="this key was used for another request")])


async def _recalled(journal: Journal, key: str, fingerprint: str) -> Answer | None:
    kept = await journal.recall(key)
    if kept is None:
        return None
    _check_same(kept.fingerprint, fingerprint)
    return msgspec.msgpack.decode(kept.response, type=Answer)


async def _keep(journal: Journal, key: str, fingerprint: str, answer: Answer) -> None:
    if answer.status in PASSING:
        return
    try:
        await journal.remember(key, fingerprint, msgspec.msgpack.encode(answer))
    except QmpdError as error:
        # The effect is there and its answer must reach the client, kept or not.
        _log.warning("answer not kept", extra={"error": error.message})
