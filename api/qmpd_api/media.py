"""Which representation a request is in, and which one its answer gets."""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from functools import lru_cache
from typing import Final

from qmpd.errors import UnsupportedMedia
from qmpd_api.echo import echo


class Media(StrEnum):
    """The representations of a document."""

    JSON = "application/json"
    MSGPACK = "application/msgpack"


#: A client says the same with every request, and there are few kinds of clients. A header has at most 8 KiB.
KNOWN_HEADERS: Final = 64
EVENT_STREAM: Final = "text/event-stream"


def parameters(value: str) -> tuple[str, dict[str, str]]:
    """The lower-case media type of a header value and its parameters, unquoted."""
    kind, *rest = value.split(";")
    found: dict[str, str] = {}
    for part in rest:
        key, _, argument = part.partition("=")
        if key.strip():
            found[key.strip().lower()] = argument.strip().strip('"').lower()
    return kind.strip().lower(), found


@lru_cache(KNOWN_HEADERS)
def of_body(content_type: str | None) -> Media:
    """The representation a body is in; raises UnsupportedMedia, which names what would do."""
    if content_type is None:
        raise UnsupportedMedia("a body needs a Content-Type", accepted=[str(media) for media in Media])
    kind, found = parameters(content_type)
    if kind not in set(Media):
        raise UnsupportedMedia(f"the media type {echo(kind)!r} is not one of ours", accepted=[str(media) for media in Media])
    charset = found.get("charset", "utf-8")
    if charset not in {"utf-8", "utf8"}:
        raise UnsupportedMedia(f"the charset {echo(charset)!r} is not utf-8", accepted=["utf-8"])
    return Media(kind)


def check_bytes(content_type: str | None, taken: str) -> None:
    """Raises UnsupportedMedia for a body that is not said to be bytes of the type that is taken."""
    kind = parameters(content_type or "")[0]
    if kind != taken:
        raise UnsupportedMedia(f"the media type {echo(kind)!r} is not {taken}", accepted=[taken])


def of_answer(accept: Iterable[str]) -> Media:
    """The representation the caller likes best. JSON where it states no preference, or none we can meet."""
    return _liked(tuple(accept))


@lru_cache(KNOWN_HEADERS)
def _liked(accept: tuple[str, ...]) -> Media:
    weights = {media: _weight(accept, str(media)) for media in Media}
    return Media.MSGPACK if weights[Media.MSGPACK] > weights[Media.JSON] else Media.JSON


def wants_event_stream(accept: Iterable[str]) -> bool:
    """True if the caller names the event stream, with a weight above none."""
    return any(kind == EVENT_STREAM and weight > 0 for kind, weight in _ranges(accept))


def _ranges(accept: Iterable[str]) -> list[tuple[str, float]]:
    ranges = []
    for value in accept:
        for item in value.split(","):
            kind, found = parameters(item)
            try:
                weight = float(found.get("q", "1"))
            except ValueError:
                weight = 0.0
            ranges.append((kind, weight))
    return ranges


def _weight(accept: Iterable[str], kind: str) -> float:
    """The weight of the most specific range that covers `kind`; 0 where none does."""
    found = dict(_ranges(accept))
    for candidate in (kind, f"{kind.partition('/')[0]}/*", "*/*"):
        if candidate in found:
            return found[candidate]
    return 0.0
