"""Where emulators are: a search of PATH and of configured places that starts nothing. Everything here blocks; call it in a thread."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Final, TypeAlias

from qmpd.facts import Facts

PREFIX: Final = "qemu-system-"
#: Debian's reduced build of qemu-system-x86_64 for one board, which the full one has too.
SKIPPED: Final = frozenset({"qemu-system-x86_64-microvm"})


class Stamp(Facts, frozen=True):
    """What a file or directory looked like: if this is unchanged, so is the file, or the list of names in the directory."""

    path: str
    size: int
    mtime_ns: int


#: What a place looked like: device, inode, size and time of change of what its path leads to; None where there is nothing to be seen.
Look: TypeAlias = tuple[int, int, int, int] | None


class Found(Facts, frozen=True):
    """The outcome of a search: the path to execute by file name and by every path that leads there, and what the places looked like."""

    by_name: dict[str, str]
    by_path: dict[str, str]
    places: tuple[Look, ...]


def look(configured: Sequence[str], search_path: str) -> Found:
    """Search the configured places (files, or directories of builds), then PATH; who comes first has the name."""
    # Taken before the search: what changes meanwhile is found by the next one.
    places = _looks(configured, search_path)
    files, directories = _files(configured), _directories(configured, search_path)
    by_name: dict[str, str] = {}
    by_path: dict[str, str] = {}
    for link in _candidates(files, directories):
        path = _resolved(link)
        by_name.setdefault(link.name, path)
        for alias in directories.get(os.path.realpath(link.parent), [link.parent]):
            by_path[str(alias / link.name)] = path
        by_path[path] = path
    return Found(by_name=by_name, by_path=by_path, places=places)


def still_right(found: Found, configured: Sequence[str], search_path: str) -> bool:
    """Whether another search would find the same: nothing was added to, removed from or renamed in any place."""
    return found.places == _looks(configured, search_path)


def stamp(path: str | Path) -> Stamp | None:
    """The stamp of a path, links followed; None where there is nothing, or nothing that may be looked at."""
    try:
        status = Path(path).stat()
    except OSError:
        return None
    return Stamp(path=str(path), size=status.st_size, mtime_ns=status.st_mtime_ns)


def _looks(configured: Sequence[str], search_path: str) -> tuple[Look, ...]:
    """What every place looks like by the names it was given: every start asks, so no path is resolved for it."""
    return tuple(_seen(place) for place in (*_inside(configured), *_named(search_path)))


def _seen(place: str) -> Look:
    try:
        status = os.stat(place)  # noqa: PTH116  at every start, a dozen times
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _inside(configured: Sequence[str]) -> list[str]:
    """The configured places, and the directories per target that an older build has."""
    return [found for place in configured for found in (place, *(str(path) for path in _targets(Path(place))))]


@lru_cache(4)
def _named(search_path: str) -> tuple[str, ...]:
    return tuple(path for path in search_path.split(os.pathsep) if Path(path).is_absolute())


def _targets(place: Path) -> list[Path]:
    return sorted(place.glob("*-softmmu"))


def _files(configured: Sequence[str]) -> list[Path]:
    """The configured places that are not directories, whether there is something or not."""
    return [place for place in map(Path, configured) if not place.is_dir()]


def _directories(configured: Sequence[str], search_path: str) -> dict[str, list[Path]]:
    """The directories to search in this order, by their real path: each once, with all its names (/bin is often /usr/bin)."""
    directories: list[Path] = []
    for place in map(Path, configured):
        if place.is_dir():
            # An uninstalled build has them at its top, an older one in a directory per target.
            directories += [place, *_targets(place)]
    directories += map(Path, _named(search_path))
    names: dict[str, list[Path]] = {}
    for path in directories:
        names.setdefault(os.path.realpath(path), []).append(path)
    return names


def _candidates(files: Sequence[Path], directories: Mapping[str, Sequence[Path]]) -> Iterator[Path]:
    """Every executable that may be an emulator, in the order in which they take a name."""
    yield from filter(_executable, files)
    for directory, *_ in directories.values():
        try:
            names = sorted(entry.name for entry in os.scandir(directory) if entry.name.startswith(PREFIX))
        except OSError:
            continue  # PATH names directories that do not exist, or that this user may not list
        yield from (directory / name for name in names if name not in SKIPPED and _executable(directory / name))


def _executable(path: Path) -> bool:
    return path.is_file() and os.access(path, os.X_OK)


def _resolved(link: Path) -> str:
    """Where a link leads, unless that is an emulator only under the link's name (a sandbox's launcher, say)."""
    real = os.path.realpath(link)
    return real if Path(real).name.startswith(PREFIX) else os.path.normpath(link)
