"""What is wrong with a decoded definition, given a board and facts: all of it at once, each with its path in the document."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

from qmpd.argv import repeated
from qmpd.board import NamedBoard
from qmpd.errors import Problem
from qmpd.facts import World
from qmpd.plan import plan
from qmpd.spec import MachineSpec
from qmpd.validation import attachments, booting, devices, escapes, limits, platform
from qmpd.validation.attachments import disk_changes
from qmpd.validation.subject import Subject

__all__ = ["disk_changes", "problems", "warnings"]

Check = Callable[[Subject], Iterator[Problem]]

CHECKS: Final[tuple[Check, ...]] = (
    platform.machine_type,
    platform.accelerator,
    platform.cpu,
    platform.memory,
    platform.actions,
    limits.limits,
    booting.firmware,
    booting.kernel,
    booting.boot_order,
    attachments.disks,
    attachments.shared_images,
    attachments.nics,
    attachments.addresses,
    devices.serial_ports,
    devices.entropy,
    devices.watchdog,
    devices.tpm,
    devices.display,
    devices.further_devices,
    devices.further_options,
    escapes.machine_options,
    escapes.device_files,
    escapes.initrd_list,
    escapes.socket_paths,
)


def problems(spec: MachineSpec, named: NamedBoard, world: World) -> list[Problem]:
    """Everything that keeps this definition from being planned; an empty list means that `plan` will succeed."""
    subject = Subject(spec=spec, named=named, world=world)
    found = [problem for check in CHECKS for problem in check(subject)]
    # Only a definition that is right otherwise has a command in which options can be counted.
    return found or list(_repeated_options(spec, named, world))


def _repeated_options(spec: MachineSpec, named: NamedBoard, world: World) -> Iterator[Problem]:
    if spec.extra_args:
        for name in repeated(plan(spec, named, world).options_by_hand()):
            yield Problem(path="$.extra_args", message=f"-{name} can be given once only, and is already set")


def warnings(spec: MachineSpec, named: NamedBoard, world: World) -> list[Problem]:
    """What is odd, but may be meant."""
    return list(platform.oddities(Subject(spec=spec, named=named, world=world)))
