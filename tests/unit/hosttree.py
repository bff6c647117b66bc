"""Hosts to check: trees of files, and the facts of emulators."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from qmpd.facts import EmulatorFacts
from qmpd.hostcheck.tree import HostTree


def host(directory: Path, files: Mapping[str, str] | None = None) -> HostTree:
    """A host of the files given by path, and of those that were put there before."""
    for name, content in (files or {}).items():
        path = directory / name.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return HostTree(directory)


def emulator(target: str, *, version: str = "9.0.0", options: frozenset[str] = frozenset({"sandbox"})) -> EmulatorFacts:
    """The facts of an emulator."""
    return EmulatorFacts(path=f"/usr/bin/qemu-system-{target}", target=target, version=version, machines=(), options=options)
