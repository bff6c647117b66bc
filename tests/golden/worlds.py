"""The world of the golden files: a host and emulators that never change, and the definitions that are planned in it."""

from __future__ import annotations

import tomllib
from pathlib import Path

import msgspec

from qmpd.board import Board, NamedBoard
from qmpd.catalogue import load
from qmpd.facts import AcceleratorFacts, EmulatorFacts, FileFacts, MachinePaths, MachineType, World
from qmpd.plan import plan, without_forwards
from qmpd.plan.resolution import disk_bus
from qmpd.schema import FEATURE_MARKS
from qmpd.spec import BiosFirmware, Disk, ImageDisk, Kernel, MachineSpec, UserNic
from qmpd.storage import paths_of
from qmpd.validation import problems

HERE = Path(__file__).parent
BOARDS = HERE / "boards"
CASES = HERE / "cases"
CATALOGUE = load([HERE.parents[1] / "machines"])
UUID = "00000000-1111-4222-8333-444444444444"


def world(board: Board, spec: MachineSpec, *, kvm: bool = False) -> World:
    """QEMU 7.2 on an x86_64 host; every file a definition names is there, and is a qcow2 image if its name says so."""
    emulator = EmulatorFacts(
        path=f"/usr/bin/qemu-system-{board.emulators[0]}",
        target=board.emulators[0],
        version="7.2.22",
        machines=(MachineType(name=board.machine, cpu_max=board.max_cpus),),
        features=frozenset(mark for mark in FEATURE_MARKS if mark.startswith("set-action.")),
        options=frozenset({"sandbox", "action"}),
        accelerators=frozenset({"tcg", "kvm"}),
    )
    files = {path: _file(path) for path in paths_of(spec)}
    verdict = AcceleratorFacts(usable=kvm, reason="measured", ratio=12.0 if kvm else 0.1)
    paths = MachinePaths(run=f"/run/qmpd/m/{spec.name}", state=f"/var/lib/qmpd/machines/{spec.name}")
    return World(emulator=emulator, host_arch="x86_64", kvm=verdict, paths=paths, files=files, swtpm="/usr/bin/swtpm")


def _file(path: str) -> FileFacts:
    magic = "qcow2" if path.endswith(".qcow2") else None
    return FileFacts(kind="file", size=64 * 1024 * 1024, readable=True, writable=True, real_path=path, magic=magic)


def everything(named: NamedBoard) -> MachineSpec:
    """A machine that uses what its board offers: a kernel or firmware, a disk, a NIC, entropy."""
    board = named.board
    kernel, firmware = None, MachineSpec(name="x", board="x").firmware
    if board.kernel is not None:
        dtb = "/srv/board.dtb" if board.kernel.dtb == "required" else None
        kernel = Kernel(image="/srv/vmlinuz", initrd="/srv/initrd", append="quiet", dtb=dtb)
    if board.firmware.default == "required":
        firmware = BiosFirmware(path="/srv/firmware.bin")
    disk: Disk = ImageDisk(path="/srv/disk.img", format="raw")
    return MachineSpec(
        name=named.id.replace("_", "-"),
        board=named.id,
        uuid=UUID,
        kernel=kernel,
        firmware=firmware,
        disks=(disk,) if disk_bus(disk, board)[1] is not None else (),
        nics=(UserNic(),) if board.default_nic is not None else (),
        rng=board.rng is not None,
    )


def command(spec: MachineSpec, *, kvm: bool = False) -> str:
    """The golden text of a definition: its command, or its problems."""
    named = CATALOGUE.get(spec.board)
    here = world(named.board, spec, kvm=kvm)
    found = problems(spec, named, here)
    if found:
        return "".join(f"{problem.path}: {problem.message}\n" for problem in found)
    return plan(spec, named, here).by_hand()


def board_texts() -> dict[Path, str]:
    """The golden files of the boards, and what they must say."""
    return {BOARDS / f"{name}.args": command(everything(named)) for name, named in sorted(CATALOGUE.boards.items())}


def case_texts() -> dict[Path, str]:
    """The golden files of the cases, and what they must say. `kvm` in a case's name puts it on a host with a good KVM,
    `incoming` has it come from another host."""
    texts = {}
    for source in sorted(CASES.glob("*.toml")):
        spec = msgspec.convert(tomllib.loads(source.read_text()), MachineSpec)
        spec = without_forwards(spec) if "incoming" in source.stem else spec
        texts[source.with_suffix(".args")] = command(spec, kvm="kvm" in source.stem)
    return texts


def rewrite() -> None:
    """Writes every golden file anew: `python -m tests.golden.worlds`."""
    for stale in (*BOARDS.glob("*.args"), *CASES.glob("*.args")):
        stale.unlink()
    for path, text in {**board_texts(), **case_texts()}.items():
        path.write_text(text)


if __name__ == "__main__":
    rewrite()
