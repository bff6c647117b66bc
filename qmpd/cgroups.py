"""Directories of cgroup v2: one of its own for each machine with limits, below one that was given to this daemon.

Everything here blocks, for microseconds. Processes are never moved out: a directory is removed when its last process has ended.
"""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path
from typing import Final

from qmpd.errors import HostError
from qmpd.hostcheck.resources import mounts, own_cgroup
from qmpd.spec import Limits

MIB: Final = 1024 * 1024
#: The period of `cpu.max`; the kernel's own default.
PERIOD_US: Final = 100_000
#: How the names of systemd's scopes end.
SCOPE: Final = ".scope"


def directory_of(pid: int) -> str | None:
    """The cgroup of a process, as a directory; None when there is no such process, or no cgroup v2."""
    try:
        path = own_cgroup(Path(f"/proc/{pid}/cgroup").read_text(encoding="utf-8", errors="surrogateescape"))
        points = [point for point, kind in mounts(Path("/proc/self/mountinfo").read_text(encoding="utf-8")) if kind == "cgroup2"]
    except (FileNotFoundError, ProcessLookupError):
        return None
    return f"{points[0].rstrip('/')}{path}" if path is not None and points else None


def values(limits: Limits) -> dict[str, str]:
    """What is written into which file of a cgroup."""
    quota = limits.cpu_percent * PERIOD_US // 100 if limits.cpu_percent is not None else None
    memory = limits.memory_max_mib * MIB if limits.memory_max_mib is not None else None
    given = {
        "cpu.max": f"{quota} {PERIOD_US}" if quota is not None else None,
        "cpu.weight": limits.cpu_weight,
        "memory.max": memory,
        "io.weight": f"default {limits.io_weight}" if limits.io_weight is not None else None,
        "pids.max": limits.tasks_max,
    }
    return {name: str(value) for name, value in given.items() if value is not None}


def make(parent: str, name: str, limits: Limits) -> Path:
    """A cgroup of this name with these limits. One that is left from a machine that has ended is made anew.

    Raises:
        HostError: the parent was not given to us, lacks a controller, or has processes in itself.
    """
    files = values(limits)
    directory = Path(parent) / name
    try:
        _enable(Path(parent), {file.partition(".")[0] for file in files})
        with contextlib.suppress(FileNotFoundError):
            directory.rmdir()
        directory.mkdir(mode=0o755)
        for file, value in files.items():
            (directory / file).write_text(value, encoding="ascii")
    except OSError as error:
        with contextlib.suppress(OSError):
            directory.rmdir()
        raise HostError(_why(parent, error), path=str(directory)) from error
    return directory


def _enable(parent: Path, controllers: set[str]) -> None:
    switch = parent / "cgroup.subtree_control"
    missing = controllers - set(switch.read_text(encoding="ascii").split())
    if missing:
        switch.write_text(" ".join(f"+{name}" for name in sorted(missing)), encoding="ascii")


def _why(parent: str, error: OSError) -> str:
    if error.errno == errno.EBUSY:
        return f"limits cannot be set below {parent}: there are processes in it, or in what is left of this machine"
    return f"limits cannot be set below {parent}: {error.strerror} ({error.filename})"


def enter(directory: Path, pid: int) -> None:
    """Put a process in. Raises PermissionError when the kernel wants somebody with rights over where it comes from."""
    (directory / "cgroup.procs").write_text(str(pid), encoding="ascii")


def leave(directory: str) -> None:
    """Remove the directory of a machine whose process has ended. A scope is systemd's, and a directory with processes stays."""
    if not directory.endswith(SCOPE):
        with contextlib.suppress(OSError):
            Path(directory).rmdir()


def sweep(parent: str) -> None:
    """Remove the directories of machines that ended while nobody looked; one with processes stays."""
    with contextlib.suppress(OSError):
        for entry in os.scandir(parent):
            if entry.is_dir(follow_symlinks=False):
                with contextlib.suppress(OSError):
                    Path(entry.path).rmdir()
