"""From a definition to how it would be launched here: the facts gathered, the problems found, the plan made."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import msgspec

from qmpd.board import NamedBoard
from qmpd.errors import invalid
from qmpd.facts import FileFacts, MachinePaths, World
from qmpd.launching import Launch
from qmpd.plan import plan, resolve
from qmpd.registry import Registry
from qmpd.spec import ImageDisk, Limits, MachineSpec, PflashFirmware
from qmpd.validation import problems
from qmpd.validation.limits import limits
from qmpd.validation.subject import Subject
from qmpd.worlds import Worlds

#: A file that QEMU can use.
_PRESENT: Final = FileFacts(kind="file", readable=True, writable=True)


def _images(spec: MachineSpec, files: Mapping[str, FileFacts]) -> dict[str, FileFacts]:
    """What the images of a definition will be that are not there yet."""
    return {
        disk.path: msgspec.structs.replace(
            _PRESENT,
            magic=disk.format if disk.format == "qcow2" else None,
            backing=(files.get(disk.base.path, _PRESENT).real_path or disk.base.path) if disk.base is not None else None,
        )
        for disk in spec.disks
        if isinstance(disk, ImageDisk)
    }


class Planning:
    """Plans launches. Changes nothing."""

    def __init__(self, registry: Registry, worlds: Worlds) -> None:
        self._registry = registry
        self._worlds = worlds

    async def launch(self, spec: MachineSpec, paths: MachinePaths | None = None, *, coming: frozenset[str] = frozenset()) -> Launch:
        """How a definition would be launched, at the place of its name or at another, once the files in `coming` are there.

        A machine that has its firmware's variables does not need the file any more that they were made of.

        Raises:
            Invalid: all that is wrong with it.
        """
        place = paths or self._registry.paths(spec.name)
        named, world = await self._worlds.of(spec, place)
        present = [path for path in coming if world.files.get(path, _PRESENT).kind == "missing"]
        if isinstance(spec.firmware, PflashFirmware) and (
            place.variables in coming or await asyncio.to_thread(Path(place.variables).exists)
        ):
            present.append(spec.firmware.vars)
        images = _images(spec, world.files)
        there = {path: images.get(path, _PRESENT) for path in present}
        return self._planned(spec, named, msgspec.structs.replace(world, files=world.files | there))

    async def limits_unkept(self, spec: MachineSpec) -> dict[str, str]:
        """Why this host cannot hold a machine to each of its limits that it cannot hold it to; `""`: to none of them.

        Raises:
            Invalid: the catalogue has no such board, or the host no emulator for it.
        """
        if spec.limits == Limits():
            return {}
        named, world = await self._worlds.of(spec, self._registry.paths(spec.name))
        found = limits(Subject(spec=spec, named=named, world=world))
        return {problem.path.removeprefix("$.limits").lstrip("."): problem.message for problem in found}

    async def completed(self, spec: MachineSpec) -> tuple[MachineSpec, Launch]:
        """A definition with everything filled in, and how it would be launched, in one and the same world."""
        named, world = await self._worlds.of(spec, self._registry.paths(spec.name))
        _check(spec, named, world)
        complete = self._registry.complete(spec, resolve(spec, named, world).machine)
        return complete, self._planned(complete, named, world)

    def _planned(self, spec: MachineSpec, named: NamedBoard, world: World) -> Launch:
        _check(spec, named, world)
        return Launch(
            plan=plan(spec, named, world),
            run_dir=world.paths.run,
            state_dir=world.paths.state,
            log_cap_bytes=self._registry.log_cap_bytes,
            stderr_path=self._registry.stderr_path(spec.name),
            machine=resolve(spec, named, world).machine,
            emulator_version=world.emulator.version,
            features=world.emulator.features,
            confiner=None if spec.limits == Limits() else self._worlds.confiner,
        )


def _check(spec: MachineSpec, named: NamedBoard, world: World) -> None:
    found = problems(spec, named, world)
    if found:
        raise invalid(found)
