"""Errors as HTTP says them: one function from error to status, one shape of body.

Three refusals exist only because the transport is HTTP::

    QmpdError
    ├── MethodNotAllowed     the path exists, the method does not
    ├── UpgradeRequired      the path is a WebSocket and the request is not the opening of one
    └── RequestTimeout       the client did not send its request in time
"""

from __future__ import annotations

from typing import Final

from qmpd import errors
from qmpd.errors import QmpdError
from qmpd.store import Unknown
from qmpd.views import ErrorBody


class MethodNotAllowed(QmpdError):
    """The path exists, the method does not; details carry `allowed`."""

    code = "method_not_allowed"


class UpgradeRequired(QmpdError):
    """The path answers only as a WebSocket."""

    code = "upgrade_required"


class RequestTimeout(QmpdError):
    """The client did not send its request within the time a request may take."""

    code = "request_timeout"


STATUSES: Final[dict[type[QmpdError], int]] = {
    errors.Undecodable: 400,
    errors.Unauthorized: 401,
    errors.Forbidden: 403,
    errors.NotFound: 404,
    MethodNotAllowed: 405,
    RequestTimeout: 408,
    errors.Conflict: 409,
    errors.StaleRevision: 412,
    errors.TooLarge: 413,
    errors.UnsupportedMedia: 415,
    errors.Misdirected: 421,
    errors.Invalid: 422,
    UpgradeRequired: 426,
    errors.RevisionRequired: 428,
    errors.Busy: 429,
    QmpdError: 500,
    errors.QemuError: 502,
    errors.MonitorUnavailable: 503,
    errors.HostError: 503,
    errors.PeerUnavailable: 503,
    errors.QemuSilent: 504,
    errors.PeerError: 502,
    errors.PeerSilent: 504,
    errors.NotYet: 504,
    errors.NoSpace: 507,
    Unknown: 503,
}

#: Said on every response: nothing here is a page, and nothing may be kept.
STANDING_HEADERS: Final = {"Server": "qmpd", "X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}
#: What a caller should wait before it asks again, in seconds: about as long as a short request, or a monitor's coming back, takes.
RETRY_AFTER_S: Final[dict[type[QmpdError], int]] = {errors.Busy: 1, errors.MonitorUnavailable: 2}


def status_of(kind: type[QmpdError]) -> int:
    """The status of an error: that of the nearest class above it that has one."""
    return next(STATUSES[parent] for parent in kind.__mro__ if parent in STATUSES)


def body_of(error: QmpdError) -> ErrorBody:
    """The one shape of every error."""
    return ErrorBody(code=error.code, message=error.message, details=dict(errors.details_of(error)))


def headers_of(error: QmpdError) -> dict[str, str]:
    """What HTTP wants said in headers beside the body."""
    headers: dict[str, str] = {}
    if type(error) in RETRY_AFTER_S:
        headers["Retry-After"] = str(RETRY_AFTER_S[type(error)])
    if isinstance(error, MethodNotAllowed):
        headers["Allow"] = ", ".join(str(method) for method in _listed(error.details.get("allowed")))
    if isinstance(error, errors.Unauthorized):
        headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, UpgradeRequired):
        headers["Upgrade"] = "websocket"
    return headers


def _listed(value: object) -> list[object]:
    return list(value) if isinstance(value, list | tuple) else []
