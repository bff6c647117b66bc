"""A live migration over TLS, with a disk on shared storage, against the same two QEMUs moved by hand over raw sockets.

Both go over the same wire between two network namespaces, under the same certificates. The downtime is read from the clock of the two
QEMUs (STOP here, RESUME there), by somebody who asks neither a daemon nor whoever drives by hand.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import statistics
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import msgspec

from qmpd.credentials import server_directory
from qmpd.migrationviews import MigrateRequest
from qmpd.spec import Disk, ImageDisk, Kernel, MachineSpec
from scripts.lib import bench_libvirt_hosts
from scripts.lib.bench_daemon import Bench
from scripts.lib.bench_figures import Row, limited, paired
from scripts.lib.bench_floor import command_line
from scripts.lib.bench_libvirt_hosts import LibvirtHosts, Moved
from scripts.lib.progress import say
from tests.guests.build import build_all
from tests.migration.byhand import Credentials, Pair, move
from tests.migration.emulators import PREFIX, emulators, without_diary
from tests.migration.hosts import Hosts, hosts
from tests.migration.network import NoNetworks

PAIRS: Final = 15
TOTAL_BAR: Final = 1.1
DOWNTIME_BAR_MS: Final = 20.0
#: Firmware and kernel are done by then, and the machine idle.
SETTLE_S: Final = 1.0
DISK_MIB: Final = 64
QMPD_DISK: Final = "disk-of-qmpd.raw"
BY_HAND_DISK: Final = "disk-by-hand.raw"
MIB: Final = 1 << 20


class Size(msgspec.Struct, frozen=True, kw_only=True):
    """How much memory a machine has, and how much of it is not empty."""

    what: str
    memory_mib: int
    filled_mib: int


SIZES: Final = (
    Size(what="64 MiB, idle", memory_mib=64, filled_mib=0),
    Size(what="512 MiB, 384 of them full", memory_mib=512, filled_mib=384),
)


class Move(msgspec.Struct, frozen=True, kw_only=True):
    """What one move took, in milliseconds: from nothing at the destination to nothing at the source, and the guest's standstill."""

    total: float
    downtime: float


async def measure(bench: Bench) -> list[Row]:
    """Moves in turn by hand, by qmpd and, where it is installed, between two libvirtds."""
    try:
        async with hosts() as world:
            await world.start()
            rows = []
            with bench_libvirt_hosts.running(world) if bench.libvirt else contextlib.nullcontext(None) as libvirt:
                for size in SIZES:
                    rows += await _measured(bench, world, libvirt, size)
            return rows
    except NoNetworks as reason:
        say(f"bench: nothing is migrated here: {reason}")
        return []


async def _measured(bench: Bench, world: Hosts, libvirt: LibvirtHosts | None, size: Size) -> list[Row]:
    floor, prepared, ours, theirs = [], [], [], []
    spec = await asyncio.to_thread(_spec, bench.root, world, size)
    async with world[0].client() as client:
        argv = without_diary(await command_line(client, spec))
        machine = await client.create(spec, start=True)
    uuid_ = machine.uuid
    world.onlooker.mind(uuid_)
    name = None if libvirt is None else await asyncio.to_thread(_started, libvirt, world, spec)
    await asyncio.sleep(SETTLE_S)
    pairs = bench.repeat or PAIRS
    places = (world[0].certificates, world[1].certificates)
    for number in range(pairs):
        floor.append(await asyncio.to_thread(_by_hand, world, argv, places))
        async with _prepared(world, machine.emulator_version or "") as better:
            prepared.append(await asyncio.to_thread(_by_hand, world, argv, better))
        ours.append(await _by_qmpd(world, spec.name, uuid_, number % 2))
        if libvirt is not None and name is not None:
            theirs.append(await asyncio.to_thread(_by_libvirt, libvirt, world, name, number % 2))
        say(
            f"  pair {number + 1}: by hand {floor[-1].total:.0f} ms with {floor[-1].downtime:.1f} ms of standstill,"
            f" {prepared[-1].total:.0f} ms where it is given parameters, qmpd {ours[-1].total:.0f} ms with {ours[-1].downtime:.1f} ms"
        )
    async with world[pairs % 2].client() as client:
        await client.kill(spec.name)
        await client.delete(spec.name)
    if libvirt is not None:
        await asyncio.to_thread(libvirt.end, pairs % 2)
    return _rows(size, floor, prepared, ours, theirs)


@asynccontextmanager
async def _prepared(world: Hosts, version: str) -> AsyncIterator[tuple[Path, Path]]:
    """The hosts' certificates as qmpd gives them to a QEMU that waits: with parameters that it would search for."""
    async with AsyncExitStack() as made:
        one, other = [
            await made.enter_async_context(server_directory(str(host.certificates), str(world.shared), version)) for host in world.each
        ]
        yield Path(one), Path(other)


def _started(libvirt: LibvirtHosts, world: Hosts, spec: MachineSpec) -> str:
    """The same machine by libvirt; its UUID."""
    if spec.kernel is None:
        raise ValueError("the machine boots a kernel")
    disk = world.shared / "disk-of-libvirt.raw"
    with disk.open("wb") as image:
        image.truncate(DISK_MIB * MIB)
    machine = Moved(
        emulator=emulators().program("x86_64"),
        memory_mib=spec.memory_mib or 0,
        kernel=spec.kernel.image,
        initrd=spec.kernel.initrd,
        disk=str(disk),
    )
    name = libvirt.start(machine)
    world.onlooker.mind(name)
    return name


def _by_libvirt(libvirt: LibvirtHosts, world: Hosts, name: str, at: int) -> Move:
    total = libvirt.move(at)
    return Move(total=total * 1e3, downtime=world.onlooker.gap(name) * 1e3)


async def _by_qmpd(world: Hosts, name: str, uuid_: str, at: int) -> Move:
    async with world[at].client() as client:
        began = datetime.now(UTC)
        job = await client.migrate(name, MigrateRequest(peer=world[1 - at].name, storage="shared"))
        # Whoever waits for it looks now and then; when it was over the daemon has written down.
        job = await client.wait_job(job.id)
    if job.state != "succeeded" or job.ended_at is None:
        raise RuntimeError(f"{name} was not moved: {job.error}")
    total = datetime.fromisoformat(job.ended_at) - began
    return Move(total=total.total_seconds() * 1e3, downtime=await asyncio.to_thread(world.onlooker.gap, uuid_) * 1e3)


def _rows(size: Size, floor: Sequence[Move], prepared: Sequence[Move], ours: Sequence[Move], theirs: Sequence[Move]) -> list[Row]:
    more = statistics.median(mine.downtime - low.downtime for mine, low in zip(ours, floor, strict=True))
    totals = paired(
        "migrate",
        f"live migration, {size.what}",
        ours=[one.total for one in ours],
        floor=[one.total for one in floor],
        libvirt=[one.total for one in theirs],
        times=TOTAL_BAR,
    )
    without_search = paired(
        "migrate",
        f"the same, parameters given by hand too, {size.what}",
        ours=[one.total for one in ours],
        floor=[one.total for one in prepared],
    )
    standstill = paired(
        "migrate",
        f"its downtime, {size.what}",
        ours=[one.downtime for one in ours],
        floor=[one.downtime for one in floor],
        libvirt=[one.downtime for one in theirs],
    )
    return [
        totals,
        without_search,
        standstill,
        limited("migrate", f"longer than by hand, {size.what}", measured=more, limit=DOWNTIME_BAR_MS, unit="ms", samples=len(ours)),
    ]


def _spec(root: Path, world: Hosts, size: Size) -> MachineSpec:
    """A machine that sleeps, with a disk both hosts see, and memory that is not all zeroes."""
    guest = build_all(root / ".cache" / "guests")["x86_64-q35-quiet"]
    for disk in (world.shared / QMPD_DISK, world.shared / BY_HAND_DISK):
        with disk.open("wb") as image:
            image.truncate(DISK_MIB * MIB)
    filling = None
    if size.filled_mib:
        filling = world.shared / f"filling{size.filled_mib}"
        filling.write_bytes(os.urandom(MIB) * size.filled_mib)
    disks: tuple[Disk, ...] = (ImageDisk(path=str(world.shared / QMPD_DISK), format="raw"),)
    kernel = Kernel(image=str(guest.file), initrd=None if filling is None else str(filling), console=False)
    name = f"moved{size.memory_mib}"
    return MachineSpec(name=name, board="x86_64-q35", accel="tcg", memory_mib=size.memory_mib, kernel=kernel, disks=disks)


def _own(before: str, word: str, name: str) -> str:
    """The word with what is this machine's own in place of what is qmpd's: its UUID, and its disk."""
    return name if before == "-uuid" else word.replace(QMPD_DISK, BY_HAND_DISK)


def _by_hand(world: Hosts, argv: Sequence[str], places: tuple[Path, Path]) -> Move:
    name = str(uuid.uuid4())
    world.onlooker.mind(name)
    program = emulators().program(Path(argv[0]).name.removeprefix(PREFIX))
    words = (program, *(_own(before, word, name) for before, word in itertools.pairwise(argv)))
    trusted = Credentials(directories=places, names=(world[0].name, world[1].name))
    pair = Pair(words, world.network, trusted)
    with pair.source() as here:
        time.sleep(SETTLE_S)
        began = time.perf_counter()
        with pair.destination() as there:
            move(pair, here, there)
            total = time.perf_counter() - began
            downtime = world.onlooker.gap(name)
    return Move(total=total * 1e3, downtime=downtime * 1e3)
