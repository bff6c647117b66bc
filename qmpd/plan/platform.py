"""Fragments for the machine itself: how QEMU is confined, machine type, accelerator, CPU, memory."""

from __future__ import annotations

from typing import Final

import msgspec

from qmpd.argv import Option, pairs
from qmpd.plan.resolution import Resolved
from qmpd.spec import Actions, OptionValue, PflashFirmware

#: The first major version all of whose releases know `-audio` without a model.
AUDIO_SINCE: Final = 9
#: Everything QEMU's seccomp filter can deny. Forks, set-uid and scheduler calls are never needed by what qmpd offers.
SANDBOX: Final = Option("sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny")


def confinement(machine: Resolved) -> list[Option]:
    """No defaults, no user configuration, halted before the first instruction, and the sandbox where the build has it."""
    options = [Option("no-user-config"), Option("nodefaults"), Option("S")]
    if "sandbox" in machine.world.emulator.options:
        options.append(SANDBOX)
    return options


def audio(machine: Resolved) -> list[Option]:
    """A sound backend that plays nothing. Newer QEMUs refuse boards with sound on board without one; older ones are told by their
    environment. No list of options and no schema says whether `-audio none` is understood, so here the version decides."""
    return [Option("audio", "none")] if machine.world.emulator.major_version >= AUDIO_SINCE else []


def identity(machine: Resolved) -> list[Option]:
    """The name and the UUID."""
    options = [Option("name", f"guest={machine.spec.name}")]
    if machine.spec.uuid is not None:
        options.append(Option("uuid", machine.spec.uuid))
    return options


def machine_type(machine: Resolved) -> list[Option]:
    """The versioned machine type with the board's options and the definition's, which win."""
    values: dict[str, OptionValue | None] = {**machine.board.machine_options, **machine.spec.machine_options}
    if isinstance(machine.spec.firmware, PflashFirmware):
        values |= {"pflash0": "pflash0", "pflash1": "pflash1"}
    return [pairs("machine", machine.machine, values), Option("accel", machine.accel)]


def cpu(machine: Resolved) -> list[Option]:
    """The CPU model with its features, and the number and arrangement of vCPUs where it is not one."""
    options: list[Option] = []
    if machine.cpu_model is not None:
        options.append(pairs("cpu", machine.cpu_model, dict(machine.spec.cpu.features)))
    topology = machine.spec.cpu.topology
    if topology is not None:
        arrangement = {"sockets": topology.sockets, "cores": topology.cores, "threads": topology.threads}
        options.append(pairs("smp", str(machine.cpu_count), dict(arrangement)))
    elif machine.cpu_count > 1:
        options.append(Option("smp", str(machine.cpu_count)))
    return options


def memory(machine: Resolved) -> list[Option]:
    """The RAM, in MiB."""
    return [Option("m", f"{machine.memory_mib}M")]


def actions(machine: Resolved) -> list[Option]:
    """What QEMU does with a guest that panics, and what else is not as QEMU would have it."""
    wanted = {"panic": machine.spec.actions.panic, **chosen_actions(machine.spec.actions)}
    value = ",".join(f"{name}={value}" for name, value in wanted.items())
    return [Option("action", value)] if "action" in machine.world.emulator.options else []


def chosen_actions(actions: Actions) -> dict[str, str]:
    """Those actions that somebody chose, by what they are for."""
    return {name: value for name, value in msgspec.structs.asdict(actions).items() if value != getattr(Actions(), name)}


def quirks(machine: Resolved) -> list[Option]:
    """What the board file adds for this board alone."""
    return [Option(name, value) for name, value in machine.board.options]
