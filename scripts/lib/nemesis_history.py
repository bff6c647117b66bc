"""What a nemesis run writes down: operations with their outcomes, processes that were seen, and what was found broken."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Final

import msgspec

OK: Final = "ok"
#: It may have taken effect, and may still until the next rest: the daemon was killed, or did not answer.
UNKNOWN: Final = "unknown"
#: It never reached a daemon.
REFUSED: Final = "refused"
RUNNING: Final = "running"
PAUSED: Final = "paused"
DOWN: Final = "down"


class Entry(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One operation, fault or observation. `outcome` is one of the words above or an error's code; times are of the monotonic clock.

    `mark` is the label its definition carries; `revision` the one it gave (If-Match) or, when it read, found; `given` what it was answered.
    """

    number: int
    who: str
    kind: str
    begin: float
    machine: str = ""
    end: float | None = None
    outcome: str = UNKNOWN
    mark: str = ""
    revision: int | None = None
    given: int | None = None
    run: str = ""
    pid: int | None = None
    detail: str = ""

    def line(self) -> str:
        """The entry in words."""
        until = "      …" if self.end is None else f"{self.end:7.3f}"
        facts = {"mark": self.mark, "revision": self.revision, "given": self.given, "run": self.run, "pid": self.pid}
        words = " ".join(f"{name}={value}" for name, value in facts.items() if value not in (None, ""))
        return f"{self.begin:8.3f} {until} {self.who:8} {self.kind:18} {self.machine:5} {self.outcome:18} {words} {self.detail}".rstrip()


class Life(msgspec.Struct, kw_only=True):
    """A QEMU as the watcher saw it: alive at `first` and at `last`; gone at `gone`, the first look that did not find it."""

    machine: str
    pid: int
    started: int
    first: float
    last: float
    gone: float | None = None
    #: The look before the first: it was not there then.
    absent: float = 0.0


class Violation(msgspec.Struct, frozen=True, kw_only=True):
    """A promise that was broken: its name, the sentence, and the entries that show it."""

    invariant: str
    what: str
    machine: str = ""
    history: tuple[str, ...] = ()


class History:
    """The entries of a run, each written to a file as a line of JSON when it ends. Times count from the beginning of the run."""

    def __init__(self, file: IO[bytes] | None = None) -> None:
        self.entries: list[Entry] = []
        self.violations: list[Violation] = []
        self._file = file
        self._began = time.monotonic()

    def now(self) -> float:
        """Seconds since the run began."""
        return time.monotonic() - self._began

    def begin(self, who: str, kind: str, machine: str = "", **facts: object) -> Entry:
        """A new entry that has begun now."""
        entry = msgspec.convert(
            {**facts, "number": len(self.entries), "who": who, "kind": kind, "machine": machine, "begin": self.now()}, Entry
        )
        self.entries.append(entry)
        return entry

    def end(self, entry: Entry, outcome: str = OK) -> None:
        """The entry ends now with this outcome. What is unknown never ends."""
        entry.outcome = outcome
        if outcome != UNKNOWN:
            entry.end = self.now()
        if self._file is not None:
            self._file.write(msgspec.json.encode(entry) + b"\n")

    def broken(self, invariant: str, what: str, machine: str = "") -> None:
        """Notes a broken promise, with what went on around it."""
        around = self.around(machine, self.now())
        self.violations.append(Violation(invariant=invariant, what=what, machine=machine, history=around))

    def around(self, machine: str, moment: float, before_s: float = 20.0) -> tuple[str, ...]:
        """The entries of a machine, and those that concern all, in the time before a moment."""
        return tuple(
            entry.line()
            for entry in self.entries
            if (not entry.machine or not machine or entry.machine == machine)
            and entry.begin <= moment
            and (entry.end is None or entry.end >= moment - before_s)
            and entry.begin >= moment - 3 * before_s
            and (entry.kind.startswith(("fault", "daemon", "rest")) or entry.machine)
        )


@contextmanager
def recording(path: Path | None) -> Iterator[History]:
    """A history whose entries go to this file too."""
    if path is None:
        yield History()
        return
    with path.open("wb") as file:
        yield History(file)


def of_machine(entries: Sequence[Entry], machine: str) -> list[Entry]:
    """The entries of one machine, in the order in which they began."""
    return sorted((entry for entry in entries if entry.machine == machine), key=lambda entry: entry.begin)
