"""Crash points of a machine at rest that moves as files: a daemon dies, or the line is cut, at a failpoint of either side.

Whatever comes of it: when everything is up and joined again one host owns the machine, at rest, every byte of its disks is what it was,
nothing is left on the other host, and no file that came half; and the machine starts there, with its whole log.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import random
from pathlib import Path
from typing import Final

import msgspec

from qmpd.errors import QmpdError
from qmpd.lifecycle import AT_REST
from qmpd.migrationviews import DiskChoice, MigrateRequest
from qmpd.spec import BlankDisk
from tests.guests.build import Guest
from tests.machines import copy_of, spec_of
from tests.migration.baggage import PRINTED
from tests.migration.crashes import Case, Point, Sides, Verdict, made_whole, passed, removed, struck
from tests.migration.hosts import Host, Hosts
from tests.migration.traveller import Broken, Traveller

#: Of the harms of a migration those that a machine without a QEMU can suffer.
HARMS_AT_REST: Final = ("source-daemon", "destination-daemon", "both-daemons", "link-flap")
MIB: Final = 1024 * 1024
#: More than one piece is sent of it, and most of it is a hole.
OWN_MIB: Final = 16
OWN: Final = "disk1.raw"


class Resting(msgspec.Struct, frozen=True, kw_only=True):
    """A machine that has run and does not. `image` is its guest's own disk, `there` where that is to be; the digests are of its disks."""

    sides: Sides
    image: Path
    there: Path
    digests: tuple[str, str]
    exit: object

    def request(self) -> MigrateRequest:
        """Moves it, and both of its disks."""
        disks = (DiskChoice(disk=0, how="copy", path=str(self.there)),)
        return MigrateRequest(peer=self.sides.destination.name, disks=disks)


async def put_to_rest(world: Hosts, guest: Guest, name: str) -> Resting:
    """A machine of the first host that is to go to the second."""
    place = world.shared / name
    place.mkdir()
    image = copy_of(guest, place)
    spec = spec_of(image, name)
    machine = Traveller(world, msgspec.structs.replace(spec, disks=(*spec.disks, BlankDisk(size_mib=OWN_MIB, format="raw"))))
    sides = Sides(source=world[0], destination=world[1], machine=machine)
    await machine.begin(sides.source)
    await machine.grown(sides.source, PRINTED)
    async with sides.source.client() as client:
        await client.kill(name)
        view = next(view for view in (await client.machines()).machines if view.name == name)
    await asyncio.to_thread(machine.visit, sides.source)
    own = sides.source.own(name) / OWN
    digests = await asyncio.to_thread(_filled, own, image.file)
    return Resting(sides=sides, image=image.file, there=place / "there.raw", digests=digests, exit=view.exit)


def _filled(own: Path, image: Path) -> tuple[str, str]:
    with own.open("r+b") as file:
        file.write(random.Random(own.parent.name).randbytes(2 * MIB + 4321))
        file.seek(OWN_MIB * MIB - 999)
        file.write(b"the last of it")
    return digest_of(image), digest_of(own)


def digest_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else "no file"


async def survey_at_rest(world: Hosts, guest: Guest, name: str = "survey", *, everything: bool = False) -> list[Point]:
    """Every point that such a move passes. Leaves the hosts as they were."""
    resting = await put_to_rest(world, guest, name)
    points = await passed(resting.sides, resting.request(), everything=everything)
    await removed(resting.sides.machine)
    return points


async def suffered_at_rest(world: Hosts, guest: Guest, name: str, case: Case) -> Verdict:
    """One case, from a machine that is made for it until that is gone again."""
    resting = await put_to_rest(world, guest, name)
    machine = resting.sides.machine
    reached, end = False, ""
    broken: list[str] = []
    try:
        reached = await struck(resting.sides, case, resting.request(), runs=False)
        await made_whole(world)
        end, broken = await _judged(resting)
    except Broken as error:
        broken = [str(error)]
    finally:
        await made_whole(world)
    broken += await asyncio.to_thread(machine.twice)
    with contextlib.suppress(Broken, QmpdError):
        await removed(machine)
    return Verdict(case=case, reached=reached, end=end, broken=tuple(broken))


async def _judged(resting: Resting) -> tuple[str, list[str]]:
    machine = resting.sides.machine
    host, view = await machine.at_home()
    end = f"{view.state} at {host.name}"
    broken = [] if view.state in AT_REST else [f"it is {view.state}, and nobody started it"]
    broken += [] if view.exit == resting.exit else [f"it ended otherwise: {view.exit}, and {resting.exit} before"]
    broken += await asyncio.to_thread(_files, resting, host)
    if broken:
        return end, broken
    async with host.client() as client:
        await client.start(machine.name)
    await asyncio.to_thread(machine.visit, host)
    await machine.grown(host, PRINTED)
    await asyncio.to_thread(machine.visit, host)
    trace = await asyncio.to_thread(machine.trace)
    if trace.breaks or trace.boots != 2:
        broken.append(f"its output is broken: {trace.boots} boots, {trace.breaks}")
    return end, broken


def _files(resting: Resting, host: Host) -> list[str]:
    """What is wrong with its files, and what there is that should not be."""
    sides, machine = resting.sides, resting.sides.machine
    moved = host is sides.destination
    found = (digest_of(resting.there if moved else resting.image), digest_of(host.own(machine.name) / OWN))
    broken = [] if found == resting.digests else [f"its disks are others at {host.name}: {found}, and {resting.digests} before"]
    if not moved and resting.there.exists():
        broken.append(f"left: {resting.there}")
    places = (resting.there.parent, *(each.daemon.state_dir / "machines" for each in machine.world.each))
    return broken + [f"left: {path}" for place in places for path in place.rglob(".*.arriving")]
