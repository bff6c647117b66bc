"""The source's QEMU: it sends its guest away, and has it back as it was if that does not succeed.

Until the machine is handed over (which is not decided here) the guest is the source's. QEMU sets it going again by itself when a
migration fails or is cancelled; everything else that was changed in it is put back: capabilities and parameters, disks and jobs,
credentials.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from types import TracebackType
from typing import Final, Self, TypeAlias

import msgspec

from qmpd.errors import MigrationFailed, QemuError, QemuRefused, QemuSilent, WrongState
from qmpd.migration import capabilities, tls
from qmpd.migration.addresses import Address, TcpAddress, uri
from qmpd.migration.capabilities import Agreed, Dials
from qmpd.migration.door import knock
from qmpd.migration.mirror import DiskCopy, Mirrors, drop_all
from qmpd.migration.progress import FINAL, NONE, POSTCOPY, Progress
from qmpd.migration.qemu import HANDED, IMPATIENT_S, PREFIX, Qemu, run_state, yank
from qmpd.migration.tls import ClientTls
from qmpd.migration.watch import Watch, watching

#: QEMU puts an end to a migration at once, unless it waits for the other end: then it is broken off.
CANCEL_PATIENCE_S: Final = 5.0
#: A connection that is being made cannot be broken; the kernel gives up after two minutes (tcp_syn_retries).
CANCEL_LIMIT_S: Final = 150.0
#: QEMU fills in the figures of a migration a moment after it says that it is completed.
FIGURES_LIMIT_S: Final = 1.0
#: A migration that was cancelled and has not ended.
CANCELLING: Final = "cancelling"
#: QEMU's run state after a migration that it takes for the end of the guest here.
GONE: Final = "postmigrate"

_log = logging.getLogger(__name__)
#: Told how far it is, some times a second. May tune or give up by raising; the guest runs meanwhile.
Report: TypeAlias = Callable[[Progress], Awaitable[None]]


class Sending(msgspec.Struct, frozen=True, kw_only=True):
    """What is sent and where to. `parameters` are QEMU's migration parameters to begin with, `helping` capabilities of the source alone.

    A migration that moves no byte for `stall_limit_s` fails; a guest that was halted for `switchover_limit_s` without having arrived
    goes on here. `bytes_per_s` limits memory and each disk; None does not limit. `secret` is what opens the door at `memory`
    (`qmpd.migration.door`); without one QEMU connects itself.
    """

    memory: Address
    secret: str | None = None
    disks_at: Address | None = None
    disks: tuple[DiskCopy, ...] = ()
    tls: ClientTls | None = None
    agreed: Agreed = Agreed()
    helping: tuple[str, ...] = ()
    parameters: dict[str, object] = {}
    bytes_per_s: int | None = None
    stall_limit_s: float = 60.0
    switchover_limit_s: float = 30.0


class Before(msgspec.Struct, frozen=True, kw_only=True):
    """How a source was before anything was changed in it: what it is put back to."""

    dials: Dials
    run_state: str


async def look(qemu: Qemu) -> Before:
    """How a source is."""
    return Before(dials=await capabilities.read(qemu), run_state=await run_state(qemu))


class Outgoing:
    """One migration of one QEMU. Leaving its block before `completed` cancels it (not once a part of the guest runs elsewhere)."""

    def __init__(self, qemu: Qemu, sending: Sending, before: Before) -> None:
        self.completed = False
        self.postcopy = False
        self._qemu = qemu
        self._sending = sending
        self._before = before
        self._mirrors = Mirrors(qemu, sending.disks, sending.disks_at, sending.tls)
        self._line: socket.socket | None = None

    async def __aenter__(self) -> Self:
        """Nothing yet: what is made is made by `prepare`."""
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Puts everything back, unless the guest has arrived or is halfway."""
        try:
            if not self.completed and not self.postcopy:
                await recall(self._qemu, self._before, self._line)
        finally:
            if self._line is not None:
                self._line.close()

    async def prepare(self) -> None:
        """Sets the source and begins to copy its disks.

        Raises:
            MigrationFailed, QemuRefused, QemuSilent: that is impossible, or the destination does not answer.
        """
        wanted = self._sending
        if wanted.tls is not None:
            await tls.add(self._qemu, wanted.tls)
        parameters = {**tls.parameters(wanted.tls), "max-bandwidth": wanted.bytes_per_s or 0, **wanted.parameters}
        await capabilities.apply(self._qemu, (*capabilities.SOURCE, *wanted.helping), wanted.agreed, parameters)
        await self._mirrors.begin(wanted.bytes_per_s)

    async def copy(self, report: Report) -> None:
        """Copies the disks until the copies have caught up. The destination need not listen for memory before.

        Raises:
            MigrationFailed: a copy failed, or stands still.
        """
        with watching(self._qemu) as watch:
            while self._mirrors and (disks := await self._mirrors.until_following(watch)) is not None:
                await report(Progress(disks=disks))

    async def send(self, report: Report, memory: Address | None = None) -> None:
        """Sends disks and memory until the guest is halted for what is left. It stands still then: `switch_over` at once.

        `memory` is where to, if that was not known before.

        Raises:
            MigrationFailed: it failed, or nothing moves.
        """
        await self.copy(report)
        with watching(self._qemu) as watch:
            await self._qemu.execute("migrate", {"uri": await self._way(memory or self._sending.memory)})
            await self._until(watch, frozenset({"pre-switchover"}), report)

    async def _way(self, memory: Address) -> str:
        """What QEMU is told to send to: the connection that was made for it, or an address."""
        if self._sending.secret is None or not isinstance(memory, TcpAddress):
            return uri(memory)
        self._line = await knock(memory, self._sending.secret)
        await self._qemu.hand(PREFIX, self._line)
        return HANDED

    async def start_postcopy(self) -> None:
        """While memory is sent: the guest moves now, and what is left of its memory follows it. `switch_over` then ends with `postcopy`.

        From then on neither end has a whole guest, until all of it has followed: there is nothing to come back to.

        Raises:
            QemuRefused: it was not agreed (`Agreed.postcopy`), or nothing is sent yet.
        """
        await self._qemu.execute("migrate-start-postcopy")

    async def follow(self, report: Report) -> bool:
        """In postcopy: waits until all memory has followed (True), or its connection is lost (False): then `following.resume`.

        Raises:
            MigrationFailed: QEMU ended.
        """
        with watching(self._qemu) as watch:
            while (status := await watch.next()) not in {"completed", "postcopy-paused"}:
                await report(watch.progress)
        self.completed = status == "completed"
        return self.completed

    async def interrupt(self) -> None:
        """In postcopy: gives up the connection, which may be dead, so that both ends can be joined anew."""
        await self._qemu.execute_oob("migrate-pause")

    async def switch_over(self) -> None:
        """Completes the disks and lets the guest go; it has arrived, or can be set going there (`postcopy`), when this returns.

        Raises:
            MigrationFailed: it did not arrive; it goes on here when the block is left.
        """
        try:
            async with asyncio.timeout(self._sending.switchover_limit_s):
                await self._switch_over()
        except TimeoutError as error:
            with suppress(QemuError):
                await yank(self._qemu, migration=True)
            raise MigrationFailed(f"the guest had not arrived {self._sending.switchover_limit_s:g} s after it was halted") from error

    async def _switch_over(self) -> None:
        with watching(self._qemu) as watch:
            if self._mirrors:
                await self._mirrors.finish()
            with suppress(QemuSilent):  # it may be under way all the same
                await self._qemu.execute("migrate-continue", {"state": "pre-switchover"})
            status = await self._until(watch, frozenset({"completed", "postcopy-active"}), None)
        self.completed = status == "completed"
        self.postcopy = not self.completed

    async def figures(self) -> Progress:
        """What a completed migration took: total time and downtime."""
        with watching(self._qemu) as watch, suppress(TimeoutError):
            async with asyncio.timeout(FIGURES_LIMIT_S):
                while watch.progress.total_ms == 0:
                    await watch.ask()
                    await asyncio.sleep(0)
        return watch.progress

    async def tune(self, parameters: Mapping[str, object]) -> None:
        """Changes parameters while it is under way; `max-bandwidth` limits the copies of disks as well."""
        await self._qemu.execute("migrate-set-parameters", parameters)
        limit = parameters.get("max-bandwidth")
        if isinstance(limit, int):
            await self._mirrors.set_speed(limit)

    async def cancel(self) -> None:
        """See `recall`."""
        await recall(self._qemu, self._before, self._line)
        self.completed = False

    async def _until(self, watch: Watch, wanted: frozenset[str], report: Report | None) -> str:
        stalled = _Stall(self._sending.stall_limit_s)
        while True:
            status = await watch.next()
            if status in wanted:
                return str(status)
            if status in {"failed", "cancelled", NONE}:
                await watch.ask()
                raise MigrationFailed(f"the migration {status}: {watch.progress.error or 'QEMU does not say why'}", status=status)
            if report is None:
                continue
            stalled.check(watch.progress)
            disks = self._mirrors.progress(await self._mirrors.check()) if self._mirrors else ()
            await report(msgspec.structs.replace(watch.progress, status=status or watch.progress.status, disks=disks))


class _Stall:
    """How long nothing has moved."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._seen: tuple[str, int] | None = None
        self._since = asyncio.get_running_loop().time()

    def check(self, progress: Progress) -> None:
        now = asyncio.get_running_loop().time()
        seen = (progress.status, progress.transferred_bytes)
        if seen != self._seen:
            self._seen, self._since = seen, now
        elif now - self._since > self._limit_s:
            raise MigrationFailed(f"no byte was sent for {self._limit_s:g} s (QEMU's state: {progress.status})", status=progress.status)


async def recall(qemu: Qemu, before: Before, line: socket.socket | None = None) -> None:
    """Ends the migration of a source that still owns its guest, in whatever phase, and puts everything back. Idempotent.

    `line` is the connection that was handed to QEMU, which is shut down if it keeps QEMU from ending.

    The guest runs again if it ran before. One that was not running before is `postmigrate` in QEMU's words when it was halted for the
    switch-over already (until QEMU 9.0 it does not know better); it can be set going all the same.

    Raises:
        WrongState: a part of the guest is at the destination already (postcopy): there is nothing whole to come back to.
        MigrationFailed: QEMU ended, or does not let go.
        MonitorUnavailable, QemuDied, QemuSilent: the connection was lost on the way; call it again.
    """
    with watching(qemu) as watch:
        status = await _asked(watch, qemu)
        if status in POSTCOPY:
            raise WrongState(f"a migration in state {status} cannot be undone", state=status, allowed=sorted(FINAL))
        if status not in FINAL:
            await _cancel(qemu, watch, line)
        await _settled(qemu, watch)
    # Only now: QEMU 7.2 loses count of who uses a disk when the end of its copy falls into the halt of its guest, which flushes all disks.
    await drop_all(qemu)
    await capabilities.restore(qemu, before.dials)
    await tls.remove(qemu)
    with suppress(QemuRefused):  # it was used, or there was none
        await qemu.execute("closefd", {"fdname": PREFIX})
    # Halted to leave, or to be sent the rest: whoever holds the machine let nobody else halt it.
    if before.run_state == "running" and await run_state(qemu) in {GONE, "paused"}:
        await qemu.execute("cont")


async def _asked(watch: Watch, qemu: Qemu) -> str:
    """The state of the migration; that of one whose QEMU does not answer is learned after its connection was broken."""
    while (status := await watch.ask()) is None:
        with suppress(QemuError):
            await yank(qemu, migration=True)
        await watch.wake()
    return status


async def _settled(qemu: Qemu, watch: Watch) -> None:
    """Waits until the guest is set going, a moment after the end; QEMU may wait for a copy that stands still before."""
    while True:
        try:
            if await run_state(qemu) != "finish-migrate":
                return
        except QemuSilent:
            await yank(qemu, migration=True)
        await watch.wake()


async def _cancel(qemu: Qemu, watch: Watch, line: socket.socket | None) -> None:
    loop = asyncio.get_running_loop()
    began = loop.time()
    yanked = False
    with suppress(QemuSilent, QemuRefused):  # refused: it ended just now
        await qemu.execute("migrate_cancel", deadline_s=IMPATIENT_S)
    while (status := await watch.next()) not in FINAL:
        waited = loop.time() - began
        if status == CANCELLING and waited > CANCEL_PATIENCE_S / 2:
            # QEMU 7.2 may be about to wait for `migrate-continue` when it is cancelled, and then waits for it all the same.
            with suppress(QemuSilent, QemuRefused):
                await qemu.execute("migrate-continue", {"state": CANCELLING}, deadline_s=IMPATIENT_S)
        if not yanked and waited > CANCEL_PATIENCE_S:
            if line is not None:  # QEMU knows a way to break it only once the handshake is over
                with suppress(OSError):
                    line.shutdown(socket.SHUT_RDWR)
            yanked = await yank(qemu, migration=True)
        if waited > CANCEL_LIMIT_S:
            raise MigrationFailed(f"QEMU did not let go of the migration within {CANCEL_LIMIT_S:g} s (state {status})")
