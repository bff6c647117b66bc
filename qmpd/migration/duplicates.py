"""The offer that is made of a copy: the files of a machine that stays, under the identity of another one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Final
from uuid import uuid4

import msgspec

from qmpd.errors import CannotMove, Problem, invalid
from qmpd.facts import MachinePaths
from qmpd.journal import timestamp, utc_now
from qmpd.lifecycle import AT_REST
from qmpd.machine import Machine
from qmpd.migration.consignment import check_bases, check_formats, packed
from qmpd.migration.identity import renewed
from qmpd.migration.protocol import VERSION, DiskOffer, Offer, Original
from qmpd.migration.shipping import Shipping
from qmpd.migrationviews import Goal, MigrateRequest
from qmpd.plan.disks import is_read_only
from qmpd.spec import MachineSpec

#: The first owner of a machine that nobody else has had.
FIRST_EPOCH: Final = 1
_OF_MEMORY: Final = "a copy takes no memory along"


def check_wishes(request: MigrateRequest) -> None:
    """Raises Invalid with everything that is asked for of a copy and means nothing there."""
    problems = list(_senseless(request))
    if problems:
        raise invalid(problems)


def _senseless(request: MigrateRequest) -> Iterator[Problem]:
    goal, usual = request.goal, Goal()
    if goal.downtime_ms != usual.downtime_ms:
        yield Problem(path="$.goal.downtime_ms", message=f"{_OF_MEMORY}: there is no downtime to keep to")
    if goal.then == "postcopy":
        yield Problem(path="$.goal.then", message=f"{_OF_MEMORY}: none can follow (postcopy)")
    elif goal.deadline_s is not None and goal.then != "abort":
        yield Problem(path="$.goal.then", message="at its deadline a copy can only be given up: `abort`")
    if goal.auto_converge != usual.auto_converge:
        yield Problem(path="$.goal.auto_converge", message=f"{_OF_MEMORY}: its guest is never slowed for it")
    if request.channels:
        yield Problem(path="$.channels", message=f"{_OF_MEMORY}: one connection is all that it needs")
    if request.tunnel:
        yield Problem(path="$.tunnel", message="a copy goes through the API's port in any case")
    if request.storage == "shared":
        yield Problem(path="$.storage", message="two machines cannot share a disk that they write to")


class Duplicates:
    """Makes offers of copies."""

    def __init__(self, shipping: Shipping, paths: Callable[[str], MachinePaths]) -> None:
        self._shipping = shipping
        self._paths = paths

    async def offer(self, machine: Machine, request: MigrateRequest, migration: str) -> Offer:
        """What the peer is told of a copy. Each has a UUID that there was not before.

        Raises:
            CannotMove: a machine of this kind cannot be copied, or not like this.
        """
        definition = machine.definition
        if request.copy is None or definition.adoption is not None:
            raise CannotMove(f"machine {machine.name!r} was started by somebody else: qmpd does not know all of it")
        spec = definition.spec
        disks = tuple(_copied(disk, spec) for disk in await self._shipping.disks(machine, request))
        check_formats(spec, disks)
        if machine.state in AT_REST:  # of one that lives, images are made that name their base in full
            await asyncio.to_thread(check_bases, spec, disks)
        shared = [disk.index for disk in disks if disk.how == "shared"]
        moment, uuid = timestamp(utc_now()), str(uuid4())
        return Offer(
            protocol=VERSION,
            id=migration,
            epoch=FIRST_EPOCH,
            spec=renewed(spec, request.copy.name or machine.name, uuid),
            uuid=uuid,
            created_at=moment,
            changed_at=moment,
            state="stopped",
            machine=spec.machine or "",
            disks=disks,
            parcels=await asyncio.to_thread(packed, machine, self._paths(machine.name), shared, all_of_it=False),
            unlimited="limit-unkept" in request.accept,
            copy_of=Original(name=machine.name, uuid=definition.uuid),
        )


def _copied(disk: DiskOffer, spec: MachineSpec) -> DiskOffer:
    """How a disk of a copy goes: what is only read may be the same file, as it is for many machines."""
    if is_read_only(spec.disks[disk.index]):
        return disk
    if disk.how == "shared":
        raise CannotMove(f"disk {disk.index} cannot be shared: original and copy would both write to it")
    return msgspec.structs.replace(disk, how="copy")
