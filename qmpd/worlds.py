"""From a definition to the facts its plan needs: the board, an emulator, the verdict on KVM, what its paths lead to."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from qmpd import tpm
from qmpd.accelerator import Accelerators
from qmpd.board import NamedBoard
from qmpd.catalogue import Catalogue
from qmpd.confinement import Confiner
from qmpd.errors import NotFound, Problem, invalid
from qmpd.facts import AcceleratorFacts, Confinement, EmulatorFacts, FileFacts, MachinePaths, World
from qmpd.probe import Emulators
from qmpd.settings import Settings
from qmpd.spec import Limits, MachineSpec
from qmpd.storage import examine, paths_of

#: Looking at a file takes microseconds, on a network a second; after this the mount is dead.
EXAMINE_DEADLINE_S: Final = 10.0
READERS: Final = 4


class Worlds:
    """Gathers facts. The only place where planning meets the host."""

    def __init__(
        self, catalogue: Catalogue, emulators: Emulators, accelerators: Accelerators, settings: Settings, confiner: Confiner
    ) -> None:
        self.confiner = confiner
        self._catalogue = catalogue
        self._emulators = emulators
        self._accelerators = accelerators
        self._settings = settings
        # Threads of their own: those that wait for a dead mount must not keep machines from being stopped.
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="qmpd-examine")
        self._host_arch = os.uname().machine

    async def of(self, spec: MachineSpec, paths: MachinePaths) -> tuple[NamedBoard, World]:
        """The board of a definition and the world it would be launched in.

        Raises:
            Invalid: the catalogue has no such board, or the host no emulator for it; everything else is for `problems` to find.
        """
        named = self.board(spec)
        emulator = await self._emulator(spec, named)
        files = await self._examined(paths_of(spec))
        world = World(
            emulator=emulator,
            host_arch=self._host_arch,
            kvm=await self._verdict(spec, named, emulator),
            paths=paths,
            files=files,
            raw_options=self._settings.raw_options,
            confinement=Confinement() if spec.limits == Limits() else await self.confiner.found(),
            swtpm=None if spec.tpm is None else await asyncio.to_thread(tpm.program),
        )
        return named, world

    async def _examined(self, paths: Sequence[str]) -> dict[str, FileFacts]:
        """What the paths lead to; one on a file system that does not answer keeps only its own definition waiting, and not for long."""
        if not paths:
            return {}
        loop = asyncio.get_running_loop()
        looking = loop.run_in_executor(self._readers, examine, paths, self._settings.pools)
        done, _ = await asyncio.wait([looking], timeout=EXAMINE_DEADLINE_S)
        if done:
            return looking.result()
        silent = FileFacts(kind="denied", refusal=f"its file system did not answer within {EXAMINE_DEADLINE_S:.0f} s")
        return dict.fromkeys(paths, silent)

    def board(self, spec: MachineSpec) -> NamedBoard:
        """The board of a definition. Raises Invalid when the catalogue has none of this name."""
        try:
            return self._catalogue.get(spec.board)
        except NotFound as error:
            raise invalid([Problem(path="$.board", message=error.message)]) from error

    async def _emulator(self, spec: MachineSpec, named: NamedBoard) -> EmulatorFacts:
        wanted = (spec.emulator,) if spec.emulator is not None else named.board.emulators
        missing: NotFound | None = None
        for name in wanted:
            try:
                return await self._emulators.get(name)
            except NotFound as error:
                missing = missing or error
        field = "emulator" if spec.emulator is not None else "board"
        message = missing.message if missing is not None else "no emulator is named for this board"
        raise invalid([Problem(path=f"$.{field}", message=message)]) from missing

    async def _verdict(self, spec: MachineSpec, named: NamedBoard, emulator: EmulatorFacts) -> AcceleratorFacts:
        if spec.accel == "tcg" or self._host_arch not in named.board.kvm_hosts:
            return AcceleratorFacts(usable=False, reason=f"KVM does not run this board on a {self._host_arch} host")
        return await self._accelerators.verdict(emulator)
