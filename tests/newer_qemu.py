"""What is different when the tests run with another QEMU than the distribution's (`scripts/test --qemu DIR`).

Board files and guests are proved with QEMU 7.2. Where a newer one has dropped or renamed a part of a board, the test of that board
says so instead of failing; every other test has to pass as it is. An emulator that is not in DIR is the distribution's own.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final, NamedTuple

import pytest

#: The directory of another QEMU, when one is under test (scripts/lib/suite.py).
OTHER_QEMU: Final = os.environ.get("QMPD_TEST_QEMU")
#: Saying its version takes an emulator a tenth of a second.
VERSION_DEADLINE_S: Final = 20.0


class Difference(NamedTuple):
    """What keeps a test from passing, and the first major version for which it was seen."""

    since: int
    reason: str


BOARDS: Final = {
    "arm-highbank": Difference(11, "was removed in QEMU 11"),
    "arm-midway": Difference(11, "was removed in QEMU 11"),
    "ppc-bamboo": Difference(11, "needs a device tree that QEMU 11 looks for where Debian's package does not have it"),
}
GUESTS: Final = {
    "mips64-malta": Difference(10, "the 32-bit program does not run on a 64-bit malta of QEMU 10 and later"),
    "mips64el-malta": Difference(10, "the 32-bit program does not run on a 64-bit malta of QEMU 10 and later"),
    "ppc-bamboo": BOARDS["ppc-bamboo"],
}
#: Machine types that newer QEMUs call differently, for tests that give QEMU its options themselves; boards have `also`.
MACHINES: Final = {"hppa": "B160L"}
#: Why a test that needs the emulator's own file cannot run with what `scripts/setup --newer-qemu` made.
START_SCRIPT: Final = "the emulator under test is itself a start script, which adds options"


def _major_version(directory: str | None) -> int:
    if directory is None:
        return 0
    command = (str(Path(directory) / "qemu-system-x86_64"), "--version")
    said = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True, timeout=VERSION_DEADLINE_S).stdout
    found = re.search(r"version (\d+)\.", said)
    if found is None:
        raise ValueError(f"{command[0]} does not tell its version: {said!r}")
    return int(found[1])


#: The major version of the other QEMU; 0 with the distribution's own.
MAJOR_VERSION: Final = _major_version(OTHER_QEMU)


def is_other(emulator: str) -> bool:
    """Whether `qemu-system-EMULATOR` is one of the other QEMU's."""
    return OTHER_QEMU is not None and (Path(OTHER_QEMU) / f"qemu-system-{emulator}").exists()


def skip_where_it_differs(name: str, differences: Mapping[str, Difference]) -> None:
    """Skips the test of a board or guest that is known to be different in the QEMU under test. Never with the distribution's own."""
    difference = differences.get(name)
    if difference is not None and difference.since <= MAJOR_VERSION:
        pytest.skip(f"{name} {difference.reason}")


def skip_with_start_script() -> None:
    """Skips a test that needs the emulator's own file, or its options to be those that the test gave."""
    if OTHER_QEMU is not None:
        pytest.skip(START_SCRIPT)


def given(options: Iterable[str]) -> set[str]:
    """The options of a process, as adoption names them, without those that the start script of another QEMU adds."""
    return {option for option in options if OTHER_QEMU is None or not option.startswith("option -L ")}
