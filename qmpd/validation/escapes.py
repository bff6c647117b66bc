"""Checks on what could lead QEMU to files or objects that no field of the definition names.

Machine options and device properties are QEMU's own vocabulary, and some of them open files. What has a field of its own must use
it, because there paths are checked against the pools; the rest is for daemons that allow raw options.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

from qmpd.errors import Problem
from qmpd.validation.subject import Subject, problem

#: Properties of `-machine` that qmpd sets, or that name files (qemu-options, hw/core/machine.c).
MACHINE_OPTIONS: Final = frozenset(
    {
        "accel", "append", "dtb", "dumpdtb", "firmware", "initrd", "kernel", "memory-backend", "pflash0", "pflash1", "shim", "type",
    }
)  # fmt: skip
#: Drivers that put files into guest memory.
FILE_DRIVERS: Final = frozenset({"guest-loader", "loader"})
#: Properties of devices that open files of the host, or devices of it.
FILE_PROPERTIES: Final = frozenset(
    {
        "chrpath", "evdev", "fd", "file", "filename", "firmware", "hostdev", "hostdevice", "kernel", "initrd", "path", "romfile", "rootdir",
        "share", "sysfsdev",
    }
)  # fmt: skip
#: sun_path of a Unix address, without the byte that ends it (unix(7)).
SOCKET_PATH_BYTES: Final = 107
#: Emulators whose `-initrd` may be a list, separated by commas, when the kernel is a multiboot one.
MULTIBOOT: Final = frozenset({"i386", "x86_64"})


def machine_options(subject: Subject) -> Iterator[Problem]:
    """Machine options must not say what has a field of its own, and hold only text."""
    for name, value in subject.spec.machine_options.items():
        if name in MACHINE_OPTIONS:
            yield problem(f"machine_options.{name}", "is set by qmpd, or has a field of its own")
        if isinstance(value, str) and any(ord(char) < 0x20 or char == "\x7f" for char in value):
            yield problem(f"machine_options.{name}", "control characters cannot be given to QEMU")


def device_files(subject: Subject) -> Iterator[Problem]:
    """Without raw options, further devices must not open files."""
    if subject.world.raw_options:
        return
    for index, device in enumerate(subject.spec.devices):
        if device.get("driver") in FILE_DRIVERS:
            yield problem(f"devices[{index}].driver", "reads files into guest memory; this daemon does not allow it (setting raw_options)")
        for name in _opening(device):
            yield problem(f"devices[{index}].{name}", "may open a file of the host; this daemon does not allow it (setting raw_options)")


def _opening(device: Mapping[str, object]) -> Iterator[str]:
    for name, value in device.items():
        if name.replace("_", "-") in FILE_PROPERTIES or (isinstance(value, str) and "/" in value):
            yield name


def initrd_list(subject: Subject) -> Iterator[Problem]:
    """QEMU splits the initrd of a multiboot kernel at commas and spaces, and would open other files than the one that was checked."""
    kernel = subject.spec.kernel
    if kernel is not None and kernel.initrd is not None and subject.world.emulator.target in MULTIBOOT and set(kernel.initrd) & set(", "):
        yield problem("kernel.initrd", "a path with a comma or a space would be split by QEMU on this board; use another path")


def socket_paths(subject: Subject) -> Iterator[Problem]:
    """The machine's sockets must fit into a Unix address (unix(7): 107 bytes)."""
    longest = subject.world.paths.socket("rescue")
    if len(longest.encode("utf-8", "surrogateescape")) > SOCKET_PATH_BYTES:
        yield problem(
            "name", f"{longest} is longer than a socket's path may be ({SOCKET_PATH_BYTES} bytes): use a shorter name, or a shorter run_dir"
        )
