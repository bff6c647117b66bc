"""What a plan is: everything needed to launch one QEMU, as data."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Literal

import msgspec

from qmpd.argv import Option, escape, lines
from qmpd.facts import Facts
from qmpd.spec import BaseImage


class Listening(Facts, frozen=True, kw_only=True):
    """A socket character device. The daemon binds `path` and passes the listening fd; by hand QEMU binds the path itself."""

    id: str
    path: str

    def passed(self, fd: int) -> Option:
        """The option with the listening socket passed as `fd`."""
        return Option("chardev", f"socket,id={self.id},fd={fd},server=on,wait=off")

    def named(self) -> Option:
        """The option in which QEMU binds the path itself."""
        return Option("chardev", f"socket,id={self.id},path={escape(self.path)},server=on,wait=off")


class SerialPipe(Facts, frozen=True, kw_only=True):
    """A serial port: QEMU writes to the file `path`.out and reads from the FIFO `path`.in. By hand it is a socket with a log."""

    id: str
    path: str
    log: str

    def passed(self) -> Option:
        """The option for a daemon that made both ends."""
        return Option("chardev", f"pipe,id={self.id},path={escape(self.path)}")

    def named(self) -> Option:
        """The option for somebody who wants to connect to the port."""
        socket, log = escape(f"{self.path}.sock"), escape(self.log)
        return Option("chardev", f"socket,id={self.id},path={socket},server=on,wait=off,logfile={log},logappend=on")


class TpmLine(Facts, frozen=True, kw_only=True):
    """QEMU's line to the TPM. The daemon passes one end of a connected pair of sockets; by hand it is the socket at `path`."""

    id: str
    path: str

    def passed(self, fd: int) -> Option:
        """The option with the connected socket passed as `fd`."""
        return Option("chardev", f"socket,id={self.id},fd={fd}")

    def named(self) -> Option:
        """The option in which QEMU connects to the path."""
        return Option("chardev", f"socket,id={self.id},path={escape(self.path)}")


class TpmEmulator(Facts, frozen=True, kw_only=True):
    """The program that is the TPM, at the other end of `line`; its state is in `directory`, what it says in the file `log`."""

    program: str
    directory: str
    log: str
    line: TpmLine

    def argv(self, fd: int) -> tuple[str, ...]:
        """The command as it is executed, in `directory`: that may be renamed while the program runs."""
        return self._command("dir=.", f"type=unixio,clientfd={fd}")

    def by_hand(self) -> tuple[str, ...]:
        """A command that returns when the socket is there, and leaves the program running until QEMU ends."""
        return (*self._command(f"dir={self.directory}", f"type=unixio,path={self.line.path},mode=0600"), "--daemon")

    def _command(self, state: str, control: str) -> tuple[str, ...]:
        return (self.program, "socket", "--tpm2", "--tpmstate", f"{state},mode=0600", "--ctrl", control, "--terminate")


class BlankImage(Facts, frozen=True, kw_only=True):
    """An image of the machine's own, to be made before its first start; with a `base` it is a qcow2 one upon that."""

    path: str
    format: Literal["raw", "qcow2"]
    size_bytes: int
    base: BaseImage | None = None


class Copy(Facts, frozen=True, kw_only=True):
    """A file of the machine's own that starts as a copy of a template, unless it is there already."""

    source: str
    target: str


class LaunchPlan(Facts, frozen=True, kw_only=True):
    """One QEMU, ready to be launched: binary, options, the sockets to bind, and the files that must exist first."""

    binary: str
    accel: Literal["kvm", "tcg"]
    accel_reason: str
    options: tuple[Option | Listening | SerialPipe | TpmLine, ...]
    directories: tuple[str, ...]
    copies: tuple[Copy, ...] = ()
    blank_images: tuple[BlankImage, ...] = ()
    tpm: TpmEmulator | None = None

    def awaiting(self) -> LaunchPlan:
        """The same machine, waiting for the state that a migration will bring."""
        return msgspec.structs.replace(self, options=(*self.options, Option("incoming", "defer")))

    def detached(self) -> LaunchPlan:
        """The same machine with nothing at the other end of its monitors and serial ports: it needs no sockets and no pipes, but
        for its TPM: QEMU talks to that before it is ready."""
        options = (Option("chardev", f"null,id={one.id}") if isinstance(one, Listening | SerialPipe) else one for one in self.options)
        return msgspec.structs.replace(self, options=tuple(options))

    def listeners(self) -> dict[str, str]:
        """The sockets to bind, by id, and their paths."""
        return {option.id: option.path for option in self.options if isinstance(option, Listening)}

    def serial_pipes(self) -> dict[str, SerialPipe]:
        """The serial ports that are kept, by id."""
        return {option.id: option for option in self.options if isinstance(option, SerialPipe)}

    def argv(self, fds: Mapping[str, int]) -> tuple[str, ...]:
        """The command as it is executed, with `fds` the numbers of the passed sockets by id."""
        words = [self.binary]
        for option in self.options:
            words += _passed(option, fds).words()
        return tuple(words)

    def options_by_hand(self) -> Sequence[Option]:
        """The options of a command that needs no passed fds."""
        return [option if isinstance(option, Option) else option.named() for option in self.options]

    def by_hand(self) -> str:
        """The command as it can be pasted into a shell, one option per line."""
        first = "" if self.tpm is None else f"{shlex.join(self.tpm.by_hand())}\n"
        return first + lines(self.binary, self.options_by_hand())


def _passed(option: Option | Listening | SerialPipe | TpmLine, fds: Mapping[str, int]) -> Option:
    if isinstance(option, Listening | TpmLine):
        return option.passed(fds[option.id])
    return option.passed() if isinstance(option, SerialPipe) else option
