"""What to install, in the words of the distribution at hand."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Final

#: How each family installs a package.
INSTALLERS: Final = {
    "debian": "apt install {}",
    "fedora": "dnf install {}",
    "suse": "zypper install {}",
    "arch": "pacman -S {}",
}

#: Distributions whose ID_LIKE does not name their family.
FAMILIES: Final = {"ubuntu": "debian", "rhel": "fedora", "centos": "fedora", "opensuse": "suse", "sles": "suse"}

#: What is wanted, by family.
PACKAGES: Final[Mapping[str, Mapping[str, str]]] = {
    "all emulators": {"debian": "qemu-system", "fedora": "qemu", "suse": "qemu", "arch": "qemu-full"},
    "qemu-img": {"debian": "qemu-utils", "fedora": "qemu-img", "suse": "qemu-img", "arch": "qemu-img"},
    "swtpm": {"debian": "swtpm", "fedora": "swtpm", "suse": "swtpm", "arch": "swtpm"},
    "UEFI for x86_64": {"debian": "ovmf", "fedora": "edk2-ovmf", "suse": "qemu-ovmf-x86_64", "arch": "edk2-ovmf"},
    "UEFI for aarch64": {"debian": "qemu-efi-aarch64", "fedora": "edk2-aarch64", "suse": "qemu-uefi-aarch64", "arch": "edk2-aarch64"},
    "UEFI for arm": {"debian": "qemu-efi-arm", "fedora": "edk2-arm", "suse": "qemu-uefi-aarch32", "arch": "edk2-arm"},
    "SeaBIOS": {"debian": "seabios", "fedora": "seabios-bin", "suse": "qemu-seabios", "arch": "seabios"},
    "QEMU's firmware": {"debian": "qemu-system-data", "fedora": "qemu-common", "suse": "qemu", "arch": "qemu-common"},
}


def family(os_release: str) -> str:
    """The family of distributions that an /etc/os-release belongs to, or the empty string."""
    fields: dict[str, str] = {}
    for line in os_release.splitlines():
        key, separator, value = line.partition("=")
        if separator:
            fields[key] = _unquoted(value)
    for name in (fields.get("ID", ""), *fields.get("ID_LIKE", "").split()):
        word = name.split("-")[0]  # opensuse-leap, opensuse-tumbleweed
        known = FAMILIES.get(word, word)
        if known in INSTALLERS:
            return known
    return ""


def installing(wanted: str, family_name: str) -> str:
    """The command that installs what is wanted, or a sentence where the distribution is not known."""
    packages = PACKAGES[wanted]
    if family_name in packages:
        return "sudo " + INSTALLERS[family_name].format(packages[family_name])
    return f"install {wanted} (Debian's package is {packages['debian']})"


def _unquoted(value: str) -> str:
    try:
        return " ".join(shlex.split(value))
    except ValueError:
        return value
