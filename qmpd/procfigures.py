"""What the kernel counts of a process: processor time, memory, and what it read and wrote. All of this blocks shortly."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import msgspec

from qmpd.process import Identity

_TICKS_PER_SECOND: Final = os.sysconf("SC_CLK_TCK")
_PAGE_BYTES: Final = os.sysconf("SC_PAGE_SIZE")


class ProcessFigures(msgspec.Struct, frozen=True, kw_only=True):
    """`read_bytes` and `written_bytes` are what went to and from storage; None where the kernel does not tell this user."""

    cpu_seconds: float
    resident_bytes: int
    read_bytes: int | None = None
    written_bytes: int | None = None


def figures_of(identities: Mapping[str, Identity], proc: Path = Path("/proc")) -> dict[str, ProcessFigures]:
    """The figures of those processes that still are who they were."""
    found = {name: _figures(identity, proc / str(identity.pid)) for name, identity in identities.items()}
    return {name: figures for name, figures in found.items() if figures is not None}


def _figures(identity: Identity, directory: Path) -> ProcessFigures | None:
    try:
        stat = (directory / "stat").read_bytes()
    except OSError:
        return None
    # Behind the name in parentheses, which may hold anything; then field 3 of proc(5) is number 0.
    fields = stat[stat.rindex(b")") + 2 :].split()
    if int(fields[19]) != identity.start_time:
        return None
    moved = _moved(directory / "io")
    return ProcessFigures(
        cpu_seconds=(int(fields[11]) + int(fields[12])) / _TICKS_PER_SECOND,
        resident_bytes=int(fields[21]) * _PAGE_BYTES,
        read_bytes=moved.get("read_bytes"),
        written_bytes=moved.get("write_bytes"),
    )


def _moved(path: Path) -> dict[str, int]:
    try:
        text = path.read_text("ascii")
    except OSError:
        return {}
    return {name: int(value) for name, _, value in (line.partition(": ") for line in text.splitlines())}
