"""Exit codes, and errors as lines for people."""

from __future__ import annotations

from collections.abc import Iterator
from enum import IntEnum
from typing import Final

import click

from qmpctl.tables import printable
from qmpd.errors import (
    Conflict,
    Invalid,
    NotFound,
    NotYet,
    PeerError,
    QemuError,
    QmpdError,
    RevisionRequired,
    StaleRevision,
    Undecodable,
)


class Exit(IntEnum):
    """What qmpctl's exit code says. Ended by a signal it is 128 and the signal's number, as in a shell."""

    OK = 0
    NO = 1
    USAGE = 2
    NOT_FOUND = 3
    CONFLICT = 4
    UNAVAILABLE = 5
    QEMU = 6
    OTHER = 7


EXPLAINED: Final = """\
Exit codes: 0 done; 1 the answer is no (no match, not valid, check failed, not in time); 2 wrong usage; 3 no such machine,
board or job; 4 conflict or wrong state; 5 no daemon; 6 QEMU failed or is silent; 7 anything else."""

#: Along the class hierarchy: the first that fits counts.
_BY_CLASS: Final[tuple[tuple[type[QmpdError], Exit], ...]] = (
    (Invalid, Exit.NO),
    (Undecodable, Exit.NO),
    (NotYet, Exit.NO),
    (NotFound, Exit.NOT_FOUND),
    (Conflict, Exit.CONFLICT),
    (StaleRevision, Exit.CONFLICT),
    (RevisionRequired, Exit.CONFLICT),
    (QemuError, Exit.QEMU),
    (PeerError, Exit.UNAVAILABLE),
)
#: The client's own errors, by code: their classes come with an HTTP client that most failures do not need.
_BY_CODE: Final = {"daemon_unavailable": Exit.UNAVAILABLE, "daemon_silent": Exit.UNAVAILABLE}


class Terminated(Exception):
    """A signal asked qmpctl to end."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def exit_of(error: QmpdError) -> Exit:
    """The exit code of an error."""
    if error.code in _BY_CODE:
        return _BY_CODE[error.code]
    return next((code for kind, code in _BY_CLASS if isinstance(error, kind)), Exit.OTHER)


def lines_of(error: QmpdError, subject: str = "") -> Iterator[str]:
    """An error as the lines that go to stderr: what happened, then what QEMU said or what is wrong where."""
    about = f"{subject}: " if subject else ""
    if isinstance(error, Invalid):
        count = len(error.problems)
        yield f"qmpctl: {printable(about)}{count} problem{'s' if count != 1 else ''} in what was asked for"
        yield from (f"  {printable(problem.path)}: {printable(problem.message)}" for problem in error.problems)
        return
    yield f"qmpctl: {printable(about + error.message)}"
    tail = error.details.get("stderr")
    if isinstance(tail, str):
        yield from (f"  stderr: {printable(line)}" for line in tail.splitlines())
    yield from map(printable, _findings(error))


def _findings(error: QmpdError) -> Iterator[str]:
    """What was in the way of a migration, which comes with the error of one that was not begun."""
    findings = error.details.get("findings")
    if isinstance(findings, list):
        import msgspec

        from qmpctl.journeys import finding_lines
        from qmpd.migrationviews import MigrationFinding

        yield from finding_lines(msgspec.convert(findings, tuple[MigrationFinding, ...]))


def report(error: QmpdError, subject: str = "") -> Exit:
    """Print an error to stderr; returns its exit code."""
    for line in lines_of(error, subject):
        click.echo(line, err=True)
    return exit_of(error)
