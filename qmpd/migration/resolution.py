"""What a person decides about a machine on its way when the other host cannot be asked, or does not know of it any more.

The other host is asked all the same: where it answers, a word that contradicts it is refused.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Final

from qmpd import power
from qmpd.errors import HostError, NotFound, PeerError, PeerRefused, WrongState
from qmpd.machine import Machine
from qmpd.migration.arrival import Arrival, Endings
from qmpd.migration.delivery import Deliveries, Departure, code_of
from qmpd.migration.ledger import Entry, Ledger
from qmpd.migration.phases import HANDED_OVER, OWNED, UNOWNED, Phase, Step
from qmpd.migration.protocol import DiscardRequest, Handover, Standing
from qmpd.peering import Peering
from qmpd.peers import PeerDaemon
from qmpd.tasks import undivided

#: What is noted of a machine that a person said the other host has.
FORGOTTEN: Final = "an operator said that the other host has it"


class SourceResolutions:
    """Carries out what a person decides at the source. `departures` are those of `Departures`, by migration."""

    def __init__(self, *, ledger: Ledger, peering: Peering, deliveries: Deliveries, departures: dict[str, Departure]) -> None:
        self._ledger = ledger
        self._peering = peering
        self._deliveries = deliveries
        self._departures = departures

    async def keep(self, machine: Machine) -> None:
        """Takes a machine back that was given away, on the word of somebody who knows that the other host does not run it.

        Raises:
            WrongState: it was not given away, or the other host says that it has it.
        """
        departure = self._given(machine)
        async with self._deciding(departure):
            self._check_not_taken(departure)
            await self._not_taken(departure)
            await undivided(self._deliveries.take_back(departure, "an operator decided so"), f"take-back:{machine.name}")

    async def forget(self, machine: Machine) -> None:
        """Removes what is here of a machine that was given away, on the word of somebody who knows that the other host has it.

        Raises:
            WrongState: it was not given away, or the other host says that it has not got it.
        """
        departure = self._given(machine)
        if departure.taken:  # nobody doubts that; only memory may be on its way still
            await self._let_go(departure)
            return
        async with self._deciding(departure):
            if not departure.taken:
                await self._not_denied(departure)
                await undivided(self._forgotten(departure), f"clear:{machine.name}")

    def _given(self, machine: Machine) -> Departure:
        departure = next((one for one in self._departures.values() if one.machine is machine), None)
        if departure is None or self._ledger.get(departure.migration).phase is not Phase.GIVEN:
            raise WrongState(f"machine {machine.name!r} was not given away", state=str(machine.state), allowed=[str(Phase.GIVEN)])
        return departure

    @asynccontextmanager
    async def _deciding(self, departure: Departure) -> AsyncIterator[None]:
        """Nobody else asks the other host, or heeds what it said, in the block. Who fails in it has decided nothing."""
        departure.decided.set()
        try:
            async with departure.lock:
                yield
        except BaseException:
            if self._ledger.get(departure.migration).phase is Phase.GIVEN:
                departure.decided.clear()
            raise
        if departure.taken:  # it was heard while this waited
            departure.decided.clear()

    def _check_not_taken(self, departure: Departure) -> None:
        if departure.taken or self._ledger.get(departure.migration).phase is not Phase.GIVEN:
            machine = departure.machine
            raise WrongState(f"machine {machine.name!r} runs at its destination", state=str(machine.state), allowed=[str(Phase.GIVEN)])

    async def _not_taken(self, departure: Departure) -> None:
        """Asks the destination, if it can be asked, to discard what it has. Raises WrongState where it has taken the machine."""
        entry = self._ledger.get(departure.migration)
        try:
            async with self._peering.dial(self._peering.peers.get(entry.peer)) as link:
                found = await link.discard(entry.id, DiscardRequest(reason="an operator of the source keeps the machine"))
        except (PeerError, NotFound, HostError):
            return  # it is not there: the operator's word has to do
        if found.phase in OWNED:
            raise WrongState(f"{entry.peer} has taken the machine: it runs there", state=str(found.phase), allowed=[str(Phase.LOADED)])

    async def _not_denied(self, departure: Departure) -> None:
        """Asks the destination, if it can be asked, whether it has the machine. Raises WrongState where it says that it has not."""
        entry = self._ledger.get(departure.migration)
        try:
            async with self._peering.dial(self._peering.peers.get(entry.peer)) as link:
                found = await _standing(link, entry)
                if found is None:
                    await self._known_there(link, entry)
        except PeerRefused as error:
            message = f"{entry.peer} answers, and does not say that it has the machine: {error.message}"
            raise WrongState(message, state=code_of(error), allowed=[str(phase) for phase in sorted(OWNED)]) from error
        except (PeerError, NotFound, HostError):
            return  # it is not there: the operator's word has to do
        if found is not None and found.phase not in OWNED:
            message = f"{entry.peer} answers, and has not taken the machine: there it is {found.phase}"
            raise WrongState(message, state=str(found.phase), allowed=[str(phase) for phase in sorted(OWNED)])

    async def _known_there(self, link: PeerDaemon, entry: Entry) -> None:
        """A host that was made anew knows nothing of the migration; the machine it may have. Raises WrongState where it has not."""
        facts = await link.tried(entry.offer)
        if not facts.name_taken and facts.uuid_taken_by is None:
            message = f"{entry.peer} answers, and has no machine of this name or UUID"
            raise WrongState(message, state="not_found", allowed=[str(phase) for phase in sorted(OWNED)])

    async def _forgotten(self, departure: Departure) -> None:
        confirm = partial(self._ledger.step, departure.migration, Step.CONFIRM, reason=FORGOTTEN)
        await self._deliveries.persist(departure, confirm, "to note that the other host has it")
        await self._deliveries.clear(departure)

    async def _let_go(self, departure: Departure) -> None:
        """Gives up memory that nobody fetches any more: the rest goes its way as soon as this QEMU has ended."""
        entry = self._ledger.get(departure.migration)
        try:
            async with self._peering.dial(self._peering.peers.get(entry.peer)) as link:
                await link.standing(entry.id)
        except (PeerError, NotFound, HostError):
            await power.kill(departure.machine)
            return
        message = f"{entry.peer} answers and has taken the machine, whose memory may be on its way still: it is forgotten when all is there"
        raise WrongState(message, state=str(entry.phase), allowed=[])


class DestinationResolutions:
    """Carries out what a person decides at the destination. `arrivals` are those of `Arrivals`, by migration."""

    def __init__(self, *, ledger: Ledger, peering: Peering, endings: Endings, arrivals: dict[str, Arrival]) -> None:
        self._ledger = ledger
        self._peering = peering
        self._endings = endings
        self._arrivals = arrivals

    async def resolve(self, machine: Machine, *, take: bool) -> None:
        """Takes or discards a machine whose source does not say what became of it.

        Raises:
            WrongState: it is not in doubt, or its source says that it has not given it away.
        """
        arrival = next((one for one in self._arrivals.values() if one.machine is machine), None)
        entry = self._ledger.get(arrival.migration) if arrival is not None else None
        if arrival is None or entry is None or entry.phase not in UNOWNED or (take and entry.phase is not Phase.LOADED):
            state = str(entry.phase if entry is not None else machine.state)
            raise WrongState(
                f"there is nothing to decide about machine {machine.name!r} here: it is {state}", state=state, allowed=["loaded"]
            )
        if take:
            await self._not_kept(arrival)
            await undivided(self._endings.take(arrival, Handover(epoch=entry.epoch, run=entry.went)), f"take:{machine.name}")
        else:
            await undivided(self._endings.discard(arrival, "an operator decided so"), f"discard:{machine.name}")

    async def _not_kept(self, arrival: Arrival) -> None:
        """Asks the source, if it can be asked. Raises WrongState where it has not given the machine away."""
        try:
            async with self._peering.dial(self._peering.peers.get(arrival.peer)) as link:
                found = await link.standing(arrival.migration)
        except (PeerError, NotFound, HostError):
            return  # it is not there: the operator's word has to do
        if found.phase not in HANDED_OVER:
            message = f"{arrival.peer} answers, and has not given the machine away: there it is {found.phase}"
            raise WrongState(message, state=str(found.phase), allowed=[str(Phase.GIVEN)])


async def _standing(link: PeerDaemon, entry: Entry) -> Standing | None:
    """How far the destination is; None where it does not know the migration. Raises PeerError."""
    try:
        return await link.standing(entry.id)
    except PeerRefused as error:
        if code_of(error) == "not_found":
            return None
        raise
