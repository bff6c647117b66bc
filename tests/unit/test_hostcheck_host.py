"""What a check makes of a host's processor, kernel and resources."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import msgspec
import pytest

from qmpd.accelerator import Device
from qmpd.facts import AcceleratorFacts
from qmpd.hostcheck import kernel, processor, resources
from qmpd.hostcheck.tree import TEXT_LIMIT_BYTES, HostTree
from tests.unit import hosttree
from tests.unit.hosttree import emulator

Host = Callable[..., HostTree]


@pytest.fixture
def host(tmp_path: Path) -> Host:
    """Makes a host of the files given by path."""
    return partial(hosttree.host, tmp_path / "host")


INTEL = "processor\t: 0\nvendor_id\t: GenuineIntel\nflags\t\t: fpu vmx sse\n"
AMD = "processor\t: 0\nvendor_id\t: AuthenticAMD\nflags\t\t: fpu svm sse sev\n"


@pytest.mark.parametrize(
    ("cpuinfo", "machine", "found"),
    [
        (INTEL, "x86_64", "Intel VT-x (vmx)"),
        (AMD, "x86_64", "AMD-V (svm)"),
        ("flags\t\t: fpu sse\n", "x86_64", None),
        ("vmx flags\t: vnmi\nflags\t\t: fpu\n", "x86_64", None),
        ("", "x86_64", None),
        ("features\t: esan3 zarch sie\n", "s390x", "SIE (sie)"),
        ("features\t: esan3 zarch\n", "s390x", None),
        ("isa\t\t: rv64imafdch_zicsr_zifencei\n", "riscv64", "the hypervisor extension (h)"),
        ("isa\t\t: rv64imafdc_zihintpause\n", "riscv64", None),
        ("platform\t: PowerNV\n", "ppc64le", "POWER hypervisor mode (PowerNV)"),
        ("platform\t: pSeries\n", "ppc64le", ""),
        ("Features\t\t: cpucfg lam lvz\n", "loongarch64", "LVZ (lvz)"),
        ("Features\t: fp asimd\n", "aarch64", ""),
    ],
)
def test_virtualisation_is_read_from_the_processor_flags(cpuinfo: str, machine: str, found: str | None) -> None:
    assert processor.virtualisation(cpuinfo, machine) == found


def test_a_processor_without_virtualisation_is_mended_in_the_firmware(host: Host) -> None:
    line = processor.virtualisation_line(host({"/proc/cpuinfo": "flags : fpu\n"}), "x86_64")
    assert line.verdict == "warn"
    assert "firmware" in str(line.mend)


def test_a_guest_without_virtualisation_is_mended_in_its_hypervisor(host: Host) -> None:
    line = processor.virtualisation_line(host({"/proc/cpuinfo": "flags : fpu hypervisor\n"}), "x86_64")
    assert (line.verdict, line.found) == ("warn", "none offered, inside another hypervisor")
    assert "nested" in str(line.mend)


def test_virtualisation_in_software_is_one_too(host: Host) -> None:
    line = processor.virtualisation_line(host({"/proc/cpuinfo": "flags : fpu\n", "/sys/module/kvm_pvm/x": ""}), "x86_64")
    assert line.verdict == "pass"
    assert "kvm_pvm" in line.found


@pytest.mark.parametrize(("value", "verdict"), [("Y\n", "pass"), ("1\n", "pass"), ("N\n", "warn"), ("0\n", "warn")])
def test_nesting_is_read_from_the_module(host: Host, value: str, verdict: str) -> None:
    line = processor.nesting_line(host({"/sys/module/kvm_intel/parameters/nested": value}))
    assert line is not None
    assert line.verdict == verdict
    assert ("kvm_intel nested=1" in str(line.mend)) == (verdict == "warn")


def test_nesting_is_not_mentioned_where_there_is_no_such_setting(host: Host) -> None:
    assert processor.nesting_line(host()) is None


@pytest.mark.parametrize(
    ("files", "verdict", "mend"),
    [
        ({"/sys/kernel/iommu_groups/0/type": "", "/sys/kernel/iommu_groups/1/type": ""}, "pass", None),
        ({}, "pass", None),
        ({"/sys/firmware/acpi/tables/DMAR": ""}, "warn", "boot the kernel with intel_iommu=on"),
        (
            {"/sys/firmware/acpi/tables/DMAR": "", "/proc/cmdline": "quiet intel_iommu=on"},
            "warn",
            "enable the IOMMU in the firmware's set-up",
        ),
        ({"/sys/firmware/acpi/tables/IVRS": ""}, "warn", "enable the IOMMU in the firmware's set-up"),
    ],
)
def test_an_iommu_that_is_there_should_be_on(host: Host, files: dict[str, str], verdict: str, mend: str | None) -> None:
    line = processor.iommu_line(host(files), "x86_64")
    assert (line.verdict, line.mend) == (verdict, mend)


@pytest.mark.parametrize(
    ("machine", "files", "verdict", "found"),
    [
        ("x86_64", {"/proc/cpuinfo": INTEL}, "pass", "not offered by this processor"),
        ("x86_64", {"/proc/cpuinfo": AMD}, "warn", "SEV in the processor, not enabled"),
        ("x86_64", {"/proc/cpuinfo": AMD, "/sys/module/kvm_amd/parameters/sev": "Y"}, "pass", "SEV"),
        ("x86_64", {"/proc/cpuinfo": "flags : tdx_host_platform", "/sys/module/kvm_intel/parameters/tdx": "Y"}, "pass", "TDX"),
        ("s390x", {"/proc/cpuinfo": "facilities : 0 1 158"}, "warn", "Secure Execution in the processor, not enabled"),
        ("s390x", {"/sys/firmware/uv/prot_virt_host": "1"}, "pass", "Secure Execution"),
        ("s390x", {}, "pass", "not offered by this processor"),
    ],
)
def test_encrypted_guests_are_a_warning_only_where_they_could_be_had(
    host: Host, machine: str, files: dict[str, str], verdict: str, found: str
) -> None:
    line = processor.secure_guest_line(host(files), machine)
    assert (line.verdict, line.found) == (verdict, found)


@pytest.mark.parametrize(
    ("files", "verdict", "found", "mend"),
    [
        ({"/sys/module/kvm/x": "", "/sys/module/kvm_intel/x": ""}, "pass", "kvm_intel, kvm", None),
        ({"/dev/kvm": ""}, "pass", "built in, or loaded at first use", None),
        ({"/proc/cpuinfo": INTEL}, "warn", "not loaded", "sudo modprobe kvm_intel"),
        ({"/proc/cpuinfo": AMD, "/sys/module/kvm/x": ""}, "warn", "not loaded", "sudo modprobe kvm_amd"),
    ],
)
def test_the_kernel_module_is_named(host: Host, files: dict[str, str], verdict: str, found: str, mend: str | None) -> None:
    line = kernel.module_line(host(files), "x86_64")
    assert (line.verdict, line.found, line.mend) == (verdict, found, mend)


@pytest.mark.parametrize(
    ("device", "group", "verdict", "mend"),
    [
        (Device(state="open"), "kvm", "pass", ""),
        (Device(state="missing"), "", "warn", "--device /dev/kvm"),
        (Device(state="denied"), "kvm", "warn", "sudo usermod -aG kvm ada"),
        (Device(state="denied"), "root", "warn", "sudo chgrp kvm /dev/kvm"),
        (Device(state="broken", detail="it is broken"), "kvm", "warn", "enable virtualisation first"),
    ],
)
def test_a_kvm_device_that_cannot_be_used_is_mended(device: Device, group: str, verdict: str, mend: str) -> None:
    line = kernel.device_line(device, group, "ada")
    assert line.verdict == verdict
    assert mend in str(line.mend)


@pytest.mark.parametrize(("usable", "ratio", "verdict"), [(True, 12.0, "pass"), (False, 0.1, "warn"), (False, None, "warn")])
def test_the_measured_speed_is_in_the_report(usable: bool, ratio: float | None, verdict: str) -> None:
    line = kernel.speed_line(emulator("x86_64"), AcceleratorFacts(usable=usable, reason="measured", ratio=ratio))
    assert (line.verdict, line.value, line.found) == (verdict, ratio, "measured")


def test_devices_of_fast_networks_are_looked_for(host: Host) -> None:
    bare = host()
    assert (kernel.vhost_line(bare).mend, kernel.tun_line(bare).mend) == ("sudo modprobe vhost_net", "sudo modprobe tun")
    there = host({"/dev/vhost-net": "", "/dev/net/tun": ""})
    assert (kernel.vhost_line(there).verdict, kernel.tun_line(there).verdict) == ("pass", "pass")


@pytest.mark.parametrize(
    ("files", "mend"),
    [
        ({"/proc/sys/user/max_user_namespaces": "15000"}, None),
        ({"/proc/sys/user/max_user_namespaces": "0"}, "sudo sysctl user.max_user_namespaces=15000"),
        (
            {"/proc/sys/user/max_user_namespaces": "9", "/proc/sys/kernel/unprivileged_userns_clone": "0"},
            "sudo sysctl kernel.unprivileged_userns_clone=1",
        ),
        (
            {"/proc/sys/user/max_user_namespaces": "9", "/proc/sys/kernel/apparmor_restrict_unprivileged_userns": "1"},
            "sudo sysctl kernel.apparmor_restrict_unprivileged_userns=0",
        ),
    ],
)
def test_what_stands_against_user_namespaces_is_named(host: Host, files: dict[str, str], mend: str | None) -> None:
    assert kernel.namespaces_line(host(files)).mend == mend


def test_seccomp_is_looked_for(host: Host) -> None:
    assert kernel.seccomp_line(host()).verdict == "warn"
    assert kernel.seccomp_line(host({"/proc/sys/kernel/seccomp/actions_avail": "kill_process allow"})).verdict == "pass"


def test_memory_is_counted(host: Host) -> None:
    line = resources.memory_line(host({"/proc/meminfo": "MemTotal:       8388608 kB\nMemAvailable:   4194304 kB\n"}))
    assert (line.verdict, line.found, line.value) == ("pass", "4.0 GiB available of 8.0 GiB", 4 * 2**30)
    assert resources.memory_line(host({"/proc/meminfo": "MemTotal: 8388608 kB\nMemAvailable: 1024 kB\n"})).verdict == "warn"


def test_huge_pages_are_counted_by_size(host: Host) -> None:
    assert resources.hugepages_line(host()).found == "none reserved; no transparent ones"
    base = "/sys/kernel/mm/hugepages/hugepages-2048kB"
    tree = host(
        {
            f"{base}/nr_hugepages": "8",
            f"{base}/free_hugepages": "3",
            "/sys/kernel/mm/transparent_hugepage/enabled": "always [madvise] never",
        }
    )
    assert resources.hugepages_line(tree).found == "8 of 2048kB (3 free); transparent ones: madvise"


def limits_file(files: str, processes: str, memory: str) -> str:
    """A /proc/self/limits."""
    return (
        "Limit                     Soft Limit           Hard Limit           Units     \n"
        f"Max processes             {processes:<41} processes \n"
        f"Max open files            {files:<41} files     \n"
        f"Max locked memory         {memory:<41} bytes     \n"
        "Max nice priority         0                    0                    \n"
    )


def test_generous_limits_pass(host: Host) -> None:
    lines = resources.limit_lines(
        host({"/proc/self/limits": limits_file("65536                65536", "unlimited unlimited", "unlimited unlimited")})
    )
    assert [(line.subject, line.verdict, line.found, line.meaning) for line in lines] == [
        ("open files", "pass", "65536", ""),
        ("processes", "pass", "unlimited", ""),
        ("locked memory", "pass", "unlimited", ""),
    ]


def test_limits_that_can_be_raised_pass_and_say_how(host: Host) -> None:
    lines = resources.limit_lines(host({"/proc/self/limits": limits_file("1024 1048576", "4096 4096", "8388608 8388608")}))
    assert lines[0].verdict == "pass"
    assert "raised to 1048576 (ulimit -n" in lines[0].meaning
    assert lines[2].found == "8 MiB"


def test_tight_limits_are_a_warning(host: Host) -> None:
    lines = resources.limit_lines(host({"/proc/self/limits": limits_file("1024 1024", "100 200", "0 0")}))
    assert [(line.verdict, line.found) for line in lines[:2]] == [("warn", "at most 1024"), ("warn", "at most 200")]


MOUNTS = """\
27 1 254:0 / / rw,relatime - ext4 /dev/vda rw
30 27 0:25 / /srv rw - nfs4 server:/srv rw
31 27 0:26 / /srv/with\\040space rw shared:1 - tmpfs tmpfs rw
32 27 0:27 / /sr rw - btrfs /dev/vdb rw
not a mount
"""


@pytest.mark.parametrize(
    ("directory", "kind"),
    [("/", "ext4"), ("/var/lib", "ext4"), ("/srv", "nfs4"), ("/srv/x", "nfs4"), ("/srv/with space/x", "tmpfs"), ("/srvx", "ext4")],
)
def test_the_file_system_is_that_of_the_longest_mount_point(directory: str, kind: str) -> None:
    assert resources.file_system(MOUNTS, directory) == kind


def test_a_file_system_nobody_knows_is_unknown() -> None:
    assert resources.file_system("", "/srv") == "unknown"


def volume(**changes: object) -> resources.Volume:
    """A good place for machines, with changes."""
    good = resources.Volume(directory="/d", kind="ext4", device=1, free_bytes=2**40, total_bytes=2**41, free_inodes=10**6, writable=True)
    return msgspec.structs.replace(good, **changes)


@pytest.mark.parametrize(
    ("changes", "verdicts"),
    [
        ({}, ["pass", "pass"]),
        ({"free_bytes": 2**20}, ["warn", "pass"]),
        ({"free_inodes": 3}, ["warn", "pass"]),
        ({"free_inodes": None}, ["pass", "pass"]),
        ({"kind": "nfs4"}, ["pass", "warn"]),
        ({"kind": "tmpfs"}, ["pass", "warn"]),
        ({"writable": False}, ["pass", "pass", "warn"]),
    ],
)
def test_the_state_directory_must_hold_and_keep_machines(changes: dict[str, object], verdicts: list[str]) -> None:
    assert [line.verdict for line in resources.volume_lines(volume(**changes))] == verdicts


def test_a_state_directory_that_is_not_there_yet_is_judged_by_its_parent(tmp_path: Path, host: Host) -> None:
    found = resources.volume(host({"/proc/self/mountinfo": "27 1 254:0 / / rw - xfs /dev/vda rw\n"}), str(tmp_path / "a" / "b"))
    assert found.kind == "xfs"
    assert found.writable
    assert 0 < found.free_bytes <= found.total_bytes


def test_a_tree_answers_nothing_for_what_is_not_there(host: Host) -> None:
    tree = host({"/long": "x" * (TEXT_LIMIT_BYTES + 1), "/odd": "\udcff".encode(errors="surrogateescape").decode(errors="replace")})
    assert (tree.text("/none"), tree.names("/none"), tree.exists("/none"), tree.permits("/none")) == ("", (), False, False)
    assert len(tree.text("/long")) == TEXT_LIMIT_BYTES
