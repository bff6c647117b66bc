"""Processes of this host as /proc shows them: which are QEMUs, who they belong to, which files they hold. Looks, and touches nothing.

Everything here blocks, and answers only for what this user may see.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import msgspec

from qmpd.process import Identity, NotOurs, boot_id, start_time

#: What QEMU's system emulators are called, by QEMU and by distributions.
_NAMES: Final = re.compile(r"qemu-system-.+|qemu-kvm")
_DELETED: Final = " (deleted)"
#: Where a descriptor of a socket leads to.
_SOCKET: Final = re.compile(r"socket:\[([0-9]+)\]")
#: The state of an accepted connection in /proc/net/unix.
_CONNECTED: Final = "03"


class HostProcess(msgspec.Struct, frozen=True, kw_only=True):
    """One process. `directory` is where it was started from, None where that is hidden or gone."""

    identity: Identity
    uid: int
    argv: tuple[str, ...]
    program: str
    directory: str | None = None
    halted: bool = False

    @property
    def is_qemu(self) -> bool:
        """Whether it is one of QEMU's system emulators, by its name."""
        return _NAMES.fullmatch(Path(self.program).name.removesuffix(_DELETED)) is not None

    @property
    def user(self) -> str:
        """Whose it is."""
        try:
            return pwd.getpwuid(self.uid).pw_name
        except KeyError:
            return str(self.uid)

    @property
    def started_at(self) -> datetime:
        """When it was started, by today's wall clock."""
        booted = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
        return datetime.fromtimestamp(booted + self.identity.start_time / os.sysconf("SC_CLK_TCK"), UTC)


def process(pid: int) -> HostProcess | None:
    """The process of this number; None if there is none (any more), or only its remains."""
    directory = Path("/proc") / str(pid)
    try:
        started = start_time(pid)
        argv = tuple(word.decode("utf-8", "replace") for word in (directory / "cmdline").read_bytes().split(b"\0")[:-1])
        if not argv:
            return None  # a kernel thread, or a process that has ended and was not reaped
        status = (directory / "status").read_text("ascii", "replace")
        made = HostProcess(
            identity=Identity(boot_id=boot_id(), pid=pid, start_time=started),
            uid=int(_field(status, "Uid").split()[1]),
            argv=argv,
            program=_link(directory / "exe") or argv[0],
            directory=_living(_link(directory / "cwd")),
            halted=_field(status, "State").startswith(("T", "t")),
        )
        return made if start_time(pid) == started else None
    except (OSError, NotOurs, ValueError, IndexError):
        return None


def is_alive(identity: Identity) -> bool:
    """Whether a process is still there; one that ended and was not reaped is."""
    try:
        return identity.boot_id == boot_id() and start_time(identity.pid) == identity.start_time
    except NotOurs:
        return False


def rests(pid: int) -> int | None:
    """How many nanoseconds a process has computed, if all of its threads wait for something; None where one does not, or nobody can see."""
    used = 0
    try:
        for task in Path(f"/proc/{pid}/task").iterdir():
            if (task / "stat").read_bytes().rpartition(b") ")[2][:1] != b"S":
                return None
            used += int((task / "schedstat").read_bytes().split()[0])
    except (OSError, ValueError, IndexError):
        return None
    return used


def qemus() -> list[HostProcess]:
    """Every QEMU of this host, by number."""
    found = (process(pid) for pid in _numbers() if _NAMES.fullmatch(_name(pid)))
    return [one for one in found if one is not None]


def working_in(directory: str, program: str) -> list[HostProcess]:
    """The processes of a program that were started in a directory."""
    where = os.path.realpath(directory)
    found = (process(pid) for pid in _numbers() if _name(pid) == program)
    return [one for one in found if one is not None and one.directory == where]


def qemu_sockets() -> frozenset[int]:
    """The inodes of the sockets that the QEMUs of this host have open, as far as this user may see them."""
    return frozenset(inode for pid in _numbers() if _NAMES.fullmatch(_name(pid)) for inode in _sockets(pid))


def _sockets(pid: int) -> list[int]:
    try:
        links = [_link(Path(entry.path)) or "" for entry in os.scandir(f"/proc/{pid}/fd")]
    except OSError:
        return []
    return [int(found[1]) for link in links if (found := _SOCKET.fullmatch(link)) is not None]


def holders(path: str) -> list[HostProcess]:
    """The other processes that have this file open."""
    mine = os.getpid()
    found = [process(pid) for pid in _numbers() if pid != mine and holds(pid, path)]
    return [one for one in found if one is not None]


def is_served(path: str) -> bool:
    """Whether the server that listens at a Unix socket has a client already. False also where that cannot be seen."""
    try:
        table = Path("/proc/net/unix").read_text("utf-8", "replace").splitlines()[1:]
    except OSError:
        return False
    rows = (row.split(maxsplit=7) for row in table)
    # A connection that nobody has accepted yet has no inode.
    return any(len(row) == 8 and row[7] == path and row[5] == _CONNECTED and row[6] != "0" for row in rows)


def holds(pid: int, path: str) -> bool:
    """Whether a process has this file open; False also where that is hidden."""
    try:
        wanted = Path(path).stat()
        entries = list(os.scandir(f"/proc/{pid}/fd"))
    except OSError:
        return False
    return any(_is(entry, Path(path).name, wanted) for entry in entries)


def _is(entry: os.DirEntry[str], name: str, wanted: os.stat_result) -> bool:
    # The name first: to look at every file would wait for every file system, also one that hangs.
    if Path(_link(Path(entry.path)) or "").name != name:
        return False
    try:
        found = entry.stat()
    except OSError:
        return False
    return (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino)


def _numbers() -> list[int]:
    return sorted(int(entry.name) for entry in os.scandir("/proc") if entry.name.isdigit())


def _name(pid: int) -> str:
    """The program's name, as cheaply as it is to be had: there are many processes, and few QEMUs."""
    if link := _link(Path(f"/proc/{pid}/exe")):
        return Path(link).name.removesuffix(_DELETED)
    with contextlib.suppress(OSError):
        return Path(Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0", 1)[0].decode("utf-8", "replace")).name
    return ""


def _link(path: Path) -> str | None:
    try:
        return str(path.readlink())
    except OSError:
        return None


def _living(directory: str | None) -> str | None:
    return None if directory is None or directory.endswith(_DELETED) else directory


def _field(status: str, name: str) -> str:
    return next(line.partition(":")[2].strip() for line in status.splitlines() if line.startswith(f"{name}:"))
