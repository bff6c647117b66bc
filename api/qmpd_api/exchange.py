"""One request, decoded: what handlers are given and what they give back."""

from __future__ import annotations

import asyncio
import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Generic, TypeVar

from aiohttp import web

from qmpd.access import Caller
from qmpd.errors import Problem, RevisionRequired, TooLarge, Undecodable, UnsupportedMedia, invalid
from qmpd_api.echo import echo
from qmpd_api.limits import Limits
from qmpd_api.statuses import RequestTimeout

if TYPE_CHECKING:
    from qmpd.service import Service

B = TypeVar("B")
Q = TypeVar("Q")

SERVICE: Final[web.AppKey[Service]] = web.AppKey("service")
LIMITS: Final = web.AppKey("limits", Limits)
#: Makes the published description. It takes a tenth of a second, which a daemon that starts has not.
DESCRIPTION: Final[web.AppKey[Callable[[], bytes]]] = web.AppKey("description")

_REVISION: Final = re.compile(r'"(0|[1-9][0-9]{0,17})"')
#: zlib's number for "gzip format, largest window".
_GZIP: Final = 31


@dataclass(frozen=True, kw_only=True, slots=True)
class Call(Generic[B, Q]):
    """What a caller asked for, as types. `name`, `id` and `item` come from the path and are empty where it has none."""

    service: Service
    caller: Caller
    body: B
    query: Q
    name: str = ""
    id: str = ""
    item: str = ""
    revision: int | None = None

    def needed_revision(self) -> int:
        """The revision in If-Match; raises RevisionRequired if there was none."""
        if self.revision is None:
            raise RevisionRequired('changing a definition needs the revision it was made from, as in If-Match: "1"')
        return self.revision


@dataclass(frozen=True, kw_only=True, slots=True)
class Reply:
    """An answer with more to say than its document."""

    document: object
    headers: Mapping[str, str] = field(default_factory=dict)


def etag(revision: int) -> dict[str, str]:
    """The header that carries a revision."""
    return {"ETag": f'"{revision}"'}


def revision_of(request: web.BaseRequest) -> int | None:
    """The revision in If-Match, or None without one; raises Invalid for anything that is not one of our ETags."""
    given = request.headers.getall("If-Match", [])
    if not given:
        return None
    match = _REVISION.fullmatch(given[0].strip())
    if len(given) > 1 or match is None:
        raise invalid([Problem(path="If-Match", message=f"must be one revision in double quotes, not {echo(given[0])}")])
    return int(match[1])


async def read_body(request: web.BaseRequest, limits: Limits) -> bytes:
    """The whole body, decompressed.

    Raises:
        UnsupportedMedia: a Content-Encoding other than gzip.
        TooLarge: it is larger than `limits.body_bytes`, before or after decompression; what announces that is not read.
        RequestTimeout: it did not arrive within `limits.body_s`.
        Undecodable: the chunks or the compression are broken.
    """
    encoding = ",".join(request.headers.getall("Content-Encoding", ["identity"])).strip().lower()
    if encoding not in {"identity", "gzip"}:
        raise UnsupportedMedia(f"the content encoding '{echo(encoding)}' is not gzip", accepted=["identity", "gzip"])
    if request.content.is_eof() and request.content.exception() is None:
        # It came along with the head, as small ones do.
        whole = request.content.read_nowait()
        check_size(len(whole), limits)
        return gunzip(whole, limits) if encoding == "gzip" else whole
    check_size(request.content_length or 0, limits)
    received = bytearray()
    try:
        async with asyncio.timeout(limits.body_s):
            async for piece in request.content.iter_any():
                received += piece
                check_size(len(received), limits)
    except TimeoutError as error:
        raise RequestTimeout(f"the body did not arrive within {limits.body_s:g} s") from error
    except (web.RequestPayloadError, web.HTTPException) as error:
        raise Undecodable("the body's framing is broken") from error
    return gunzip(bytes(received), limits) if encoding == "gzip" else bytes(received)


def check_size(size: int, limits: Limits) -> None:
    """Raises TooLarge if a body of `size` bytes is over the cap."""
    if size > limits.body_bytes:
        raise TooLarge(f"a body may have {limits.body_bytes} bytes", limit=limits.body_bytes)


def gunzip(data: bytes, limits: Limits) -> bytes:
    """One gzip member, decompressed; stops at the cap, so that a bomb costs no more than an honest body."""
    stream = zlib.decompressobj(_GZIP)
    try:
        plain = stream.decompress(data, limits.body_bytes + 1)
    except zlib.error as error:
        raise Undecodable("the body is not gzip") from error
    check_size(len(plain), limits)
    if not stream.eof or stream.unused_data:
        raise Undecodable("the gzip stream is truncated, or something follows it")
    return plain
