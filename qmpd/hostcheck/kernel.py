"""What the kernel offers: KVM, the devices of fast networking, namespaces and seccomp."""

from __future__ import annotations

import grp
import os
import pwd
from typing import Final

from qmpd.accelerator import Device, open_device
from qmpd.facts import AcceleratorFacts, EmulatorFacts
from qmpd.hostcheck.line import Topic
from qmpd.hostcheck.processor import KVM_MODULES, X86
from qmpd.hostcheck.tree import HostTree
from qmpd.views import CheckLine

KVM: Final = Topic("KVM")
NETWORK: Final = Topic("Networking")
ISOLATION: Final = Topic("Isolation")

EMULATED: Final = "Machines of this host's architecture are emulated (TCG) unless their definition insists on KVM."

OPEN_TO_GROUP: Final = "sudo chgrp kvm /dev/kvm && sudo chmod 660 /dev/kvm, and join the group kvm"


def module_line(tree: HostTree, host: str) -> CheckLine:
    """Whether the kernel has KVM."""
    loaded = [module for module in KVM_MODULES if tree.exists(f"/sys/module/{module}")]
    # On x86 `kvm` is only what the modules of the processors' makers share.
    if loaded and not (host in X86 and loaded == ["kvm"]):
        return KVM.passed("kernel module", ", ".join(loaded))
    if tree.exists("/dev/kvm"):
        return KVM.passed("kernel module", "built in, or loaded at first use")
    module = "kvm" if host not in X86 else "kvm_amd" if "AuthenticAMD" in tree.text("/proc/cpuinfo") else "kvm_intel"
    return KVM.warned("kernel module", "not loaded", EMULATED, f"sudo modprobe {module}")


def device_line(device: Device, group: str, user: str) -> CheckLine:
    """Whether this user may use KVM; `group` is the device's."""
    if device.state == "open":
        return KVM.passed("/dev/kvm", "opens")
    if device.state == "missing":
        return KVM.warned(
            "/dev/kvm", "missing", EMULATED, "load the kernel module (above); into a container it is passed: --device /dev/kvm"
        )
    if device.state == "denied":
        mend = OPEN_TO_GROUP if group in ("root", "") else f"sudo usermod -aG {group} {user}, and log in again"
        return KVM.warned("/dev/kvm", f"there, but user {user} may not open it", EMULATED, mend)
    return KVM.warned("/dev/kvm", device.detail, EMULATED, "enable virtualisation first (above)")


def speed_line(emulator: EmulatorFacts, verdict: AcceleratorFacts) -> CheckLine:
    """Whether KVM is worth using; `value` is how many times it is as fast as TCG (where it was stopped: at most)."""
    subject = f"speed ({emulator.target})"
    if verdict.usable:
        return KVM.passed(subject, verdict.reason, value=verdict.ratio)
    mend = "enable hardware virtualisation for this host in the hypervisor above it" if verdict.ratio is not None else None
    return KVM.warned(subject, verdict.reason, EMULATED, mend, value=verdict.ratio)


def vhost_line(tree: HostTree) -> CheckLine:
    """Whether the kernel can carry guests' network packets itself."""
    if tree.exists("/dev/vhost-net"):
        return NETWORK.passed("/dev/vhost-net", "there")
    return NETWORK.warned(
        "/dev/vhost-net",
        "missing",
        "Tap networks pass every packet through QEMU, which is slower. User networks do not need it.",
        "sudo modprobe vhost_net",
    )


def tun_line(tree: HostTree) -> CheckLine:
    """Whether tap devices can be had."""
    if not tree.exists("/dev/net/tun"):
        return NETWORK.warned("/dev/net/tun", "missing", "There are no tap devices; user networks do not need them.", "sudo modprobe tun")
    if not tree.permits("/dev/net/tun"):
        return NETWORK.warned(
            "/dev/net/tun",
            "there, but this user may not open it",
            "Tap devices must be made beforehand by root; user networks do not need them.",
            "sudo chmod 666 /dev/net/tun (the kernel still asks for CAP_NET_ADMIN to make devices)",
        )
    return NETWORK.passed("/dev/net/tun", "opens")


def namespaces_line(tree: HostTree) -> CheckLine:
    """Whether processes without privileges may make user namespaces."""
    subject = "user namespaces"
    obstacles = {
        "user.max_user_namespaces": (tree.text("/proc/sys/user/max_user_namespaces") in ("0", ""), "15000"),
        "kernel.unprivileged_userns_clone": (tree.text("/proc/sys/kernel/unprivileged_userns_clone") == "0", "1"),
        "kernel.apparmor_restrict_unprivileged_userns": (
            tree.text("/proc/sys/kernel/apparmor_restrict_unprivileged_userns") == "1",
            "0",
        ),
    }
    for name, (stands, wanted) in obstacles.items():
        if stands:
            return ISOLATION.warned(
                subject,
                f"not for everybody ({name})",
                "Helpers that confine themselves (passt, virtiofsd) need them when qmpd does not run as root.",
                f"sudo sysctl {name}={wanted}",
            )
    return ISOLATION.passed(subject, "allowed")


def seccomp_line(tree: HostTree) -> CheckLine:
    """Whether the kernel can filter system calls."""
    if tree.text("/proc/sys/kernel/seccomp/actions_avail"):
        return ISOLATION.passed("seccomp", "in the kernel")
    return ISOLATION.warned(
        "seccomp", "not in the kernel", "QEMU's system calls cannot be filtered.", "run a kernel that has CONFIG_SECCOMP_FILTER"
    )


def lines(tree: HostTree, host: str) -> list[CheckLine]:
    """Everything about the kernel except the speed of KVM, which takes a measurement. Blocks."""
    path = tree.path("/dev/kvm")
    try:
        group = grp.getgrgid(path.stat().st_gid).gr_name
    except (OSError, KeyError):
        group = ""
    return [
        module_line(tree, host),
        device_line(open_device(str(path)), group, _user()),
        vhost_line(tree),
        tun_line(tree),
        namespaces_line(tree),
        seccomp_line(tree),
    ]


def _user() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())
