"""Finds and reads board files. A file that cannot be used is reported and named, and never stops the daemon."""

from __future__ import annotations

import difflib
import logging
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

import msgspec

from qmpd import factcache
from qmpd.board import ID_PATTERN, Board, DiskBus, Memory, NamedBoard, ProvenGuest
from qmpd.emulatorfiles import Stamp, stamp
from qmpd.errors import NotFound, Problem

#: The decoded files, in the cache directory: TOML takes many times longer to read.
CACHE_FILE: Final = "boards.msgpack"
#: Directories to look in before all others, separated by colons.
VARIABLE: Final = "QMPD_MACHINES_PATH"
SYSTEM_DIRECTORY: Final = Path("/etc/qmpd/machines")
#: The longest of our own files has 5 KiB; anything beyond this is not a board file, whatever it is called.
MAX_FILE_BYTES: Final = 256 * 1024
#: More names than this say nothing to somebody who mistyped one.
MAX_SUGGESTIONS: Final = 5

_PACKAGE: Final = Path(__file__).resolve().parent
#: What decides how a board file is understood: with another one, the cache is void.
_READERS: Final = (_PACKAGE / "board.py", _PACKAGE / "catalogue.py")

_log = logging.getLogger(__name__)


class BoardProblem(msgspec.Struct, frozen=True, kw_only=True):
    """Why a file of the catalogue is not used: the file, where in it (`$.memory.default_mib`), and what is wrong."""

    file: str
    path: str
    message: str


class Catalogue(msgspec.Struct, frozen=True, kw_only=True):
    """The boards by id, and everything that was wrong with the files on the way."""

    boards: dict[str, NamedBoard]
    problems: tuple[BoardProblem, ...] = ()

    def get(self, board_id: str) -> NamedBoard:
        """The board of this id.

        Raises:
            NotFound: there is none; the message says why its file is not used, or which ids are close.
        """
        found = self.boards.get(board_id)
        if found is not None:
            return found
        broken = [problem for problem in self.problems if Path(problem.file).name == f"{board_id}.toml"]
        if broken:
            first = broken[0]
            raise NotFound(
                f"board {board_id!r} cannot be used: {first.file}, {first.path}: {first.message}",
                problems=[msgspec.to_builtins(problem) for problem in broken],
            )
        close = _closest(board_id, self.boards)
        hint = f"; close to it: {', '.join(close)}" if close else ""
        raise NotFound(f"there is no board {board_id!r}{hint}", closest=close)


def search_path(environ: Mapping[str, str]) -> tuple[Path, ...]:
    """Where board files are looked for, first choice first.

    The directories of QMPD_MACHINES_PATH are always part of it. Of the user's (`$XDG_CONFIG_HOME/qmpd/machines`), the system's
    (`/etc/qmpd/machines`), the installed copy and the checkout's, those that exist.
    """
    asked_for = [Path(entry).absolute() for entry in environ.get(VARIABLE, "").split(":") if entry]
    standard = [*_user_directories(environ), SYSTEM_DIRECTORY, _PACKAGE / "_machines", *_checkout_directories()]
    return tuple(dict.fromkeys([*asked_for, *(path for path in standard if path.is_dir())]))


def _user_directories(environ: Mapping[str, str]) -> Iterator[Path]:
    home = environ.get("HOME", "")
    base = environ.get("XDG_CONFIG_HOME") or (f"{home}/.config" if home else "")
    # The XDG base directory specification: a relative path in these variables is to be ignored.
    if base.startswith("/"):
        yield Path(base) / "qmpd" / "machines"


def _checkout_directories() -> Iterator[Path]:
    # Installed, the package's neighbour `machines` would be somebody else's.
    root = _PACKAGE.parent
    if (root / "pyproject.toml").is_file():
        yield root / "machines"


class CachedCatalogue(msgspec.Struct, frozen=True, kw_only=True):
    """A catalogue, and what every file it depends on looked like."""

    stamps: tuple[Stamp | None, ...]
    catalogue: Catalogue


def load_cached(paths: Sequence[Path], cache_dir: Path) -> Catalogue:
    """The same as `load`, from the cache where no file, and nothing of what reads them, has changed since. Blocks."""
    seen = tuple(stamp(path) for path in (*_READERS, *paths, *(file for path in paths for file in _files(path))))
    cache = cache_dir / CACHE_FILE
    known = factcache.read(cache, CachedCatalogue)
    if known is not None and known.stamps == seen and None not in seen:
        return known.catalogue
    loaded = load(paths)
    try:
        factcache.write(cache, CachedCatalogue(stamps=seen, catalogue=loaded))
    except OSError as error:
        _log.warning("the catalogue's cache cannot be written", extra={"path": str(cache), "error": str(error)})
    return loaded


def _files(directory: Path) -> list[Path]:
    try:
        return sorted(path for path in directory.iterdir() if path.suffix == ".toml" and not path.name.startswith("."))
    except OSError:
        return []


def load(paths: Iterable[Path]) -> Catalogue:
    """Read all board files of these directories. For an id the first directory that has a file wins, also if that file is broken."""
    claimed: set[str] = set()
    boards: dict[str, NamedBoard] = {}
    problems: list[BoardProblem] = []
    for directory in paths:
        try:
            files = sorted(path for path in directory.iterdir() if path.suffix == ".toml" and not path.name.startswith("."))
        except OSError as error:
            problems.append(_problem(directory, _reason(error)))
            continue
        for file in files:
            if file.stem in claimed:
                continue
            claimed.add(file.stem)
            named, found = _read(file)
            problems += found
            if named is not None:
                boards[named.id] = named
    return Catalogue(boards=dict(sorted(boards.items())), problems=tuple(problems))


def _read(file: Path) -> tuple[NamedBoard | None, list[BoardProblem]]:
    try:
        if not re.match(ID_PATTERN, file.stem):
            return None, [_problem(file, "the file's name is the board's id, and an id is [a-z0-9][a-z0-9_-]{0,62}")]
        if not file.is_file():
            return None, [_problem(file, "this is not a regular file")]
        if file.stat().st_size > MAX_FILE_BYTES:
            return None, [_problem(file, f"a board file has at most {MAX_FILE_BYTES} bytes")]
        content = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        return None, [_problem(file, f"this is not UTF-8: {error.reason} at byte {error.start}")]
    except OSError as error:
        return None, [_problem(file, _reason(error))]
    try:
        board = msgspec.convert(tomllib.loads(content), Board, strict=True)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        return None, [_problem(file, f"this is not TOML: {error}")]
    except msgspec.ValidationError as error:
        message, _, where = str(error).partition(" - at `")
        return None, [_problem(file, message, where.rstrip("`") or "$")]
    found = [_problem(file, problem.message, problem.path) for problem in contradictions(board)]
    return (None if found else NamedBoard(id=file.stem, source=str(file), board=board)), found


def _problem(file: Path, message: str, path: str = "$") -> BoardProblem:
    return BoardProblem(file=str(file), path=path, message=message)


def _reason(error: OSError) -> str:
    return f"cannot be read: {error.strerror or error}"


def _closest(word: str, known: Iterable[str]) -> list[str]:
    """Names that look alike, and those that have the word in them: `q35` is not close to `x86_64-q35`, but meant."""
    names = sorted(known)
    alike = difflib.get_close_matches(word, names, n=MAX_SUGGESTIONS)
    inside = [name for name in names if word and word in name]
    return list(dict.fromkeys([*inside, *alike]))[:MAX_SUGGESTIONS]


def contradictions(board: Board) -> list[Problem]:
    """What a board says that cannot all be true; each field by itself is right already."""
    return [problem for check in _CHECKS for problem in check(board)]


def _memory(board: Board) -> Iterator[Problem]:
    yield from _amounts(board.memory)
    if board.guest is not None and board.guest.memory_mib is not None and not _fits(board.memory, board.guest.memory_mib):
        yield Problem(path="$.guest.memory_mib", message=f"{board.guest.memory_mib} MiB is not what $.memory allows")


def _amounts(memory: Memory) -> Iterator[Problem]:
    if memory.max_mib is not None and memory.max_mib < memory.min_mib:
        yield Problem(path="$.memory.max_mib", message=f"{memory.max_mib} is less than min_mib, {memory.min_mib}")
    elif not _fits(memory, memory.default_mib):
        yield Problem(path="$.memory.default_mib", message=f"{memory.default_mib} is not what min_mib, max_mib and step_mib allow")


def _fits(memory: Memory, amount: int) -> bool:
    if memory.fixed:
        return amount == memory.default_mib
    return memory.min_mib <= amount <= (memory.max_mib or amount) and amount % memory.step_mib == 0


def _processors(board: Board) -> Iterator[Problem]:
    if board.max_cpus < board.min_cpus:
        yield Problem(path="$.max_cpus", message=f"{board.max_cpus} is less than min_cpus, {board.min_cpus}")


def _disks(board: Board) -> Iterator[Problem]:
    for name, bus in board.disks.items():
        for field, message in _bus(bus):
            yield Problem(path=f"$.disks.{name}.{field}", message=message)
    if board.default_disk is not None and board.default_disk not in board.disks:
        yield Problem(path="$.default_disk", message=f"{board.default_disk!r} is not one of $.disks: {', '.join(board.disks) or 'none'}")


def _bus(bus: DiskBus) -> Iterator[tuple[str, str]]:
    if (bus.device is None) == (bus.drive_interface is None):
        yield "device", "a disk bus has either a device or a drive_interface"
    if bus.drive_interface is not None:
        for field in ("cdrom_device", "controller", "bus"):
            if getattr(bus, field) is not None:
                yield field, "this goes with a device, not with a drive_interface"
    if bus.bus is not None and set("{}") & set(bus.bus.replace("{index}", "")):
        yield "bus", "the only place to fill in is {index}"


def _nics(board: Board) -> Iterator[Problem]:
    for name, model in board.nics.items():
        if (model.device is None) == (model.on_board is None):
            yield Problem(path=f"$.nics.{name}.device", message="a NIC model is either a device or on_board")
    if board.default_nic is not None and board.default_nic not in board.nics:
        yield Problem(path="$.default_nic", message=f"{board.default_nic!r} is not one of $.nics: {', '.join(board.nics) or 'none'}")


def _guest(board: Board) -> Iterator[Problem]:
    guest = board.guest
    if guest is None:
        return
    if guest.kernel is not None and board.kernel is None:
        yield Problem(path="$.guest.kernel", message="the board has no [kernel]: it cannot boot one directly")
    if guest.kernel is None:
        for field in ("initrd", "dtb"):
            if getattr(guest, field) is not None:
                yield Problem(path=f"$.guest.{field}", message="this goes with a kernel")
    if guest.bios is not None and not board.firmware.bios:
        yield Problem(path="$.guest.bios", message="the board's firmware cannot be replaced")
    yield from _patterns(guest)
    for index, device in enumerate(guest.devices):
        if not isinstance(device.get("driver"), str):
            yield Problem(path=f"$.guest.devices[{index}].driver", message="a device needs a driver (a string)")


def _patterns(guest: ProvenGuest) -> Iterator[Problem]:
    for field, pattern in (("expect", guest.expect), ("send_after", guest.send_after)):
        try:
            re.compile(pattern or "")
        except re.error as error:
            yield Problem(path=f"$.guest.{field}", message=f"this is not a regular expression: {error}")
    if guest.send_after is not None and guest.send is None:
        yield Problem(path="$.guest.send_after", message="there is nothing to send")


_CHECKS: Final[Sequence[Callable[[Board], Iterator[Problem]]]] = (_memory, _processors, _disks, _nics, _guest)
