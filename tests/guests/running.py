"""Runs a test guest straight under its emulator, without the daemon: the command line, and a process with its serial port at hand."""

from __future__ import annotations

import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.guests.catalogue import Guest
from tests.newer_qemu import MACHINES, is_other

BOOT_DEADLINE_S = 90.0
"""Until the first line. Guests boot within a second; a host that runs other work on both its cores takes its time."""

KILL_DEADLINE_S = 60.0
"""From SIGKILL to the end: the kernel has to give back the memory."""

_SAMPLE_S = 0.05
"""Between two looks at the threads of QEMU: a guest that works does not sleep at every one of them."""

_CHUNK_BYTES = 1 << 16


class GuestSilent(AssertionError):
    """The guest did not print what was waited for; the message has the end of what it did print, and QEMU's own words."""


def command(guest: Guest, serial: str, *, image: Path | None = None) -> tuple[str, ...]:
    """The command line that boots `guest` under TCG with its serial port on `serial` (what QEMU's `-serial` takes).

    Disks are run with `snapshot=on`, so the file is not written; with `image`, that copy is used in its place, and is written.
    """
    newer = is_other(guest.arch_emulator)
    machine = MACHINES.get(guest.machine, guest.machine) if newer else guest.machine
    return (
        f"qemu-system-{guest.arch_emulator}",
        *("-machine", machine, "-accel", "tcg", "-nodefaults", "-no-user-config", "-display", "none"),
        *(("-cpu", guest.cpu) if guest.cpu else ()),
        *("-m", str(guest.memory_mib)),
        *(("-audio", "none") if newer else ()),
        *guest.options,
        *_boot(guest, image),
        *(("-serial", "null") * guest.serial_index),
        *("-serial", serial),
    )


def _boot(guest: Guest, image: Path | None) -> tuple[str, str]:
    if guest.how in {"kernel", "bios"}:
        return f"-{guest.how}", str(guest.file)
    interface = "floppy" if guest.how == "floppy" else "ide"
    snapshot = "on" if image is None else "off"
    return "-drive", f"if={interface},format=raw,snapshot={snapshot},file={image or guest.file}"


class RunningGuest:
    """A QEMU process and the bytes of its serial port so far."""

    def __init__(self, process: subprocess.Popen[bytes], serial: socket.socket, stderr: Path) -> None:
        self._process = process
        self._serial = serial
        self._stderr = stderr
        self._output = bytearray()

    @property
    def pid(self) -> int:
        """QEMU's process id."""
        return self._process.pid

    @property
    def output(self) -> bytes:
        """Everything read from the serial port so far."""
        return bytes(self._output)

    def read_until(self, satisfied: Callable[[bytes], bool], deadline_s: float = BOOT_DEADLINE_S) -> bytes:
        """Read the serial port until `satisfied(output)`, and return the whole output.

        Raises:
            GuestSilent: QEMU ended or the deadline passed first.
        """
        end = time.monotonic() + deadline_s
        while not satisfied(self.output):
            try:
                chunk = self._receive(end)
            except TimeoutError as silence:
                raise GuestSilent(f"nothing more within {deadline_s} s; {self.report()}") from silence
            if not chunk:
                raise GuestSilent(f"QEMU ended; {self.report()}")
            self._output += chunk
        return self.output

    def send(self, data: bytes) -> None:
        """Bytes for the guest's serial port."""
        self._serial.sendall(data)

    def wait_exit(self, deadline_s: float = BOOT_DEADLINE_S) -> int:
        """Read the serial port to its end, and return QEMU's exit status.

        Raises:
            GuestSilent: it went on beyond the deadline.
        """
        end = time.monotonic() + deadline_s
        try:
            while chunk := self._receive(end):
                self._output += chunk
            return self._process.wait(max(end - time.monotonic(), 0.001))
        except (TimeoutError, subprocess.TimeoutExpired) as running:
            raise GuestSilent(f"still running after {deadline_s} s; {self.report()}") from running

    def settle(self, deadline_s: float = BOOT_DEADLINE_S) -> None:
        """Wait until every thread of QEMU sleeps: the guest is idle and costs nothing.

        Raises:
            GuestSilent: some thread never did.
        """
        end = time.monotonic() + deadline_s
        while not asleep(self.pid):
            try:
                self._output += self._receive(min(end, time.monotonic() + _SAMPLE_S))
            except TimeoutError as busy:
                if time.monotonic() >= end:
                    raise GuestSilent(f"busy for {deadline_s} s; {self.report()}") from busy

    def report(self) -> str:
        """The end of the output and of QEMU's stderr, for a failing test."""
        return f"output ends in {self.output[-400:]!r}; stderr: {self._stderr.read_text(errors='replace')[-2000:]!r}"

    def _receive(self, end: float) -> bytes:
        self._serial.settimeout(max(end - time.monotonic(), 0.001))
        return self._serial.recv(_CHUNK_BYTES)


def asleep(pid: int) -> bool:
    """Whether every thread of a QEMU sleeps now."""
    try:
        threads = [thread.read_text() for thread in Path(f"/proc/{pid}/task").glob("*/stat")]
    except (FileNotFoundError, ProcessLookupError):
        return False  # a thread ended while we looked, so something was going on
    return all(thread.rpartition(")")[2].split()[0] == "S" for thread in threads)


@contextmanager
def running(guest: Guest, *extra: str, image: Path | None = None) -> Iterator[RunningGuest]:
    """QEMU runs `guest`, with `extra` arguments; it is killed, by its pid, when the block is left. See `command` for `image`."""
    ours, theirs = socket.socketpair()
    with ours, tempfile.TemporaryDirectory(prefix="qmpd-guest-") as directory:
        stderr = Path(directory) / "stderr"
        chardev = f"socket,id=guest-serial,fd={theirs.fileno()}"
        argv = (*command(guest, "chardev:guest-serial", image=image), "-chardev", chardev, *extra)
        with theirs, stderr.open("wb") as errors:
            process = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=errors, stderr=errors, pass_fds=[theirs.fileno()], cwd=directory, env=_environment()
            )
        try:
            yield RunningGuest(process, ours, stderr)
        finally:
            process.kill()
            process.wait(KILL_DEADLINE_S)


def _environment() -> dict[str, str]:
    """QEMU keeps the temporary files of `snapshot=on` in TMPDIR; boards with sound would look for the host's."""
    return {name: os.environ[name] for name in ("PATH", "TMPDIR") if name in os.environ} | {"QEMU_AUDIO_DRV": "none"}
