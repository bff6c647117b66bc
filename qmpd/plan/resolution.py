"""The choices a definition leaves open, made: accelerator, versioned machine type, memory, CPU, serial ports, addresses."""

from __future__ import annotations

import hashlib
from typing import Literal

from qmpd.board import Board, DiskBus, NamedBoard, NicModel
from qmpd.facts import Facts, World
from qmpd.spec import Disk, MachineSpec, Nic, SerialConsole, SerialNone, SerialPort

#: QEMU's own OUI (docs/specs: "52:54:00" is locally administered and used for generated addresses).
MAC_PREFIX = "52:54:00"


class Resolved(Facts, frozen=True, kw_only=True):
    """A definition with nothing left open."""

    spec: MachineSpec
    board: Board
    world: World
    machine: str
    memory_mib: int
    cpu_model: str | None
    cpu_count: int
    accel: Literal["kvm", "tcg"]
    accel_reason: str


def accelerator(spec: MachineSpec, board: Board, world: World) -> tuple[Literal["kvm", "tcg"], str]:
    """The accelerator to use, and why. An explicit choice is kept; whether it is possible is for validation to say."""
    if spec.accel == "kvm":
        return "kvm", "asked for by the definition"
    if spec.accel == "tcg":
        return "tcg", "asked for by the definition"
    if world.host_arch not in board.kvm_hosts:
        return "tcg", f"no KVM for this board on a {world.host_arch} host"
    if "kvm" not in world.emulator.accelerators:
        return "tcg", f"{world.emulator.path} was built without KVM"
    if not world.kvm.usable:
        return "tcg", world.kvm.reason
    return "kvm", world.kvm.reason


def resolve(spec: MachineSpec, named: NamedBoard, world: World) -> Resolved:
    """The definition with the board's and the emulator's defaults put in. Needs a definition without problems."""
    board = named.board
    wanted = machine_name(spec, board, world)
    found = world.emulator.machine(wanted)
    accel, reason = accelerator(spec, board, world)
    return Resolved(
        spec=spec,
        board=board,
        world=world,
        machine=found.name if found else wanted,
        memory_mib=spec.memory_mib or board.memory.default_mib,
        cpu_model=spec.cpu.model or (board.kvm_cpu if accel == "kvm" else None) or board.cpu,
        cpu_count=cpu_count(spec, board),
        accel=accel,
        accel_reason=reason,
    )


def machine_name(spec: MachineSpec, board: Board, world: World) -> str:
    """The machine type asked for: the definition's, or whichever of the board's names this QEMU knows."""
    if spec.machine is not None:
        return spec.machine
    return next((name for name in (board.machine, *board.also) if world.emulator.machine(name) is not None), board.machine)


def cpu_count(spec: MachineSpec, board: Board) -> int:
    """The number of vCPUs: by default as few as the board takes."""
    return spec.cpu.count or board.min_cpus


def serial_ports(spec: MachineSpec, board: Board) -> tuple[SerialPort, ...]:
    """The serial ports by index. By default the board's console port, and nothing on the ports before it."""
    if spec.serial_ports:
        return spec.serial_ports
    return (*(SerialNone() for _ in range(board.console.serial_index)), SerialConsole())


def console_port(spec: MachineSpec, board: Board) -> int | None:
    """The index of the port that is the console: the board's if it is kept, otherwise the first that is."""
    kept = [index for index, port in enumerate(serial_ports(spec, board)) if isinstance(port, SerialConsole)]
    if board.console.serial_index in kept:
        return board.console.serial_index
    return kept[0] if kept else None


def mac_address(spec: MachineSpec, index: int) -> str:
    """The address of NIC `index`: the definition's, otherwise one that is always the same for the same machine."""
    given = spec.nics[index].mac
    if given is not None:
        return given
    digest = hashlib.sha256(f"{spec.uuid or spec.name}/{index}".encode()).digest()
    return ":".join([MAC_PREFIX, *(f"{byte:02x}" for byte in digest[:3])])


def watchdog_model(spec: MachineSpec, board: Board) -> str | None:
    """The watchdog to attach: the definition's, or the board's first; None where none is wanted, or the board takes none."""
    if spec.watchdog is None:
        return None
    return spec.watchdog.model or next(iter(board.watchdogs), None)


def tpm_model(spec: MachineSpec, board: Board) -> str | None:
    """The TPM to attach: the definition's, or the board's first; None where none is wanted, or the board takes none."""
    if spec.tpm is None:
        return None
    return spec.tpm.model or next(iter(board.tpms), None)


def on_bus(board: Board) -> dict[str, object]:
    """The bus that devices must name on a board where QEMU would not find it by itself."""
    return {} if board.device_bus is None else {"bus": board.device_bus}


def disk_bus(disk: Disk, board: Board) -> tuple[str | None, DiskBus | None]:
    """The name of the bus a disk goes to, and what the board says of it (None where the board has no such bus)."""
    name = disk.bus or board.default_disk
    return name, board.disks.get(name) if name else None


def nic_model(nic: Nic, board: Board) -> tuple[str | None, NicModel | None]:
    """The name of a NIC's model, and what the board says of it (None where the board has no such model)."""
    name = nic.model or board.default_nic
    return name, board.nics.get(name) if name else None
