"""The TPM of a machine: swtpm, a process of its own beside QEMU, that lives as long as QEMU does.

Both wait behind gates, are recorded together, and are let go one after the other, QEMU first. They are connected by a pair of sockets
without a name: nobody else can reach the TPM. A daemon that dies in between leaves a QEMU whose TPM never answers: it ends.

Two of them never have one state: swtpm locks it as soon as QEMU opens the TPM, and refuses one that is locked.

swtpm ends by itself when QEMU does, provided that QEMU has opened the TPM before (7.2 and swtpm 0.7.1: without that it waits for ever).
So whoever sees a QEMU end, or finds that it has ended, also ends the swtpm that was recorded with it, and only then is the record removed.

Without its swtpm a guest goes on; what it asks of its TPM fails.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import signal
import socket
from asyncio.subprocess import DEVNULL
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Final

import msgspec

from qmpd.capture import tail_of
from qmpd.errors import HostError, LaunchFailed, QmpdError
from qmpd.plan import TpmEmulator
from qmpd.process import Gate, Identity, NotOurs, QemuProcess, adopt, describe, discard, gate
from qmpd.shortage import shortage
from qmpd.tasks import alongside
from qmpd.throwaway import ENVIRONMENT, leash

#: swtpm ends by itself within milliseconds after its QEMU, and writes what it has to; one that QEMU never spoke to waits for ever.
OWN_END_S: Final = 1.0
#: The same when it is asked to, unless it waits for a disk that hangs.
END_LIMIT_S: Final = 10.0
#: The ends of two processes are seen one after the other: by then it is known whether QEMU ended too, after a swtpm that failed.
QEMU_END_S: Final = 5.0
#: The same after a swtpm that ended in order, as it does when QEMU lets go of it: the kernel has a guest's memory to give back.
QEMU_IN_ORDER_S: Final = 60.0
#: So much of what swtpm said goes into an error.
SAID_LINES: Final = 3
#: How QEMU begins what it says about it.
_BACKEND: Final = "tpm-emulator"
#: Where the state was whose place was taken, for a moment.
_FORMER: Final = "tpm-former"

_log = logging.getLogger(__name__)
Publish = Callable[[str, str, Mapping[str, object]], object]


class Companion(msgspec.Struct, frozen=True, kw_only=True):
    """The gate of a TPM, and what QEMU inherits to reach it, by the id of its line. Both are missing where there is no TPM."""

    gate: Gate | None = None
    descriptors: Mapping[str, int] = {}

    @property
    def identity(self) -> Identity | None:
        """Who it is."""
        return None if self.gate is None else self.gate.identity


def program() -> str | None:
    """The path of swtpm. Blocks."""
    return shutil.which("swtpm", path=ENVIRONMENT["PATH"])


@contextmanager
def gated(tpm: TpmEmulator | None) -> Iterator[Companion]:
    """A gate before swtpm. The descriptors are closed when the block ends; when it raises, the gate is gone. Blocks.

    Raises:
        Busy, NoSpace, LaunchFailed: as `process.gate`.
    """
    if tpm is None:
        yield Companion()
        return
    with _pair() as (ours, its):
        # Recorded by whoever records QEMU, before either gate is opened.
        made = gate(tpm.argv(its), inherited=[its], cwd=tpm.directory, stderr=tpm.log, record=lambda _identity: None)
        try:
            yield Companion(gate=made, descriptors={tpm.line.id: ours})
        except BaseException:
            discard(made)
            raise


@contextmanager
def _pair() -> Iterator[tuple[int, int]]:
    try:
        pair = socket.socketpair()
    except OSError as error:
        raise shortage(error) or LaunchFailed(f"no line to the TPM: {error.strerror}") from error
    with pair[0], pair[1]:
        yield pair[0].fileno(), pair[1].fileno()


@asynccontextmanager
async def lent(tpm: TpmEmulator | None) -> AsyncIterator[Mapping[str, int]]:
    """A TPM for an emulator that is thrown away: what it inherits, by the id of the line. It is gone when the block ends, or the daemon.

    Raises:
        LaunchFailed: swtpm cannot be executed.
    """
    if tpm is None:
        yield {}
        return
    with _pair() as (ours, its):
        argv = (*await asyncio.to_thread(leash), *tpm.argv(its))
        try:
            process = await asyncio.create_subprocess_exec(
                *argv, stdin=DEVNULL, stdout=DEVNULL, stderr=DEVNULL, env=ENVIRONMENT, cwd=tpm.directory, pass_fds=[its]
            )
        except OSError as error:
            raise LaunchFailed(f"{tpm.program} cannot be executed: {error.strerror}") from error
        try:
            yield {tpm.line.id: ours}
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()


@asynccontextmanager
async def accompanied(name: str, process: QemuProcess, recorded: Identity | None, publish: Publish) -> AsyncIterator[None]:
    """Watches the TPM of a QEMU as long as the block lasts; `recorded` is who it is. When QEMU has ended it is gone at the end."""
    if process.companion is None and recorded is not None:
        try:
            process.companion = await adopt(recorded)
        except NotOurs as error:
            _lost(name, process, f"it ended while nobody looked: {error}", publish)
        except (QmpdError, OSError) as error:
            _log.warning("the TPM of a machine is not watched", extra={"machine": name, "error": str(error)})
    companion = process.companion
    if companion is None:
        yield
        return
    try:
        async with alongside(_watch(name, process, companion, publish), f"tpm:{name}"):
            yield
    finally:
        if process.exit is not None:
            await dismissed(companion)
        companion.close()


def is_lost(process: QemuProcess) -> bool:
    """Whether a QEMU runs on without the TPM that it had."""
    return process.forsaken is not None or (process.companion is not None and process.companion.over.done())


async def _watch(name: str, process: QemuProcess, companion: QemuProcess, publish: Publish) -> None:
    status = await companion.wait()
    failed = status.signal is not None or status.code not in {None, 0}
    await asyncio.wait([process.over], timeout=QEMU_END_S if failed else QEMU_IN_ORDER_S)
    if not process.over.done():
        _lost(name, process, f"swtpm ended with {describe(status)}", publish)


def _lost(name: str, process: QemuProcess, reason: str, publish: Publish) -> None:
    process.forsaken = reason
    _log.error("a guest has lost its TPM", extra={"machine": name, "reason": reason})
    publish("machine.tpm-lost", name, {"reason": reason})


async def dismissed(companion: QemuProcess | None) -> None:
    """Ends a swtpm whose QEMU has ended, and returns when it is gone, or cannot be ended."""
    if companion is None:
        return
    await asyncio.wait([companion.over], timeout=OWN_END_S)
    for number in (signal.SIGTERM, signal.SIGKILL):
        if companion.over.done():
            return
        try:
            companion.signal(number)
        except HostError as error:
            _log.error("swtpm cannot be ended", extra={"pid": companion.identity.pid, "error": error.message})
        await asyncio.wait([companion.over], timeout=END_LIMIT_S)
    if not companion.over.done():
        _log.error("swtpm does not end", extra={"pid": companion.identity.pid})


async def dismiss_recorded(identity: Identity | None) -> None:
    """The same for one that some earlier daemon recorded."""
    if identity is None:
        return
    try:
        found = await adopt(identity)
    except NotOurs:
        return
    try:
        await dismissed(found)
    finally:
        found.close()


async def explained(failure: LaunchFailed, companion: QemuProcess | None, tpm: TpmEmulator | None) -> LaunchFailed:
    """The failure of a launch; where it was swtpm's, or is about the TPM, with what that said."""
    if companion is None or companion.exit is None or tpm is None:
        return failure
    try:
        tail = await asyncio.to_thread(tail_of, tpm.log, companion.stderr_start)
    except OSError as error:
        tail = f"{tpm.log} cannot be read: {error.strerror}"
    said = "; ".join(tail.strip().splitlines()[-SAID_LINES:]) or "nothing"
    if companion.exit.code not in {None, 0}:
        how = describe(companion.exit)
        return LaunchFailed(f"swtpm ended with {how} before QEMU was ready: it said {said}", exit=how, stderr=tail)
    if _BACKEND in failure.message:
        return LaunchFailed(f"{failure.message} (swtpm said {said})", **failure.details)
    return failure


# The state's directory, where one QEMU takes the place of another: each has a TPM of its own, and its state comes with the guest's.


def begin_anew(directory: str) -> None:
    """An empty directory for the state that comes. Nobody may have it open. Blocks. Raises OSError."""
    drop(directory)
    Path(directory).mkdir(mode=0o700)


def take_place(former: str, successor: str) -> None:
    """The successor's state becomes the machine's; whoever had the former one open has ended. May be repeated. Blocks. Raises OSError.

    A swtpm does not notice when its directory is renamed: it knows no name of it.
    """
    aside = Path(former).with_name(_FORMER)
    if Path(successor).exists():
        drop(str(aside))
        if Path(former).exists():
            Path(former).rename(aside)
        Path(successor).rename(former)
    drop(str(aside))


def drop(directory: str) -> None:
    """Removes a state's directory, if it is there. Blocks. Raises OSError."""
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(directory)
