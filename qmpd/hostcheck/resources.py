"""What machines live on: memory, huge pages, limits of the process, and the file system of the state directory."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final

import msgspec

from qmpd.hostcheck.line import Topic
from qmpd.hostcheck.tree import HostTree
from qmpd.views import CheckLine

RESOURCES: Final = Topic("Resources")
STORAGE: Final = Topic("State directory")

#: A daemon holds about ten descriptors per machine, and QEMU itself opens some dozens: enough for some hundred machines.
ENOUGH_FILES: Final = 4096
#: QEMU has a thread per processor and some per disk: enough for some hundred machines.
ENOUGH_PROCESSES: Final = 4096
#: A small Linux guest and its QEMU.
ENOUGH_MEMORY_BYTES: Final = 512 * 2**20
#: A small distribution image; below this the first guest may already fill the disk.
ENOUGH_BYTES: Final = 2 * 2**30
#: The state database needs locks and shared memory maps that work, which network file systems do not promise.
REMOTE: Final = frozenset({"nfs", "nfs4", "cifs", "smb3", "9p", "ceph", "fuse.sshfs", "fuse.glusterfs", "afs"})
VOLATILE: Final = frozenset({"tmpfs", "ramfs"})
UNLIMITED: Final = "unlimited"


def own_cgroup(proc_self_cgroup: str) -> str | None:
    """The path of this process in the unified hierarchy."""
    return next((line.removeprefix("0::") for line in proc_self_cgroup.splitlines() if line.startswith("0::")), None)


def available_bytes(tree: HostTree) -> int:
    """What memory can be had without swapping; 0 where nobody says."""
    return _memory_bytes(tree, "MemAvailable")


def _memory_bytes(tree: HostTree, name: str) -> int:
    found = re.search(rf"^{name}: +(\d+) kB", tree.text("/proc/meminfo"), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def memory_line(tree: HostTree) -> CheckLine:
    """What memory there is for guests."""
    total, available = _memory_bytes(tree, "MemTotal"), available_bytes(tree)
    found = f"{available / 2**30:.1f} GiB available of {total / 2**30:.1f} GiB"
    if available < ENOUGH_MEMORY_BYTES:
        meaning = "Machines will be slowed down by swapping, or ended by the kernel."
        return RESOURCES.warned("memory", found, meaning, "stop something else, or give machines less memory_mib", value=available)
    return RESOURCES.passed("memory", found, value=available)


def hugepages_line(tree: HostTree) -> CheckLine:
    """What memory in large pages there is."""
    reserved: list[str] = []
    base = "/sys/kernel/mm/hugepages"
    for name in tree.names(base):
        total, free = tree.text(f"{base}/{name}/nr_hugepages"), tree.text(f"{base}/{name}/free_hugepages")
        if total not in ("", "0"):
            reserved.append(f"{total} of {name.removeprefix('hugepages-')} ({free} free)")
    chosen = re.search(r"\[(\w+)\]", tree.text("/sys/kernel/mm/transparent_hugepage/enabled"))
    transparent = f"transparent ones: {chosen[1]}" if chosen else "no transparent ones"
    return RESOURCES.passed("huge pages", f"{'; '.join(reserved) or 'none reserved'}; {transparent}")


def limits(proc_self_limits: str) -> dict[str, tuple[str, str]]:
    """Soft and hard limit by name (`Max open files`), as /proc/self/limits has them."""
    rows = re.finditer(r"^(Max [a-z ]+?) {2,}(\S+) +(\S+)", proc_self_limits, re.MULTILINE)
    return {row[1]: (row[2], row[3]) for row in rows}


def limit_lines(tree: HostTree) -> list[CheckLine]:
    """The limits a daemon started from here would have."""
    known = limits(tree.text("/proc/self/limits"))
    locked, _ = known.get("Max locked memory", (UNLIMITED, UNLIMITED))
    size = UNLIMITED if locked == UNLIMITED else f"{int(locked) // 2**20} MiB"
    restricted = "" if size == UNLIMITED else "Machines that lock their memory, or own PCI devices of the host, need more."
    return [
        _count_line("open files", known.get("Max open files"), ENOUGH_FILES, "ulimit -n 65536; in a service LimitNOFILE=65536"),
        _count_line("processes", known.get("Max processes"), ENOUGH_PROCESSES, "ulimit -u 65536; in a service LimitNPROC=65536"),
        RESOURCES.passed("locked memory", size, restricted),
    ]


def _count_line(subject: str, limit: tuple[str, str] | None, enough: int, mend: str) -> CheckLine:
    soft, hard = limit or (UNLIMITED, UNLIMITED)
    if soft == UNLIMITED or int(soft) >= enough:
        return RESOURCES.passed(subject, soft)
    if hard == UNLIMITED or int(hard) >= enough:
        return RESOURCES.passed(subject, soft, f"Enough for some dozens of machines; it can be raised to {hard} ({mend}).")
    return RESOURCES.warned(subject, f"at most {hard}", "With some dozens of machines, starts will fail.", mend)


class Volume(msgspec.Struct, frozen=True):
    """The file system that a directory is, or would be, on."""

    directory: str
    kind: str
    device: int
    free_bytes: int
    total_bytes: int
    free_inodes: int | None
    writable: bool


def mounts(mountinfo: str) -> list[tuple[str, str]]:
    """Every mount point with the type of its file system (proc(5), mountinfo)."""
    found = []
    for line in mountinfo.splitlines():
        before, separator, after = line.partition(" - ")
        fields = before.split()
        if separator and len(fields) >= 5:
            point = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), fields[4])
            found.append((point, after.split()[0]))
    return found


def is_below(path: str, point: str) -> bool:
    """Whether a path is a mount point or below it, by their names."""
    return path == point or path.startswith(point.rstrip("/") + "/")


def file_system(mountinfo: str, directory: str) -> str:
    """The type of the file system a directory is on, by the longest mount point above it; of two in one place, the later one's."""
    best, kind = "", "unknown"
    for point, of_this in mounts(mountinfo):
        if is_below(directory, point) and len(point) >= len(best):
            best, kind = point, of_this
    return kind


def volume(tree: HostTree, directory: str) -> Volume:
    """Look at the file system of the nearest directory that exists. Blocks."""
    place = Path(os.path.realpath(directory))
    while not place.is_dir():
        place = place.parent
    status = os.statvfs(place)
    return Volume(
        directory=directory,
        kind=file_system(tree.text("/proc/self/mountinfo"), str(place)),
        device=place.stat().st_dev,
        free_bytes=status.f_bavail * status.f_frsize,
        total_bytes=status.f_blocks * status.f_frsize,
        free_inodes=status.f_favail if status.f_files else None,
        writable=os.access(place, os.W_OK | os.X_OK),
    )


def volume_lines(found: Volume) -> list[CheckLine]:
    """Whether the state directory can hold machines, and keep them."""
    return [_space_line(found), _kind_line(found), *_access_lines(found)]


def _space_line(found: Volume) -> CheckLine:
    text = f"{found.free_bytes / 2**30:.1f} GiB free of {found.total_bytes / 2**30:.1f} GiB"
    if found.free_bytes < ENOUGH_BYTES:
        return STORAGE.warned(
            "free space",
            text,
            "Disks of machines will fill it soon; a guest whose disk cannot grow is paused.",
            f"make room in {found.directory}, or set state_dir to a larger file system",
            value=found.free_bytes,
        )
    if found.free_inodes is not None and found.free_inodes < ENOUGH_FILES:
        return STORAGE.warned(
            "free space",
            f"{text}, but only {found.free_inodes} inodes",
            "New files cannot be made soon.",
            "delete small files",
            value=found.free_bytes,
        )
    return STORAGE.passed("free space", text, value=found.free_bytes)


def _kind_line(found: Volume) -> CheckLine:
    mend = "set state_dir to a directory on a local disk"
    if found.kind in REMOTE:
        return STORAGE.warned("file system", found.kind, "The state database may be damaged when the network fails.", mend)
    if found.kind in VOLATILE:
        return STORAGE.warned("file system", f"{found.kind}, in memory", "Machines and their disks are gone after a reboot.", mend)
    return STORAGE.passed("file system", found.kind)


def _access_lines(found: Volume) -> list[CheckLine]:
    if found.writable:
        return []
    meaning = "A daemon of this user would not start."
    return [STORAGE.warned("permission", f"this user may not write to {found.directory}", meaning, "set state_dir, or run as its owner")]


def lines(tree: HostTree, state_dir: str | None) -> list[CheckLine]:
    """Everything about resources. Blocks."""
    found = [memory_line(tree), hugepages_line(tree), *limit_lines(tree)]
    return found if state_dir is None else [*found, *volume_lines(volume(tree, state_dir))]
