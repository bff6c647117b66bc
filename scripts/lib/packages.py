"""Which distribution packages each purpose needs, and which of them this host lacks.

The guests of the demo are named by the board files, the assemblers of the test guests by their catalogue: each is read from there.
"""

from __future__ import annotations

import subprocess
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from scripts.lib.demo_boards import BOARDS

#: Debian 12's names. `qemu-system-misc` holds alpha, hppa, m68k, riscv, s390x, sh4 and the small ones.
EMULATORS: Final = (
    "qemu-system-arm",
    "qemu-system-mips",
    "qemu-system-misc",
    "qemu-system-ppc",
    "qemu-system-sparc",
    "qemu-system-x86",
    "qemu-utils",
)
FIRMWARE: Final = (
    "ipxe-qemu",
    "opensbi",
    "ovmf",
    "qemu-efi-aarch64",
    "qemu-efi-arm",
    "qemu-system-data",
    "seabios",
    "u-boot-qemu",
)
#: tmux: qmpctl's attach is tested in a real terminal. iproute2: what listens is looked at with ss. systemd: its tools check the units.
#: prometheus: promtool checks the metrics and the dashboard. swtpm: machines with a TPM.
TEST_TOOLS: Final = ("iproute2", "prometheus", "swtpm", "systemd", "tmux")
#: A Debian guest is made of packages, in which the units of systemd/ have to hold.
SLOW_TOOLS: Final = ("e2fsprogs", "mmdebstrap")
TEST_GUESTS: Final = Path("tests/guests/guests.toml")
#: The guest that `scripts/bench` lets flood its serial port, by the name of its toolchain in the catalogue of test guests.
BENCH_TOOLCHAIN: Final = "aarch64"
PURPOSES: Final = ("run", "demo", "bench", "test", "slow")


def needed(purpose: str, root: Path) -> tuple[str, ...]:
    """The packages `purpose` needs, sorted. `run` is part of every other purpose; the tests boot every guest the demo boots, and more."""
    names = {*EMULATORS, *FIRMWARE}
    machines = root / "machines"
    if purpose == "demo":
        names |= guest_packages(machines / f"{board}.toml" for board in BOARDS)
    if purpose == "bench":
        names |= assembler_packages(root / TEST_GUESTS, BENCH_TOOLCHAIN)
    if purpose == "slow":
        names |= set(SLOW_TOOLS)
    if purpose in {"test", "slow"}:
        names |= {*TEST_TOOLS, *assembler_packages(root / TEST_GUESTS), *guest_packages(machines.glob("*.toml"))}
    return tuple(sorted(names))


def guest_packages(boards: Iterable[Path]) -> set[str]:
    """The packages the proven guests of these board files come from."""
    names: set[str] = set()
    for path in boards:
        guest = tomllib.loads(path.read_text(encoding="utf-8")).get("guest", {})
        names.update(guest.get("packages", ()))
    return names


def assembler_packages(guests: Path, only: str | None = None) -> set[str]:
    """The packages of the assemblers that the test guests are made with; of the toolchain called `only`, if it is given."""
    toolchains = tomllib.loads(guests.read_text(encoding="utf-8"))["toolchains"]
    return {toolchain["package"] for name, toolchain in toolchains.items() if only in {None, name}}


def missing(names: tuple[str, ...]) -> tuple[str, ...]:
    """Those of `names` that are not installed, in their order. Raises FileNotFoundError where there is no dpkg."""
    if not names:
        return ()
    answer = subprocess.run(
        ["dpkg-query", "-W", "-f", "${Package}\\t${db:Status-Status}\\n", *names],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,  # 1 says that some are unknown to dpkg, which is an answer
    )
    installed = {line.split("\t")[0] for line in answer.stdout.splitlines() if line.endswith("\tinstalled")}
    return tuple(name for name in names if name not in installed)
