"""Whether this host can run machines, and how well: everything qmpd depends on, looked at one by one.

Works without a daemon. A finding is a `CheckLine`: what was found, what that means, and what mends it. Only what makes it impossible
to run any machine is a failure; a host without KVM is not, since TCG runs everything.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence

from qmpd.accelerator import NATIVE, Accelerators
from qmpd.errors import HostError
from qmpd.facts import EmulatorFacts
from qmpd.hostcheck import firmware, kernel, limits, processor, resources, software
from qmpd.hostcheck.limits import Caller, caller
from qmpd.hostcheck.remedies import family
from qmpd.hostcheck.tree import HostTree
from qmpd.probe import Emulators
from qmpd.systemd import systemd
from qmpd.views import CheckLine, CheckReport

__all__ = ["check"]


async def check(
    emulators: Emulators,
    accelerators: Accelerators,
    *,
    state_dir: str | None = None,
    machines_cgroup: str | None = None,
    tree: HostTree | None = None,
    host: str | None = None,
    further: Callable[[], Sequence[CheckLine]] = tuple,
) -> CheckReport:
    """Look at everything, and at `further`, which may block.

    Takes seconds the first time (emulators are asked, KVM is measured), afterwards some 0.1 s. Never fails.
    """
    tree = HostTree() if tree is None else tree
    host = os.uname().machine if host is None else host
    found = await emulators.all()
    working = [item for item in found if isinstance(item, EmulatorFacts)]
    targets = sorted({emulator.target for emulator in working})
    distribution = family(await asyncio.to_thread(tree.text, "/etc/os-release"))
    places = await software.data_dirs(working)
    lines = [
        *await asyncio.to_thread(processor.lines, tree, host),
        *await _kernel_lines(tree, host, working, accelerators),
        *await asyncio.to_thread(resources.lines, tree, state_dir),
        *await _limit_lines(tree, caller(os.geteuid(), machines_cgroup, os.environ)),
        *software.emulator_lines(found, host, distribution),
        await software.image_line(distribution),
        await software.tpm_line(distribution),
        *await asyncio.to_thread(firmware.uefi_lines, tree, targets, distribution),
        *await asyncio.to_thread(firmware.built_in_lines, targets, places, distribution),
        *await asyncio.to_thread(further),
    ]
    return CheckReport(ok=all(line.verdict != "fail" for line in lines), lines=tuple(lines))


async def _limit_lines(tree: HostTree, who: Caller) -> list[CheckLine]:
    """How machines can be held to limits; systemd is asked whether it answers."""
    found = await asyncio.to_thread(limits.found, tree, who)
    answer = None
    if found.way == "scope":
        try:
            async with systemd(found.place) as connection:
                answer = await connection.version()
        except HostError:
            answer = None
    return [await asyncio.to_thread(limits.version_line, tree), limits.way_line(found, answer)]


async def _kernel_lines(tree: HostTree, host: str, working: Sequence[EmulatorFacts], accelerators: Accelerators) -> list[CheckLine]:
    """The kernel's lines, with the measured speed of KVM behind the others about KVM."""
    lines = await asyncio.to_thread(kernel.lines, tree, host)
    about_kvm = [line for line in lines if line.topic == kernel.KVM.name]
    if about_kvm[-1].verdict == "pass":  # /dev/kvm opens
        own = [emulator for emulator in working if emulator.target in NATIVE.get(host, ())[:1]]
        about_kvm += [kernel.speed_line(emulator, await accelerators.verdict(emulator)) for emulator in own]
    return [*about_kvm, *(line for line in lines if line.topic != kernel.KVM.name)]
