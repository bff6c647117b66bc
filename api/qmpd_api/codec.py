"""Bytes of a request into a typed document, and documents into bytes.

The order matters: shape first (depth, number of values, truncation), on the bytes and with little memory; then the plain decoder;
then the values no document may carry; then the type. So a body that would cost much memory is refused before it is built.
"""

from __future__ import annotations

import asyncio
import math
import re
from typing import Final, TypeVar

import msgspec

from qmpd.errors import Invalid, Problem, Undecodable, invalid
from qmpd_api import json_body, msgpack_body
from qmpd_api.echo import echo, placed
from qmpd_api.limits import Limits
from qmpd_api.media import Media

T = TypeVar("T")

#: Surrogates and the noncharacters of Unicode 23.7. QEMU ends a whole monitor session over one of them.
_FORBIDDEN: Final = re.compile(
    "[\ud800-\udfff\ufdd0-\ufdef" + "".join(chr(plane << 16 | low) for plane in range(17) for low in (0xFFFE, 0xFFFF)) + "]"
)
_READERS: Final = {Media.JSON: json_body.read, Media.MSGPACK: msgpack_body.read}
_INT_RANGE: Final = (-(2**63), 2**64 - 1)


def decode(body: bytes, media: Media, kind: type[T], limits: Limits) -> T:
    """The document in `body`.

    Raises:
        Undecodable: the bytes are not a document, or one that no type can make sense of.
        TooLarge: there are more values in it than `limits.nodes`.
        Invalid: it is a document, but not a `kind`.
    """
    if not body:
        raise Undecodable("the body is empty")
    document = _READERS[media](body, limits)
    if not isinstance(document, dict):
        raise Undecodable("the top level of a document must be a map")
    check_values(document)
    return converted(document, kind)


async def decode_aside(body: bytes, media: Media, kind: type[T], limits: Limits) -> T:
    """The same; a large body is decoded in a thread, so that other callers do not wait for it."""
    if len(body) > limits.offload_bytes:
        return await asyncio.to_thread(decode, body, media, kind, limits)
    return decode(body, media, kind, limits)


def converted(document: object, kind: type[T]) -> T:
    """The decoded document as a `kind`; raises Invalid with the place of the first structural problem."""
    try:
        return msgspec.convert(document, type=kind, strict=True)
    except msgspec.ValidationError as error:
        raise structural(str(error)) from error


def structural(message: str, root: str = "$") -> Invalid:
    """What msgspec found wrong, with its path below `root`."""
    path, sentence = placed(message)
    return invalid([Problem(path=root + path, message=sentence)])


def check_values(value: object, path: str = "$") -> None:
    """Raises Undecodable if there is a value that has no meaning on the way to QEMU. The depth of `value` is known to be bounded."""
    if isinstance(value, str):
        check_text(value, path)
    elif isinstance(value, dict):
        for key, item in value.items():
            check_text(key, path)
            check_values(item, f"{path}.{echo(key)}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            check_values(item, f"{path}[{index}]")
    elif isinstance(value, float) and not math.isfinite(value):
        raise Undecodable(f"{path} is not a finite number")
    elif isinstance(value, int) and not _INT_RANGE[0] <= value <= _INT_RANGE[1]:
        raise Undecodable(f"{path} does not fit into 64 bits")


def check_text(text: str, path: str) -> None:
    """Raises Undecodable if `text` has a lone surrogate or a noncharacter."""
    found = _FORBIDDEN.search(text)
    if found:
        raise Undecodable(f"{path} has the code point U+{ord(found[0]):04X}, which is not a character")


def encode(document: object, media: Media) -> bytes:
    """The bytes of one of our own documents. What a guest or QEMU put into it cannot make this fail."""
    encoder = msgspec.json.encode if media is Media.JSON else msgspec.msgpack.encode
    try:
        return encoder(document, enc_hook=str)
    except UnicodeEncodeError:
        return encoder(_without_surrogates(msgspec.to_builtins(document, enc_hook=str)), enc_hook=str)


def _without_surrogates(value: object) -> object:
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, dict):
        return {_without_surrogates(key): _without_surrogates(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_surrogates(item) for item in value]
    return value
