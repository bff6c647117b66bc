"""Checks on the machine itself: machine type, accelerator, CPU, memory."""

from __future__ import annotations

from collections.abc import Iterator

from qmpd.errors import Problem
from qmpd.plan.platform import chosen_actions
from qmpd.plan.resolution import cpu_count, machine_name
from qmpd.spec import ImageDisk
from qmpd.validation.subject import Subject, choices, problem


def machine_type(subject: Subject) -> Iterator[Problem]:
    """The emulator must have the machine type."""
    wanted = machine_name(subject.spec, subject.board, subject.world)
    emulator = subject.world.emulator
    if emulator.machine(wanted) is None:
        names = {name for machine in emulator.machines for name in (machine.name, machine.alias) if name}
        yield problem(
            "machine" if subject.spec.machine else "board",
            f"{emulator.path} ({emulator.version}) has no machine type {wanted!r}; it has {choices(names, wanted)}",
        )


def accelerator(subject: Subject) -> Iterator[Problem]:
    """KVM that was asked for must be possible: it is refused, never swapped for something else."""
    if subject.spec.accel != "kvm":
        return
    world, board = subject.world, subject.board
    if world.host_arch not in board.kvm_hosts:
        hosts = ", ".join(board.kvm_hosts) or "no host at all"
        yield problem("accel", f"KVM runs board {subject.named.id!r} on {hosts}; this host is {world.host_arch}")
    elif "kvm" not in world.emulator.accelerators:
        yield problem("accel", f"{world.emulator.path} was built without KVM")
    elif world.kvm.ratio is None:
        yield problem("accel", f"KVM cannot be used: {world.kvm.reason}")


def cpu(subject: Subject) -> Iterator[Problem]:
    """The model must exist, the count fit the machine, and the topology the count."""
    spec, emulator = subject.spec.cpu, subject.world.emulator
    if spec.model is not None and spec.model != "host" and emulator.cpus and spec.model not in emulator.cpus:
        yield problem("cpu.model", f"{emulator.path} has no CPU model {spec.model!r}; it has {choices(emulator.cpus, spec.model)}")
    if spec.model == "host" and subject.spec.accel == "tcg":
        yield problem("cpu.model", "'host' needs KVM, and accel is 'tcg'; use 'max'")
    if spec.features and spec.model is None and subject.board.cpu is None:
        yield problem("cpu.features", "features need a model, and this board has no default one: set cpu.model")
    found = emulator.machine(machine_name(subject.spec, subject.board, subject.world))
    most = min(subject.board.max_cpus, found.cpu_max) if found else subject.board.max_cpus
    count, least = cpu_count(subject.spec, subject.board), subject.board.min_cpus
    if count > most or count < least:
        yield problem("cpu.count", f"{count} vCPUs asked for; board {subject.named.id!r} takes {least} to {most}")
    if spec.topology is not None:
        product = spec.topology.sockets * spec.topology.cores * spec.topology.threads
        if product != count:
            yield problem("cpu.topology", f"sockets x cores x threads is {product}, but cpu.count is {count}")


def memory(subject: Subject) -> Iterator[Problem]:
    """The RAM must be what the board takes."""
    wanted, board = subject.spec.memory_mib, subject.board.memory
    if wanted is None:
        return
    if board.fixed and wanted != board.default_mib:
        yield problem("memory_mib", f"board {subject.named.id!r} always has {board.default_mib} MiB; leave memory_mib out")
    elif wanted < board.min_mib:
        yield problem("memory_mib", f"{wanted} MiB is less than the {board.min_mib} MiB board {subject.named.id!r} needs")
    elif board.max_mib is not None and wanted > board.max_mib:
        yield problem("memory_mib", f"{wanted} MiB is more than the {board.max_mib} MiB board {subject.named.id!r} takes")
    elif wanted % board.step_mib:
        yield problem("memory_mib", f"{wanted} MiB is not a multiple of the {board.step_mib} MiB board {subject.named.id!r} needs")


def actions(subject: Subject) -> Iterator[Problem]:
    """What QEMU shall do with the guest must be something this QEMU can do."""
    emulator = subject.world.emulator
    for name, value in chosen_actions(subject.spec.actions).items():
        if "action" not in emulator.options or f"set-action.{name}={value}" not in emulator.features:
            yield problem(f"actions.{name}", f"{emulator.path} ({emulator.version}) does not know {value!r}")


def oddities(subject: Subject) -> Iterator[Problem]:
    """Things that work now and may not for long, or not as expected."""
    found = subject.world.emulator.machine(machine_name(subject.spec, subject.board, subject.world))
    if found is not None and found.deprecated:
        yield problem("machine", f"machine type {found.name} is deprecated in QEMU {subject.world.emulator.version}")
    if subject.spec.accel == "kvm" and not subject.world.kvm.usable:
        yield problem("accel", f"KVM was asked for, but {subject.world.kvm.reason}")
    for index, disk in enumerate(subject.spec.disks):
        if isinstance(disk, ImageDisk) and disk.format == "raw":
            magic = subject.file(disk.path).magic
            if magic is not None:
                yield problem(f"disks[{index}].format", f"{disk.path} begins like a {magic} image, but is used as raw as asked")
