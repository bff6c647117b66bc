"""The plan: all fragments in their order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from qmpd.argv import Option
from qmpd.board import NamedBoard
from qmpd.facts import World
from qmpd.plan import boot, channels, disks, network, platform, tpm
from qmpd.plan.launch import LaunchPlan, Listening, SerialPipe, TpmLine
from qmpd.plan.resolution import Resolved, resolve
from qmpd.spec import MachineSpec

Fragment = Callable[[Resolved], Sequence[Option | Listening | SerialPipe | TpmLine]]

FRAGMENTS: Final[tuple[Fragment, ...]] = (
    platform.confinement,
    platform.identity,
    platform.machine_type,
    platform.cpu,
    platform.memory,
    platform.actions,
    platform.audio,
    channels.monitors,
    platform.quirks,
    channels.display,
    channels.serial,
    boot.firmware,
    boot.kernel,
    disks.disks,
    network.nics,
    channels.entropy,
    channels.watchdog,
    tpm.device,
    channels.devices,
    channels.extra,
)


def plan(spec: MachineSpec, named: NamedBoard, world: World) -> LaunchPlan:
    """The launch plan of a definition that has no problems: the same inputs give the same bytes."""
    machine = resolve(spec, named, world)
    return LaunchPlan(
        binary=world.emulator.path,
        accel=machine.accel,
        accel_reason=machine.accel_reason,
        options=tuple(option for fragment in FRAGMENTS for option in fragment(machine)),
        directories=(world.paths.run, world.paths.state),
        copies=boot.variables(machine),
        blank_images=disks.blank_images(machine),
        tpm=tpm.emulator(machine),
    )
