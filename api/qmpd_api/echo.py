"""Quoting what a caller sent, so that an answer or a log line never carries control characters or a flood."""

from __future__ import annotations

import re
from typing import Final

from qmpd.spec import explained

#: Enough to recognise one's own input.
MAX_ECHO: Final = 64
#: The places where msgspec's messages quote the document.
_QUOTED: Final = re.compile(r"^(Object contains unknown field|Invalid enum value|Invalid value) ([`'])(.*)[`']$", re.DOTALL)
_PLACE: Final = re.compile(r"^(.*) - at (`key` in )?`\$?(.*)`$", re.DOTALL)


def echo(text: str) -> str:
    """At most `MAX_ECHO` characters of `text`, printable ASCII only; the rest is escaped."""
    clipped = ascii(text[:MAX_ECHO])[1:-1]
    return clipped[:MAX_ECHO] + ("..." if len(text) > MAX_ECHO or len(clipped) > MAX_ECHO else "")


def placed(message: str) -> tuple[str, str]:
    """The path below the document (`.disks[0].path`, empty for the document itself) and the sentence of a msgspec validation message."""
    place = _PLACE.match(message)
    sentence, path = (explained(place[1]), place[3]) if place else (explained(message), "")
    if place and place[2]:
        sentence = f"{sentence} as a key"
    quoted = _QUOTED.match(sentence)
    if quoted:
        sentence = f"{quoted[1]} {quoted[2]}{echo(quoted[3])}{quoted[2]}"
    return path, sentence
