"""QEMU command lines as values: options, their escaping, and the two ways to print them."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

import msgspec

#: Options that QEMU takes once: a second one would silently win or be refused. Listed as in `qemu-system-*(1)`.
SINGLE_USE: Final = frozenset(
    {
        "M", "S", "accel", "append", "bios", "boot", "cpu", "daemonize", "display", "dtb", "incoming", "initrd", "kernel",
        "m", "machine", "monitor", "name", "no-reboot", "no-shutdown", "no-user-config", "nodefaults", "nographic",
        "pidfile", "rtc", "sandbox", "smp", "uuid", "vga", "vnc",
    }
)  # fmt: skip
#: Different spellings of the same option.
SAME_AS: Final = {"M": "machine", "nographic": "display"}


class Option(msgspec.Struct, frozen=True):
    """One command-line option without its dash, and its value if it takes one."""

    name: str
    value: str | None = None

    def words(self) -> tuple[str, ...]:
        """The one or two words of argv."""
        return (f"-{self.name}",) if self.value is None else (f"-{self.name}", self.value)


def escape(value: str) -> str:
    """A value for QEMU's key=value syntax, in which a comma ends the value unless doubled (qemu-options, "Notes")."""
    return value.replace(",", ",,")


def word(value: str | int | bool) -> str:
    """A scalar as QEMU's key=value syntax spells it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return escape(str(value))


def pairs(name: str, head: str, values: Mapping[str, str | int | bool | None]) -> Option:
    """`-name head,key=value,…`; keys whose value is None are left out, commas are doubled."""
    parts = [escape(head)] if head else []
    parts += [f"{key}={word(value)}" for key, value in values.items() if value is not None]
    return Option(name, ",".join(parts))


def document(name: str, value: Mapping[str, object]) -> Option:
    """`-name {json}`: for the options that take JSON (`blockdev`, `device`, `netdev`, `object`), where nothing needs escaping."""
    return Option(name, json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False))


def parse(words: Sequence[str]) -> tuple[Option, ...]:
    """Words as a user writes them (`extra_args`) as options; a word that starts with a dash begins one."""
    options: list[Option] = []
    for item in words:
        if item.startswith("-") and item.strip("-"):
            options.append(Option(item.lstrip("-")))
        elif not options or options[-1].value is not None:
            raise ValueError(f"{item!r} belongs to no option: every value must follow an option that starts with '-'")
        else:
            options[-1] = Option(options[-1].name, item)
    return tuple(options)


def repeated(options: Iterable[Option]) -> tuple[str, ...]:
    """The single-use options that occur more than once, in order of their second occurrence."""
    seen: set[str] = set()
    again: list[str] = []
    for option in options:
        name = SAME_AS.get(option.name, option.name)
        if name not in SINGLE_USE:
            continue
        if name in seen and name not in again:
            again.append(name)
        seen.add(name)
    return tuple(again)


def lines(binary: str, options: Iterable[Option]) -> str:
    """The command as a shell would take it, one option per line, each but the last continued with a backslash."""
    rows = [shlex.quote(binary)]
    rows += [" ".join(shlex.quote(item) for item in option.words()) for option in options]
    return " \\\n  ".join(rows) + "\n"
