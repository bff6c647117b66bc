"""Machines of many architectures that go back and forth between two hosts under load, and not a tick, byte or block is lost."""

from __future__ import annotations

import asyncio
import itertools
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec

from qmpd.migrationviews import DiskChoice, MigrateRequest
from qmpd.spec import ImageDisk
from scripts.lib.progress import say
from tests.guests.build import Guest, build_all
from tests.guests.ring import acknowledged, missing, read_ring
from tests.machines import copy_of, spec_of
from tests.migration.hosts import Host, Hosts, hosts
from tests.migration.linuxguest import PACKAGE, is_there, linux_spec
from tests.migration.traveller import Broken, Traveller

#: Each counts in its memory, on its serial port, as fast as a processor that it shares with all others lets it.
BOARDS: Final = (
    "aarch64-virt",
    "arm-virt",
    "riscv64-virt",
    "x86_64-microvm",
    "mips-malta",
    "ppc64-pseries",
    "s390x-ccw",
    "m68k-virt",
)
#: Writes to the disk it was booted from, which is copied at each move.
COPIED: Final = "x86_64-pc-blocks"
#: So many machines are on their way at the same time, some there and some back.
AT_ONCE: Final = 2
#: So much every machine prints between two moves of it.
PRINTED: Final = 20


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """What a soak found. `printed` are bytes, `blocks` what the writers say that is on their disks; times in milliseconds."""

    moves: int
    seconds: float
    machines: int
    printed: int
    blocks: int
    downtime_median: float
    downtime_worst: float
    total_median: float
    total_worst: float
    broken: tuple[str, ...]


class Passenger:
    """A machine, where it is, and how it is checked that it lost nothing."""

    def __init__(self, machine: Traveller, disk: Path | None, *, copied: bool) -> None:
        self.machine = machine
        self.at = 0
        self.downtimes: list[float] = []
        self.totals: list[float] = []
        self._disk = disk
        self._copied = copied
        self._copies = itertools.count(1)

    async def move(self, world: Hosts) -> None:
        """To the other host. Raises Broken."""
        machine, source, destination = self.machine, world[self.at], world[1 - self.at]
        await machine.grown(source, PRINTED)
        await asyncio.to_thread(machine.visit, source)
        began = time.perf_counter()
        request, disk = self._request(destination)
        async with source.client() as client:
            job = await client.wait_job((await client.migrate(machine.name, request)).id)
        if job.state != "succeeded":
            raise Broken(f"{machine.name} did not move from {source.name} to {destination.name}: {job.error}")
        self.totals.append((time.perf_counter() - began) * 1e3)
        self.at = 1 - self.at
        await asyncio.to_thread(machine.visit, destination)
        if disk != self._disk and self._disk is not None:
            self._disk.unlink(missing_ok=True)
        self._disk = disk
        if broken := await asyncio.to_thread(machine.twice):
            raise Broken("; ".join(broken))
        self.downtimes.append(await asyncio.to_thread(world.onlooker.gap, machine.uuid) * 1e3)
        await machine.grown(destination, PRINTED)

    def lost(self) -> tuple[str, ...]:
        """Every tick, byte and block that it lost. Blocks."""
        name, output = self.machine.name, self.machine.printed()
        if self._disk is None:
            trace = self.machine.trace()
            return tuple(f"{name}: {broken}" for broken in trace.breaks) + (() if trace.boots == 1 else (f"{name}: {trace.boots} boots",))
        told = acknowledged(output)
        ring = read_ring(self._disk)
        found = [f"{name}: block {number} is out of order" for number in told.gaps]
        found += [f"{name}: block {number} is not on the disk" for number in missing(ring, told.last)]
        found += [f"{name}: sector {number} is torn" for number in ring.torn]
        return (*found, *([f"{name}: {told.errors} errors of the disk"] if told.errors else []))

    def counted(self) -> tuple[int, int]:
        """How many bytes it printed, and how many blocks it wrote."""
        output = self.machine.printed()
        return len(output), 0 if self._disk is None else acknowledged(output).last

    def _request(self, destination: Host) -> tuple[MigrateRequest, Path | None]:
        if self._disk is None or not self._copied:
            return MigrateRequest(peer=destination.name), self._disk
        path = self._disk.with_name(f"{self.machine.name}.{next(self._copies)}.raw")
        return MigrateRequest(peer=destination.name, disks=(DiskChoice(disk=0, how="copy", path=str(path)),)), path


async def measure(root: Path, *, rounds: int, boards: Sequence[str] = BOARDS, linux: bool = True) -> Figures:
    """So many moves, the machines taking turns. Afterwards nothing of it is left."""
    guests = await asyncio.to_thread(build_all, root / ".cache" / "guests")
    began = time.monotonic()
    async with hosts() as world:
        await world.start()
        passengers = await _boarded(root, world, guests, boards, linux=linux)
        say(f"  {len(passengers)} machines run")
        broken: list[str] = []
        try:
            await _moved(world, passengers, rounds)
        except* Broken as group:
            broken += [str(error) for error in group.exceptions]
        for passenger in passengers:
            broken += await asyncio.to_thread(passenger.lost)
            broken += [f"{passenger.machine.name}: {what}" for what in await _left(world, passenger)]
        return await asyncio.to_thread(_figures, passengers, time.monotonic() - began, broken)


async def _boarded(root: Path, world: Hosts, guests: dict[str, Guest], boards: Sequence[str], *, linux: bool) -> list[Passenger]:
    """Every machine, running, half of them at each host."""
    made = [Passenger(Traveller(world, spec_of(guests[board], board.replace("_", "-"))), None, copied=False) for board in boards]
    writer = copy_of(guests[COPIED], world.shared)
    first = world.shared / "pc-blocks.0.raw"
    writer.file.rename(first)
    spec = spec_of(writer, "pc-blocks", disks=(ImageDisk(path=str(first), format="raw", bus="ide", read_only=False),))
    made.append(Passenger(Traveller(world, spec), first, copied=True))
    if linux and is_there():
        disk = world.shared / "linux.raw"
        made.append(Passenger(Traveller(world, await asyncio.to_thread(linux_spec, root / ".cache", disk, "linux")), disk, copied=False))
    elif linux:
        raise Broken(f"the package {PACKAGE} is not installed")
    for number, passenger in enumerate(made):
        passenger.at = number % 2
        await passenger.machine.begin(world[passenger.at])
    for passenger in made:
        await passenger.machine.grown(world[passenger.at], PRINTED)
    return made


async def _moved(world: Hosts, passengers: Sequence[Passenger], rounds: int) -> None:
    turns = iter(range(rounds))

    async def mover(first: int) -> None:
        # Each has its own machines, so that none is on two ways at once.
        own = itertools.cycle(passengers[first::AT_ONCE])
        for number in turns:
            passenger = next(own)
            await passenger.move(world)
            took = f"{passenger.totals[-1]:.0f} ms, {passenger.downtimes[-1]:.0f} ms of them standing still"
            say(f"  {number + 1}: {passenger.machine.name} to {world[passenger.at].name}: {took}")

    async with asyncio.TaskGroup() as group:
        for number in range(AT_ONCE):
            group.create_task(mover(number), name=f"mover:{number}")


async def _left(world: Hosts, passenger: Passenger) -> list[str]:
    """What there is of a machine at the host where it is not, and whatever else is not as it should be."""
    try:
        await passenger.machine.rest()
    except Broken as error:
        return [str(error)]
    other = world[1 - passenger.at]
    left = [what for what in await asyncio.to_thread(passenger.machine.left_at, other) if ": port " not in what]
    return left + await passenger.machine.untouched(world[passenger.at])


def _figures(passengers: Sequence[Passenger], seconds: float, broken: Sequence[str]) -> Figures:
    downtimes = [one for passenger in passengers for one in passenger.downtimes] or [0.0]
    totals = [one for passenger in passengers for one in passenger.totals] or [0.0]
    counts = [passenger.counted() for passenger in passengers]
    return Figures(
        moves=sum(len(passenger.totals) for passenger in passengers),
        seconds=seconds,
        machines=len(passengers),
        printed=sum(count[0] for count in counts),
        blocks=sum(count[1] for count in counts),
        downtime_median=statistics.median(downtimes),
        downtime_worst=max(downtimes),
        total_median=statistics.median(totals),
        total_worst=max(totals),
        broken=tuple(broken),
    )
