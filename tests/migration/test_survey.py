"""Real QEMUs of several boards say what a migration has to know of them."""

from __future__ import annotations

import shutil
import subprocess
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import pytest

from qmpd.errors import QemuDied, QemuRefused
from qmpd.inquiry import CONTAINERS
from qmpd.migration.convergence import Abilities, opening
from qmpd.migration.discrepancy import discrepancies
from qmpd.migration.likeness import CpuFacts, PciFacts, QemuFacts
from qmpd.migration.survey import NO_PARTS, dirty_mib_s, surveyed
from qmpd.migrationviews import Goal
from qmpd.monitor import Monitor
from tests.guests.build import Guest
from tests.process.emulator import PATIENCE_S, Emulators, emulators_in

pytestmark = pytest.mark.qemu
MIB = 1024 * 1024
#: target, machine, options, the type it is without its version, a RAM block, what it has plugged in (type, bus, address)
BOARDS = {
    "q35": (
        "x86_64",
        ("-m", "64", "-device", "pcie-root-port,id=rp,chassis=1", "-device", "virtio-rng-pci,id=r0,bus=rp", "-cpu", "Nehalem"),
        "pc-q35",
        "pc.ram",
        {("pcie-root-port", "pcie.0", "01.0"), ("virtio-rng-pci", "rp", "00.0")},
    ),
    "pc": ("x86_64", ("-m", "64", "-device", "rtl8139,addr=7"), "pc-i440fx", "pc.ram", {("rtl8139", "pci.0", "07.0")}),
    "virt": (
        "aarch64",
        ("-m", "64", "-cpu", "max", "-device", "virtio-rng-device"),
        "virt",
        "mach-virt.ram",
        {("virtio-rng-device", "virtio-mmio-bus.31", "")},
    ),
    "rvvirt": (
        "riscv64",
        ("-m", "64", "-bios", "none", "-device", "virtio-rng-device,id=r0"),
        "virt",
        "riscv_virt_board.ram",
        {("virtio-rng-device", "virtio-mmio-bus.7", "")},
    ),
    "s390-ccw-virtio": (
        "s390x",
        ("-m", "64", "-device", "virtio-rng-ccw,id=r0"),
        "s390-ccw-virtio",
        "s390.ram",
        {("virtio-rng-ccw", "virtual-css", "fe.0.0000")},
    ),
    "pseries": (
        "ppc64",
        ("-m", "256", "-device", "virtio-rng-pci,id=r0"),
        "pseries",
        "ppc_spapr.ram",
        {("virtio-rng-pci", "pci.0", "00.0")},
    ),
    "malta": ("mips", ("-m", "64", "-device", "pcnet,id=n0"), "malta", "mips_malta.ram", {("pcnet", "pci", "12.0")}),
}


@pytest.fixture
async def started(directory: Path, patient: None) -> AsyncIterator[Emulators]:
    async with emulators_in(directory) as emulators:
        yield emulators


async def facts_of(started: Emulators, target: str, machine: str, *options: str) -> QemuFacts:
    program = shutil.which(f"qemu-system-{target}")
    assert program is not None
    emulator = await started.start(*options, machine=machine, program=program)
    async with emulator.session() as monitor:
        return await surveyed(monitor)


@pytest.mark.parametrize("board", BOARDS)
async def test_a_board_says_what_it_is_made_of(started: Emulators, board: str) -> None:
    target, options, machine, block, devices = BOARDS[board]
    found = await facts_of(started, target, board.removeprefix("rv"), *options)
    assert found.target == target
    assert found.machine.startswith(machine)
    assert found.machine in found.types
    assert (found.accelerator, found.status, found.replay, found.dumping) == ("tcg", "prelaunch", "none", False)
    memory = int(options[1]) * MIB
    assert found.memory_bytes == memory
    assert next(ram for ram in found.ram_blocks if ram.name == block).bytes == memory
    assert {(device.type, device.bus, device.address) for device in found.devices} == devices
    assert found.built_in
    assert not {kind for kind, _, _ in devices} & set(found.built_in)
    assert found.cpu is not None
    assert found.cpu.count == 1
    assert found.cpu.type in found.built_in
    assert {"return-path", "events", "pause-before-switchover"} <= set(found.capabilities)
    assert found.blockers == found.jobs == ()


@pytest.mark.parametrize("board", BOARDS)
async def test_a_machine_that_runs_and_its_halted_twin_are_alike(started: Emulators, board: str) -> None:
    target, options, _, _, _ = BOARDS[board]
    program = shutil.which(f"qemu-system-{target}")
    assert program is not None
    emulator = await started.start(*options, "-action", "panic=none", machine=board.removeprefix("rv"), program=program, halted=False)
    async with emulator.session() as monitor:
        runs = await surveyed(monitor)
    twin = await facts_of(started, target, board.removeprefix("rv"), *options)
    assert list(discrepancies(runs, twin)) == []


async def test_a_processor_says_which_features_its_guest_sees(started: Emulators) -> None:
    old = await facts_of(started, "x86_64", "q35", "-cpu", "Nehalem")
    new = await facts_of(started, "x86_64", "q35", "-cpu", "max")
    assert old.cpu is not None
    assert new.cpu is not None
    assert old.cpu.words.keys() == new.cpu.words.keys()
    assert old.cpu.words["0x1.0.ECX"] < new.cpu.words["0x1.0.ECX"]
    assert old.cpu.traits == {}


async def test_a_processor_that_is_not_x86_says_what_its_model_is(started: Emulators) -> None:
    found = await facts_of(started, "aarch64", "virt", "-cpu", "max")
    assert found.cpu is not None
    assert (found.cpu.type, found.cpu.words) == ("max-arm-cpu", {})
    assert found.cpu.traits["aarch64"] is True


async def test_features_that_the_accelerator_lacks_are_named(started: Emulators) -> None:
    found = await facts_of(started, "x86_64", "q35", "-cpu", "Nehalem,avx512f=on")
    assert found.cpu is not None
    assert "avx512f" in found.cpu.unavailable


async def test_several_processors_are_counted(started: Emulators) -> None:
    found = await facts_of(started, "x86_64", "q35", "-smp", "3")
    assert found.cpu is not None
    assert found.cpu.count == 3


async def test_drives_are_told_by_their_devices(started: Emulators, directory: Path) -> None:
    image = directory / "disk"
    with image.open("wb") as made:
        made.truncate(3 * MIB)
    blockdev = f'{{"driver":"raw","node-name":"d0","file":{{"driver":"file","filename":"{image}"}}}}'
    found = await facts_of(started, "x86_64", "q35", "-blockdev", blockdev, "-device", "virtio-blk-pci,drive=d0,id=disk0")
    (drive,) = found.drives
    assert drive.device.startswith("/machine/peripheral/disk0")
    assert (drive.format, drive.bytes, drive.read_only) == ("raw", 3 * MIB, False)


async def test_pci_functions_are_told_by_the_way_to_them(started: Emulators) -> None:
    found = await facts_of(started, "x86_64", "q35", "-device", "virtio-rng-pci,id=r0,addr=5")
    assert next(function for function in found.pci if function.id == "r0").place == "00:05.0"
    assert {"00:00.0", "00:1f.0", "00:1f.2"} <= {function.place for function in found.pci}


def unmigratable_image(path: Path) -> Path:
    subprocess.run(["qemu-img", "create", "-q", "-f", "vdi", str(path), "1M"], check=True, timeout=PATIENCE_S)
    return path


async def test_a_machine_that_cannot_be_migrated_says_why(started: Emulators, directory: Path) -> None:
    image = unmigratable_image(directory / "disk.vdi")
    blockdev = f'{{"driver":"vdi","node-name":"d0","file":{{"driver":"file","filename":"{image}"}}}}'
    found = await facts_of(started, "x86_64", "q35", "-blockdev", blockdev)
    (reason,) = found.blockers
    assert "vdi" in reason


async def test_a_machine_that_is_recorded_says_so(started: Emulators, directory: Path) -> None:
    found = await facts_of(started, "x86_64", "q35", "-icount", f"shift=7,rr=record,rrfile={directory}/replay")
    assert found.replay == "record"


async def test_a_program_without_a_machine_has_nothing(started: Emulators) -> None:
    found = await facts_of(started, "x86_64", "none")
    assert found.cpu is None
    assert (found.devices, found.pci, found.drives) == ((), (), ())


async def test_what_a_goal_asks_for_in_the_beginning_every_qemu_takes(started: Emulators) -> None:
    emulator = await started.start(machine="q35")
    async with emulator.session() as monitor:
        for goal in (Goal(then="postcopy"), Goal(auto_converge=True, bandwidth_mib_s=1), Goal(downtime_ms=2_000_000)):
            begin = opening(goal, Abilities())
            await monitor.execute("migrate-set-parameters", begin.parameters)
            wanted = [{"capability": name, "state": True} for name in begin.capabilities if name != "postcopy-ram"]
            await monitor.execute("migrate-set-capabilities", {"capabilities": wanted})
            answer = await monitor.execute("query-migrate-parameters")
            assert isinstance(answer, dict)
            assert {name: answer[name] for name in begin.parameters} == begin.parameters


async def test_how_fast_a_guest_changes_memory_is_measured(started: Emulators, guests: dict[str, Guest]) -> None:
    emulator = await started.start("-m", "64", "-kernel", str(guests["x86_64-microvm"].file), machine="pc", halted=False)
    async with emulator.session() as monitor:
        assert await dirty_mib_s(monitor) is not None
        await monitor.execute("stop")
        assert await dirty_mib_s(monitor) == 0


async def test_a_rate_that_is_not_known_in_time_is_none(started: Emulators) -> None:
    emulator = await started.start("-m", "64", machine="pc", halted=False)
    async with emulator.session() as monitor:
        assert await dirty_mib_s(monitor, limit_s=0) is None


# What no QEMU at hand says


class Answers:
    """A QEMU that says what the test has it say; what it is not told about it does not know."""

    def __init__(self, **answers: object) -> None:
        self.answers = {name.replace("_", "-"): answer for name, answer in answers.items()}
        self.asked: list[str] = []

    async def execute(self, command: str, arguments: Mapping[str, object] | None = None) -> object:
        self.asked.append(command)
        if command == "qom-get" and arguments is not None:
            answer = self.answers.get(str(arguments["property"]))
        else:
            answer = self.answers.get(command)
        if answer is None:
            raise QemuRefused(f"{command} has not been found")
        return answer


def minimal(**more: object) -> Answers:
    return Answers(
        **{
            "query_version": {"qemu": {"major": 9, "minor": 1, "micro": 0}, "package": ""},
            "query_memory_size_summary": {"base-memory": 1, "plugged-memory": 2},
            "query_target": {"arch": "riscv64"},
            "query_machines": [],
            "query_status": {"status": "running"},
            "query_cpus_fast": [{"qom-path": "/cpu"}],
            "query_block": [{"device": "empty"}],
            "query_migrate_capabilities": [],
            "query_migrate": {},
            "query_jobs": [{"id": "backup0", "type": "backup"}],
            "qom_list": [],
            **more,
        }
    )


async def test_what_a_qemu_does_not_know_is_left_out() -> None:
    found = await surveyed(minimal())
    assert found == QemuFacts(
        version=(9, 1, 0),
        target="riscv64",
        machine="",
        accelerator="tcg",
        status="running",
        memory_bytes=3,
        cpu=CpuFacts(type="", count=1),
        jobs=("backup0 (backup)",),
    )


async def test_kvm_dumps_and_cards_behind_bridges_are_seen() -> None:
    behind = {"slot": 3, "function": 1, "qdev_id": "card", "id": {"device": 2, "vendor": 1}}
    bridge = {"slot": 2, "function": 0, "id": {"device": 1, "vendor": 1}, "pci_bridge": {"bus": {"number": 1}, "devices": [behind]}}
    answers = minimal(
        query_kvm={"enabled": True, "present": True},
        query_dump={"status": "active"},
        query_pci=[{"bus": 0, "devices": [bridge]}],
        type="max-arm-cpu",
        query_cpu_definitions=[{"name": "max", "typename": "max-arm-cpu"}],
        query_cpu_model_expansion={"model": {"name": "max", "props": {"sve": True, "vl": 4, "odd": [1]}}},
    )
    found = await surveyed(answers)
    assert (found.accelerator, found.dumping) == ("kvm", True)
    assert found.pci == (
        PciFacts(place="00:02.0", vendor=1, device=1),
        PciFacts(place="00:02.0/03.1", vendor=1, device=2, id="card"),
    )
    assert found.cpu is not None
    assert found.cpu.traits == {"sve": True, "vl": 4}


TREE = """\
/machine (none-machine)
  /peripheral (container)
    /r0 (virtio-rng)
  /peripheral-anon (container)
  /soc (soc)
    /peripheral (container)
      /uart[0] (uart)
    /gic (gic)
      /unnamed-gpio-in[0] (irq)
        /below (uart)
      /ram (and more) (memory-region)
  /unattached (container)
    /uart[1] (uart)
"""


async def test_objects_are_counted_by_type_but_for_those_that_were_plugged_in() -> None:
    found = await surveyed(minimal(human_monitor_command=TREE))
    assert found.built_in == {"gic": 1, "soc": 1, "uart": 2}


async def walked(monitor: Monitor) -> dict[str, int]:
    """The same, asked for object by object."""
    counts: Counter[str] = Counter()
    waiting = ["/machine"]
    while waiting:
        path = waiting.pop()
        children = await monitor.execute("qom-list", {"path": path})
        assert isinstance(children, list)
        for child in children:
            kind, below = child["type"].removeprefix("child<").removesuffix(">"), f"{path}/{child['name']}"
            if not child["type"].startswith("child<") or below in CONTAINERS:
                continue
            if kind not in NO_PARTS:
                counts[kind] += 1
            if kind not in NO_PARTS or kind == "container":
                waiting.append(below)
    return dict(counts)


@pytest.mark.parametrize("board", BOARDS)
async def test_the_printed_tree_says_what_the_objects_say(started: Emulators, board: str) -> None:
    target, options, *_ = BOARDS[board]
    program = shutil.which(f"qemu-system-{target}")
    assert program is not None
    emulator = await started.start(*options, machine=board.removeprefix("rv"), program=program)
    async with emulator.session() as monitor:
        assert (await surveyed(monitor)).built_in == await walked(monitor)


async def test_what_is_no_answer_of_a_qemu_is_refused() -> None:
    with pytest.raises(QemuDied, match="query-version"):
        await surveyed(minimal(query_version={"qemu": "new"}))
