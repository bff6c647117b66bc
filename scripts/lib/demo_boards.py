"""The boards of the demo: one of every architecture whose firmware or kernel Debian packages, and some with a second kind of guest."""

from __future__ import annotations

from typing import Final

BOARDS: Final = (
    "aarch64-virt",
    "alpha-clipper",
    "arm-virt",
    "hppa-hppa",
    "i386-q35",
    "mips64el-loongson3",
    "mipsel-malta",
    "ppc-mac99",
    "ppc-ppce500",
    "ppc64-powernv9",
    "ppc64-pseries",
    "riscv64-virt",
    "sparc-ss5",
    "sparc64-sun4u",
    "x86_64-pc",
    "x86_64-q35",
)
#: Boots the whole of Debian's installer too, from the files of its proven guest, which is only a shell in it.
INSTALLER: Final = "aarch64-virt"
