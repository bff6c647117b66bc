"""What this host offers: the boards with what can run them, and the emulators."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from qmpd.accelerator import Accelerators
from qmpd.board import NamedBoard
from qmpd.catalogue import Catalogue
from qmpd.errors import QmpdError
from qmpd.facts import AcceleratorFacts, EmulatorFacts
from qmpd.hostcheck import check
from qmpd.probe import Emulators, ProbeProblem
from qmpd.settings import Settings
from qmpd.views import BoardView, CheckLine, CheckReport, EmulatorView


def certificate_lines(settings: Settings) -> list[CheckLine]:
    """What a report on the whole host says of certificates; nothing where there are none, and none are needed. Blocks."""
    if not settings.listen and not settings.peers and not Path(settings.pki_dir).exists():
        return []
    from qmpd.pki import own_hosts  # here: a library of cryptography comes with the check
    from qmpd.pki.checking import in_short

    return in_short(settings, own_hosts(), datetime.now(UTC))


class Inventory:
    """Answers what could be run here. Finding an emulator is enough to list a board; nothing is launched for that."""

    def __init__(self, catalogue: Catalogue, emulators: Emulators, accelerators: Accelerators, machines_cgroup: str | None = None) -> None:
        self._machines_cgroup = machines_cgroup
        self.catalogue = self._catalogue = catalogue
        self._emulators = emulators
        self._accelerators = accelerators
        self._host_arch = os.uname().machine

    async def boards(self, arch: str | None) -> list[BoardView]:
        """The catalogue, ordered by id; only one architecture's if asked."""
        await self._emulators.scan()
        named = [self._catalogue.boards[name] for name in sorted(self._catalogue.boards)]
        return [await self._board(board) for board in named if arch is None or board.board.arch == arch]

    def board(self, board_id: str) -> NamedBoard:
        """One board, whole. Raises NotFound."""
        return self._catalogue.get(board_id)

    async def emulators(self) -> list[EmulatorView]:
        """Every emulator found, with the verdict on KVM."""
        return [await self._emulator(found) for found in await self._emulators.all()]

    async def check(self, settings: Settings) -> CheckReport:
        """The state of the whole host, and of the certificates of a daemon with these settings."""
        return await check(
            self._emulators,
            self._accelerators,
            state_dir=settings.state_dir,
            machines_cgroup=self._machines_cgroup,
            further=partial(certificate_lines, settings),
        )

    async def _board(self, named: NamedBoard) -> BoardView:
        board = named.board
        found = next((path for path in map(self._emulators.find, board.emulators) if path is not None), None)
        accel, reason = None, None
        if found is None:
            reason = f"no emulator: qemu-system-{board.emulators[0]} was not found"
        elif self._host_arch not in board.kvm_hosts:
            accel = "tcg"
        else:
            try:
                verdict = await self._accelerators.verdict(await self._emulators.get(str(found)))
            except QmpdError as error:  # one emulator that does not work must not hide all boards
                return self._view(named, None, None, error.message)
            accel, reason = ("kvm" if verdict.usable else "tcg"), verdict.reason
        return self._view(named, None if found is None else str(found), accel, reason)

    def _view(self, named: NamedBoard, emulator: str | None, accel: str | None, reason: str | None) -> BoardView:
        board = named.board
        return BoardView(
            id=named.id,
            title=board.title,
            arch=board.arch,
            machine=board.machine,
            emulator=emulator,
            runnable=emulator is not None,
            accel=accel,
            reason=reason,
            memory_mib=board.memory.default_mib,
            max_cpus=board.max_cpus,
            disks=tuple(board.disks),
            nics=tuple(board.nics),
            console=board.console.kernel,
            snapshots=board.snapshots,
            migration=board.migration,
            guest=board.guest.summary if board.guest else None,
            source=named.source,
        )

    async def _emulator(self, found: EmulatorFacts | ProbeProblem) -> EmulatorView:
        if isinstance(found, ProbeProblem):
            name = found.path.rsplit("/", 1)[-1]
            return EmulatorView(
                name=name,
                path=found.path,
                target="",
                version="",
                machines=0,
                cpus=0,
                devices=0,
                kvm=False,
                kvm_reason="",
                problem=found.message,
            )
        foreign = AcceleratorFacts(usable=False, reason="built without KVM")
        verdict = await self._accelerators.verdict(found) if "kvm" in found.accelerators else foreign
        return EmulatorView(
            name=found.path.rsplit("/", 1)[-1],
            path=found.path,
            target=found.target,
            version=found.version,
            machines=len(found.machines),
            cpus=len(found.cpus),
            devices=len(found.devices),
            kvm=verdict.usable,
            kvm_reason=verdict.reason,
            kvm_ratio=verdict.ratio,
        )
