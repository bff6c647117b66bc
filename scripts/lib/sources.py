"""Where this system's packages come from, read from apt's source files in both of their formats (sources.list(5))."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

APT: Final = Path("/etc/apt")
ONE_LINE: Final = re.compile(r"^deb\s+(?:\[[^\]]*\]\s+)?(?P<uri>\S+)\s+(?P<suite>\S+)\s+(?P<components>[^#]+)", re.MULTILINE)


def archives(suite: str, directory: Path = APT) -> tuple[str, ...]:
    """The addresses that the sources in `directory` name for `suite`/main, without repetition.

    Debian's own is one of them; a third party may publish under the same name. Only a signature tells them apart.
    """
    files = [directory / "sources.list", *sorted(directory.glob("sources.list.d/*"))]
    found: list[str] = []
    for path in files:
        text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        found.extend(_stanzas(text, suite) if path.suffix == ".sources" else _lines(text, suite))
    return tuple(dict.fromkeys(uri for uri in found if not uri.startswith("cdrom:")))


def _lines(text: str, suite: str) -> Iterator[str]:
    for match in ONE_LINE.finditer(text):
        if match["suite"] == suite and "main" in match["components"].split():
            yield match["uri"]


def _stanzas(text: str, suite: str) -> Iterator[str]:
    text = re.sub(r"(?m)^#.*\n?", "", text)
    for stanza in re.split(r"\n\s*\n", text):
        fields = {name.lower(): value.split() for name, value in re.findall(r"(?m)^([\w-]+):(.*(?:\n[ \t].*)*)", stanza)}
        wanted = suite in fields.get("suites", ()) and "main" in fields.get("components", ()) and "deb" in fields.get("types", ())
        if wanted and fields.get("enabled") != ["no"]:
            yield from fields.get("uris", ())
