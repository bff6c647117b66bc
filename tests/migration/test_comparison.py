"""Everything that speaks against a migration is found, and nothing else: one difference at a time, between two sides that are alike."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from qmpd.migration import comparison, discrepancy, retargeting
from qmpd.migration.comparison import ACCEPTABLE, accepted, compared, possible
from qmpd.migration.discrepancy import SHOWN, found, shown, versioned
from qmpd.migration.likeness import (
    CpuFacts,
    DestinationFacts,
    DeviceFacts,
    DriveFacts,
    FirmwareFile,
    HostPort,
    MachineFacts,
    Obstacle,
    PciFacts,
    QemuFacts,
    RamBlock,
    SourceDisk,
    SourceFacts,
    TargetDisk,
)
from qmpd.migrationviews import Severity

MIB = 1024 * 1024
CAPABILITIES = ("events", "return-path", "validate-uuid", "pause-before-switchover", "multifd", "postcopy-ram")
CPU = CpuFacts(type="Nehalem-x86_64-cpu", count=2, words={"0x1.0.ECX": 0b1011, "0x7.1.EAX": 0b1}, unavailable=("vmx",))
NET = DeviceFacts(path="/machine/peripheral/nic0", type="virtio-net-pci", bus="pcie.0", address="02.0")
QEMU = QemuFacts(
    version=(7, 2, 22),
    target="x86_64",
    machine="pc-q35-7.2",
    types={"pc-q35-7.2": "q35", "pc-q35-7.1": None},
    accelerator="tcg",
    status="running",
    memory_bytes=64 * MIB,
    ram_blocks=(
        RamBlock(name="pc.ram", bytes=64 * MIB, most_bytes=64 * MIB),
        RamBlock(name="pc.bios", bytes=262144, most_bytes=262144),
        RamBlock(name="/rom@etc/acpi/tables", bytes=131072, most_bytes=2 * MIB),
    ),
    cpu=CPU,
    devices=(NET,),
    built_in={"hpet": 1, "ioapic": 1},
    pci=(PciFacts(place="00:00.0", vendor=0x8086, device=0x29C0), PciFacts(place="00:02.0/00.0", vendor=1, device=2)),
    drives=(DriveFacts(device="/machine/peripheral/disk0/virtio-backend", format="raw", bytes=MIB, read_only=False),),
    capabilities=CAPABILITIES,
)
FIRMWARE = FirmwareFile(role="firmware.code", bytes=100, sha256="aa")
PORT = HostPort(protocol="tcp", address="127.0.0.1", port=2222)
DEPARTURE = SourceFacts(
    name="web",
    uuid="6f1f5d4c-7d0a-4d5c-9b0e-0d6f3a2b1c00",
    macs=("52:54:00:00:00:01",),
    alias="pc-q35-7.2",
    protocol=1,
    qemu=QEMU,
    firmware=(FIRMWARE,),
    disks=(SourceDisk(index=0, how="shared", format="raw", bytes=MIB),),
    forwards=(PORT,),
)
SHARED = TargetDisk(index=0, path="/pool/web.img", exists=True, same=True, bytes=MIB, format="raw")
ARRIVAL = DestinationFacts(
    protocols=(1,), qemu=replace(QEMU, status="prelaunch"), firmware=(FIRMWARE,), disks=(SHARED,), free_memory_mib=4096
)

Found = tuple[Severity, str]


def codes(departure: MachineFacts = DEPARTURE, arrival: DestinationFacts = ARRIVAL) -> list[Found]:
    return [(finding.severity, finding.code) for finding in compared(departure, arrival)]


def there(**changes: object) -> DestinationFacts:
    """A destination whose QEMU is other than the source's."""
    return replace(ARRIVAL, qemu=replace(QEMU, **changes))


def here(**changes: object) -> SourceFacts:
    """A source whose QEMU is other than the destination's."""
    return replace(DEPARTURE, qemu=replace(QEMU, **changes))


def cpu(**changes: object) -> CpuFacts:
    return replace(CPU, **changes)


def message(departure: SourceFacts = DEPARTURE, arrival: DestinationFacts = ARRIVAL) -> str:
    (finding,) = compared(departure, arrival)
    return finding.message


def test_nothing_is_found_where_all_is_alike() -> None:
    assert codes() == []
    assert possible(compared(DEPARTURE, ARRIVAL))


OTHER_QEMU: Final[dict[str, tuple[dict[str, object], list[Found]]]] = {
    "target": ({"target": "i386"}, [("error", "target-differs")]),
    "accelerator": ({"accelerator": "kvm"}, [("error", "accelerator-differs")]),
    "type known there": ({"machine": "pc-q35-7.1"}, [("error", "machine-type-differs")]),
    "type unknown there": ({"machine": "pc-q35-10.0", "types": {"pc-q35-10.0": "q35"}}, [("error", "machine-type-unknown")]),
    "newer": ({"version": (8, 2, 0)}, []),
    "older": ({"version": (6, 2, 0)}, [("info", "older-emulator")]),
    "cpu count": ({"cpu": cpu(count=4)}, [("error", "cpu-count-differs")]),
    "cpu type": ({"cpu": cpu(type="qemu64-x86_64-cpu", words={})}, [("error", "cpu-type-differs")]),
    "cpu unknown": ({"cpu": None}, []),
    "cpu bit lost": ({"cpu": cpu(words={"0x1.0.ECX": 0b0011, "0x7.1.EAX": 0b1})}, [("error", "cpu-features-missing")]),
    "cpu leaf lost": ({"cpu": cpu(words={"0x1.0.ECX": 0b1011})}, [("error", "cpu-features-missing")]),
    "cpu bit gained": ({"cpu": cpu(words={"0x1.0.ECX": 0b1111, "0x7.1.EAX": 0b1})}, [("info", "cpu-features-added")]),
    "cpu feature unavailable": ({"cpu": cpu(unavailable=("vmx", "avx2"))}, [("error", "cpu-features-missing")]),
    "cpu feature available": ({"cpu": cpu(unavailable=())}, []),
    "device missing": ({"devices": ()}, [("error", "device-missing")]),
    "device added": ({"devices": (NET, replace(NET, path="/machine/peripheral/x"))}, [("error", "device-added")]),
    "device elsewhere": ({"devices": (replace(NET, address="03.0"),)}, [("error", "device-differs")]),
    "device of another type": ({"devices": (replace(NET, type="e1000"),)}, [("error", "device-differs")]),
    "device on no bus": ({"devices": (replace(NET, bus="", address=""),)}, [("error", "device-differs")]),
    "other parts": ({"built_in": {"hpet": 2, "vmport": 1}}, [("info", "built-in-differs")]),
    "parts unknown": ({"built_in": {}}, []),
    "pci card missing": ({"pci": ()}, [("error", "pci-differs")]),
    "pci card other": ({"pci": (PciFacts(place="00:00.0", vendor=1, device=2),)}, [("error", "pci-differs")]),
    "memory": ({"memory_bytes": 32 * MIB}, [("error", "memory-differs")]),
    "blocks unknown": ({"ram_blocks": ()}, []),
    "block missing": ({"ram_blocks": QEMU.ram_blocks[1:]}, [("error", "block-missing")]),
    "block of another size": (
        {"ram_blocks": (QEMU.ram_blocks[0], replace(QEMU.ram_blocks[1], bytes=65536, most_bytes=65536), QEMU.ram_blocks[2])},
        [("error", "block-differs")],
    ),
    "table that grows": ({"ram_blocks": (*QEMU.ram_blocks[:2], replace(QEMU.ram_blocks[2], bytes=65536))}, []),
    "table that cannot grow so far": (
        {"ram_blocks": (*QEMU.ram_blocks[:2], replace(QEMU.ram_blocks[2], bytes=4096, most_bytes=65536))},
        [("error", "block-differs")],
    ),
    "block that can grow": (
        {"ram_blocks": (*QEMU.ram_blocks[:1], RamBlock(name="pc.bios", bytes=1, most_bytes=MIB), QEMU.ram_blocks[2])},
        [],
    ),
    "drive too small": ({"drives": (replace(QEMU.drives[0], bytes=MIB - 1),)}, [("error", "drive-too-small")]),
    "drive larger": ({"drives": (replace(QEMU.drives[0], bytes=MIB + 1),)}, []),
    "drive read-only": ({"drives": (replace(QEMU.drives[0], read_only=True),)}, [("error", "drive-read-only")]),
    "drive unknown": ({"drives": ()}, []),
    "capability": ({"capabilities": CAPABILITIES[1:]}, [("error", "capability-missing")]),
}


@pytest.mark.parametrize("case", OTHER_QEMU)
def test_another_qemu_is_found_out(case: str) -> None:
    changes, expected = OTHER_QEMU[case]
    assert codes(arrival=there(**changes)) == expected


def test_snapshots_in_an_image_are_not_left_behind_unasked() -> None:
    drive = replace(QEMU.drives[0], device="/machine/peripheral/disk0/virtio-backend", snapshots=("before",))
    departure, arrival = here(drives=(drive,)), there(drives=(drive,))
    assert codes(departure, arrival) == []
    copied = replace(departure, disks=(replace(DEPARTURE.disks[0], how="copy"),))
    found = accepted(compared(copied, replace(arrival, disks=(replace(SHARED, exists=False, same=False),))), ("snapshots-lost",))
    assert [(one.severity, one.code, one.path) for one in found] == [("warning", "snapshots-lost", "$.disks[0]")]


def test_a_lost_feature_is_named_as_well_as_it_can_be() -> None:
    assert "CPUID 0x1 ECX bit 3" in message(arrival=there(cpu=cpu(words={"0x1.0.ECX": 0b0011, "0x7.1.EAX": 0b1})))
    assert "CPUID 0x7.1 EAX bit 0" in message(arrival=there(cpu=cpu(words={"0x1.0.ECX": 0b1011})))
    assert "avx2" in message(arrival=there(cpu=cpu(unavailable=("vmx", "avx2"))))


def test_a_feature_that_nobody_has_is_not_missed() -> None:
    pcommit = replace(QEMU, cpu=cpu(words={**CPU.words, "0x7.0.EBX": 1 << 22}))
    assert codes(replace(DEPARTURE, qemu=pcommit), there(cpu=cpu(words={**CPU.words, "0x7.0.EBX": 0}))) == []


def test_a_processor_that_tells_its_traits_is_compared_by_them() -> None:
    arm = CpuFacts(type="max-arm-cpu", count=1, traits={"sve": True, "pauth": False, "vl": 512, "midr": "a"})
    less = replace(arm, traits={"sve": False, "pauth": True, "vl": 256, "other": 1})
    assert codes(here(cpu=arm), there(cpu=arm)) == []
    assert codes(here(cpu=arm), there(cpu=less)) == [("error", "cpu-features-missing"), ("warning", "cpu-traits-differ")]
    assert "vl (512 here, 256 there)" in compared(here(cpu=arm), there(cpu=less))[1].message
    assert codes(here(cpu=arm), there(cpu=replace(arm, traits={}))) == [("error", "cpu-features-missing")]


def test_a_type_that_is_another_is_not_compared_part_by_part() -> None:
    assert codes(arrival=there(machine="pc-q35-7.1", built_in={"hpet": 7})) == [("error", "machine-type-differs")]


def test_machines_without_versions_move_between_qemus_of_one_release_only() -> None:
    malta, newer = replace(QEMU, machine="malta"), replace(QEMU, machine="malta", version=(7, 2, 23), built_in={"clock": 4})
    leaving = replace(DEPARTURE, qemu=malta, alias="malta")
    assert codes(leaving, replace(ARRIVAL, qemu=malta)) == []
    assert codes(leaving, replace(ARRIVAL, qemu=newer)) == [("warning", "built-in-differs")]
    assert codes(leaving, replace(ARRIVAL, qemu=replace(malta, version=(10, 0, 13)))) == [("error", "machine-unversioned")]


TEN, ELEVEN, SEVEN = (10, 0, 13), (11, 1, 3), (7, 2, 22)


@pytest.mark.parametrize(
    ("source", "destination", "changes", "severity"),
    [
        (TEN, ELEVEN, {}, "warning"),
        (TEN, ELEVEN, {"devices": ()}, None),
        (TEN, ELEVEN, {"devices": (replace(NET, type="e1000"),)}, None),
        (ELEVEN, TEN, {}, None),
        (SEVEN, TEN, {}, None),
        (SEVEN, TEN, {"target": "aarch64", "machine": "virt-7.2"}, "error"),
        (SEVEN, TEN, {"target": "aarch64", "machine": "virt-7.2", "accelerator": "kvm"}, None),
        (TEN, SEVEN, {"target": "arm", "machine": "virt-7.2"}, "error"),
        (SEVEN, SEVEN, {"target": "arm", "machine": "virt-7.2"}, None),
        (TEN, SEVEN, {"target": "ppc64", "machine": "pseries-7.2"}, "error"),
        (SEVEN, TEN, {"target": "ppc64", "machine": "pseries-7.2"}, None),
        (SEVEN, TEN, {"machine": "microvm"}, "error"),
        (TEN, SEVEN, {"machine": "microvm"}, "error"),
    ],
)
def test_known_troubles_between_versions_are_told(
    source: tuple[int, int, int], destination: tuple[int, int, int], changes: dict[str, object], severity: Severity | None
) -> None:
    leaving = replace(DEPARTURE, alias="", qemu=replace(QEMU, version=source, **changes))
    arriving = replace(ARRIVAL, qemu=replace(QEMU, version=destination, **changes))
    told = [finding for finding in compared(leaving, arriving) if finding.code == "known-trouble"]
    assert [finding.severity for finding in told] == ([] if severity is None else [severity])
    assert all("the guest goes on at its source" in finding.message for finding in told)


OTHER_SOURCE: Final[dict[str, tuple[SourceFacts, list[Found]]]] = {
    "blocked": (here(blockers=("device ivshmem",)), [("error", "blocked")]),
    "recorded": (here(replay="record"), [("error", "replay")]),
    "dumped": (here(dumping=True), [("error", "dumping")]),
    "backed up": (here(jobs=("backup0 (backup)",)), [("error", "block-job")]),
    "panicked": (here(status="guest-panicked"), [("warning", "guest-stopped")]),
    "paused": (here(status="paused"), []),
    "works": (replace(DEPARTURE, works="works"), []),
    "needs input": (replace(DEPARTURE, works="needs-input"), [("warning", "board-needs-input")]),
    "slow": (replace(DEPARTURE, works="slow"), [("warning", "board-slow")]),
    "frozen": (replace(DEPARTURE, works="frozen"), [("error", "board-frozen")]),
    "refused": (replace(DEPARTURE, works="refused"), [("error", "board-refused")]),
    "crashes": (replace(DEPARTURE, works="crashes"), [("error", "board-crashes")]),
    "untested": (replace(DEPARTURE, works="untested"), [("warning", "board-untested")]),
    "alias": (replace(DEPARTURE, alias="q35"), [("info", "machine-alias")]),
    "several connections": (replace(DEPARTURE, channels=4), []),
    "postcopy": (replace(DEPARTURE, postcopy=True), []),
    "template missing": (replace(DEPARTURE, firmware=(replace(FIRMWARE, role="firmware.vars"),)), [("warning", "template-missing")]),
    "firmware missing": (replace(DEPARTURE, firmware=(replace(FIRMWARE, role="kernel.image"),)), [("error", "firmware-missing")]),
    "firmware of another size": (replace(DEPARTURE, firmware=(replace(FIRMWARE, bytes=7),)), [("error", "firmware-size")]),
    "other firmware": (replace(DEPARTURE, firmware=(replace(FIRMWARE, sha256="bb"),)), [("warning", "firmware-differs")]),
    "old source": (here(capabilities=CAPABILITIES[2:]), [("error", "capability-missing")]),
}


@pytest.mark.parametrize("case", OTHER_SOURCE)
def test_what_keeps_a_machine_at_its_source_is_found(case: str) -> None:
    departure, expected = OTHER_SOURCE[case]
    assert codes(departure) == expected


FORWARD: Final = found("info", "forward-moves", "it will be one of the destination's", path="$.nics[0].forwards[0]")
OTHER_DESTINATION: Final[dict[str, tuple[DestinationFacts, list[Found]]]] = {
    "protocol": (replace(ARRIVAL, protocols=(2, 3)), [("error", "protocol-differs")]),
    "no protocol": (replace(ARRIVAL, protocols=()), [("error", "protocol-differs")]),
    "no start": (replace(ARRIVAL, qemu=None, obstacles=(Obstacle(message="a"), Obstacle(message="b"))), [("error", "cannot-start")] * 2),
    "no start, no word": (replace(ARRIVAL, qemu=None), [("error", "cannot-start")]),
    "name": (replace(ARRIVAL, name_taken=True), [("error", "name-taken")]),
    "uuid": (replace(ARRIVAL, uuid_taken_by="db"), [("error", "uuid-taken")]),
    "mac": (replace(ARRIVAL, macs_taken={"52:54:00:00:00:01": "db"}), [("warning", "mac-taken")]),
    "other mac": (replace(ARRIVAL, macs_taken={"52:54:00:00:00:02": "db"}), []),
    "port": (replace(ARRIVAL, ports_taken=(PORT,)), [("error", "port-taken")]),
    "other port": (replace(ARRIVAL, ports_taken=(replace(PORT, port=1),)), []),
    "limit": (replace(ARRIVAL, limits_unkept={"memory_max_mib": "no cgroup"}), [("error", "limit-unkept")]),
    "little memory": (replace(ARRIVAL, free_memory_mib=63), [("warning", "little-memory")]),
    "memory unknown": (replace(ARRIVAL, free_memory_mib=None), []),
    "disk unsaid": (replace(ARRIVAL, disks=()), [("error", "disk-unknown")]),
    "disk missing": (replace(ARRIVAL, disks=(replace(SHARED, exists=False),)), [("error", "disk-missing")]),
    "another disk": (replace(ARRIVAL, disks=(replace(SHARED, same=False),)), [("error", "disk-not-shared")]),
    "disk unproven": (replace(ARRIVAL, disks=(replace(SHARED, same=None),)), [("warning", "disk-shared-unproven")]),
    "disk of another format": (replace(ARRIVAL, disks=(replace(SHARED, format="qcow2"),)), [("error", "disk-format")]),
    "forward": (replace(ARRIVAL, findings=(FORWARD,)), [("info", "forward-moves")]),
    "port and forward": (replace(ARRIVAL, ports_taken=(PORT,), findings=(FORWARD,)), [("error", "port-taken"), ("info", "forward-moves")]),
    "format unknown": (replace(ARRIVAL, disks=(replace(SHARED, format=None),)), []),
}


@pytest.mark.parametrize("case", OTHER_DESTINATION)
def test_what_the_destination_has_no_room_for_is_found(case: str) -> None:
    arrival, expected = OTHER_DESTINATION[case]
    assert codes(arrival=arrival) == expected


COPIED = replace(DEPARTURE, disks=(SourceDisk(index=0, how="copy", format="raw", bytes=MIB),))
FREE = TargetDisk(index=0, path="/pool/web.img", exists=False, needed_bytes=MIB, free_bytes=2 * MIB)


@pytest.mark.parametrize(
    ("disk", "expected"),
    [
        (FREE, []),
        (replace(FREE, free_bytes=None), []),
        (replace(FREE, free_bytes=MIB - 1), [("error", "no-space")]),
        (replace(FREE, exists=True, same=True), [("error", "disk-is-shared")]),
        (replace(FREE, exists=True), [("error", "disk-target-exists")]),
        (replace(FREE, exists=True, bytes=MIB), [("error", "disk-target-exists")]),
        (replace(FREE, exists=True, bytes=1), [("error", "disk-target-exists"), ("error", "disk-too-small")]),
    ],
)
def test_a_disk_that_is_copied_needs_a_place(disk: TargetDisk, expected: list[Found]) -> None:
    assert codes(COPIED, replace(ARRIVAL, disks=(disk,))) == expected


def test_what_the_request_asks_for_has_to_be_in_both_qemus() -> None:
    without = there(capabilities=CAPABILITIES[:4])
    assert codes(arrival=without) == []
    assert codes(replace(DEPARTURE, channels=2), without) == [("error", "capability-missing")]
    assert codes(replace(here(capabilities=CAPABILITIES[:4]), postcopy=True)) == [("error", "capability-missing")]


def test_errors_come_first() -> None:
    severities = [severity for severity, _ in codes(replace(DEPARTURE, alias="q35", works="untested"), replace(ARRIVAL, name_taken=True))]
    assert severities == ["error", "warning", "info"]


def test_only_some_errors_can_be_taken_upon_oneself() -> None:
    found = compared(here(blockers=("no",)), there(cpu=cpu(unavailable=("vmx", "avx2"))))
    assert not possible(found)
    assert accepted(found, ()) == found
    kept = accepted(found, ("blocked", "cpu-features-missing"))
    assert [(finding.severity, finding.code) for finding in kept] == [("error", "blocked"), ("warning", "cpu-features-missing")]


def test_versions_are_told_from_names() -> None:
    assert [name for name in ("pc-q35-7.2", "pc-q35-4.0.1", "virt", "malta", "SS-5", "virt-10.0", "raspi3b") if versioned(name)] == [
        "pc-q35-7.2",
        "pc-q35-4.0.1",
        "virt-10.0",
    ]


@given(st.lists(st.sampled_from("abc")))
def test_long_lists_are_cut_and_say_so(items: list[str]) -> None:
    text = shown(items)
    assert text.count(",") < SHOWN
    assert ("more" in text) == (len(items) > SHOWN)


def test_every_finding_is_explained() -> None:
    sources = "".join(Path(module.__file__ or "").read_text(encoding="utf-8") for module in (comparison, discrepancy, retargeting))
    known = set(re.findall(r'"(?:error|warning|info)",\s*"([a-z-]+)"', sources)) | {f"board-{works}" for works in comparison._WORKS}
    known |= {"machine-type-differs", "machine-type-unknown", "built-in-differs", "known-trouble"}
    text = (Path(__file__).parents[2] / "docs" / "migration-checks.md").read_text(encoding="utf-8")
    assert len(known) > 40
    assert not {code for code in known if f"`{code}`" not in text}
    assert not {code for code in ACCEPTABLE if not re.search(rf"^\| `{code}` .*\| yes \|$", text, re.MULTILINE)}


AT_REST = MachineFacts(
    name="web",
    uuid=DEPARTURE.uuid,
    macs=DEPARTURE.macs,
    protocol=1,
    firmware=(FIRMWARE,),
    disks=DEPARTURE.disks,
    forwards=(PORT,),
)
#: Nobody has started a QEMU there.
UNTRIED = replace(ARRIVAL, qemu=None)

OTHER_REST: Final[dict[str, tuple[MachineFacts, DestinationFacts, list[Found]]]] = {
    "all alike": (AT_REST, UNTRIED, []),
    "another qemu": (AT_REST, there(version=(6, 2, 0), machine="pc-q35-7.1", cpu=cpu(count=9), memory_bytes=1), []),
    "no start": (AT_REST, replace(UNTRIED, obstacles=(Obstacle(message="a"),)), [("error", "cannot-start")]),
    "little memory": (AT_REST, replace(UNTRIED, free_memory_mib=1), []),
    "protocol": (AT_REST, replace(UNTRIED, protocols=()), [("error", "protocol-differs")]),
    "name": (AT_REST, replace(UNTRIED, name_taken=True), [("error", "name-taken")]),
    "port": (AT_REST, replace(UNTRIED, ports_taken=(PORT,)), [("warning", "port-taken")]),
    "limit": (AT_REST, replace(UNTRIED, limits_unkept={"": "no cgroup"}), [("error", "limit-unkept")]),
    "another disk": (AT_REST, replace(UNTRIED, disks=(replace(SHARED, same=False),)), [("error", "disk-not-shared")]),
    "firmware missing": (AT_REST, replace(UNTRIED, firmware=()), [("error", "firmware-missing")]),
    "firmware of another size": (replace(AT_REST, firmware=(replace(FIRMWARE, bytes=7),)), UNTRIED, [("warning", "firmware-differs")]),
    "other firmware": (replace(AT_REST, firmware=(replace(FIRMWARE, sha256="bb"),)), UNTRIED, [("warning", "firmware-differs")]),
    "forward": (AT_REST, replace(UNTRIED, findings=(FORWARD,)), [("info", "forward-moves")]),
    "template, said twice": (
        replace(AT_REST, firmware=(replace(FIRMWARE, role="firmware.vars"),)),
        replace(UNTRIED, findings=(found("warning", "template-missing", "not there", path="$.firmware.vars"),)),
        [("warning", "template-missing")],
    ),
    "template": (replace(AT_REST, firmware=(replace(FIRMWARE, role="firmware.vars"),)), UNTRIED, [("warning", "template-missing")]),
}


@pytest.mark.parametrize("case", OTHER_REST)
def test_of_a_machine_at_rest_only_what_its_next_start_needs_is_compared(case: str) -> None:
    departure, arrival, expected = OTHER_REST[case]
    assert codes(departure, arrival) == expected
