"""What the checks look at, and how they say what they found."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from difflib import get_close_matches

from qmpd.board import Board, NamedBoard
from qmpd.errors import Problem
from qmpd.facts import Facts, FileFacts, World
from qmpd.spec import MachineSpec

#: A list of valid values in a message stops here: long enough to be useful, short enough to be read.
NAMED_AT_MOST = 12


class Subject(Facts, frozen=True, kw_only=True):
    """A definition with the board and the facts it is held against."""

    spec: MachineSpec
    named: NamedBoard
    world: World

    @property
    def board(self) -> Board:
        """The board's own part of the named board."""
        return self.named.board

    def file(self, path: str) -> FileFacts:
        """What a path leads to; a path nobody looked at counts as missing."""
        return self.world.files.get(path, FileFacts(kind="missing"))


def problem(path: str, message: str) -> Problem:
    """One thing that is wrong, at a path below the document."""
    return Problem(path=f"$.{path}", message=message)


def choices(names: Iterable[str], wanted: str | None = None) -> str:
    """Valid values for a message: those close to what was asked for, otherwise the first ones."""
    known = sorted(names)
    close = get_close_matches(wanted, known, n=5) if wanted else []
    shown = close or known[:NAMED_AT_MOST]
    more = len(known) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more > 0 else "")


def file_problems(subject: Subject, path: str, field: str, *, writable: bool = False, based: bool = False) -> Iterator[Problem]:
    """What keeps QEMU from opening a file of the definition; `based`: it is an image whose base the definition names."""
    facts = subject.file(path)
    if facts.refusal is not None and not (based and facts.backing is not None):
        yield problem(field, f"{path}: {facts.refusal}")
    elif facts.kind == "missing":
        yield problem(field, f"{path}: no such file")
    elif facts.kind == "denied":
        yield problem(field, f"{path}: permission denied")
    elif facts.kind != "file":
        yield problem(field, f"{path}: not a regular file but a {'directory' if facts.kind == 'directory' else 'special file'}")
    elif not facts.readable:
        yield problem(field, f"{path}: not readable by the daemon")
    elif writable and not facts.writable:
        yield problem(field, f"{path}: not writable by the daemon; set read_only = true to attach it read-only")
