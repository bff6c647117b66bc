"""From what a QEMU says of itself to a definition: nothing that is not understood is left unsaid."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from qmpd.adoption import NO_BOARD, NULL_UUID, Described, Subject, described, name_of
from qmpd.board import NamedBoard
from qmpd.catalogue import load
from qmpd.findings import Chardev, Device, Drive, Findings, Medium
from qmpd.spec import BiosFirmware, DisconnectedNic, ImageDisk, Kernel, SerialNone, UserNic

UUID = "0d9d3b6c-35d5-4f49-9d0c-3a2f2b1f6a11"
QEMU = ("qemu-system-x86_64", "-nodefaults")
FINDINGS = Findings(
    version="7.2.22",
    target="x86_64",
    name=None,
    uuid=NULL_UUID,
    kvm=False,
    machine="pc-q35-6.0",
    relatives={"pc-q35-7.2": "q35", "pc-q35-6.0": None, "pc-i440fx-7.2": "pc"},
    memory_bytes=64 * 1024 * 1024,
    cpus=1,
    cpu_type="qemu64-x86_64-cpu",
    boot={},
    drives=(),
    devices=(),
    chardevs=(),
)


@pytest.fixture(scope="module")
def boards() -> dict[str, NamedBoard]:
    return load([Path(__file__).parents[2] / "machines"]).boards


def told(boards: dict[str, NamedBoard], *argv: str, **changes: object) -> Described:
    findings = msgspec.structs.replace(FINDINGS, **changes)
    subject = Subject(findings=findings, argv=(*QEMU, *argv), directory="/home", name="lab", uuid=UUID)
    return described(subject, boards)


def test_the_board_is_that_of_the_machine_type_in_whatever_version(boards: dict[str, NamedBoard]) -> None:
    made = told(boards)
    assert (made.spec.board, made.spec.machine, made.spec.memory_mib, made.spec.accel) == ("x86_64-q35", "pc-q35-6.0", 64, "tcg")
    assert (made.spec.cpu.count, made.spec.cpu.model) == (1, "qemu64")
    assert made.unknown == ()


def test_a_machine_type_of_no_board_is_said_to_be_so(boards: dict[str, NamedBoard]) -> None:
    made = told(boards, machine="secret-board", relatives={})
    assert made.spec.board == NO_BOARD
    assert made.unknown == ("board: none in the catalogue is a x86_64 secret-board",)


def test_paths_begin_where_the_process_was_started(boards: dict[str, NamedBoard]) -> None:
    drive = Drive(
        device="d0", qdev="/machine/peripheral-anon/device[0]", driver="ide-cd", inserted=Medium(file="a.iso", drv="raw", ro=True)
    )
    made = told(boards, drives=(drive,), boot={"kernel": "k", "initrd": "/i", "append": "x"})
    assert made.spec.disks == (ImageDisk(path="/home/a.iso", format="raw", bus="ide", media="cdrom", read_only=True),)
    assert made.spec.kernel == Kernel(image="/home/k", initrd="/i", append="x", console=False)


@pytest.mark.parametrize(
    "drive",
    [
        Drive(device="pflash0", inserted=Medium(file="/code.fd", drv="raw")),
        Drive(device="d0", driver="virtio-blk-pci", qdev="/x", inserted=Medium(file="/a.vmdk", drv="vmdk")),
        Drive(device="d0", driver="virtio-blk-pci", qdev="/x", inserted=Medium(file="nbd://h/x", drv="raw")),
        Drive(device="d0", driver="virtio-blk-pci", qdev="/x", inserted=Medium(file='json:{"driver":"raw"}', drv="raw")),
        Drive(device="d0", driver="odd-disk", qdev="/x", inserted=Medium(file="/a", drv="raw")),
    ],
    ids=lambda drive: f"{drive.device} {drive.inserted.file}",
)
def test_a_drive_that_no_definition_can_say_is_named(boards: dict[str, NamedBoard], drive: Drive) -> None:
    made = told(boards, drives=(drive,))
    assert made.spec.disks == ()
    assert len(made.unknown) == 1
    assert drive.device in made.unknown[0]


def test_an_empty_drive_is_nothing(boards: dict[str, NamedBoard]) -> None:
    assert told(boards, drives=(Drive(device="ide2-cd0", driver="ide-cd", qdev="/x"),)).unknown == ()


def test_a_nic_needs_a_backend_that_is_understood(boards: dict[str, NamedBoard]) -> None:
    nic = Device(path="/machine/peripheral/n", driver="virtio-net-pci", mac="52:54:00:00:00:AA", netdev="n0")
    assert told(boards, "-netdev", "user,id=n0", devices=(nic,)).spec.nics == (UserNic(model="virtio", mac="52:54:00:00:00:aa"),)
    alone = msgspec.structs.replace(nic, netdev=None)
    assert told(boards, devices=(alone,)).spec.nics == (DisconnectedNic(model="virtio", mac="52:54:00:00:00:aa"),)
    for backend in ("tap,id=n0,ifname=t", "user,id=n0,hostfwd=tcp::1-:2", "user,id=other"):
        made = told(boards, "-netdev", backend, devices=(nic,))
        assert made.spec.nics == ()
        assert made.unknown == ("NIC virtio-net-pci 52:54:00:00:00:AA: on n0",)


def test_a_device_of_its_own_is_named(boards: dict[str, NamedBoard]) -> None:
    made = told(boards, devices=(Device(path="/a", driver="virtio-rng-pci"), Device(path="/b", driver="vfio-pci")))
    assert made.spec.rng
    assert made.unknown == ("device vfio-pci",)


@pytest.mark.parametrize(
    "words",
    [
        ("-rtc", "base=localtime"),
        ("-cpu", "qemu64,+vmx"),
        ("-smp", "2,sockets=2"),
        ("-m", "64,slots=2,maxmem=1G"),
        ("-machine", "q35,hpet=off"),
        ("-display", "gtk"),
        ("-nic", "user"),
        ("-bios", "/my.bin"),
        ("-snapshot", ""),
        ("-object", "secret,id=s,file=/x"),
    ],
    ids=" ".join,
)
def test_an_option_that_no_answer_covers_is_named(boards: dict[str, NamedBoard], words: tuple[str, str]) -> None:
    given = words if words[1] else words[:1]
    assert told(boards, *given).unknown == (f"option {' '.join(given)}",)
    assert not isinstance(told(boards, *given).spec.firmware, BiosFirmware)


def test_a_secret_in_an_option_is_not_told(boards: dict[str, NamedBoard]) -> None:
    assert told(boards, "-object", "secret,id=s,data=hunter2").unknown == ("option -object secret,id=s,data=***",)


def test_default_devices_are_not_guessed(boards: dict[str, NamedBoard]) -> None:
    subject = Subject(findings=FINDINGS, argv=("qemu-system-x86_64",), directory="/", name="lab", uuid=UUID)
    assert described(subject, boards).unknown == ("default devices: it was started without -nodefaults",)


def test_serial_ports_stay_where_they_are_and_it_is_said(boards: dict[str, NamedBoard]) -> None:
    made = told(boards, chardevs=(Chardev(label="serial0", filename="pty:/dev/pts/3"), Chardev(label="compat_monitor0", filename="unix:q")))
    assert made.spec.serial_ports == (SerialNone(),)
    assert [line for line in made.fixed if "pty:/dev/pts/3" in line]


def test_what_no_definition_may_say_is_left_out_and_named(boards: dict[str, NamedBoard]) -> None:
    drive = Drive(device="d0", driver="virtio-blk-pci", qdev="/x", inserted=Medium(file="/a\nb", drv="raw"))
    made = told(boards, drives=(drive,), cpu_type="odd model-x86_64-cpu")
    assert (made.spec.disks, made.spec.cpu.model, made.spec.memory_mib) == ((), None, 64)
    assert [line.partition(":")[0] for line in made.unknown] == ["cpu", "disks"]


@pytest.mark.parametrize(
    ("wanted", "own", "expected"),
    [
        ("x", "y", "x"),
        (None, "My Lab: 1!", "my-lab-1"),
        (None, None, "adopted-7"),
        (None, "\N{SNOWMAN}", "adopted-7"),
        (None, "a" * 80, "a" * 63),
    ],
)
def test_a_name_is_made_of_what_qemu_was_told(wanted: str | None, own: str | None, expected: str) -> None:
    assert name_of(wanted, msgspec.structs.replace(FINDINGS, name=own), 7) == expected
