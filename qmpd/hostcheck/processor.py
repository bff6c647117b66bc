"""What the processor and the chipset offer: virtualisation, nesting, an IOMMU, encrypted guests."""

from __future__ import annotations

import re
from typing import Final

from qmpd.hostcheck.line import Topic
from qmpd.hostcheck.tree import HostTree
from qmpd.views import CheckLine

TOPIC: Final = Topic("Processor")
#: What the kernel writes into a module parameter that is on.
ON: Final = frozenset({"Y", "y", "1"})
#: Modules that run guests; their parameter `nested` lets these run guests of their own.
KVM_MODULES: Final = ("kvm_intel", "kvm_amd", "kvm_pvm", "kvm_hv", "kvm_pr", "kvm")
X86: Final = frozenset({"x86_64", "i686", "i386"})
POWER: Final = frozenset({"ppc64", "ppc64le"})


def words(cpuinfo: str, *keys: str) -> frozenset[str]:
    """The words of the first line of /proc/cpuinfo whose key is one of these (`flags`, `Features`, `features`, `isa`)."""
    for line in cpuinfo.splitlines():
        key, separator, value = line.partition(":")
        if separator and key.strip() in keys:
            return frozenset(value.split())
    return frozenset()


def riscv_extensions(isa: str) -> frozenset[str]:
    """The extensions of an ISA string: `rv64imafdch_zicsr` has the letters up to the first underscore, and names behind it."""
    head, *names = isa.lower().split("_")
    return frozenset(re.sub(r"^rv\d+", "", head)) | frozenset(names)


def virtualisation(cpuinfo: str, host: str) -> str | None:
    """The processor's virtualisation feature under its usual name; None if it has none, "" if its flags do not tell."""
    if host in X86:
        flags = words(cpuinfo, "flags")
        return "Intel VT-x (vmx)" if "vmx" in flags else "AMD-V (svm)" if "svm" in flags else None
    if host == "s390x":
        return "SIE (sie)" if "sie" in words(cpuinfo, "features") else None
    if host == "riscv64":
        isa = " ".join(words(cpuinfo, "isa"))
        return "the hypervisor extension (h)" if "h" in riscv_extensions(isa) else None
    if host == "loongarch64":
        return "LVZ (lvz)" if "lvz" in words(cpuinfo, "Features", "features") else None
    if host in POWER:
        platform = words(cpuinfo, "platform")
        return "POWER hypervisor mode (PowerNV)" if "PowerNV" in platform else ""
    return ""


def virtualisation_line(tree: HostTree, host: str) -> CheckLine:
    """Whether guests can run on the processor itself."""
    subject = "virtualisation"
    cpuinfo = tree.text("/proc/cpuinfo")
    found = virtualisation(cpuinfo, host)
    if found:
        return TOPIC.passed(subject, found)
    if found == "":
        return TOPIC.passed(subject, "not told by the processor flags", "/dev/kvm, below, is the test on this architecture.")
    if tree.exists("/sys/module/kvm_pvm"):
        return TOPIC.passed(
            subject, "none in the processor; the kernel has kvm_pvm", "kvm_pvm runs guests in software: see their speed below."
        )
    inside = "hypervisor" in words(cpuinfo, "flags")
    return TOPIC.warned(
        subject,
        "none offered, inside another hypervisor" if inside else "none offered",
        "Machines of this host's architecture are emulated (TCG), about ten times slower than with KVM.",
        "enable nested virtualisation for this host in the hypervisor above it"
        if inside
        else "enable VT-x or AMD-V (SVM) in the firmware's set-up, if the processor has it",
    )


def nesting_line(tree: HostTree) -> CheckLine | None:
    """Whether guests can be hypervisors themselves; None where no module has such a setting."""
    for module in KVM_MODULES:
        value = tree.text(f"/sys/module/{module}/parameters/nested")
        if value in ON:
            return TOPIC.passed("nested guests", f"allowed by {module}")
        if value:
            return TOPIC.warned(
                "nested guests",
                f"not allowed by {module}",
                "Guests cannot use KVM themselves.",
                f"echo 'options {module} nested=1' | sudo tee /etc/modprobe.d/{module}.conf, stop all guests, and reload {module}",
            )
    return None


def iommu_line(tree: HostTree, host: str) -> CheckLine:
    """Whether PCI devices of the host could be given to guests."""
    subject = "IOMMU"
    groups = tree.names("/sys/kernel/iommu_groups")
    if groups:
        return TOPIC.passed(subject, f"on, {len(groups)} groups", value=len(groups))
    tables = tree.names("/sys/firmware/acpi/tables")
    hardware = next((name for name in ("DMAR", "IVRS", "IORT") if name in tables), None)
    if hardware is None:
        return TOPIC.passed(subject, "none", "PCI devices of the host cannot be given to guests.")
    option = "intel_iommu=on"  # the drivers of the others are on by themselves
    by_option = hardware == "DMAR" and option not in tree.text("/proc/cmdline").split()
    return TOPIC.warned(
        subject,
        f"described by the firmware ({hardware}), but not used by the kernel",
        "PCI devices of the host cannot be given to guests.",
        f"boot the kernel with {option}" if by_option else "enable the IOMMU in the firmware's set-up",
    )


def secure_guest_line(tree: HostTree, host: str) -> CheckLine:
    """Whether guests can be hidden from this host (SEV, TDX, Secure Execution)."""
    subject = "encrypted guests"
    if host == "s390x":
        return _secure_execution(tree, subject)
    flags = words(tree.text("/proc/cpuinfo"), "flags")
    for flag, name, module in (("sev_snp", "SEV-SNP", "kvm_amd"), ("sev", "SEV", "kvm_amd"), ("tdx_host_platform", "TDX", "kvm_intel")):
        if flag not in flags:
            continue
        parameter = "tdx" if name == "TDX" else flag
        if tree.text(f"/sys/module/{module}/parameters/{parameter}") in ON:
            return TOPIC.passed(subject, f"{name}")
        return TOPIC.warned(
            subject,
            f"{name} in the processor, not enabled",
            "Guests cannot be encrypted against this host; ordinary guests are not concerned.",
            f"echo 'options {module} {parameter}=1' | sudo tee /etc/modprobe.d/{module}.conf, and enable it in the firmware's set-up",
        )
    return TOPIC.passed(subject, "not offered by this processor", "Ordinary guests are not concerned.")


def _secure_execution(tree: HostTree, subject: str) -> CheckLine:
    if tree.text("/sys/firmware/uv/prot_virt_host") == "1":
        return TOPIC.passed(subject, "Secure Execution")
    offered = "158" in words(tree.text("/proc/cpuinfo"), "facilities")
    if not offered:
        return TOPIC.passed(subject, "not offered by this processor", "Ordinary guests are not concerned.")
    return TOPIC.warned(
        subject,
        "Secure Execution in the processor, not enabled",
        "Guests cannot be encrypted against this host; ordinary guests are not concerned.",
        "boot the kernel with prot_virt=1",
    )


def lines(tree: HostTree, host: str) -> list[CheckLine]:
    """Everything about the processor. Blocks."""
    found = (virtualisation_line(tree, host), nesting_line(tree), iommu_line(tree, host), secure_guest_line(tree, host))
    return [line for line in found if line is not None]
