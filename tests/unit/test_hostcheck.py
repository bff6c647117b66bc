"""What a check makes of the software on a host, and of a whole host."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from blockbuster import blockbuster_ctx

from qmpd import tpm
from qmpd.accelerator import Accelerators
from qmpd.hostcheck import check, firmware, remedies, software
from qmpd.hostcheck.tree import HostTree
from qmpd.probe import Emulators, ProbeProblem
from tests.unit import hosttree
from tests.unit.hosttree import emulator
from tests.unit.standin_emulator import make


@pytest.fixture(autouse=True)
def _no_blocking_calls() -> Iterator[None]:
    with blockbuster_ctx("qmpd"):
        yield


Host = Callable[..., HostTree]


@pytest.fixture
def host(tmp_path: Path) -> Host:
    """Makes a host of the files given by path."""
    return partial(hosttree.host, tmp_path / "host")


def test_emulators_are_listed_by_version_and_place() -> None:
    lines = software.emulator_lines([emulator("x86_64"), emulator("avr"), emulator("rx", version="8.0.0")], "x86_64", "debian")
    assert [(line.subject, line.found, line.value) for line in lines] == [
        ("QEMU 8.0.0", "1 in /usr/bin: rx", 1),
        ("QEMU 9.0.0", "2 in /usr/bin: avr, x86_64", 2),
    ]


def test_no_emulator_at_all_is_a_failure() -> None:
    lines = software.emulator_lines([], "x86_64", "debian")
    assert [(line.verdict, line.mend) for line in lines] == [("fail", "sudo apt install qemu-system")]


def test_an_emulator_that_does_not_answer_is_a_warning_and_not_an_emulator() -> None:
    lines = software.emulator_lines([ProbeProblem(path="/opt/qemu-system-toy", message="it died")], "x86_64", "")
    assert [(line.subject, line.verdict) for line in lines] == [("qemu-system-toy", "warn"), ("emulators", "fail")]
    assert "it died" in lines[0].meaning


def test_a_host_whose_own_architecture_has_no_emulator_is_a_warning() -> None:
    lines = software.emulator_lines([emulator("avr")], "x86_64", "fedora")
    assert [(line.subject, line.mend) for line in lines if line.verdict == "warn"] == [("emulator for x86_64", "sudo dnf install qemu")]


def test_a_build_without_a_sandbox_is_a_warning() -> None:
    lines = software.emulator_lines([emulator("x86_64", options=frozenset())], "x86_64", "")
    assert [line.found for line in lines if line.verdict == "warn"] == ["not in qemu-system-x86_64"]


HELP = "qemu-img version 9.1.0 (Debian)\nusage: qemu-img\n\nSupported formats: blkdebug qcow2 raw\n  vmdk\n\nSee <https://qemu.org>\n"


def test_image_formats_are_read_from_the_help() -> None:
    assert software.image_formats(HELP) == ("blkdebug", "qcow2", "raw", "vmdk")
    assert software.image_version(HELP) == "9.1.0"
    assert (software.image_formats("nonsense"), software.image_version("nonsense")) == ((), "of an unknown version")


async def test_a_host_without_qemu_img_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    line = await software.image_line("debian")
    assert (line.verdict, line.mend) == ("warn", "sudo apt install qemu-utils")


async def test_a_host_without_swtpm_has_machines_without_tpm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tpm, "ENVIRONMENT", {"PATH": str(tmp_path)})
    line = await software.tpm_line("debian")
    assert (line.verdict, line.found, line.meaning) == ("pass", "none", "No machine can have a TPM: sudo apt install swtpm")
    program = tmp_path / "swtpm"
    program.write_text("#!/bin/sh\necho TPM emulator version 0.7.1, Copyright\n")
    program.chmod(0o755)
    assert (await software.tpm_line("debian")).found == "0.7.1"


async def test_what_a_program_prints_is_read_whole_or_not_at_all() -> None:
    assert await software.printed("/bin/sh", "-c", "echo one; echo two") == "one\ntwo\n"
    assert await software.printed("/does/not/exist") is None
    endless = await software.printed("/bin/sh", "-c", "exec yes")
    assert endless is not None
    assert len(endless) == software.PRINT_LIMIT_BYTES


def descriptor(file: str, architecture: str = "x86_64", interface: str = "uefi", features: str = "") -> str:
    """A firmware descriptor."""
    return (
        f'{{"description": "", "interface-types": ["{interface}"], "mapping": {{"device": "flash", "executable": {{"filename": "{file}",'
        f' "format": "raw"}}}}, "targets": [{{"architecture": "{architecture}", "machines": []}}], "features": [{features}], "tags": []}}'
    )


USR = "/usr/share/qemu/firmware"


def test_uefi_is_found_through_its_descriptors(host: Host) -> None:
    tree = host(
        {
            f"{USR}/50-b.json": descriptor("/fw/b.fd"),
            f"{USR}/40-a.json": descriptor("/fw/a.fd", features='"secure-boot"'),
            f"{USR}/30-bios.json": descriptor("/fw/none.bin", interface="bios"),
            f"{USR}/20-mem.json": '{"interface-types": ["uefi"], "mapping": {"device": "memory", "filename": "/fw/a.fd"},'
            ' "targets": [{"architecture": "toy"}]}',
            f"{USR}/README": "not a descriptor",
            "/fw/a.fd": "",
            "/fw/b.fd": "",
        }
    )
    lines = firmware.uefi_lines(tree, ["toy", "x86_64"], "debian")
    assert [(line.subject, line.verdict, line.found) for line in lines] == [
        ("UEFI for toy", "pass", "/fw/a.fd"),
        ("UEFI for x86_64", "pass", "/fw/a.fd and 1 more, Secure Boot too"),
    ]


def test_missing_uefi_is_a_warning_only_for_installed_emulators(host: Host) -> None:
    lines = firmware.uefi_lines(host(), ["x86_64", "avr"], "arch")
    assert [(line.subject, line.verdict, line.mend) for line in lines] == [("UEFI for x86_64", "warn", "sudo pacman -S edk2-ovmf")]


def test_useless_descriptors_are_named_and_can_be_masked(host: Host) -> None:
    tree = host({f"{USR}/1.json": "{}", f"{USR}/2.json": descriptor("/gone.fd"), f"{USR}/3.json": "{", "/etc/qemu/firmware/3.json": ""})
    lines = firmware.uefi_lines(tree, [], "")
    assert [line.found for line in lines] == [
        f"{USR}/1.json is not a firmware descriptor",
        f"{USR}/2.json names /gone.fd, which does not exist",
    ]
    assert all(f"ln -s /dev/null /etc/qemu/firmware/{number}.json" in str(line.mend) for number, line in enumerate(lines, 1))


def test_firmware_that_qemu_loads_by_itself_is_looked_for_in_its_directories(tmp_path: Path) -> None:
    (tmp_path / "bios-256k.bin").write_text("")
    lines = firmware.built_in_lines(["avr", "i386", "riscv32", "x86_64"], [str(tmp_path)], "debian")
    assert [(line.subject, line.verdict, line.found) for line in lines] == [
        ("loaded by QEMU", "pass", "SeaBIOS (i386, x86_64)"),
        ("OpenSBI for riscv32", "warn", "opensbi-riscv32-generic-fw_dynamic.bin is missing"),
    ]
    assert str(tmp_path) in str(lines[1].mend)


def test_missing_firmware_is_installed() -> None:
    lines = firmware.built_in_lines(["ppc64", "x86_64"], [], "debian")
    assert [line.mend for line in lines] == ["sudo apt install qemu-system-data", "sudo apt install seabios"]


@pytest.mark.parametrize(
    ("os_release", "family"),
    [
        ("ID=debian\n", "debian"),
        ("ID=ubuntu\nID_LIKE=debian\n", "debian"),
        ('NAME="Rocky Linux"\nID="rocky"\nID_LIKE="rhel centos fedora"\n', "fedora"),
        ('ID="opensuse-tumbleweed"\nID_LIKE="opensuse suse"\n', "suse"),
        ("ID=arch\n", "arch"),
        ("ID=nixos\n", ""),
        ('ID="broken\n', ""),
        ("", ""),
    ],
)
def test_the_family_of_a_distribution_is_known(os_release: str, family: str) -> None:
    assert remedies.family(os_release) == family


def test_an_unknown_distribution_gets_a_sentence() -> None:
    assert remedies.installing("qemu-img", "") == "install qemu-img (Debian's package is qemu-utils)"


async def test_a_bare_host_fails_for_want_of_emulators_alone(host: Host) -> None:
    report = await check(Emulators(None, (), "/nowhere"), Accelerators(None, device="/nowhere"), tree=host(), host="x86_64")
    assert not report.ok
    assert [line.subject for line in report.lines if line.verdict == "fail"] == ["emulators"]


async def test_one_emulator_makes_a_host_pass(host: Host, tmp_path: Path) -> None:
    make(tmp_path / "bin" / "qemu-system-toy")
    report = await check(
        Emulators(None, (), str(tmp_path / "bin")), Accelerators(None), state_dir=str(tmp_path), tree=host({"/dev/kvm": ""}), host="x86_64"
    )
    assert report.ok
    assert {line.topic for line in report.lines} >= {
        "Processor",
        "KVM",
        "Networking",
        "Isolation",
        "Resources",
        "State directory",
        "Emulators",
    }
