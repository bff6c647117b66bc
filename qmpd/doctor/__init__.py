"""What is wrong with this daemon, its machines and what they live on, and what to do about it.

Here everything is found out (`gathering` says what, `looking` how, so that nothing that hangs holds it up); `judgement` is pure.
QEMU is not asked: what its silence means is known already.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final

import msgspec

from qmpd.bus import Bus
from qmpd.doctor import gathering
from qmpd.doctor.condition import (
    CertificateSeen,
    Condition,
    DatabaseSeen,
    FileSeen,
    ForeignQemu,
    LeftOver,
    LimitSeen,
    MachineSeen,
    PeerSeen,
    SilentDirectory,
    VolumeSeen,
)
from qmpd.doctor.gathering import FullConsole, Question, only
from qmpd.doctor.judgement import report
from qmpd.doctor.looking import Lookout
from qmpd.errors import QmpdError
from qmpd.hostprocess import HostProcess
from qmpd.journal import Journal, timestamp, utc_now
from qmpd.lifecycle import State
from qmpd.machine import Machine
from qmpd.peering import Peering
from qmpd.peerviews import PeerHealth
from qmpd.registry import Registry
from qmpd.settings import Settings
from qmpd.tasks import Tasks
from qmpd.views import DoctorReport, ExitView

__all__ = ["Doctor"]

#: A read of the database takes milliseconds; a doctor who waits longer helps nobody.
DATABASE_DEADLINE_S: Final = 3.0
#: Looking at the emulators of a hundred machines takes milliseconds, unless one lies on a dead mount.
EMULATORS_DEADLINE_S: Final = 2.0
#: Peers that need longer are in trouble as well. Asking goes on until its own limit, in the background.
PEERS_DEADLINE_S: Final = 3.0
#: How many of the newest events are searched for crashes.
EVENTS_SEARCHED: Final = 2000
HOUR: Final = timedelta(hours=1)


class Doctor:
    """Examines one daemon."""

    def __init__(self, settings: Settings, registry: Registry, journal: Journal, bus: Bus, peering: Peering) -> None:
        self._peering = peering
        self._settings = settings
        self._registry = registry
        self._journal = journal
        self._bus = bus
        self._lookout = Lookout()
        self._tasks = Tasks()
        self._emulators: asyncio.Task[dict[str, bool]] | None = None

    async def examine(self) -> DoctorReport:
        """What is wrong. Answers within seconds, whatever hangs; never fails."""
        machines = list(self._registry)
        answers, crashes, replaced, peers = await asyncio.gather(
            self._looked(machines), self._crashes(), self._replaced(machines), self._peers()
        )
        full = {(console.machine, console.port) for console in only(FullConsole, answers)}
        (database,) = only(DatabaseSeen, answers)
        condition = Condition(
            machines=tuple(_machine(machine, crashes, replaced, full) for machine in machines),
            volumes=_on_different(only(VolumeSeen, answers)),
            files=only(FileSeen, answers),
            database=msgspec.structs.replace(database, answers=crashes is not None, pending=self._bus.pending, lost=self._bus.lost),
            limits=only(LimitSeen, answers),
            left_over=only(LeftOver, answers),
            foreign=tuple(self._foreign(only(HostProcess, answers))),
            silent=only(SilentDirectory, answers),
            certificates=only(CertificateSeen, answers),
            peers=peers,
        )
        return report(condition)

    async def _looked(self, machines: list[Machine]) -> list[object]:
        """The answers of everything that has to be looked at in files."""
        settings, registry = self._settings, self._registry
        questions: list[Question] = [
            *gathering.of_volumes(settings),
            *gathering.of_left_over(settings, lambda: registry.names, registry.damaged),
            gathering.of_database(settings),
            gathering.of_host(),
            *gathering.of_certificates(settings),
        ]
        for machine in machines:
            paths = registry.paths(machine.name)
            questions += gathering.of_files(machine.definition.spec, paths, settings)
            questions += [gathering.of_console(machine.name, paths, port) for port in machine.consoles]
        answers = await self._lookout.look([question.look for question in questions])
        return [found for question, answer in zip(questions, answers, strict=True) for found in question.seen(answer)]

    async def _peers(self) -> tuple[PeerSeen, ...]:
        """What the peers say, or that they did not say it in time."""
        names = [peer.name for peer in self._peering.peers]
        asked = [self._tasks.start(self._peering.health(name), f"doctor:peer:{name}") for name in names]
        if asked:
            await asyncio.wait(asked, timeout=PEERS_DEADLINE_S)
        late = PeerHealth(name="", url="", reachable=False, problem=f"no answer within {PEERS_DEADLINE_S:g} s")
        now = utc_now()
        return tuple(_peer(name, task.result() if task.done() else late, now) for name, task in zip(names, asked, strict=True))

    async def _crashes(self) -> Counter[str] | None:
        """How often each machine crashed within the last hour; None if the database does not say."""
        since, newest = max(0, self._bus.last - EVENTS_SEARCHED), self._bus.last
        earliest = timestamp(utc_now() - HOUR)
        crashes: Counter[str] = Counter()
        try:
            async with asyncio.timeout(DATABASE_DEADLINE_S):
                while since < newest:
                    page = await self._journal.page(since)
                    crashes.update(
                        event.machine
                        for event in page.events
                        if event.machine and event.at >= earliest and event.data.get("state") == State.CRASHED
                    )
                    since = page.events[-1].number if page.events else newest
                await self._journal.last()
        except (QmpdError, TimeoutError):
            return None
        return crashes

    async def _replaced(self, machines: list[Machine]) -> dict[str, bool]:
        """Which machines' emulators were replaced. A look that hangs is not begun a second time: it keeps one thread, not all."""
        if self._emulators is None or self._emulators.done():
            self._emulators = self._tasks.start(_all_replaced(machines), "doctor:emulators")
        await asyncio.wait([self._emulators], timeout=EMULATORS_DEADLINE_S)
        return self._emulators.result() if self._emulators.done() else {}

    def _foreign(self, host: tuple[HostProcess, ...]) -> list[ForeignQemu]:
        """The QEMUs that use our directories and that no machine of ours has."""
        own = {machine.launch.identity.pid for machine in self._registry if machine.launch is not None}
        found = []
        for process in host:
            directory = _used_by(process, (self._settings.run_dir, self._settings.state_dir))
            if directory is not None and process.identity.pid not in own:
                found.append(ForeignQemu(pid=process.identity.pid, program=Path(process.program).name, directory=directory))
        return found


async def _all_replaced(machines: list[Machine]) -> dict[str, bool]:
    found = {}
    for machine in machines:
        if machine.alive and not machine.stray:
            try:
                found[machine.name] = await machine.session.process.binary_replaced()
            except (QmpdError, OSError):
                continue
    return found


def _peer(name: str, health: PeerHealth, now: datetime) -> PeerSeen:
    left = None if health.certificate is None else (datetime.fromisoformat(health.certificate.expires_at) - now).total_seconds() / 86_400
    return PeerSeen(name=name, problem=health.problem, clock_ahead_s=health.clock_ahead_s, days_left=left)


def _used_by(process: HostProcess, directories: tuple[str, ...]) -> str | None:
    for directory in directories:
        if any(f"{directory}/" in word for word in process.argv) or f"{process.directory}/".startswith(f"{directory}/"):
            return directory
    return None


def _machine(machine: Machine, crashes: Counter[str] | None, replaced: dict[str, bool], full: set[tuple[str, int]]) -> MachineSeen:
    spec = machine.definition.spec
    return MachineSeen(
        name=spec.name,
        board=spec.board,
        board_known=machine.board is not None,
        state=machine.state,
        status=machine.status,
        stray=machine.stray,
        emulator=machine.launch.emulator if machine.launch else None,
        replaced=replaced.get(spec.name),
        crashes=crashes[spec.name] if crashes else 0,
        restarts=spec.restart.when != "never",
        ending=_ending(machine.exit),
        full_consoles=tuple(sorted(port for name, port in full if name == spec.name)),
    )


def _ending(ended: ExitView | None) -> str:
    """How it ended, in brackets behind what is said about it."""
    if ended is None:
        return ""
    words = [ended.signal or (f"status {ended.code}" if ended.code is not None else ""), ended.reason or ""]
    said = ended.stderr_tail.strip().splitlines()
    return f" ({', '.join(filter(None, words)) or 'unknown'}{f': {said[-1].strip()}' if said else ''})"


def _on_different(volumes: tuple[VolumeSeen, ...]) -> tuple[VolumeSeen, ...]:
    """One of those that are on the same file system: the first, which is the daemon's own."""
    return tuple({volume.device: volume for volume in reversed(volumes)}.values())[::-1]
