"""A machine of a peer's, tried: whether a QEMU with its definition can be here, and what it is made of. Nothing durable comes of it.

The QEMU is a throw-away one, halted, and waits for a state that never comes, as the real one would: so it takes no lock of an image on
shared storage, and writes nothing. Stand-ins take the place of disks that would be copied; everything that has to be made for it is in one
directory below `run_dir`, which goes when the trial ends, or when the next daemon starts. Nobody is at the other end of its ports.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import shutil
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import msgspec

from qmpd.errors import Busy, HostError, Invalid, QmpdError
from qmpd.facts import MachinePaths
from qmpd.failpoint import passing
from qmpd.launching import Launch
from qmpd.migration.items import MAX_VARIABLES_BYTES
from qmpd.migration.likeness import DestinationFacts, Obstacle, QemuFacts, TargetDisk
from qmpd.migration.parcels import VARIABLES
from qmpd.migration.premises import Premises
from qmpd.migration.protocol import Offer
from qmpd.migration.survey import surveyed
from qmpd.plan import LaunchPlan, without_forwards
from qmpd.plan.disks import is_read_only
from qmpd.planning import Planning
from qmpd.settings import Peer
from qmpd.shortage import shortage
from qmpd.spec import BlankDisk, Disk, ImageDisk, Limits, MachineSpec
from qmpd.storage import furnish
from qmpd.throwaway import Throwaway, throwaway
from qmpd.tpm import lent

MIB: Final = 1024 * 1024
#: A QEMU is there within a second and answers all questions in less; whoever asks waits a little longer than this.
TRIAL_S: Final = 45.0
#: Below `run_dir`, and short: the paths of sockets are below it, and must not be long.
PLACE: Final = "t"

_log = logging.getLogger(__name__)


class _Questions:
    """A throw-away emulator, asked as a monitor is."""

    def __init__(self, emulator: Throwaway) -> None:
        self._emulator = emulator

    async def execute(self, command: str, arguments: Mapping[str, object] | None = None) -> object:
        """The answer, whatever it is."""
        return msgspec.json.decode(await self._emulator.command(command, msgspec.Raw, arguments))


class Trials:
    """Tries machines of peers on one host: one at a time for each of them."""

    def __init__(self, planning: Planning, premises: Premises, run_dir: str) -> None:
        self._planning = planning
        self._premises = premises
        self._places = Path(run_dir) / PLACE
        self._busy: set[str] = set()

    def sweep(self) -> None:
        """Removes what is left of trials that a killed daemon did not end; their QEMUs were killed with it. Blocks."""
        try:
            shutil.rmtree(self._places)
        except FileNotFoundError:
            pass
        except OSError as error:
            _log.warning("what is left of a trial was not removed", extra={"directory": str(self._places), "error": str(error)})

    async def tried(self, peer: Peer, offer: Offer) -> DestinationFacts:
        """What this host has for the machine, and a QEMU with its definition is made of.

        Raises:
            Busy: another machine of this peer's is being tried.
            CannotMove: the offer does not fit its own definition.
        """
        if peer.name in self._busy:
            raise Busy(f"another machine of {peer.name} is being tried", limit=1)
        self._busy.add(peer.name)
        try:
            facts = await self._premises.of(offer)
            name_taken, uuid_taken_by = self._premises.named(offer)
            facts = msgspec.structs.replace(facts, name_taken=name_taken, uuid_taken_by=uuid_taken_by)
            try:
                async with asyncio.timeout(TRIAL_S):
                    return msgspec.structs.replace(facts, qemu=await self._surveyed(offer, facts.disks))
            except TimeoutError:
                obstacles = [Obstacle(message=f"its QEMU did not answer within {TRIAL_S:.0f} s")]
            except Invalid as error:
                obstacles = [Obstacle(path=problem.path, message=problem.message) for problem in error.problems]
            except QmpdError as error:
                obstacles = [Obstacle(message=error.message)]
            return msgspec.structs.replace(facts, obstacles=tuple(obstacles))
        finally:
            self._busy.discard(peer.name)

    async def _surveyed(self, offer: Offer, targets: tuple[TargetDisk, ...]) -> QemuFacts:
        async with self._place() as place:
            paths = MachinePaths(run=str(place), state=str(place))
            variables = next((parcel.size for parcel in offer.parcels if parcel.item == VARIABLES), None)
            if variables is not None:
                await asyncio.to_thread(_make_sparse, paths.variables, min(variables, MAX_VARIABLES_BYTES))
            launch = await self._planning.launch(_stood_in(offer, targets), paths)
            plan = _sized(launch, offer, paths)
            await furnish(plan)
            async with lent(plan.tpm) as line, throwaway(*_command(plan, line), tuple(line.values())) as emulator:
                await passing("migration-trial")
                return await surveyed(_Questions(emulator))

    @asynccontextmanager
    async def _place(self) -> AsyncIterator[Path]:
        place = self._places / secrets.token_hex(4)
        try:
            await asyncio.to_thread(place.mkdir, mode=0o700, parents=True)
        except OSError as error:
            raise shortage(error) or HostError(f"{place} cannot be made: {error.strerror}", path=str(place)) from error
        try:
            yield place
        finally:
            await asyncio.to_thread(shutil.rmtree, place, ignore_errors=True)


def _command(plan: LaunchPlan, fds: Mapping[str, int]) -> tuple[str, tuple[str, ...]]:
    binary, *words = plan.detached().awaiting().argv(fds)
    return binary, tuple(words)


def _make_sparse(path: str, size: int) -> None:
    """In place of the variables that the machine will bring."""
    try:
        with Path(path).open("xb") as file:
            file.truncate(size)
    except OSError as error:
        raise shortage(error) or HostError(f"{path} cannot be made: {error.strerror}", path=path) from error


def _stood_in(offer: Offer, targets: tuple[TargetDisk, ...]) -> MachineSpec:
    """The definition with stand-ins for the disks that are not here, without what would be taken of the host."""
    there = {target.index for target in targets if target.how == "shared" and target.exists and not target.refusal}
    sizes = {wanted.index: wanted.virtual_bytes for wanted in offer.disks}
    disks = tuple(disk if index in there else _blank(disk, sizes.get(index, 0)) for index, disk in enumerate(offer.spec.disks))
    bare = msgspec.structs.replace(offer.spec, uuid=offer.uuid, accel=offer.accel or offer.spec.accel, disks=disks, limits=Limits())
    return without_forwards(bare)


def _blank(disk: Disk, size_bytes: int) -> Disk:
    if not isinstance(disk, ImageDisk) or is_read_only(disk):
        return disk
    return BlankDisk(
        size_mib=max(1, -(-size_bytes // MIB)),
        format=disk.format,
        bus=disk.bus,
        serial=disk.serial,
        discard=disk.discard,
        on_error=disk.on_error,
    )


def _sized(launch: Launch, offer: Offer, paths: MachinePaths) -> LaunchPlan:
    """The plan with images that are to the byte as large as the guest's."""
    sizes = {
        paths.disk(wanted.index, offer.spec.disks[wanted.index].format): wanted.virtual_bytes
        for wanted in offer.disks
        if wanted.virtual_bytes
    }
    blank = (msgspec.structs.replace(image, size_bytes=sizes.get(image.path, image.size_bytes)) for image in launch.plan.blank_images)
    return msgspec.structs.replace(launch.plan, blank_images=tuple(blank))
