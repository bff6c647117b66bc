"""Whether KVM is worth using, found out by running the same small guest under TCG and under KVM.

That `/dev/kvm` opens says little: nested in some hypervisors it runs guests thousands of times slower than TCG does, or not at all.
A measurement takes about half a second, 2.5 s at most on such a host, and holds until the next boot.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Final, Literal

from qmpd import emulatorfiles, factcache
from qmpd.emulatorfiles import Stamp
from qmpd.errors import QemuError
from qmpd.facts import AcceleratorFacts, EmulatorFacts, Facts
from qmpd.loopguest import LOOP_GUESTS, LoopGuest
from qmpd.throwaway import throwaway

log = logging.getLogger(__name__)

#: QEMU builds a machine in 0.05 s; a hundred times that is a hung one, not a slow host.
START_LIMIT_S: Final = 5.0
#: The test guest takes 0.2 s to 0.4 s under TCG; slower by this much, no comparison would mean anything.
TCG_LIMIT_S: Final = 30.0
#: The KVM run gets this many times the TCG run: whoever is slower than that is slow enough.
KVM_LIMIT_FACTOR: Final = 4.0
#: … but never less than this, since a busy host may not run anything of ours for a second.
KVM_LIMIT_MIN_S: Final = 2.0
#: KVM counts as faster from here on; real KVM is 5 to 15 times as fast, and below this the difference may be noise.
WORTHWHILE: Final = 1.5
#: Changes with the test guests and with the meaning of a measurement.
CACHE_FORMAT: Final = 1
CACHE_FILE: Final = "accelerators.msgpack"
BOOT_ID: Final = "/proc/sys/kernel/random/boot_id"

#: Targets whose guests KVM can run, by the kernel's name of the host (`uname -m`).
NATIVE: Final = {
    "x86_64": ("x86_64", "i386"),
    "i686": ("i386",),
    "aarch64": ("aarch64", "arm"),
    "riscv64": ("riscv64",),
    "s390x": ("s390x",),
    "ppc64": ("ppc64",),
    "ppc64le": ("ppc64",),
    "mips64": ("mips64el",),
    "loongarch64": ("loongarch64",),
}


class Device(Facts, frozen=True):
    """What became of an attempt to open `/dev/kvm`; `identity` changes when the device is made anew or its permissions change."""

    state: Literal["open", "missing", "denied", "broken"]
    detail: str = ""
    identity: tuple[int, ...] = ()


class Measured(Facts, frozen=True):
    """A verdict, and all it depends on."""

    boot_id: str
    emulator: Stamp | None
    device: tuple[int, ...]
    verdict: AcceleratorFacts


class CacheFile(Facts, frozen=True):
    """The cache file."""

    format: int
    measured: tuple[Measured, ...]


class Accelerators:
    """The verdicts on KVM, one per emulator, measured at the first question and kept until the next boot."""

    def __init__(self, run_dir: str | None, *, host: str | None = None, device: str = "/dev/kvm") -> None:
        self._cache = None if run_dir is None else Path(run_dir) / CACHE_FILE
        self._host = os.uname().machine if host is None else host
        self._device = device
        self._measured: dict[str, Measured] | None = None
        # Two measurements at once would measure each other.
        self._one_at_a_time = asyncio.Lock()

    async def verdict(self, emulator: EmulatorFacts) -> AcceleratorFacts:
        """Whether `accel = "auto"` is KVM for this emulator, and why; never fails, since TCG is always left."""
        hopeless = foreign(emulator, self._host)
        if hopeless is not None:
            return AcceleratorFacts(usable=False, reason=hopeless)
        device = await asyncio.to_thread(open_device, self._device)
        if device.state != "open":
            return AcceleratorFacts(usable=False, reason=device.detail)
        guest = LOOP_GUESTS.get(emulator.target)
        if guest is None or machine_of(guest, emulator) is None:
            return AcceleratorFacts(usable=False, reason=f'nothing measures KVM for {emulator.target} here: say accel = "kvm" to use it')
        async with self._one_at_a_time:
            return await self._remembered_or_measured(emulator, guest, device)

    async def _remembered_or_measured(self, emulator: EmulatorFacts, guest: LoopGuest, device: Device) -> AcceleratorFacts:
        boot_id, stamp = await asyncio.to_thread(lambda: (Path(BOOT_ID).read_text().strip(), emulatorfiles.stamp(emulator.path)))
        if self._measured is None:
            self._measured = await self._read_cache()
        known = self._measured.get(emulator.path)
        if known is not None and (known.boot_id, known.emulator, known.device) == (boot_id, stamp, device.identity):
            return known.verdict
        verdict = await measure(emulator, guest)
        self._measured[emulator.path] = Measured(boot_id=boot_id, emulator=stamp, device=device.identity, verdict=verdict)
        await self._write_cache(tuple(self._measured.values()))
        return verdict

    async def _read_cache(self) -> dict[str, Measured]:
        cached = None if self._cache is None else await asyncio.to_thread(factcache.read, self._cache, CacheFile)
        if cached is None or cached.format != CACHE_FORMAT:
            return {}
        return {entry.emulator.path: entry for entry in cached.measured if entry.emulator is not None}

    async def _write_cache(self, entries: Sequence[Measured]) -> None:
        """Keep what was measured. What merely failed may have failed by chance: the next daemon tries again."""
        if self._cache is None:
            return
        kept = tuple(entry for entry in entries if entry.verdict.usable or entry.verdict.ratio is not None)
        try:
            await asyncio.to_thread(factcache.write, self._cache, CacheFile(format=CACHE_FORMAT, measured=kept))
        except OSError as error:
            log.warning("the accelerator cache %s cannot be written: %s", self._cache, error.strerror)


def foreign(emulator: EmulatorFacts, host: str) -> str | None:
    """Why this host's KVM cannot run this emulator's guests, or None if it might."""
    if emulator.target not in NATIVE.get(host, ()):
        return f"foreign architecture: {emulator.target} guests on a host that is {host}"
    if "kvm" not in emulator.accelerators:
        return f"{emulator.path} was built without KVM"
    return None


def open_device(path: str) -> Device:
    """Try to open the KVM device. Blocks; opening may load the kernel module."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return Device(
            state="missing",
            detail=f"there is no {path}: load the module (`modprobe kvm_intel` or `kvm_amd`), or enable virtualisation in the firmware",
        )
    except PermissionError:
        return Device(state="denied", detail=f"this user may not open {path}: join its group (`usermod -aG kvm NAME`), then log in again")
    except OSError as error:
        why = "the processor offers no virtualisation" if error.errno in (errno.ENODEV, errno.ENXIO) else error.strerror
        return Device(state="broken", detail=f"{path} cannot be opened: {why}")
    try:
        status = os.fstat(descriptor)
    finally:
        os.close(descriptor)
    return Device(state="open", identity=(status.st_rdev, status.st_ino, status.st_mode, status.st_uid, status.st_gid))


def machine_of(guest: LoopGuest, emulator: EmulatorFacts) -> str | None:
    """The machine type this emulator can run the test guest on."""
    return next((name for name in guest.machines if emulator.machine(name) is not None), None)


async def measure(emulator: EmulatorFacts, guest: LoopGuest) -> AcceleratorFacts:
    """Run the guest under TCG, then under KVM with a limit that follows from the first; `ratio` is how many times KVM is faster.

    Where KVM did not come to an end, `ratio` is the most it can be. Never fails.
    """
    try:
        tcg_s = await run(emulator, guest, "tcg", TCG_LIMIT_S) if "tcg" in emulator.accelerators else 0.0
    except QemuError as error:
        return AcceleratorFacts(usable=False, reason=f"the test guest does not run under TCG, so nothing can be compared: {error.message}")
    if tcg_s is None:
        return AcceleratorFacts(usable=False, reason=f"the test guest took more than {TCG_LIMIT_S:.0f} s under TCG: the host is overloaded")
    limit_s = max(KVM_LIMIT_MIN_S, tcg_s * KVM_LIMIT_FACTOR)
    try:
        kvm_s = await run(emulator, guest, "kvm", limit_s)
    except QemuError as error:
        return AcceleratorFacts(usable=False, reason=f"the test guest does not run under KVM: {error.message}")
    return compared(tcg_s, kvm_s, limit_s)


def compared(tcg_s: float, kvm_s: float | None, limit_s: float) -> AcceleratorFacts:
    """The verdict on two running times. `tcg_s` is 0 for a build without TCG, `kvm_s` None where the limit was reached."""
    if kvm_s is None:
        slower = f"more than {limit_s / tcg_s:.0f} times slower than TCG" if tcg_s else "too slowly"
        ratio = tcg_s / limit_s if tcg_s else None
        return AcceleratorFacts(usable=False, reason=f"KVM runs guests {slower} (stopped after {limit_s:.1f} s)", ratio=ratio)
    if not tcg_s:
        return AcceleratorFacts(usable=True, reason="KVM runs guests, and this emulator has no TCG")
    ratio = tcg_s / kvm_s
    return AcceleratorFacts(usable=ratio >= WORTHWHILE, reason=f"KVM runs guests {ratio:.1f} times as fast as TCG", ratio=ratio)


async def run(emulator: EmulatorFacts, guest: LoopGuest, accel: str, limit_s: float) -> float | None:
    """The seconds from the guest's first instruction until QEMU is gone, or None if that is not within the limit.

    Raises:
        QemuError: the emulator does not start with this accelerator, or ended otherwise than the guest ends it.
    """
    machine = machine_of(guest, emulator)
    async with _file(guest.image) as descriptor:
        options = (option.format(program=f"/proc/self/fd/{descriptor}") for option in guest.options)
        words = ("-machine", f"{machine}{guest.machine_options}", "-accel", accel, *options)
        try:
            async with asyncio.timeout(START_LIMIT_S) as limit, throwaway(emulator.path, words, (descriptor,)) as qemu:
                begin = time.monotonic()
                limit.reschedule(asyncio.get_running_loop().time() + limit_s)
                await qemu.command("cont", dict[str, object])
                code = await qemu.exit_code()
                seconds = time.monotonic() - begin
        except TimeoutError:
            return None
    if code != guest.exit_code:
        raise QemuError(f"{emulator.path} ended with exit code {code} instead of {guest.exit_code} under {accel}")
    return seconds


@contextlib.asynccontextmanager
async def _file(content: bytes) -> AsyncIterator[int]:
    """A descriptor of a file in memory with this content."""
    descriptor = os.memfd_create("loop-guest")
    try:
        await asyncio.to_thread(os.write, descriptor, content)
        yield descriptor
    finally:
        os.close(descriptor)
