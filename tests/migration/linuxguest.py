"""A Linux that writes numbered blocks to a disk, as the bare-metal block writer does (`tests.guests.ring` checks both), and churns memory.

The kernel is that of Debian's installer, and so is everything in its initramfs: what it needs is picked from the installer's initrd, so
that it fits into little memory. The disk is on USB, the one bus whose drivers the installer brings along.
"""

from __future__ import annotations

import gzip
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from string import ascii_lowercase
from typing import Final

import msgspec

from qmpd.spec import Disk, ImageDisk, Kernel, MachineSpec
from tests.guests.ring import RING_SECTORS, RING_START, SECTOR_BYTES

IMAGES: Final = Path("/usr/lib/debian-installer/images/12/amd64/text/debian-installer/amd64")
PACKAGE: Final = "debian-installer-12-netboot-amd64"
PROGRAMS: Final = ("bin/busybox", "lib/x86_64-linux-gnu/ld-linux-x86-64.so.2", "lib/x86_64-linux-gnu/libc.so.6")
LINKS: Final = {
    "lib64/ld-linux-x86-64.so.2": "/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2",
    **{f"bin/{name}": "busybox" for name in ("dd", "insmod", "mount", "printf", "sh", "sleep")},
}
DIRECTORIES: Final = ("bin", "dev", "lib", "lib/x86_64-linux-gnu", "lib64", "modules", "proc", "sys")
MODULES: Final = ("xhci-pci", "usb-storage", "sd_mod")
MEMORY_MIB: Final = 160
DISK_MIB: Final = 2
#: The churn: so many KiB of memory that are written anew, over and over.
CHURN_KIB: Final = 4096
APPEND: Final = "quiet loglevel=0 panic=-1"

INIT: Final = """\
#!/bin/busybox sh
export PATH=/bin
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
for module in {modules}; do insmod /modules/$module.ko; done
IFS=:
for disk in ${{disks:-sda}}; do until [ -b /dev/$disk ]; do sleep 0.1; done; done
printf 'BM-OK linux-blocks\\n'
while :; do dd if=/dev/urandom of=/churn bs=64k count={churn} 2>/dev/null; done &
number=1
while :; do
    line=$(printf 'BLOCK %08d\\r\\n.' $number)
    line=${{line%.}}
    four=$line$line$line$line
    sixteen=$four$four$four$four
    place=$(( {start} + (number - 1) % {ring} ))
    for disk in ${{disks:-sda}}; do
        until printf '%s' "$sixteen$sixteen" | dd of=/dev/$disk bs={sector} seek=$place conv=notrunc,fsync 2>/dev/null; do printf '!'; done
    done
    printf 'BLOCK %08d\\n' $number
    number=$((number + 1))
done
"""


class Entry(msgspec.Struct, frozen=True):
    """A file of an archive: its mode and its content, or where it leads."""

    mode: int
    content: bytes


def is_there() -> bool:
    """Whether the package is installed that the guest is made from."""
    return (IMAGES / "linux").exists() and (IMAGES / "initrd.gz").exists()


def initramfs(directory: Path) -> Path:
    """The guest's initramfs, made if it is not there yet. Blocks."""
    path = directory / "linux-blocks.cpio.gz"
    if not path.exists():
        found = dict(_read(gzip.decompress((IMAGES / "initrd.gz").read_bytes())))
        path.write_bytes(gzip.compress(_written(_files(found)), compresslevel=6))
    return path


def linux_spec(directory: Path, disk: Path, name: str, *more: Path) -> MachineSpec:
    """A machine that runs it, with a disk that is made empty; with `more` it writes each block to one after the other."""
    paths = (disk, *more)
    for path in paths:
        with path.open("wb") as image:
            image.truncate(DISK_MIB << 20)
    names = ":".join(f"sd{letter}" for _, letter in zip(paths, ascii_lowercase, strict=False))
    kernel = Kernel(image=str(IMAGES / "linux"), initrd=str(initramfs(directory)), append=f"{APPEND} disks={names}")
    disks: tuple[Disk, ...] = tuple(ImageDisk(path=str(path), format="raw", bus="usb", read_only=False) for path in paths)
    return MachineSpec(name=name, board="x86_64-q35", accel="tcg", memory_mib=MEMORY_MIB, kernel=kernel, disks=disks)


def _files(found: Mapping[str, Entry]) -> dict[str, Entry]:
    by_name = {Path(name).stem.replace("_", "-"): entry for name, entry in found.items() if name.endswith(".ko")}
    order = list(dict.fromkeys(name for module in MODULES for name in _needed(module.replace("_", "-"), by_name)))
    script = INIT.format(modules=" ".join(order), churn=CHURN_KIB // 64, sector=SECTOR_BYTES, start=RING_START, ring=RING_SECTORS)
    return {
        **{name: Entry(stat.S_IFDIR | 0o755, b"") for name in DIRECTORIES},
        **{name: found[name] for name in PROGRAMS},
        **{name: Entry(stat.S_IFLNK | 0o777, target.encode()) for name, target in LINKS.items()},
        **{f"modules/{name}.ko": by_name[name] for name in order},
        "init": Entry(stat.S_IFREG | 0o755, script.encode()),
    }


def _needed(module: str, by_name: Mapping[str, Entry]) -> Iterator[str]:
    """The module and all it depends on, in the order in which they are loaded; one that is not there is part of the kernel."""
    entry = by_name.get(module)
    if entry is None:
        return
    depends = re.search(rb"\0depends=([^\0]*)\0", entry.content)
    for name in depends[1].decode().split(",") if depends and depends[1] else ():
        yield from _needed(name.replace("_", "-"), by_name)
    yield module


def _read(archive: bytes) -> Iterator[tuple[str, Entry]]:
    """The files of an archive (cpio, the format `newc`)."""
    at = 0
    while True:
        fields = [int(archive[at + 6 + 8 * number : at + 14 + 8 * number], 16) for number in range(13)]
        mode, size, name_size = fields[1], fields[6], fields[11]
        name = archive[at + 110 : at + 110 + name_size - 1].decode()
        if name == "TRAILER!!!":
            return
        begin = _aligned(at + 110 + name_size)
        yield name, Entry(mode, archive[begin : begin + size])
        at = _aligned(begin + size)


def _written(files: Mapping[str, Entry]) -> bytes:
    pieces = bytearray()
    for number, (name, entry) in enumerate([*files.items(), ("TRAILER!!!", Entry(0, b""))], 1):
        fields = (number, entry.mode, 0, 0, 1, 0, len(entry.content), 0, 0, 0, 0, len(name) + 1, 0)
        pieces += b"070701" + b"".join(b"%08X" % field for field in fields) + name.encode() + b"\0"
        pieces += bytes(_aligned(len(pieces)) - len(pieces)) + entry.content
        pieces += bytes(_aligned(len(pieces)) - len(pieces))
    return bytes(pieces)


def _aligned(offset: int) -> int:
    return (offset + 3) // 4 * 4
