"""What a machine takes along beside its memory when it moves: nothing, a disk upon a base that both hosts have, or a TPM.

Each piece says how the machine is moved with it, which failpoints of its own that passes, and, wherever the machine is in the end, whether
anything of it was lost, doubled or left behind. To find out, the machine may be stopped and started again.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Final

import msgspec

from qmpd.migrationviews import DiskChoice, MigrateRequest
from qmpd.record import read_record
from qmpd.spec import BaseImage, ImageDisk, MachineSpec, Tpm
from qmpd_api.client import Client
from tests.guests.build import Guest
from tests.guests.ring import acknowledged, missing, read_ring
from tests.guests.tpmtrace import LINE, MEASURED, WORKS, Said, said, tpms_below
from tests.machines import spec_of
from tests.migration.hosts import Host, Hosts
from tests.migration.overlays import CHANGES, LOWEST, MIDDLE, RING, below, content, laid_upon, layered, qemu_io
from tests.migration.traveller import LOOK_S, PATIENCE_S, Broken, Traveller

#: So much a guest prints before it is moved, and afterwards.
PRINTED: Final = 60
#: `qemu-img check` found blocks that nothing refers to: so does an image whose QEMU was killed look, and nothing is lost.
LEAKS: Final = 3


class Ending(msgspec.Struct, frozen=True, kw_only=True):
    """Where a machine is when all is settled. It runs there, or is at rest because its QEMU was killed. `harm` is what was done."""

    machine: Traveller
    host: Host
    runs: bool
    harm: str = ""


class Baggage:
    """A machine with nothing but its memory. `points` are how the names of failpoints begin that only this baggage passes, `harms`
    are what only it can suffer; `copied` says whether there are disks that are copied."""

    points: tuple[str, ...] = ()
    harms: tuple[str, ...] = ()
    copied = False

    def __init__(self, spec: MachineSpec) -> None:
        self.spec = spec

    def request(self, destination: Host) -> MigrateRequest:
        """The move."""
        return MigrateRequest(peer=destination.name)

    async def begun(self, machine: Traveller, host: Host) -> None:
        """Returns when the guest has something to lose. Raises Broken."""
        await machine.grown(host, PRINTED)

    async def lost(self, ending: Ending) -> list[str]:
        """What is wrong in the end."""
        if not ending.runs:
            return []
        trace = await asyncio.to_thread(ending.machine.trace)
        return [f"its output is broken: {trace.boots} boots, {trace.breaks}"] if trace.breaks or trace.boots != 1 else []


class UponBase(Baggage):
    """A disk of which only what lies above its base is sent. The guest writes numbered blocks to it, and prints each that it has flushed.

    The base lies upon another one. The hosts have both under different names, so that each must name its own.
    """

    points = ("image-",)
    copied = True

    def __init__(self, spec: MachineSpec, place: Path, bases: tuple[BaseImage, BaseImage], before: bytes) -> None:
        super().__init__(spec)
        (disk,) = spec.disks
        assert isinstance(disk, ImageDisk)
        self._place = place
        self._image = Path(disk.path)
        self._there = place / "there.qcow2"
        self._bases = bases
        self._digests = _digests(bases)
        self._before = before

    @classmethod
    async def packed(cls, world: Hosts, guest: Guest, name: str) -> UponBase:
        """A machine upon a base that all machines of these hosts share, as such bases are shared."""
        place = world.shared / name
        place.mkdir()
        bases = await _bases(world, guest)
        disk = await laid_upon(bases[0], place / "here.qcow2")
        await qemu_io(Path(disk.path), *CHANGES)
        before = await content(Path(disk.path), place)
        return await asyncio.to_thread(cls, spec_of(guest, name, disks=(disk,)), place, bases, before)

    def request(self, destination: Host) -> MigrateRequest:
        choice = DiskChoice(disk=0, how="copy", path=str(self._there), base=self._bases[1].path)
        return MigrateRequest(peer=destination.name, disks=(choice,))

    async def lost(self, ending: Ending) -> list[str]:
        machine, host = ending.machine, ending.host
        async with host.client() as client:
            (disk,) = (await client.definition(machine.name)).spec.disks
            if ending.runs:
                await client.stop(machine.name)
            await asyncio.to_thread(machine.visit, host)
            assert isinstance(disk, ImageDisk)
            broken = await self._misplaced(disk) or await self._incomplete(Path(disk.path), machine, clean=ending.runs)
            await client.start(machine.name)
        await machine.grown(host, PRINTED)
        found = await asyncio.to_thread(_digests, self._bases)
        return broken + ([] if found == self._digests else ["a base was changed"])

    async def _misplaced(self, disk: ImageDisk) -> list[str]:
        """What is wrong with where it lies, and what is left of where it was to lie."""
        moved = disk.path == str(self._there)
        wanted = (str(self._there), self._bases[1]) if moved else (str(self._image), self._bases[0])
        if (disk.path, disk.base) != wanted:
            return [f"its disk is {disk.path} upon {disk.base}"]
        if (found := await below(Path(disk.path))) != wanted[1].path:
            return [f"its image says that it lies upon {found}"]
        left = [path for path in self._place.iterdir() if path.name.endswith((".arriving", ".new"))]
        return [f"left: {path}" for path in (*left, *([self._there] if not moved and self._there.exists() else []))]

    async def _incomplete(self, image: Path, machine: Traveller, *, clean: bool) -> list[str]:
        """Which blocks of it are not what they were, or what the guest made of them."""
        now = await content(image, self._place)
        told = acknowledged(await asyncio.to_thread(machine.printed))
        ring = await asyncio.to_thread(read_ring, self._place / "flat.raw")
        broken = [] if ring.newest >= told.last else [f"block {told.last} was written, and {ring.newest} is the newest there is"]
        broken += [f"block {number} is out of order" for number in told.gaps]
        broken += [f"block {number} is not on the disk" for number in missing(ring, told.last)]
        broken += [f"sector {number} is torn" for number in ring.torn]
        broken += [f"{told.errors} errors of the disk"] if told.errors else []
        if (now[: RING.start], now[RING.stop :]) != (self._before[: RING.start], self._before[RING.stop :]):
            broken.append("what the guest does not write to is not what it was")
        return broken + await _damage(image, clean=clean)


class WithTpm(Baggage):
    """A TPM, whose state goes with the guest's. The guest has measured something once, and tells again and again what the register has."""

    # Of a process that starts at the destination beside a QEMU, and of its directory that goes at the source.
    points = ("gate-", "tpm-", "record-", "files-")
    harms = ("source-tpm", "destination-tpm")

    def __init__(self, spec: MachineSpec) -> None:
        super().__init__(spec)
        self._first: Said | None = None

    @classmethod
    async def packed(cls, _world: Hosts, guest: Guest, name: str) -> WithTpm:
        """A machine with a TPM of its board's usual kind."""
        return cls(spec_of(guest, name, tpm=Tpm()))

    async def begun(self, machine: Traveller, host: Host) -> None:
        async with host.client() as client:
            self._first = await said(client, machine.name)
        if (self._first.code, self._first.register) != (WORKS, MEASURED):
            raise Broken(f"it has no TPM from the start: {self._first}")

    async def lost(self, ending: Ending) -> list[str]:
        assert self._first is not None
        machine, host = ending.machine, ending.host
        async with host.client() as client:
            without = ending.harm in self.harms and ending.runs and await _bereft(ending, client)
            broken = await asyncio.to_thread(_companions, ending, without=without)
            if not without:
                answers = {Said(*groups) for groups in await asyncio.to_thread(_answers, machine)}
                broken += [f"its TPM said {other}, and {self._first} before" for other in answers - {self._first}]
            if ending.runs:
                await said(client, machine.name)
                await client.stop(machine.name)
            await client.start(machine.name)
            again = await said(client, machine.name)
        if (again.code, again.register) != (WORKS, MEASURED) or again.resets <= self._first.resets:
            broken.append(f"its TPM is another one when it starts again: {again}, and {self._first} before")
        return broken + await asyncio.to_thread(_companions, msgspec.structs.replace(ending, runs=True))


async def _bases(world: Hosts, guest: Guest) -> tuple[BaseImage, BaseImage]:
    """The bases of the two hosts, made once."""
    here, there = (world.shared / name for name in ("bases", "bases.there"))
    for place in (here, there):
        with contextlib.suppress(FileExistsError):
            place.mkdir()
            await layered(place, guest, name=LOWEST)
            if place is there:  # of an image that was made twice no two copies are the same
                await asyncio.to_thread(shutil.copyfile, here / MIDDLE, there / MIDDLE)
    lowest = [BaseImage(path=str(place / LOWEST), format="raw") for place in (here, there)]
    return (
        BaseImage(path=str(here / MIDDLE), format="qcow2", base=lowest[0]),
        BaseImage(path=str(there / MIDDLE), format="qcow2", base=lowest[1]),
    )


def _digests(bases: tuple[BaseImage, ...]) -> list[str]:
    return [hashlib.sha256(Path(layer.path).read_bytes()).hexdigest() for base in bases for layer in base.layers()]


async def _damage(image: Path, *, clean: bool) -> list[str]:
    """What `qemu-img check` finds; `clean`: its QEMU was not killed."""
    process = await asyncio.create_subprocess_exec(
        "qemu-img", "check", "-q", "-f", "qcow2", str(image), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    output, _ = await process.communicate()
    fine = process.returncode == 0 or (process.returncode == LEAKS and not clean)
    return [] if fine else [f"qemu-img check: {output.decode(errors='replace').strip()}"]


def _answers(machine: Traveller) -> set[tuple[str, str, int]]:
    """All that the guest was answered since its first banner."""
    found = re.finditer(LINE, machine.printed().decode("ascii", "replace"))
    return {(one[1], one[2], int(one[3], 16)) for one in found}


async def _bereft(ending: Ending, client: Client) -> bool:
    """Whether a guest runs on without its TPM where that was killed: the daemon must say so. Raises Broken."""
    machine, place = ending.machine, ending.host.own(ending.machine.name)

    async def told() -> bool:
        return (await client.machine(machine.name)).tpm_lost is not None

    end = time.monotonic() + PATIENCE_S
    while not (lost := await told()) and not await asyncio.to_thread(tpms_below, place):
        if time.monotonic() > end:
            raise Broken("it has no TPM, and nobody says so")
        await asyncio.sleep(LOOK_S)
    return lost


def kill_tpm(host: Host, machine: str) -> None:
    """SIGKILL to the TPM of a machine's QEMU at a host, if there is one. Blocks."""
    for pid in tpms_below(host.own(machine)):
        os.kill(pid, signal.SIGKILL)


def _companions(ending: Ending, *, without: bool = False) -> list[str]:
    """What is wrong with the processes that are TPMs of the machine, and with where their state is. `without`: its own is lost. Blocks."""
    machine, host = ending.machine, ending.host
    broken = []
    for each in machine.world.each:
        found, wanted = tpms_below(each.own(machine.name)), list[object]()
        if each is host and ending.runs and not without:
            recorded = read_record(str(host.running_dir(machine.name))).tpm
            wanted = [recorded.pid] if recorded is not None else ["one that is recorded"]
        if found != wanted:
            broken.append(f"TPMs at {each.name}: pids {found}, and not {wanted}")
    states = [path.name for path in host.own(machine.name).glob("tpm*") if path.is_dir()]
    return broken + ([] if states == ["tpm"] else [f"the states of its TPM at {host.name}: {states}"])
