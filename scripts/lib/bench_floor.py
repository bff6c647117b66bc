"""The floor: the same QEMU command spawned by hand and driven over a raw socket."""

from __future__ import annotations

import asyncio
import os
import select
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from qmpd.spec import MachineSpec
from qmpd_api.client import Client

#: A start, a command or an end that takes longer hangs.
DEADLINE_S: Final = 60.0
#: The file that QEMU writes the serial port to.
CONSOLE: Final = "console"


async def command_line(client: Client, spec: MachineSpec) -> tuple[str, ...]:
    """The very command qmpd runs for this definition, read from a process it started. That machine is gone afterwards."""
    view = await client.create(spec, start=True)
    words = await asyncio.to_thread(_words, view.pid)
    await client.kill(spec.name)
    await client.delete(spec.name)
    return words


def _words(pid: int | None) -> tuple[str, ...]:
    words = Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").split(b"\0")
    return tuple(word.decode() for word in words)


class ByHand:
    """A QEMU that runs a command of qmpd's with sockets and pipes of its own; used in `with`, which ends it.

    `seconds` is from spawning it until `cont` was answered, or, `halted`, `qmp_capabilities`. `within` is a command that runs it elsewhere.
    """

    def __init__(self, argv: Sequence[str], *, halted: bool = False, plain_console: bool = False, within: Sequence[str] = ()) -> None:
        self._argv = argv
        self._within = tuple(within)
        self._handshake = ("qmp_capabilities",) if halted else ("qmp_capabilities", "cont")
        self._plain_console = plain_console
        self._stack = ExitStack()
        self.seconds = 0.0

    def __enter__(self) -> Self:
        self.directory = Path(tempfile.mkdtemp(prefix="qmpd-bench-"))
        self._stack.callback(shutil.rmtree, self.directory)
        try:
            self._start()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()

    @property
    def console(self) -> Path:
        """What the guest printed, if its console is a plain file."""
        return self.directory / CONSOLE

    @property
    def pid(self) -> int:
        """QEMU's process id."""
        return self._process.pid

    def execute(self, command: str) -> None:
        """One round trip: a command without arguments, and its answer."""
        self._stream.write(b'{"execute": "%s"}' % command.encode())
        self._stream.flush()
        while b'"return"' not in (line := self._stream.readline()):
            if not line or b'"error"' in line:
                raise RuntimeError(f"QEMU did not take {command}: {line!r}")

    def quit(self) -> float:
        """Seconds from sending `quit` until the process is gone."""
        end = select.poll()
        end.register(self._pidfd, select.POLLIN)
        began = time.perf_counter()
        self._stream.write(b'{"execute": "quit"}')
        self._stream.flush()
        if not end.poll(DEADLINE_S * 1000):
            raise RuntimeError("QEMU did not quit")
        return time.perf_counter() - began

    def _start(self) -> None:
        passed: list[socket.socket] = []
        words = [*self._within, *(self._own(word, passed) for word in self._argv)]
        descriptors = [sock.fileno() for sock in passed]
        began = time.perf_counter()
        # A session of its own, as under qmpd: the scheduler shares the processors among sessions, not among processes.
        self._process = subprocess.Popen(
            words, pass_fds=descriptors, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/",
            start_new_session=True,
        )  # fmt: skip
        self._stack.callback(self._reap, self._process)
        client = self._stack.enter_context(socket.socket(socket.AF_UNIX))
        client.settimeout(DEADLINE_S)
        client.connect(str(self.directory / "qmp.sock"))
        self._stream = client.makefile("rwb")
        if not self._stream.readline().startswith(b'{"QMP"'):
            raise RuntimeError("QEMU did not greet")
        for command in self._handshake:
            self.execute(command)
        self.seconds = time.perf_counter() - began
        self._pidfd = os.pidfd_open(self._process.pid)
        self._stack.callback(os.close, self._pidfd)

    def _own(self, word: str, passed: list[socket.socket]) -> str:
        """The word with a socket, a pipe or a file of ours where qmpd's were named."""
        kind, _, rest = word.partition(",")
        fields = dict(field.partition("=")[::2] for field in rest.split(","))
        if kind == "socket" and "fd" in fields:
            listener = self._stack.enter_context(socket.socket(socket.AF_UNIX))
            listener.bind(str(self.directory / f"{fields['id']}.sock"))
            listener.listen()
            passed.append(listener)
            return f"socket,id={fields['id']},fd={listener.fileno()},server=on,wait=off"
        if kind == "pipe" and self._plain_console:
            return f"file,id={fields['id']},path={self.console}"
        if kind == "pipe":
            os.mkfifo(f"{self.console}.in")
            Path(f"{self.console}.out").touch()
            return f"pipe,id={fields['id']},path={self.console}"
        return word

    @staticmethod
    def _reap(process: subprocess.Popen[bytes]) -> None:
        process.kill()
        process.wait()
