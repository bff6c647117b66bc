"""The same machine created by libvirt, where it is installed: for comparison only."""

from __future__ import annotations

import shutil
import subprocess
import time
from typing import Final

DOMAIN: Final = """<domain type='qemu'>
  <name>qmpd-bench</name><memory unit='MiB'>64</memory><vcpu>1</vcpu>
  <os><type arch='x86_64' machine='q35'>hvm</type></os>
  <devices><emulator>/usr/bin/qemu-system-x86_64</emulator><serial type='pty'/><video><model type='none'/></video></devices>
</domain>
"""
#: libvirt needs under a second.
DEADLINE_S: Final = 60


def create() -> float | None:
    """Seconds libvirt needs to create and start the machine; None where there is no libvirt that answers."""
    virsh = shutil.which("virsh")
    if virsh is None or not _ok(virsh, "version"):
        return None
    began = time.perf_counter()
    done = subprocess.run(
        [virsh, "-q", "create", "/dev/stdin"], input=DOMAIN, text=True, capture_output=True, timeout=DEADLINE_S, check=False
    )
    took = time.perf_counter() - began
    _ok(virsh, "destroy", "qmpd-bench")
    return took if done.returncode == 0 else None


def _ok(virsh: str, *words: str) -> bool:
    return subprocess.run([virsh, "-q", *words], capture_output=True, timeout=DEADLINE_S, check=False).returncode == 0
