"""What may be told to somebody who helps: documents and texts without the secrets that people put into them.

The rule: a value is hidden where its name looks like a secret's (`password`, `api-key`, `AUTH_TOKEN`, ...: see `is_secret`), in
documents, in `name=value` and `name: value` of any text, and behind a flag of that name; so are user names and passwords in
addresses, private keys, and what QEMU's own options take a secret in (`redaction`). A secret without a name cannot be told from
another word.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Final

import msgspec

from qmpd.redaction import HIDDEN, redacted

#: Parts of a name that say that its value is a secret, wherever they stand in a word.
_TELLING: Final = ("password", "passwd", "passphrase", "secret", "token", "credential", "apikey", "privatekey", "cookie")
#: The same as whole parts of a name.
_PARTS: Final = frozenset({"pass", "pw", "pwd", "auth", "authorization", "psk", "pin", "key"})
#: `apiKey` and `APIKey` are two parts, `API_KEY` too.
_HUMP: Final = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
_SPLIT: Final = re.compile(r"[^A-Za-z0-9]+")
#: A name with what separates it from its value. It begins where a word begins, so that a long word is read once.
_NAMED: Final = re.compile(r"(?<![\w./-])([\w./-]+)([\"']?[ \t]*(?:=[ \t]*|:[ \t]*))")
_FLAG: Final = re.compile(r"(?<!\S)(--?[\w-]+)([ \t]+)(?=[^\s-])")
#: Behind a colon and a blank a value is all of the line; elsewhere it is quoted, or a word.
_VALUE: Final = re.compile(r'"(?:[^"\\\n]|\\.)*"|\'[^\'\n]*\'|\S+')
_WORD: Final = re.compile(r"\S+")
#: A word without any of these has no value in it.
_SIGNS: Final = frozenset("=:")
_LINE: Final = re.compile(r"[^\n]+")
_ADDRESS: Final = re.compile(r"(?<=://)[^/\s@]+(?=@)")
_PRIVATE: Final = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL)
#: Documents nest less than this; what is deeper is not told.
_DEPTH: Final = 64


@lru_cache(maxsize=4096)
def is_secret(name: str) -> bool:
    """Whether the value of something called so is to be hidden."""
    parts = [part.lower() for part in _SPLIT.split(_HUMP.sub("_", name)) if part]
    whole = "".join(parts)
    return not _PARTS.isdisjoint(parts) or any(word in whole for word in _TELLING)


def told(value: object, depth: int = _DEPTH) -> object:
    """A document of maps, lists and plain values, with every secret hidden."""
    if depth == 0:
        return HIDDEN
    if isinstance(value, str):
        return told_text(value)
    if isinstance(value, Mapping):
        return {told_text(str(key)): _told_field(str(key), member, value, depth) for key, member in value.items()}
    if isinstance(value, list | tuple):
        return list(_told_list(value, depth))
    return value


def _told_field(name: str, value: object, of: Mapping[object, object], depth: int) -> object:
    # An object of QEMU's may hold a secret as its data: {"qom-type": "secret", "data": "..."}.
    if (is_secret(name) or (name == "data" and "qom-type" in of)) and not isinstance(value, bool | None):
        return HIDDEN
    return told(value, depth - 1)


def _told_list(values: list[object] | tuple[object, ...], depth: int) -> Iterator[object]:
    """Of two words the second is hidden where the first is a flag that takes a secret."""
    flag = ""
    for value in values:
        yield HIDDEN if flag and isinstance(value, str) and not value.startswith("-") else told(value, depth - 1)
        flag = value if isinstance(value, str) and value.startswith("-") and "=" not in value and is_secret(value) else ""


def told_text(text: str) -> str:
    """A text with every secret hidden."""
    if text.lstrip().startswith(("{", "[")):
        try:
            document = msgspec.json.decode(text)
        except (msgspec.DecodeError, RecursionError):
            pass
        else:
            return msgspec.json.encode(told(document)).decode()
    text = _ADDRESS.sub(HIDDEN, _PRIVATE.sub(HIDDEN, text))
    text = "".join(_hidden(_FLAG, "".join(_hidden(_NAMED, text))))
    # Word by word, as QEMU's options are written: a pair at the beginning of a word is one.
    return _WORD.sub(lambda word: redacted((word[0],))[0] if _SIGNS.intersection(word[0]) else word[0], text)


def _hidden(names: re.Pattern[str], text: str) -> Iterator[str]:
    """The text in pieces, without the values behind secret names."""
    at = 0
    while found := names.search(text, at):
        yield text[at : found.end()]
        at = found.end()
        if is_secret(found[1]):
            whole_line = found[2].strip("\"' \t") == ":" and found[2] != ":"
            value = (_LINE if whole_line else _VALUE).match(text, at)
            if value is not None and value[0] not in {"on", "off"}:
                yield HIDDEN
                at = value.end()
    yield text[at:]
