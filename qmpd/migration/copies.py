"""The source's part of a copy: another machine is made at a peer of the files of one that stays here, as it is.

A copy has no hand-over: the original's definition is not touched, and nobody else ever owns it. What moves on is written in the ledger
alone. Until *release* is written the copy may be given up for any reason, and nothing is left of it at the peer; from then on it is the
peer's to take, and this host only tells it so, until it has heard that the peer has it, or has discarded it for good.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Final

import msgspec

from qmpd.errors import Held, HostError, MigrationFailed, NotFound, PeerError, PeerRefused, QmpdError, WrongState
from qmpd.jobs import Report
from qmpd.lifecycle import AT_REST
from qmpd.machine import Machine, Publish
from qmpd.migration.carriage import Carriage
from qmpd.migration.delivery import AGAIN_S, LONGEST_AGAIN_S, Departure, asked, code_of, insisted
from qmpd.migration.duplicates import Duplicates
from qmpd.migration.exposures import Exposures
from qmpd.migration.ledger import Entry, Ledger, first_entry
from qmpd.migration.persistence import persist
from qmpd.migration.phases import ENDED, KEEPABLE, OWNED, Phase, Step
from qmpd.migration.protocol import DiscardRequest, Handover, Standing
from qmpd.migration.rehearsal import Rehearsals
from qmpd.migration.shipping import LIVE
from qmpd.migration.withdrawal import Withdrawals, reason_of
from qmpd.migrationviews import CopyReport, MigrateRequest, MigrationReport
from qmpd.peering import Peering
from qmpd.peers import PeerDaemon
from qmpd.registry import Registry
from qmpd.settings import Peer
from qmpd.tasks import Tasks, undivided
from qmpd.views import Progress

VERB: Final = "copy"
#: What is noted of a copy whose peer never said whether it has it.
GIVEN_UP: Final = "an operator gave it up"

_log = logging.getLogger(__name__)


class Copies:
    """All copies that are made of this host's machines."""

    def __init__(
        self,
        *,
        registry: Registry,
        ledger: Ledger,
        peering: Peering,
        duplicates: Duplicates,
        rehearsals: Rehearsals,
        exposures: Exposures,
        carriage: Carriage,
        withdrawals: Withdrawals,
        tasks: Tasks,
        publish: Publish,
    ) -> None:
        self._registry = registry
        self._ledger = ledger
        self._peering = peering
        self._duplicates = duplicates
        self._rehearsals = rehearsals
        self._exposures = exposures
        self._carriage = carriage
        self._withdrawals = withdrawals
        self._tasks = tasks
        self._publish = publish
        self._under_way: dict[str, Departure] = {}
        #: The daemon ends: what cannot be done now is left to the next one.
        self.closing = False

    async def copy(self, machine: Machine, request: MigrateRequest, report: Report) -> CopyReport:
        """Copies a machine. Who cancels the task before the copy is released leaves nothing of it.

        Raises:
            NotFound, Forbidden: there is no such peer, or it may not receive machines.
            WrongState, Held: the machine cannot be copied now.
            CannotMove: the peer does not take it, or it cannot be copied like this.
            MigrationFailed, PeerError: it did not get there.
        """
        peer = self._peering.peers.receiver(request.peer)
        departure = Departure(secrets.token_hex(8), machine, VERB)
        departure.job = report.job
        departure.hold()
        try:
            machine.require(LIVE | AT_REST, VERB)
            lives = machine.state not in AT_REST
            offer = await self._duplicates.offer(machine, request, departure.migration)
            if not lives:
                await self._registry.check_free(machine)
            entry = await self._ledger.begin(first_entry(offer, machine.name, peer.name))
        except BaseException:
            departure.release()
            raise
        self._under_way[entry.id] = departure
        self._publish("migration.began", machine.name, {"migration": entry.id, "peer": peer.name})
        async with AsyncExitStack() as stack:
            try:
                link = await stack.enter_async_context(self._peering.dial(peer))
                halted_ms = None
                if lives:
                    began = asyncio.get_running_loop().time()
                    halted_ms = await self._exposed(departure, link, request, report)
                    request = _left(request, asyncio.get_running_loop().time() - began)
                outcome = await self._released(departure, peer, link, request, report)
            except BaseException as error:
                if self._ledger.get(entry.id).phase in KEEPABLE:
                    await undivided(self._kept(departure, Step.KEEP, reason_of(error)), f"keep:{machine.name}")
                raise
            await self._delivered(departure, link)
        return _reported(entry, outcome, at_rest=not lives, halted_ms=halted_ms)

    async def _exposed(self, departure: Departure, link: PeerDaemon, request: MigrateRequest, report: Report) -> float | None:
        """Takes the disks of a machine that lives as they are at one moment, if the peer would take a copy; then the original is free. For
        how long its guest was halted."""
        offer = self._ledger.get(departure.migration).offer
        await report(Progress(phase="the destination tries it"))
        there = await insisted(lambda: link.tried(offer))
        self._rehearsals.checked(departure.machine, request, offer, await self._rehearsals.look(departure.machine, offer), there)
        limit = asyncio.timeout(request.goal.deadline_s)  # with a deadline it is given up (`check_wishes`)
        try:
            async with limit:
                halted_ms = await self._exposures.take(departure, report)
        except TimeoutError as error:
            if not limit.expired():
                raise
            raise MigrationFailed(f"the disks were not copied within {request.goal.deadline_s:g} s") from error
        departure.release()
        return halted_ms

    async def _released(
        self, departure: Departure, peer: Peer, link: PeerDaemon, request: MigrateRequest, report: Report
    ) -> MigrationReport:
        """Everything up to the note that makes the copy the peer's to take; from then on the original is free."""
        entry = self._ledger.get(departure.migration)
        carried = await self._carriage.carry(departure, peer, link, request, report)
        report.point_of_no_return(f"{peer.name} is making its copy of machine {departure.machine.name!r} its own")
        await undivided(self._ledger.step(entry.id, Step.RELEASE), f"release:{entry.machine}")
        departure.release()
        return await carried.reported(departure, entry)

    def standing(self, entry: Entry) -> Standing:
        """How far this side is."""
        departure = self._under_way.get(entry.id)
        handover = _handover(entry) if entry.phase is Phase.RELEASED else None
        return entry.standing(departure.problem if departure is not None else "", handover)

    def under_way(self, migration: str) -> Departure | None:
        """What is under way of a copy."""
        return self._under_way.get(migration)

    async def give_up(self, entry: Entry) -> None:
        """Ends a copy of which the peer does not say whether it has it, on the word of somebody who does not wait for that. A peer that
        answers after all is told to discard what it has.

        Raises:
            WrongState: nobody waits for the peer, or it says that it has the copy.
        """
        departure = self._under_way.get(entry.id)
        if departure is None or entry.phase is not Phase.RELEASED:
            raise WrongState(f"the copy of machine {entry.machine!r} is {entry.phase}", state=str(entry.phase), allowed=["released"])
        async with departure.lock:
            await self._not_taken(entry)
            if self._ledger.get(entry.id).phase is Phase.RELEASED:
                await undivided(self._kept(departure, Step.RETURNED, GIVEN_UP), f"keep:{entry.machine}")

    async def _not_taken(self, entry: Entry) -> None:
        """Has the peer, if it can be asked, discard what it has. Raises WrongState where it has the copy."""
        try:
            async with self._peering.dial(self._peering.peers.get(entry.peer)) as link:
                found = await link.discard(entry.id, DiscardRequest(reason=GIVEN_UP))
        except (PeerError, NotFound, HostError):
            return  # it is not there: the operator's word has to do
        if found.phase in OWNED:
            raise WrongState(f"{entry.peer} answers, and has the copy", state=str(found.phase), allowed=[str(Phase.LOADED)])

    def beginning(self) -> tuple[str, ...]:
        """The jobs of copies that may still be given up."""
        found = [one for one in self._under_way.values() if self._ledger.get(one.migration).phase in KEEPABLE]
        return tuple(one.job for one in found if one.job is not None)

    # After a restart of the daemon.

    def restore(self) -> None:
        """Before processes are taken over: holds the machines whose guests may stand still for a copy, until they go on."""
        for entry in self._ledger.unsettled("source"):
            machine, of = self._registry.known(entry.machine), entry.offer.copy_of
            if of is None or machine is None or machine.definition.uuid != of.uuid or not entry.went:
                continue
            departure = Departure(entry.id, machine, VERB)
            try:
                departure.hold()
            except Held:  # a copy that was taken, and a move that began after it
                continue
            self._under_way[entry.id] = departure

    def go_on(self) -> None:
        """Goes on with each copy where it stood."""
        for entry in self._ledger.unsettled("source"):
            if entry.is_copy:
                self._tasks.start(self._gone_on(entry), f"copy:{entry.machine}")

    async def _gone_on(self, entry: Entry) -> None:
        departure, machine = self._under_way.get(entry.id), self._registry.known(entry.machine)
        say = departure.say if departure is not None else _nobody
        if entry.phase in KEEPABLE:
            entry = await self._noted(entry, Step.KEEP, "the daemon of the source was restarted", say)
        if departure is not None:
            self._let_go(departure)
        if entry.phase is Phase.KEPT:
            await self._withdrawals.told(entry)
        elif entry.phase is Phase.COPIED or machine is None:  # the peer asks what was decided, if it has not heard it
            await self._noted(entry, Step.CONFIRM, entry.reason, say)
            await self._ledger.settle(entry.id)
        else:
            departure = self._under_way[entry.id] = Departure(entry.id, machine, VERB)
            async with self._peering.dial(self._peering.peers.get(entry.peer)) as link:
                try:
                    await self._delivered(departure, link)
                except MigrationFailed as error:
                    _log.warning("a copy did not come about", extra={"machine": entry.machine, "reason": error.message})

    # What follows when it is decided.

    async def _kept(self, departure: Departure, step: Step, reason: str) -> None:
        """Nothing is copied: the original is let go of, and the peer is told until it has heard."""
        entry = await self._noted(self._ledger.get(departure.migration), step, reason, departure.say)
        self._let_go(departure)
        self._publish("migration.kept", entry.machine, {"migration": entry.id, "peer": entry.peer, "reason": reason})
        self._tasks.start(self._withdrawals.told(entry), f"tell:{entry.machine}")

    async def _copied(self, departure: Departure, reason: str) -> None:
        entry = await self._noted(self._ledger.get(departure.migration), Step.CONFIRM, reason, departure.say)
        await persist(lambda: self._ledger.settle(entry.id), what="to note that all is done", say=departure.say, ending=self._ending)
        self._let_go(departure)
        data = {"migration": entry.id, "peer": entry.peer, "name": entry.offer.spec.name, "uuid": entry.uuid}
        self._publish("migration.copied", entry.machine, data)

    async def _delivered(self, departure: Departure, link: PeerDaemon) -> None:
        """Tells the peer that the copy is its own, until it is known that it is.

        Raises:
            MigrationFailed: the peer has discarded it, or somebody has given it up.
        """
        entry = self._ledger.get(departure.migration)
        pause = AGAIN_S
        while True:
            async with departure.lock:
                if self._ledger.get(entry.id).phase is not Phase.RELEASED:
                    break
                if await self._taken(departure, link):
                    return
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_AGAIN_S)
        raise MigrationFailed(f"there is no copy at {entry.peer}: {self._ledger.get(entry.id).reason or 'it was discarded there'}")

    async def _taken(self, departure: Departure, link: PeerDaemon) -> bool:
        """Whether the peer says that it has the copy. One that says that it never will ends it."""
        entry = self._ledger.get(departure.migration)
        try:
            found = await asked(lambda: link.take(entry.id, _handover(entry)))
        except PeerError as error:
            if isinstance(error, PeerRefused) and code_of(error) == "not_found":  # it was made anew, and has nothing of it
                await undivided(self._kept(departure, Step.RETURNED, error.message), f"keep:{entry.machine}")
            else:
                self._doubted(departure, error)
            return False
        if found.phase in OWNED:
            await undivided(self._copied(departure, found.reason or found.problem), f"copied:{entry.machine}")
            return True
        if found.phase is Phase.DISCARDED:
            await undivided(self._kept(departure, Step.RETURNED, found.reason), f"keep:{entry.machine}")
        return False

    def _doubted(self, departure: Departure, error: QmpdError) -> None:
        entry = self._ledger.get(departure.migration)
        problem = f"whether {entry.peer} has its copy of the machine is not known: {error.message}"
        if problem != departure.problem:
            departure.say(problem)
            _log.warning("copy in doubt", extra={"machine": entry.machine, "peer": entry.peer, "error": error.message})
            self._publish("migration.doubt", entry.machine, {"migration": entry.id, "peer": entry.peer, "reason": problem})

    async def _noted(self, entry: Entry, step: Step, reason: str, say: Callable[[str], None]) -> Entry:
        """Writes down what became of a copy, whatever that takes."""

        async def noted() -> Entry:
            await self._exposures.clear(entry)
            now = self._ledger.get(entry.id)
            return now if now.phase in ENDED else await self._ledger.step(entry.id, step, reason=reason)

        return await persist(noted, what="to note what became of a copy", say=say, ending=self._ending)

    def _let_go(self, departure: Departure) -> None:
        self._under_way.pop(departure.migration, None)
        departure.release()

    def _ending(self) -> bool:
        return self.closing


def _nobody(_problem: str) -> None:
    """Nobody shows why it cannot go on; the log has it."""


def _left(request: MigrateRequest, elapsed_s: float) -> MigrateRequest:
    """The request with what is left of the time that it allows."""
    if request.goal.deadline_s is None:
        return request
    goal = msgspec.structs.replace(request.goal, deadline_s=max(0.001, request.goal.deadline_s - elapsed_s))
    return msgspec.structs.replace(request, goal=goal)


def _handover(entry: Entry) -> Handover:
    return Handover(epoch=entry.epoch, run=False)


def _reported(entry: Entry, carried: MigrationReport, *, at_rest: bool, halted_ms: float | None) -> CopyReport:
    spec = entry.offer.spec
    return CopyReport(
        id=entry.id,
        machine=entry.machine,
        peer=entry.peer,
        name=spec.name,
        uuid=entry.uuid,
        macs=tuple(nic.mac for nic in spec.nics if nic.mac is not None),
        at_rest=at_rest,
        halted_ms=halted_ms,
        total_ms=carried.total_ms,
        transferred_bytes=carried.transferred_bytes,
        bandwidth_mib_s=carried.bandwidth_mib_s,
        findings=carried.findings,
        disks=carried.disks,
    )
