"""How the source gives a machine away: it hears that the destination holds it, and makes the one commit by which the ownership moves."""

from __future__ import annotations

import asyncio
from typing import Final

import msgspec

from qmpd.errors import Busy, MigrationFailed, NoSpace, PeerError, PeerRefused, QmpdError, StaleRevision, TooLarge, WrongState
from qmpd.failpoint import passing
from qmpd.lifecycle import AT_REST
from qmpd.migration.delivery import AGAIN_S, DOUBT_S, Deliveries, Departure, asked, code_of
from qmpd.migration.ledger import Ledger
from qmpd.migration.phases import Phase, Step
from qmpd.migration.protocol import LoadedRequest
from qmpd.peers import PeerDaemon
from qmpd.record import Given
from qmpd.registry import Registry

#: The destination has everything when the source's QEMU says `completed`; it only has to read what is in its socket, and note it.
LOADED_DEADLINE_S: Final = 60.0
#: A question in which the peer waits for that itself.
LOADED_WAIT_S: Final = 10.0
#: Refusals of a write that say that nothing was written.
NOT_WRITTEN: Final = (NoSpace, StaleRevision, Busy, TooLarge)
#: What a peer answers that has nothing of the machine, or nothing to do with us.
_STRANGERS: Final = frozenset({"not_found", "forbidden", "unauthorized"})


class Giving:
    """Gives machines away."""

    def __init__(self, registry: Registry, ledger: Ledger, deliveries: Deliveries) -> None:
        self._registry = registry
        self._ledger = ledger
        self._deliveries = deliveries

    def _has_ended(self, departure: Departure) -> bool:
        """Whether the QEMU that the machine left from is gone. One at rest had none."""
        return departure.machine.state in AT_REST and not self._ledger.get(departure.migration).at_rest

    async def loaded(self, departure: Departure, link: PeerDaemon, *, halfway: bool) -> None:
        """Returns when the destination says that it holds the whole state, or of a guest that is `halfway` all that it needs to run: then
        there is no way back, and no limit, as long as this half is there.

        Raises:
            MigrationFailed: it does not hold it.
            PeerError: it does not say so in time.
        """
        loop = asyncio.get_running_loop()
        until = loop.time() + LOADED_DEADLINE_S
        while True:
            try:
                found = await asked(lambda: link.loaded(departure.migration, LoadedRequest(timeout_s=LOADED_WAIT_S)))
            except PeerError as error:
                stranger = isinstance(error, PeerRefused) and code_of(error) in _STRANGERS
                if (not halfway and (stranger or loop.time() > until)) or self._has_ended(departure):
                    raise
                departure.problem = f"whether the destination has the guest is not known: {error.message}"
                await asyncio.sleep(AGAIN_S)
                continue
            departure.problem = ""
            # Taken: a person there said so, who cannot have heard it from here. Then it is given, and not resumed.
            if found.phase in {Phase.LOADED, Phase.TAKEN, Phase.ARRIVED}:
                return
            if found.phase is not Phase.AWAITING or (not halfway and loop.time() > until):
                raise MigrationFailed(f"the destination does not hold the machine: it is {found.phase}. {found.reason}".rstrip())

    async def give(self, departure: Departure, *, went: bool, halfway: bool) -> None:
        """The commit by which the other host becomes the owner. Until its outcome is known nothing else may be done.

        The note in the ledger comes after it, and is written whatever that takes: a ledger that says `given` is right.

        Raises:
            WrongState: somebody has killed the machine: it is not given, and is dead here.
            NoSpace, StaleRevision, Busy, TooLarge: nothing was written. Of a guest that is `halfway` it is tried again instead.
        """
        machine, entry = departure.machine, self._ledger.get(departure.migration)
        if machine.asked_to_end and not entry.at_rest:
            raise WrongState(f"machine {machine.name!r} was ended here meanwhile", state=str(machine.state), allowed=[])
        given = msgspec.structs.replace(machine.definition, given=Given(peer=entry.peer, migration=entry.id, epoch=entry.epoch))
        departure.giving = True
        await passing("ownership-give")
        while True:
            try:
                await self._registry.store(machine, given, machine.revision)
                break
            except NOT_WRITTEN as error:
                if not halfway or isinstance(error, StaleRevision | TooLarge):
                    departure.giving = False
                    raise
                departure.problem = f"it cannot be given away yet: {error.message}"
            except QmpdError as error:
                departure.problem = f"whether the machine was given away is not certain yet: {error.message}"
            await asyncio.sleep(DOUBT_S)
        departure.problem = ""
        await self._deliveries.persist(departure, lambda: self._ledger.step(entry.id, Step.GIVE, went=went), "to note that it was given")
        await passing("ownership-given")
