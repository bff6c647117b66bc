"""A board that has one of everything, and a host it can run on: what tests change to show one thing."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from qmpd.board import Board, NamedBoard
from qmpd.facts import AcceleratorFacts, EmulatorFacts, FileFacts, MachinePaths, MachineType, World
from qmpd.plan import plan
from qmpd.spec import MachineSpec
from qmpd.validation import problems
from tests.unit.anything import GOOD

BOARD: Mapping[str, object] = {
    "title": "Toy",
    "arch": "toy",
    "emulators": ["toy"],
    "machine": "toyboard",
    "min_cpus": 1,
    "max_cpus": 4,
    "cpu": "toy-cpu",
    "kvm_hosts": ["x86_64"],
    "memory": {"default_mib": 64, "min_mib": 16, "max_mib": 128, "step_mib": 4},
    "kernel": {"formats": ["ELF"], "dtb": "optional"},
    "firmware": {"pflash": True},
    "disks": {
        "pci": {"device": "blk", "limit": 2},
        "slot": {"drive_interface": "ide", "limit": 2},
        "card": {"drive_interface": "sd", "limit": 1},
        "cd": {"device": "hd", "cdrom_device": "cd"},
    },
    "default_disk": "pci",
    "nics": {"net": {"device": "net", "limit": 1}, "soldered": {"on_board": "eth"}},
    "default_nic": "net",
    "rng": "rng-pci",
    "watchdogs": ["isa-debugcon", "old-dog"],
    "tpms": ["isa-debugcon", "old-tpm"],
    "display": {"device": "vga"},
}
WORLD = World(
    emulator=EmulatorFacts(
        path="/usr/bin/qemu-system-toy",
        target="toy",
        version="7.2.0",
        machines=(MachineType(name="toyboard-7.2", alias="toyboard", cpu_max=8),),
        cpus=("toy-cpu", "toy-cpu-v2"),
        devices=frozenset({"vga", "vga-old", "isa-debugcon"}),
        accelerators=frozenset({"tcg", "kvm"}),
    ),
    host_arch="x86_64",
    kvm=AcceleratorFacts(usable=True, reason="measured", ratio=10.0),
    paths=MachinePaths(run="/run/m", state="/var/m"),
    swtpm="/usr/bin/swtpm",
    files={"/f": GOOD, "/g": GOOD, "/e": msgspec.structs.replace(GOOD, magic="elf"), "/q": msgspec.structs.replace(GOOD, magic="qcow2")},
)


def board_of(changes: Mapping[str, object]) -> NamedBoard:
    """The board with other fields; None leaves one out."""
    board = {name: value for name, value in {**BOARD, **changes}.items() if value is not None}
    return NamedBoard(id="toy", source="toy.toml", board=msgspec.convert(board, Board))


def spec_of(changes: Mapping[str, object]) -> MachineSpec:
    """A definition for it with these fields."""
    return msgspec.convert({"name": "one", "board": "toy", **changes}, MachineSpec)


def told(spec: Mapping[str, object], board: Mapping[str, object] | None = None, world: World = WORLD) -> list[str]:
    """The problems as lines; what has none must be plannable."""
    named, document = board_of(board or {}), spec_of(spec)
    found = problems(document, named, world)
    if not found:
        plan(document, named, world)
    return [f"{problem.path}: {problem.message}" for problem in found]


def files(**facts: FileFacts) -> World:
    """The host with these files alone."""
    return msgspec.structs.replace(WORLD, files={f"/{name}": value for name, value in facts.items()})
