"""The same machines by libvirt, where it is installed: for comparison only.

A libvirtd of the benchmark's own: private directories, no right of root's, driven by `virsh` shells that stay open, so that what is
measured is libvirt and not the start of a program.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Final

from scripts.lib.progress import say

DOMAIN: Final = """<domain type='qemu'>
  <name>{name}</name><memory unit='MiB'>64</memory><vcpu>1</vcpu>
  <os><type arch='x86_64' machine='q35'>hvm</type></os>
  <devices><emulator>{emulator}</emulator><serial type='pty'/><video><model type='none'/></video></devices>
</domain>
"""
EMULATOR: Final = "qemu-system-x86_64"
NEEDED: Final = ("libvirtd", "virsh", EMULATOR)
#: Where Debian keeps libvirtd is not on every user's path.
PLACES: Final = f"{os.environ.get('PATH', '/usr/bin')}:/usr/sbin:/sbin"
#: libvirtd looks at every emulator on its path before it answers first; here there is one.
START_LIMIT_S: Final = 60.0
#: It lets go of its machines within a second.
STOP_LIMIT_S: Final = 20.0
#: Between two looks whether it listens.
LOOK_S: Final = 0.01
PROMPT: Final = "virsh # "
#: A command that does nothing.
NEXT: Final = "echo"


class LibvirtFailed(Exception):
    """libvirt did not do what it was told; the message has its words."""


class Virsh:
    """An open `virsh` shell, for one caller at a time."""

    def __init__(self, commands: IO[str], output: IO[str]) -> None:
        self._commands = commands
        self._output = output

    def run(self, command: str) -> str:
        """The command's output. Raises LibvirtFailed."""
        self._commands.write(f"{command}\n{NEXT}\n")
        self._commands.flush()
        lines: list[str] = []
        for line in self._output:
            # The shell repeats what it reads: when it reads the next command, this one is over.
            if line.endswith(f"{PROMPT}{NEXT}\n"):
                break
            lines += [] if PROMPT in line else [line]
        else:
            lines.append("error: virsh ended")
        output = "".join(lines).strip()
        if "error:" in output:
            raise LibvirtFailed(f"virsh {command}: {output}")
        return output

    def seconds(self, command: str) -> float:
        """How long the command takes. Raises LibvirtFailed."""
        began = time.perf_counter()
        self.run(command)
        return time.perf_counter() - began


@contextmanager
def opened(
    uri: str, *, environment: Mapping[str, str] | None = None, account: int | None = None, groups: list[int] | None = None
) -> Iterator[Virsh]:
    """A `virsh` shell that is connected. Raises LibvirtFailed."""
    process = subprocess.Popen(
        [found("virsh"), "-q", "-c", uri],
        env=environment, cwd="/", stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True, user=account, extra_groups=groups,
    )  # fmt: skip
    with process:
        if process.stdin is None or process.stdout is None:
            raise LibvirtFailed("virsh was started without pipes")
        virsh = Virsh(process.stdin, process.stdout)
        virsh.run("uri")
        yield virsh


def found(program: str) -> str:
    """Where a program of libvirt's is, or QEMU. Raises LibvirtFailed."""
    path = shutil.which(program, path=PLACES)
    if path is None:
        raise LibvirtFailed(f"{program} is not installed")
    return path


@dataclass(kw_only=True)
class Libvirt:
    """A private libvirtd."""

    directory: Path
    _process: subprocess.Popen[bytes] | None = field(default=None)

    @property
    def pid(self) -> int:
        """The daemon's process id."""
        return 0 if self._process is None else self._process.pid

    def domain(self, name: str) -> Path:
        """A file with the description of the machine that every row starts, under this name."""
        path = self.directory / f"{name}.xml"
        path.write_text(DOMAIN.format(name=name, emulator=self.directory / "bin" / EMULATOR), encoding="utf-8")
        path.chmod(0o644)
        return path

    def shell(self) -> AbstractContextManager[Virsh]:
        """A `virsh` that is connected."""
        return opened("qemu:///session", environment=self._environment(), account=_account(), groups=_groups())

    def start(self) -> None:
        """Start the daemon; returns when it listens. Raises LibvirtFailed."""
        log = (self.directory / "log").open("ab")
        with log:
            self._process = subprocess.Popen(
                [found("libvirtd"), "-f", str(self.directory / "libvirtd.conf")],
                env=self._environment(), cwd="/", stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True, user=_account(), extra_groups=_groups(),
            )  # fmt: skip
        limit = time.monotonic() + START_LIMIT_S
        while not (self.directory / "libvirt" / "libvirt-sock").exists():
            if self._process.poll() is not None or time.monotonic() > limit:
                raise LibvirtFailed((self.directory / "log").read_text(encoding="utf-8", errors="replace")[-2000:])
            time.sleep(LOOK_S)

    def clear(self) -> None:
        """End every machine; returns when the daemon has noticed. Quicker than `destroy`, which takes a second for each."""
        end_processes(str(self.directory / "bin" / EMULATOR))
        limit = time.monotonic() + STOP_LIMIT_S
        with self.shell() as virsh:
            while virsh.run("list --name"):
                if time.monotonic() > limit:
                    raise LibvirtFailed("machines that were killed are still listed")
                time.sleep(LOOK_S)

    def kill(self) -> None:
        """End the daemon with SIGKILL; its machines go on."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(STOP_LIMIT_S)
            (self.directory / "libvirt" / "libvirt-sock").unlink(missing_ok=True)

    def stop(self) -> None:
        """End the daemon and every machine of it."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(STOP_LIMIT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait(STOP_LIMIT_S)
        end_processes(str(self.directory))

    def _environment(self) -> dict[str, str]:
        own = ("HOME", "XDG_RUNTIME_DIR", "XDG_CONFIG_HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME")
        # The path has one emulator: libvirtd would start all others too, and take a minute.
        return {"PATH": str(self.directory / "bin"), "LC_ALL": "C"} | dict.fromkeys(own, str(self.directory))


@contextmanager
def running() -> Iterator[Libvirt | None]:
    """A libvirtd that answers, and is gone with its machines when the block is left; None where libvirt is not installed or fails."""
    absent = [name for name in NEEDED if shutil.which(name, path=PLACES) is None]
    if absent:
        say(f"bench: no comparison with libvirt: not installed: {', '.join(absent)}")
        yield None
        return
    directory = Path(tempfile.mkdtemp(prefix="qmpd-libvirt-"))
    libvirt = Libvirt(directory=directory)
    try:
        _prepare(directory)
        yield libvirt if _works(libvirt) else None
    finally:
        libvirt.stop()
        shutil.rmtree(directory, ignore_errors=True)


def _works(libvirt: Libvirt) -> bool:
    try:
        libvirt.start()
        with libvirt.shell() as virsh:
            version = virsh.run("version --daemon").rpartition(" ")[2]
            virsh.run(f"create {libvirt.domain('warm-up')}")
            virsh.run("destroy warm-up")
    except LibvirtFailed as error:
        say(f"bench: no comparison with libvirt: {error}")
        return False
    say(f"bench: beside libvirt {version}")
    return True


def _prepare(directory: Path) -> None:
    (directory / "bin").mkdir()
    (directory / "bin" / EMULATOR).symlink_to(found(EMULATOR))
    (directory / "libvirtd.conf").touch(mode=0o644)
    account = _account()
    if account is not None:
        os.chown(directory, account, -1)


def _account() -> int | None:
    """Root's libvirtd would be the host's one, with its directories; another account has one of its own."""
    return pwd.getpwnam("nobody").pw_uid if os.geteuid() == 0 else None


def _groups() -> list[int] | None:
    return [] if os.geteuid() == 0 else None


def end_processes(mark: str) -> None:
    """SIGKILL to every process whose command line has `mark`, the name of a private directory."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if mark.encode() in path.read_bytes():
                os.kill(int(path.parent.name), signal.SIGKILL)
        except (FileNotFoundError, ProcessLookupError):
            continue
