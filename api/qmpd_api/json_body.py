"""JSON (RFC 8259) as callers may send it: UTF-8 without a byte order mark, no duplicate keys, no numbers beyond 64 bits."""

from __future__ import annotations

import json
import math
import re
from typing import Final, Never

from qmpd.errors import TooLarge, Undecodable
from qmpd_api.echo import echo
from qmpd_api.limits import Limits

#: A string (terminated or not, so that every quote is consumed once and the scan stays linear) or a mark that begins or ends a value.
_TOKEN: Final = re.compile(rb'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)|[][{},:]', re.DOTALL)
_QUOTE: Final = ord('"')
_OPENING: Final = frozenset(b"[{")
_CLOSING: Final = frozenset(b"]}")
#: A value in a map is at most a key, a colon, the value's own string or brackets, and a comma.
_TOKENS_PER_VALUE: Final = 5
#: 2**64 has 20 digits; a minus sign makes 21. Longer ones need no arithmetic to be refused.
_MAX_DIGITS: Final = 21


def read(body: bytes, limits: Limits) -> object:
    """The value in `body` as dicts, lists, strings, numbers, booleans and None; raises Undecodable or TooLarge."""
    if body.startswith(b"\xef\xbb\xbf"):
        raise Undecodable("the body begins with a byte order mark; send UTF-8 without one")
    measure(body, limits)
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        raise Undecodable(f"the body is not UTF-8 at byte {error.start}") from error
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise Undecodable(f"the body is not JSON: {error}") from error


def measure(body: bytes, limits: Limits) -> None:
    """Raises Undecodable if `body` nests too deeply, TooLarge if it has too many values. Looks at punctuation only."""
    depth = count = 0
    for number, token in enumerate(_TOKEN.finditer(body)):
        if number > limits.nodes * _TOKENS_PER_VALUE:
            raise _too_many(limits)
        mark = body[token.start()]
        if mark == _QUOTE:
            continue
        if mark in _CLOSING:
            depth -= 1
            continue
        if mark in _OPENING:
            depth += 1
            if depth > limits.depth:
                raise Undecodable(f"the body nests deeper than {limits.depth} levels", limit=limits.depth)
        count += 1
        if count > limits.nodes:
            raise _too_many(limits)


def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """The pairs as a dict; raises Undecodable if a key is there twice, because every decoder would silently drop one of them."""
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise Undecodable(f"the key '{echo(key)}' is there twice")
            seen.add(key)
    return found


def _too_many(limits: Limits) -> TooLarge:
    return TooLarge(f"the body has more than {limits.nodes} values", limit=limits.nodes)


def _integer(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise Undecodable("an integer does not fit into 64 bits")
    return int(digits)


def _number(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise Undecodable("a number is too large")
    return number


def _constant(name: str) -> Never:
    raise Undecodable(f"{name} is not JSON")


_DECODER: Final = json.JSONDecoder(object_pairs_hook=unique, parse_int=_integer, parse_float=_number, parse_constant=_constant)
