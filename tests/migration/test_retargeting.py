"""A definition says on another host what it says on this one, but for what is told to be otherwise."""

from __future__ import annotations

import msgspec
import pytest

from qmpd.errors import Invalid
from qmpd.facts import FileFacts
from qmpd.migration.retargeting import DiskTarget, Retarget, host_findings, host_paths, retargeted
from qmpd.spec import BiosFirmware, BlankDisk, DisconnectedNic, Forward, ImageDisk, Kernel, MachineSpec, PflashFirmware, UserNic
from qmpd.storage import paths_of

SPEC = MachineSpec(
    name="one",
    board="x86_64-q35",
    emulator="/opt/qemu/bin/qemu-system-x86_64",
    firmware=PflashFirmware(code="/fw/code", vars="/fw/vars"),
    kernel=Kernel(image="/boot/vmlinuz", initrd="/boot/initrd", dtb="/boot/dtb"),
    disks=(
        ImageDisk(path="/srv/a.qcow2", format="qcow2"),
        BlankDisk(size_mib=1),
        ImageDisk(path="/srv/c.iso", format="raw", media="cdrom"),
    ),
    nics=(UserNic(forwards=(Forward(guest_port=22), Forward(guest_port=80, host_port=8080))), DisconnectedNic()),
    extra_args=("-fw_cfg name=opt/x,file=/etc/x", "-no-hpet"),
)


def test_every_path_is_found_with_its_place_and_use() -> None:
    assert [(named.field, named.path, named.use) for named in host_paths(SPEC)] == [
        ("$.emulator", "/opt/qemu/bin/qemu-system-x86_64", "emulator"),
        ("$.firmware.code", "/fw/code", "loaded"),
        ("$.firmware.vars", "/fw/vars", "template"),
        ("$.kernel.image", "/boot/vmlinuz", "loaded"),
        ("$.kernel.initrd", "/boot/initrd", "loaded"),
        ("$.kernel.dtb", "/boot/dtb", "loaded"),
        ("$.disks[0].path", "/srv/a.qcow2", "disk"),
        ("$.disks[2].path", "/srv/c.iso", "disk"),
    ]
    bios = MachineSpec(name="one", board="x", emulator="riscv64", firmware=BiosFirmware(path="/fw/bios"))
    assert [(named.field, named.use) for named in host_paths(bios)] == [("$.firmware.path", "loaded")]
    assert host_paths(MachineSpec(name="one", board="x")) == ()


def test_no_path_of_a_definition_is_forgotten() -> None:
    for spec in (SPEC, msgspec.structs.replace(SPEC, firmware=BiosFirmware(path="/fw/bios"), kernel=Kernel(image="/k"))):
        assert set(paths_of(spec)) == {named.path for named in host_paths(spec) if named.use != "emulator"}


def test_disks_and_emulator_are_what_they_are_told_to_be_and_all_else_stays() -> None:
    wanted = Retarget(
        disks={0: DiskTarget(path="/pool/a.raw", format="raw"), 1: DiskTarget(format="raw"), 2: DiskTarget(path="/pool/c.iso")},
        emulator="x86_64",
    )
    there = retargeted(SPEC, wanted)
    assert there.disks == (
        ImageDisk(path="/pool/a.raw", format="raw"),
        BlankDisk(size_mib=1, format="raw"),
        ImageDisk(path="/pool/c.iso", format="raw", media="cdrom"),
    )
    assert there.emulator == "x86_64"
    assert msgspec.structs.replace(there, disks=SPEC.disks, emulator=SPEC.emulator) == SPEC
    assert retargeted(SPEC, Retarget()) == SPEC
    assert retargeted(SPEC, Retarget(disks={0: DiskTarget()})) == SPEC
    swapped = retargeted(SPEC, Retarget(disks={0: DiskTarget(path="/srv/c.iso"), 2: DiskTarget(path="/srv/a.qcow2")}))
    assert [disk.path for disk in swapped.disks if isinstance(disk, ImageDisk)] == ["/srv/c.iso", "/srv/a.qcow2"]


def test_everything_wrong_with_a_wish_is_said_at_once() -> None:
    wanted = {
        0: DiskTarget(path="/srv/c.iso"),
        1: DiskTarget(path="/pool/b"),
        2: DiskTarget(format="qcow2"),
        3: DiskTarget(path="/x"),
        -1: DiskTarget(),
    }
    with pytest.raises(Invalid) as caught:
        retargeted(SPEC, Retarget(disks=wanted))
    assert {problem.path for problem in caught.value.problems} == {"$.disks[-1]", "$.disks[1].path", "$.disks[2].format", "$.disks[3]"}
    with pytest.raises(Invalid, match=r"disks\[2\] too"):
        retargeted(SPEC, Retarget(disks={0: DiskTarget(path="/srv/c.iso")}))
    with pytest.raises(Invalid, match="not absolute"):
        retargeted(SPEC, Retarget(disks={0: DiskTarget(path="c.iso")}))


def test_what_means_something_else_on_another_host_is_said() -> None:
    there = {"/fw/vars": FileFacts(kind="file", readable=True)}
    expected = [
        ("info", "forward-moves", "$.nics[0].forwards[0]"),
        ("info", "forward-moves", "$.nics[0].forwards[1]"),
        ("warning", "option-unknown", "$.extra_args[0]"),
    ]
    assert [(finding.severity, finding.code, finding.path) for finding in host_findings(SPEC, there)] == expected
    for facts in (FileFacts(kind="file"), FileFacts(kind="missing"), FileFacts(kind="denied", refusal="outside")):
        found = [(finding.severity, finding.code, finding.path) for finding in host_findings(SPEC, {"/fw/vars": facts})]
        assert found == [("warning", "template-missing", "$.firmware.vars"), *expected]
    assert list(host_findings(MachineSpec(name="one", board="x"), {})) == []
