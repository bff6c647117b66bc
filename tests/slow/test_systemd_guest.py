"""The slow proof of the units: a Debian guest with systemd, run by qmpd, in which qmpd runs a machine that outlives its daemon.

The guest is made of the distribution's packages and a wheel of this tree. What is proven is in `systemd_guest/proof.sh`. It needs root
(to make the guest's file system), the distribution's archive and the package index, and takes some minutes.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qmpd.lifecycle import AT_REST
from qmpd.service import Service
from qmpd.spec import Cpu, ImageDisk, Kernel, MachineSpec
from qmpd.views import ExpectRequest
from tests.unavailable import unavailable

pytestmark = [pytest.mark.slow, pytest.mark.qemu, pytest.mark.timeout(3600)]

ROOT = Path(__file__).parents[2]
UNITS = ROOT / "systemd"
PROOF = Path(__file__).parent / "systemd_guest"
#: The packages are unpacked once; a release changes rarely.
SUITE = "bookworm"
ARCHIVE = ROOT / ".cache" / "systemd-guest" / f"{SUITE}.tar"
#: The kernel of clouds has virtio and a serial console, and little else. No recommended packages: they would triple the guest.
PACKAGES = ("systemd-sysv", "dbus", "udev", "procps", "python3-venv", "qemu-system-misc", "qemu-utils", "linux-image-cloud-amd64")
TOOLS = ("mke2fs", "chroot", "tar")
#: A mirror and a slow processor together.
BUILD_DEADLINE_S = 1500
#: Booting Debian and emulating in the emulation, on a busy host.
STEP_DEADLINE_S = 900.0
#: A whole line of the proof: its end must have been seen.
SAID = r"PRO(?:VEN|OF) ([^\r\n]*)\r?\n"

STEPS = (
    "units are active",
    "a machine runs, held by unit and sandbox",
    "a machine is held to its limits until it ends",
    "a daemon of root makes a scope that outlives it",
    "the group may use the API and others may not",
    "the machine outlives a restart",
    "the machine outlives kill -9",
    "the machine outlives a stop",
    "a daemon that hangs is replaced by the watchdog",
    "first boot",
    "the machine is started with the host",
    "the machine was ended in order with the host",
    "second boot",
)


def run(*command: str | Path) -> None:
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=BUILD_DEADLINE_S
    )
    assert done.returncode == 0, f"{command[0]}: {done.stdout[-4000:]}"


def require_host() -> None:
    """Skips, or in CI fails, where the guest cannot be made."""
    tools = TOOLS if ARCHIVE.exists() else ("mmdebstrap", *TOOLS)
    missing = [name for name in tools if shutil.which(name) is None]
    problem = f"{', '.join(missing)}: not installed" if missing else "needs root to make a file system" if os.geteuid() != 0 else None
    if problem:
        unavailable(problem)


def packages() -> Path:
    """The file tree of the distribution's packages, as an archive."""
    if not ARCHIVE.exists():
        ARCHIVE.parent.mkdir(parents=True, exist_ok=True)
        draft = ARCHIVE.with_name(f"draft-{os.getpid()}.tar")
        options = ("--mode=root", "--variant=minbase", '--aptopt=APT::Install-Recommends "false"', f"--include={','.join(PACKAGES)}")
        try:
            run("mmdebstrap", *options, SUITE, draft)
            draft.rename(ARCHIVE)
        finally:
            draft.unlink(missing_ok=True)
    return ARCHIVE


def wheels(directory: Path) -> None:
    """This tree as a wheel, with all it depends on. The guest has the Python of its distribution, not ours."""
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", directory, ROOT)
    (ours,) = directory.glob("qmpd-*.whl")
    platform = ("--only-binary=:all:", "--python-version=3.11", "--implementation=cp", "--abi=cp311", "--abi=abi3", "--abi=none")
    tags = [f"--platform=manylinux_2_{minor}_x86_64" for minor in (17, 28, 34)] + ["--platform=manylinux2014_x86_64"]
    run(sys.executable, "-m", "pip", "download", *platform, *tags, "-d", directory, ours)


def install(tree: Path, wheel_directory: Path) -> None:
    """What docs/systemd.md says, in the guest's tree, and the proof beside it."""
    shutil.copytree(PROOF, tree / "proof")
    shutil.copytree(wheel_directory, tree / "proof" / "wheels")
    run("chroot", tree, "python3", "-m", "venv", "/opt/qmpd")
    run("chroot", tree, "/opt/qmpd/bin/pip", "install", "--no-index", "--find-links=/proof/wheels", "qmpd")
    run("chroot", tree, "ln", "-s", "/opt/qmpd/bin/qmpd", "/opt/qmpd/bin/qmpctl", "/usr/local/bin/")
    for source, target in {
        "qmpd.toml": "etc/qmpd",
        "sysusers.d/qmpd.conf": "usr/local/lib/sysusers.d",
        "tmpfiles.d/qmpd.conf": "usr/local/lib/tmpfiles.d",
    }.items():
        (tree / target).mkdir(parents=True, exist_ok=True)
        shutil.copy(UNITS / source, tree / target)
    for unit in [*UNITS.glob("*.service"), *UNITS.glob("*.socket"), *UNITS.glob("*.slice"), PROOF / "proof.service"]:
        shutil.copy(unit, tree / "etc/systemd/system")
    run("chroot", tree, "systemd-sysusers")
    run(
        "chroot",
        tree,
        "systemctl",
        "enable",
        "qmpd.socket",
        "qmpd.service",
        "qmpd-guests-shutdown.service",
        "qmpd-machines.service",
        "proof.service",
    )


@pytest.fixture
def guest(tmp_path: Path) -> tuple[Path, Path, Path]:
    """Kernel, initial RAM disk and disk image."""
    require_host()
    tree, wheel_directory = tmp_path / "tree", tmp_path / "wheels"
    tree.mkdir()
    run("tar", "-C", tree, "-xpf", packages())
    wheels(wheel_directory)
    install(tree, wheel_directory)
    (kernel,) = (tree / "boot").glob("vmlinuz-*")
    (initrd,) = (tree / "boot").glob("initrd.img-*")
    image = tmp_path / "root.img"
    run("mke2fs", "-q", "-t", "ext4", "-d", tree, image, "4G")
    for path in (kernel, initrd):
        shutil.copy(path, tmp_path / path.name)
    shutil.rmtree(tree)
    return tmp_path / kernel.name, tmp_path / initrd.name, image


async def test_machines_outlive_the_daemon_under_systemd(service: Service, guest: tuple[Path, Path, Path]) -> None:
    kernel, initrd, image = map(str, guest)
    spec = MachineSpec(
        name="host",
        board="x86_64-q35",
        accel="auto",
        memory_mib=1024,
        cpu=Cpu(count=2),
        kernel=Kernel(image=kernel, initrd=initrd, append="root=/dev/vda rw quiet systemd.show_status=no"),
        disks=(ImageDisk(path=image, format="raw"),),
    )
    await service.create(spec, start=True)

    since = 0
    for step in STEPS:
        found = await service.expect("host", ExpectRequest(pattern=SAID, since=since, timeout_s=STEP_DEADLINE_S))
        assert found.matched, found.tail
        assert found.groups[0] == step, found.tail
        since = found.end or 0

    async with asyncio.timeout(STEP_DEADLINE_S):
        await service.wait("host", frozenset(AT_REST), STEP_DEADLINE_S)
