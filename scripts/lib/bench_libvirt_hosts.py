"""Two libvirtds, one in each network namespace of a pair of hosts, between which machines move: for comparison only.

They are root's, as on a server, and see nothing of the host's own libvirt: each has a mount namespace in which libvirt's directories are
empty, and the account it insists on is there.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from xml.sax.saxutils import quoteattr

import msgspec

from scripts.lib.bench_libvirt import START_LIMIT_S, STOP_LIMIT_S, LibvirtFailed, Virsh, end_processes, found, opened
from scripts.lib.progress import say
from tests.migration.hosts import Host, Hosts

#: Runs in namespaces of its own, with the directory of its daemon.
SCRIPT: Final = """\
set -eu
for place in /run /var/lib /var/cache /var/log /etc/libvirt; do mount -t tmpfs tmpfs "$place"; done
for file in passwd group; do mount --bind "$1/$file" "/etc/$file"; done
cp "$1/qemu.conf" /etc/libvirt/
exec "$2" -f "$1/libvirtd.conf"
"""
#: Debian's build looks for them before it reads which ones to use.
ACCOUNTS: Final = {"passwd": "libvirt-qemu:x:64055:64055::/:/usr/sbin/nologin\n", "group": "libvirt-qemu:x:64055:\nkvm:x:64056:\n"}
DAEMON: Final = """\
unix_sock_dir = "{directory}"
auth_unix_rw = "none"
host_uuid = "{identity}"
"""
QEMU: Final = """\
user = "root"
group = "root"
security_driver = "none"
namespaces = []
cgroup_controllers = []
dynamic_ownership = 0
remember_owner = 0
stdio_handler = "file"
migrate_tls_x509_cert_dir = "{certificates}"
migrate_tls_x509_verify = 1
"""
DOMAIN: Final = """\
<domain type='qemu'>
  <name>{name}</name><uuid>{uuid}</uuid><memory unit='MiB'>{memory_mib}</memory><vcpu>1</vcpu>
  <os><type arch='x86_64' machine='q35'>hvm</type><kernel>{kernel}</kernel>{initrd}</os>
  <devices>
    <emulator>{emulator}</emulator><serial type='null'/><video><model type='none'/></video>
    <disk type='file' device='disk'>
      <driver name='qemu' type='raw' cache='none'/><source file={disk}/><target dev='vda' bus='virtio'/><shareable/>
    </disk>
  </devices>
</domain>
"""
#: Between two looks whether it listens.
LOOK_S: Final = 0.05


class Moved(msgspec.Struct, frozen=True, kw_only=True):
    """The machine that is moved: its memory, and files that both hosts see."""

    emulator: str
    memory_mib: int
    kernel: str
    initrd: str | None
    disk: str


@dataclass(frozen=True, kw_only=True)
class LibvirtHosts:
    """Both daemons, with a shell at each. What they run has `mark` in its name."""

    each: tuple[Host, Host]
    shells: tuple[Virsh, Virsh]
    uris: tuple[str, str]
    directory: Path

    @property
    def mark(self) -> str:
        """The name of every machine."""
        return self.directory.name

    def start(self, machine: Moved) -> str:
        """Starts the machine at the first host; returns its UUID. Raises LibvirtFailed."""
        identity = str(uuid.uuid4())
        initrd = "" if machine.initrd is None else f"<initrd>{machine.initrd}</initrd>"
        document = DOMAIN.format(
            name=self.mark,
            uuid=identity,
            memory_mib=machine.memory_mib,
            kernel=machine.kernel,
            initrd=initrd,
            emulator=machine.emulator,
            disk=quoteattr(machine.disk),
        )
        path = self.directory / "machine.xml"
        path.write_text(document, encoding="utf-8")
        self.shells[0].run(f"create {path}")
        return identity

    def move(self, at: int) -> float:
        """Seconds until the machine has moved from host `at` to the other, over TLS. Raises LibvirtFailed."""
        there = self.each[1 - at]
        how = f"--live --unsafe --tls --tls-destination {there.name} --migrateuri tcp://{there.station.address}"
        return self.shells[at].seconds(f"migrate {self.mark} {how} --desturi {self.uris[1 - at]}")

    def end(self, at: int) -> None:
        """Ends the machine. Raises LibvirtFailed."""
        self.shells[at].run(f"destroy {self.mark}")


@contextmanager
def running(world: Hosts) -> Iterator[LibvirtHosts | None]:
    """Both, gone with their machines when the block is left; None, and why is said, where they do not run."""
    directory = Path(tempfile.mkdtemp(prefix="qmpd-libvirt-hosts-"))
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        stack.callback(end_processes, f"guest={directory.name},")
        try:
            ends = [_end(stack, directory, host) for host in world.each]
        except (LibvirtFailed, OSError) as error:
            say(f"bench: no migration by libvirt to compare with: {error}")
            yield None
            return
        (shell, uri), (other_shell, other_uri) = ends
        first, second = world.each
        yield LibvirtHosts(each=(first, second), shells=(shell, other_shell), uris=(uri, other_uri), directory=directory)


def _end(stack: ExitStack, directory: Path, host: Host) -> tuple[Virsh, str]:
    own = directory / host.name
    own.mkdir()
    for name, more in ACCOUNTS.items():
        (own / name).write_text((Path("/etc") / name).read_text(encoding="utf-8") + more, encoding="utf-8")
    (own / "libvirtd.conf").write_text(DAEMON.format(directory=own, identity=uuid.uuid4()), encoding="utf-8")
    (own / "qemu.conf").write_text(QEMU.format(certificates=host.certificates), encoding="utf-8")
    _daemon(stack, own, (*host.station.within, "unshare", "--mount", "--propagation", "private"))
    uri = f"qemu+unix:///system?socket={own / 'libvirt-sock'}"
    shell = stack.enter_context(opened(uri))
    shell.run("domcapabilities --virttype qemu --arch x86_64 --machine q35")  # it looks at the emulator now, not when time counts
    return shell, uri


def _daemon(stack: ExitStack, own: Path, within: Sequence[str]) -> None:
    with (own / "log").open("wb") as log:
        process = subprocess.Popen(
            [*within, "sh", "-c", SCRIPT, "libvirtd", str(own), found("libvirtd")],
            cwd="/", stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    stack.callback(_stop, process)
    limit = time.monotonic() + START_LIMIT_S
    while not (own / "libvirt-sock").exists():
        if process.poll() is not None or time.monotonic() > limit:
            raise LibvirtFailed((own / "log").read_text(encoding="utf-8", errors="replace")[-2000:])
        time.sleep(LOOK_S)


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_LIMIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(STOP_LIMIT_S)
