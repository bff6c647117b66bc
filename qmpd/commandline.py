"""What can be read from the command line of a QEMU that somebody else started: its options, and where its QMP monitors listen."""

from __future__ import annotations

import posixpath
from collections.abc import Iterator, Sequence
from typing import Final

import msgspec

#: Options of QEMU that take no value (qemu-options.hx, the options without HAS_ARG).
FLAGS: Final = frozenset(
    {
        "S", "nodefaults", "no-user-config", "enable-kvm", "daemonize", "nographic", "snapshot", "no-reboot", "no-shutdown", "no-acpi",
        "no-hpet", "no-fd-bootchk", "singlestep", "only-migratable", "win2k-hack", "full-screen", "no-quit", "usb", "s", "preconfig",
        "mem-prealloc", "enable-sync-profile", "semihosting", "old-param", "portrait", "help", "h", "version", "xen-attach",
        "xen-domid-restrict", "prom-env-none",
    }
)  # fmt: skip


class MonitorPlace(msgspec.Struct, frozen=True, kw_only=True):
    """Where a QMP monitor is, as the command line says: a Unix socket's `path`, or else what it is instead."""

    path: str | None = None
    described: str = ""


def options(argv: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The options with their values, in order; a word that is no option is the image of a first disk, and comes as `hda`."""
    words = iter(argv[1:])
    for word in words:
        if not word.startswith("-"):
            yield "hda", word
            continue
        name = word.removeprefix("--") if word.startswith("--") else word[1:]
        yield name, "" if name in FLAGS else next(words, "")


def fields(value: str) -> tuple[str, dict[str, str]]:
    """The first word of a key=value option, and its keys; a doubled comma is a comma in a value."""
    parts = [part.replace("\0", ",") for part in value.replace(",,", "\0").split(",")]
    pairs = dict(part.partition("=")[::2] for part in parts if "=" in part)
    first = parts[0] if "=" not in parts[0] else ""
    return first, pairs


def qmp_places(argv: Sequence[str], directory: str) -> list[MonitorPlace]:
    """The QMP monitors; `directory` is what relative paths begin at."""
    chardevs: dict[str, tuple[str, dict[str, str]]] = {}
    wanted: list[tuple[str, dict[str, str]] | str] = []
    for name, value in options(argv):
        first, pairs = fields(value)
        if name == "chardev":
            chardevs[pairs.get("id", "")] = first, pairs
        elif name in {"qmp", "qmp-pretty"}:
            wanted.append(first.removeprefix("chardev:") if first.startswith("chardev:") else _short(first, pairs))
        elif name == "mon" and pairs.get("mode") == "control":
            wanted.append(pairs.get("chardev") or first)
    found = [chardevs.get(item, (f"the unknown chardev {item}", {})) if isinstance(item, str) else item for item in wanted]
    return [_place(kind, pairs, directory) for kind, pairs in found]


def _short(first: str, pairs: dict[str, str]) -> tuple[str, dict[str, str]]:
    """`-qmp unix:PATH,server` in the words of a chardev."""
    kind, _, rest = first.partition(":")
    return ("socket", {**pairs, "path": rest}) if kind == "unix" else (first, pairs)


def _place(kind: str, pairs: dict[str, str], directory: str) -> MonitorPlace:
    if kind != "socket":
        return MonitorPlace(described=kind)
    if "path" not in pairs:
        return MonitorPlace(described="an inherited socket" if "fd" in pairs else f"TCP {pairs.get('host', '')}:{pairs.get('port', '')}")
    if pairs.get("abstract") == "on":
        return MonitorPlace(described=f"the abstract socket {pairs['path']}")
    return MonitorPlace(path=posixpath.join(directory, pairs["path"]))
