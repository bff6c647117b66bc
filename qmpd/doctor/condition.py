"""What was found out about a daemon and its surroundings, as data: what `judgement` judges."""

from __future__ import annotations

from typing import Literal

from qmpd.facts import Facts, FileFacts
from qmpd.lifecycle import State


class Silence(Facts, frozen=True, kw_only=True):
    """What was looked at did not answer; or `behind` did not, which was to be looked at before on the same file system."""

    behind: str | None = None


class SilentDirectory(Facts, frozen=True, kw_only=True):
    """A directory of the daemon that could not be looked at."""

    directory: str
    silence: Silence


class VolumeSeen(Facts, frozen=True, kw_only=True):
    """The file system below a directory that this daemon uses; `device` is the kernel's number for it."""

    purpose: Literal["state", "run", "cache", "pool"]
    directory: str
    device: int
    free_bytes: int
    total_bytes: int
    free_inodes: int | None
    writable: bool


class FileSeen(Facts, frozen=True, kw_only=True):
    """A file that a machine needs: its `role` in the definition, and what its path leads to."""

    machine: str
    role: str
    path: str
    written_to: bool
    found: FileFacts | Silence


class MachineSeen(Facts, frozen=True, kw_only=True):
    """A machine. `replaced`: the file of its emulator is another one now (None: not known). `crashes`: in the last hour.

    `stray`: its QEMU is alive, but nothing says how to reach it. `restarts`: its definition asks for restarts.
    `full_consoles`: serial ports whose oldest output is no longer kept.
    """

    name: str
    board: str
    board_known: bool
    state: State
    status: str | None = None
    stray: bool = False
    emulator: str | None = None
    replaced: bool | None = None
    crashes: int = 0
    restarts: bool = False
    ending: str = ""
    full_consoles: tuple[int, ...] = ()


class DatabaseSeen(Facts, frozen=True, kw_only=True):
    """The database. `answers`: a read came back in time. `pending` events wait to be written, `lost` ones could not be."""

    path: str
    answers: bool
    size_bytes: int = 0
    log_bytes: int = 0
    pending: int = 0
    lost: int = 0


class LimitSeen(Facts, frozen=True, kw_only=True):
    """How much of something limited is in use; `mend` is what raises the limit."""

    what: str
    used: int
    limit: int
    mend: str


class LeftOver(Facts, frozen=True, kw_only=True):
    """A directory like a machine's, of no machine. `damaged`: the machine's definition is there and cannot be read. `held`: by a QEMU."""

    directory: str
    damaged: bool = False
    held: bool = False


class ForeignQemu(Facts, frozen=True, kw_only=True):
    """A QEMU that this daemon did not launch, and that uses one of its directories."""

    pid: int
    program: str
    directory: str


class CertificateSeen(Facts, frozen=True, kw_only=True):
    """Something that is wrong with the certificates, as `qmpd pki check` puts it. `grave`: they cannot be used."""

    subject: str
    found: str
    remedy: str
    grave: bool


class PeerSeen(Facts, frozen=True, kw_only=True):
    """Another daemon. `problem`: why it cannot be reached. `clock_ahead_s`: its clock; `days_left`: of its certificate."""

    name: str
    problem: str | None = None
    clock_ahead_s: float | None = None
    days_left: float | None = None


class Condition(Facts, frozen=True, kw_only=True):
    """Everything at once."""

    machines: tuple[MachineSeen, ...] = ()
    volumes: tuple[VolumeSeen, ...] = ()
    files: tuple[FileSeen, ...] = ()
    database: DatabaseSeen
    limits: tuple[LimitSeen, ...] = ()
    left_over: tuple[LeftOver, ...] = ()
    foreign: tuple[ForeignQemu, ...] = ()
    silent: tuple[SilentDirectory, ...] = ()
    certificates: tuple[CertificateSeen, ...] = ()
    peers: tuple[PeerSeen, ...] = ()
