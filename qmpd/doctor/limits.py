"""What the kernel limits, and how much of it is in use. Reads /proc and /sys only; blocks shortly."""

from __future__ import annotations

import resource
from collections.abc import Iterator

from qmpd.doctor.condition import LimitSeen
from qmpd.hostcheck.resources import own_cgroup
from qmpd.hostcheck.tree import HostTree

_FILES = "raise LimitNOFILE= of the service, or ulimit -n, and restart the daemon"
_TASKS = "raise TasksMax= of the service; threads of QEMUs count too"
_WATCHES = "sysctl fs.inotify.max_user_watches, with a larger number"
_INSTANCES = "sysctl fs.inotify.max_user_instances, with a larger number"


def limits(tree: HostTree) -> tuple[LimitSeen, ...]:
    """Those that could be found out."""
    return tuple(_limits(tree))


def _limits(tree: HostTree) -> Iterator[LimitSeen]:
    descriptors = tree.names("/proc/self/fd")
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY:
        yield LimitSeen(what="open files of the daemon", used=len(descriptors), limit=soft, mend=_FILES)
    watches = [tree.text(f"/proc/self/fdinfo/{name}").count("inotify wd:") for name in descriptors]
    yield from _counted(tree, "/proc/sys/fs/inotify/max_user_watches", "inotify watches", sum(watches), _WATCHES)
    yield from _counted(tree, "/proc/sys/fs/inotify/max_user_instances", "inotify instances", sum(map(bool, watches)), _INSTANCES)
    group = own_cgroup(tree.text("/proc/self/cgroup"))
    if group is not None:
        directory = f"/sys/fs/cgroup{group.rstrip('/')}"
        used = tree.text(f"{directory}/pids.current")
        yield from _counted(
            tree, f"{directory}/pids.max", "processes and threads of the service", int(used) if used.isdigit() else 0, _TASKS
        )


def _counted(tree: HostTree, path: str, what: str, used: int, mend: str) -> Iterator[LimitSeen]:
    limit = tree.text(path)
    if limit.isdigit():
        yield LimitSeen(what=what, used=used, limit=int(limit), mend=mend)
