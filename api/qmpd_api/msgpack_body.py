"""msgpack as callers may send it: what JSON can say and nothing else, so no extension types, no binary, string keys only."""

from __future__ import annotations

from typing import Final

import msgpack

from qmpd.errors import TooLarge, Undecodable
from qmpd_api.json_body import unique
from qmpd_api.limits import Limits

_SCALAR, _TEXT, _LIST, _MAP = range(4)

#: First bytes with a fixed number of bytes behind them: nil, booleans, floats and integers.
_FIXED: Final = {
    0xC0: 0,
    0xC2: 0, 0xC3: 0,
    0xCA: 4, 0xCB: 8,
    0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8,
    0xD0: 1, 0xD1: 2, 0xD2: 4, 0xD3: 8,
}  # fmt: skip
#: First bytes that are followed by a length: what it is a length of, and how many bytes the length takes.
_SIZED: Final = {
    0xD9: (_TEXT, 1), 0xDA: (_TEXT, 2), 0xDB: (_TEXT, 4),
    0xDC: (_LIST, 2), 0xDD: (_LIST, 4),
    0xDE: (_MAP, 2), 0xDF: (_MAP, 4),
}  # fmt: skip


def read(body: bytes, limits: Limits) -> object:
    """The value in `body` as dicts, lists, strings, numbers, booleans and None; raises Undecodable or TooLarge."""
    measure(body, limits)
    try:
        return msgpack.unpackb(body, raw=False, strict_map_key=True, object_pairs_hook=unique)
    except (ValueError, msgpack.UnpackException) as error:
        raise Undecodable(f"the body is not msgpack: {type(error).__name__}") from error


def measure(body: bytes, limits: Limits) -> None:
    """Raises Undecodable unless `body` is exactly one value of the allowed kinds and depth; TooLarge if it holds too many."""
    open_items: list[int] = []
    open_maps: list[bool] = []
    at = count = 0
    while not count or open_items:
        kind, size, at = _head(body, at)
        count += 1
        if count > limits.nodes:
            raise TooLarge(f"the body has more than {limits.nodes} values", limit=limits.nodes)
        if open_items:
            if open_maps[-1] and open_items[-1] % 2 == 0 and kind != _TEXT:
                raise Undecodable(f"a key before byte {at} is not a string")
            open_items[-1] -= 1
        if kind in {_LIST, _MAP}:
            open_items.append(size * (kind - 1))
            open_maps.append(kind == _MAP)
            _check_opened(open_items, len(body) - at, limits)
        while open_items and not open_items[-1]:
            open_items.pop()
            open_maps.pop()
    if at != len(body):
        raise Undecodable(f"there are {len(body) - at} bytes behind the document")


def _check_opened(open_items: list[int], left: int, limits: Limits) -> None:
    if open_items[-1] > left:
        raise Undecodable("the body ends before what it announces")
    if len(open_items) > limits.depth:
        raise Undecodable(f"the body nests deeper than {limits.depth} levels", limit=limits.depth)


def _head(body: bytes, at: int) -> tuple[int, int, int]:
    """The kind of the value at `at`, how many items it has, and where the next value or first item is."""
    if at >= len(body):
        raise Undecodable("the body ends before what it announces")
    first = body[at]
    at += 1
    if first < 0x80 or first >= 0xE0:
        return _SCALAR, 0, at
    if first < 0xC0:
        kind = _MAP if first < 0x90 else _LIST if first < 0xA0 else _TEXT
        return _sized(body, kind, first & (0x1F if kind == _TEXT else 0x0F), at)
    if first in _FIXED:
        return _SCALAR, 0, _skip(body, at, _FIXED[first])
    if first in _SIZED:
        kind, width = _SIZED[first]
        end = _skip(body, at, width)
        return _sized(body, kind, int.from_bytes(body[at:end], "big"), end)
    raise Undecodable(f"byte {at - 1} begins a value that is not allowed here (0x{first:02x}: binary, extension or reserved)")


def _sized(body: bytes, kind: int, size: int, at: int) -> tuple[int, int, int]:
    return kind, size, _skip(body, at, size) if kind == _TEXT else at


def _skip(body: bytes, at: int, size: int) -> int:
    if size > len(body) - at:
        raise Undecodable("the body ends before what it announces")
    return at + size
