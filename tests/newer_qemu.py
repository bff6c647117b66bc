"""What is different when the tests run with another QEMU than the distribution's (`scripts/test --qemu DIR`).

Board files and guests are proved with QEMU 7.2. Where a newer one has dropped or renamed a part of a board, the test of that board
says so instead of failing; every other test has to pass as it is.
"""

from __future__ import annotations

import os

import pytest

#: The directory of another QEMU, when one is under test (scripts/lib/suite.py).
OTHER_QEMU = os.environ.get("QMPD_TEST_QEMU")

BOARDS = {
    "arm-ast2600-evb": "takes SD cards and flash as devices since QEMU 10",
    "arm-highbank": "was removed in QEMU 11",
    "arm-midway": "was removed in QEMU 11",
    "hppa-hppa": "is called B160L since QEMU 10, and has no SCSI controller without QEMU's default devices",
    "ppc-bamboo": "needs a device tree that Debian's newer packages do not have",
    "riscv64-sifive-u": "has a flash of another size since QEMU 10",
}
GUESTS = {
    "hppa-hppa": BOARDS["hppa-hppa"],
    "mips64-malta": "the 32-bit program does not run on a 64-bit malta of QEMU 10 and later",
    "mips64el-malta": "the 32-bit program does not run on a 64-bit malta of QEMU 10 and later",
    "nios2-10m50": "was removed in QEMU 9.1",
    "ppc-bamboo": BOARDS["ppc-bamboo"],
}


def skip_where_it_differs(name: str, differences: dict[str, str]) -> None:
    """Skips the test of a board or guest that is known to be different in the QEMU under test. Never with the distribution's own."""
    if OTHER_QEMU is not None and name in differences:
        pytest.skip(f"{name} {differences[name]}")
