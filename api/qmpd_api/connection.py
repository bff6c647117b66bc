"""One pool of HTTP connections to a daemon, over its Unix socket or TLS: calls, deadlines, and errors as the classes they were raised as.

Beside the tree of `qmpd.errors` a caller meets two of its own::

    QmpdError
    ├── DaemonUnavailable    nobody listens on the socket, or the connection broke
    └── DaemonSilent         no answer within the deadline: the outcome is unknown

A daemon that asks a peer meets `PeerUnavailable`, `PeerRefused` and `PeerSilent` instead, and nothing else: what a peer says of its
machines must not pass for what is said of ours.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from typing import Final, Literal, TypeVar
from urllib.parse import quote

import aiohttp
import msgspec
from yarl import URL

import qmpd.errors
from qmpd.errors import Invalid, NotFound, PeerRefused, PeerSilent, PeerUnavailable, Problem, QmpdError
from qmpd.views import ErrorBody

Wire = Literal["msgpack", "json"]
Scalar = str | int | float | bool | None
Query = Mapping[str, Scalar | tuple[str, ...]]
T = TypeVar("T")

MEDIA: Final[dict[Wire, str]] = {"msgpack": "application/msgpack", "json": "application/json"}
BYTES: Final = "application/octet-stream"
#: The two ways to have a daemon.
START_HINT: Final = "start the daemon with `systemctl start qmpd`, or one of your own with `qmpd serve`"

#: The daemon answers queries from memory; a loaded host may still take seconds to schedule it.
QUERY_DEADLINE_S: Final = 30.0
#: The daemon's own longest deadline for one QMP command is 60 s; a verb may wait for one before it.
VERB_DEADLINE_S: Final = 180.0
#: The first look at a host starts every emulator once, and measures KVM for some.
PROBE_DEADLINE_S: Final = 600.0
#: What a request that says how long to wait may take beyond that.
MARGIN_S: Final = 30.0
#: A Unix socket connects at once or not at all, unless the listener's backlog is full.
CONNECT_DEADLINE_S: Final = 10.0


class DaemonUnavailable(QmpdError):
    """Nobody listens on the socket, it may not be used, or the connection broke; the message names the socket."""

    code = "daemon_unavailable"


class DaemonSilent(QmpdError):
    """The daemon did not answer within the deadline. A request that changes something may still take effect: ask again."""

    code = "daemon_silent"


def _by_code() -> dict[str, type[QmpdError]]:
    classes = [value for value in vars(qmpd.errors).values() if isinstance(value, type) and issubclass(value, QmpdError)]
    return {error.code: error for error in classes}


ERRORS: Final = _by_code()


def error_of(body: ErrorBody) -> QmpdError:
    """The exception the daemon raised, with its details. A code this client does not know gives QmpdError, the code in `details`."""
    kind = ERRORS.get(body.code)
    if kind is Invalid:
        listed = body.details.get("problems")
        try:
            return Invalid(body.message, msgspec.convert(listed, tuple[Problem, ...]))
        except msgspec.ValidationError:
            return Invalid(body.message, (Problem(path="$", message=body.message),))
    error = (kind or QmpdError)(body.message)
    error.details.update(body.details)
    if kind is None:
        error.details["code"] = body.code
    return error


def segment(value: str) -> str:
    """A name as one segment of a path. One that cannot be a segment cannot be anybody's name: NotFound."""
    if value in {"", ".", ".."}:
        raise NotFound(f"there is nothing called {value!r}")
    return quote(value, safe="")


def url(path: str, query: Query | None = None) -> URL:
    """A route, relative to the daemon. Query values of None are left out; a tuple repeats its key."""
    pairs: list[tuple[str, str]] = []
    for key, value in (query or {}).items():
        if isinstance(value, tuple):
            pairs += [(key, item) for item in value]
        elif isinstance(value, bool):
            pairs.append((key, "true" if value else "false"))
        elif value is not None:
            pairs.append((key, str(value)))
    return URL(path, encoded=True).with_query(pairs)


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    """A whole answer as it came."""

    body: bytes
    headers: Mapping[str, str]


class Remote(msgspec.Struct, frozen=True, kw_only=True):
    """A daemon on another host: where it listens (`host:port`), and the directory with the authority's certificate and one's own.

    With a `token` no certificate of one's own is needed, and none is shown. `context` is used in place of what is in `pki_dir`.
    """

    address: str
    pki_dir: str
    token: str | None = None
    context: ssl.SSLContext | None = None


class Failures(msgspec.Struct, frozen=True, kw_only=True):
    """In which classes a connection raises: nothing could be asked; it broke, or nobody answered; the answer was an error."""

    unreached: type[QmpdError] = DaemonUnavailable
    broken: type[QmpdError] = DaemonUnavailable
    silent: type[QmpdError] = DaemonSilent
    refused: Callable[[ErrorBody], QmpdError] = error_of
    about: Mapping[str, object] = {}


#: Of a daemon that a person or program talks to.
DAEMON: Final = Failures()


def failures_of_peer(name: str) -> Failures:
    """Those of a peer. What broke may have been done, so it is silent."""

    def refused(body: ErrorBody) -> QmpdError:
        return PeerRefused(f"{name} refused: {body.message}", peer=name, error=msgspec.to_builtins(body))

    return Failures(unreached=PeerUnavailable, broken=PeerSilent, silent=PeerSilent, refused=refused, about={"peer": name})


class Connection:
    """Requests to one daemon. Made by `connected`; every method raises the errors of `qmpd.errors` and the two of this module."""

    def __init__(self, where: str, session: aiohttp.ClientSession, wire: Wire, failures: Failures = DAEMON) -> None:
        self.where = where
        self.session = session
        self._media = MEDIA[wire]
        self._failures = failures
        self._local = isinstance(session.connector, aiohttp.UnixConnector)

    async def call(
        self,
        method: str,
        path: str,
        answer: type[T],
        *,
        query: Query | None = None,
        body: msgspec.Struct | bytes | None = None,
        headers: Mapping[str, str] | None = None,
        deadline_s: float = QUERY_DEADLINE_S,
    ) -> T:
        """Send `body`, return the answer as `answer`."""
        reply = await self.fetch(method, path, query=query, body=body, headers=headers, deadline_s=deadline_s)
        try:
            return _decode(reply.body, reply.headers.get("Content-Type", self._media), answer)
        except msgspec.DecodeError as error:
            message = f"the daemon's answer to {method} {path} cannot be understood: {error}"
            raise self._failures.refused(ErrorBody(code="internal", message=message)) from error

    async def fetch(
        self,
        method: str,
        path: str,
        *,
        query: Query | None = None,
        body: msgspec.Struct | bytes | None = None,
        headers: Mapping[str, str] | None = None,
        deadline_s: float = QUERY_DEADLINE_S,
    ) -> Reply:
        """Send `body`, return the bytes of the answer."""
        sent = {"Accept": self._media, **(headers or {})}
        data = None
        if isinstance(body, bytes):
            sent["Content-Type"] = BYTES
            data = body
        elif body is not None:
            sent["Content-Type"] = self._media
            data = self._encode(body)
        async with self.response(method, url(path, query), data=data, headers=sent, deadline_s=deadline_s) as response:
            return Reply(body=await response.read(), headers=dict(response.headers))

    @asynccontextmanager
    async def response(
        self, method: str, address: URL, *, data: bytes | None = None, headers: Mapping[str, str], deadline_s: float | None
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """A response whose body is read by the caller; None: no limit on how long that may take. Errors are raised before it is yielded."""
        limits = aiohttp.ClientTimeout(total=deadline_s, sock_connect=CONNECT_DEADLINE_S)
        with self.translated(f"{method} {address.path}", deadline_s):
            async with self.session.request(method, address, data=data, headers=headers, timeout=limits) as response:
                if response.status >= 400:
                    raise self._failures.refused(_error_in(response, await response.read()))
                yield response

    @contextmanager
    def translated(self, what: str, deadline_s: float | None = None) -> Iterator[None]:
        """Raise what aiohttp raises as DaemonUnavailable and DaemonSilent, or as what a peer's failures are."""
        failures, about = self._failures, {"where": self.where, **self._failures.about}
        try:
            yield
        except aiohttp.ClientConnectorCertificateError as error:
            raise failures.unreached(f"the daemon at {self.where} is not trusted: {_distrust(error.certificate_error)}", **about) from error
        except aiohttp.ClientConnectorError as error:
            raise failures.unreached(f"cannot connect to {self.where}: {_reason(error.os_error, local=self._local)}", **about) from error
        except aiohttp.ConnectionTimeoutError as error:
            message = f"cannot connect to {self.where}: no answer within {CONNECT_DEADLINE_S:g} s"
            raise failures.unreached(message, **about) from error
        except TimeoutError as error:
            message = f"the daemon at {self.where} did not answer {what} within {deadline_s or CONNECT_DEADLINE_S:g} s"
            raise failures.silent(message, **about) from error
        except (aiohttp.ClientError, ConnectionError) as error:
            message = f"the connection to {self.where} broke during {what}: the outcome is unknown ({str(error) or type(error).__name__})"
            raise failures.broken(message, **about) from error

    def _encode(self, body: msgspec.Struct) -> bytes:
        return msgspec.msgpack.encode(body) if self._media == MEDIA["msgpack"] else msgspec.json.encode(body)


@asynccontextmanager
async def connected(target: str | Remote, wire: Wire, failures: Failures = DAEMON) -> AsyncIterator[Connection]:
    """A pool of connections to a Unix socket or a remote daemon. Nothing is sent before the first call.

    Raises:
        HostError: the certificates for a remote daemon are missing or cannot be used.
    """
    # Watchers hold a connection each, so the pool has no limit of its own.
    if isinstance(target, Remote):
        connector: aiohttp.BaseConnector = aiohttp.TCPConnector(ssl=await asyncio.to_thread(_context, target), limit=0)
        where, base = target.address, f"https://{target.address}"
        headers = {} if target.token is None else {"Authorization": f"Bearer {target.token}"}
    else:
        connector = aiohttp.UnixConnector(path=target, limit=0)
        where, base, headers = target, "http://localhost", {}
    async with aiohttp.ClientSession(base, connector=connector, headers=headers, auto_decompress=True) as session:
        yield Connection(where, session, wire, failures)


def _context(remote: Remote) -> ssl.SSLContext:
    # Here, not above: most callers use the Unix socket and need not wait for a library of cryptography to be imported.
    from qmpd.pki.context import anonymous_context, client_context
    from qmpd.pki.directory import Pki

    if remote.context is not None:
        return remote.context
    pki = Pki(remote.pki_dir)
    return client_context(pki) if remote.token is None else anonymous_context(pki)


def _decode(body: bytes, content_type: str, answer: type[T]) -> T:
    if content_type.partition(";")[0].strip() == MEDIA["json"]:
        return msgspec.json.decode(body, type=answer)
    return msgspec.msgpack.decode(body, type=answer)


def _error_in(response: aiohttp.ClientResponse, body: bytes) -> ErrorBody:
    try:
        return _decode(body, response.content_type, ErrorBody)
    except (msgspec.DecodeError, UnicodeDecodeError):
        message = f"the daemon answered {response.status} {response.reason} to {response.method} {response.url.path}"
        return ErrorBody(code=QmpdError.code, message=message)


def _distrust(error: Exception) -> str:
    return getattr(error, "verify_message", "") or str(error)


def _reason(error: OSError, *, local: bool) -> str:
    if isinstance(error, ssl.SSLError):
        return f"TLS failed ({error.reason or error}); see `qmpd pki check` on both sides"
    if isinstance(error, PermissionError):
        return "permission denied; only the socket's owner and group may use it"
    if isinstance(error, FileNotFoundError):
        return f"there is no such socket; {START_HINT}"
    if isinstance(error, ConnectionRefusedError):
        return f"nobody listens on it; {START_HINT}" if local else "nobody listens there"
    return error.strerror or str(error)
