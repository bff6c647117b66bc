"""A destination that was not told how it was decided asks, and does what the source has decided; or says that nobody can know."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from typing import Final

from qmpd.errors import NotFound, PeerError, PeerRefused, QmpdError
from qmpd.lifecycle import AT_REST
from qmpd.machine import Publish
from qmpd.migration.arrival import AGAIN_S, Arrival, Endings, last_words
from qmpd.migration.delivery import code_of
from qmpd.migration.ledger import Ledger
from qmpd.migration.phases import HANDED_OVER, UNOWNED, Phase
from qmpd.migration.protocol import Handover, Standing
from qmpd.migration.reception import Reception
from qmpd.peering import Peering
from qmpd.tasks import undivided

#: The source is asked this often how it decided, once it should have said so by itself.
ASK_S: Final = 5.0
#: An offer after which nothing came and whose source does not answer any more is given up: it holds memory, ports and a name.
ABANDON_S: Final = 180.0

_log = logging.getLogger(__name__)


class Wondering:
    """Asks for arrivals that are not decided."""

    def __init__(self, *, ledger: Ledger, endings: Endings, reception: Reception, peering: Peering, publish: Publish) -> None:
        self._ledger = ledger
        self._endings = endings
        self._reception = reception
        self._peering = peering
        self._publish = publish

    async def wonder(self, arrival: Arrival) -> None:
        """Until it is decided: notices when QEMU ends, and asks the source what it decided when that does not say so by itself."""
        silent_since: float | None = None
        loop = asyncio.get_running_loop()
        while self._ledger.get(arrival.migration).phase in UNOWNED:
            try:
                if await self._has_ended(arrival):
                    await self._endings.discard(arrival, last_words(arrival.machine))
                    return
                async with self._peering.dial(self._peering.peers.get(arrival.peer)) as link:
                    found = await link.standing(arrival.migration)
                silent_since = None
                await self._heed(arrival, found)
            except (PeerError, NotFound) as error:
                silent_since = silent_since or loop.time()
                await self._doubted(arrival, error, loop.time() - silent_since)
            except QmpdError as error:  # it could not be written down, say: the same is done again
                _log.error("arrival does not go on", extra={"machine": arrival.machine.name, "error": error.message})
                await asyncio.sleep(AGAIN_S)

    async def _has_ended(self, arrival: Arrival) -> bool:
        """Whether the QEMU that waited has ended, or does so before the source is to be asked. A machine at rest has none: there it is only
        waited until it is decided."""
        if not self._ledger.get(arrival.migration).at_rest:
            return await arrival.machine.until(AT_REST, ASK_S)
        with suppress(TimeoutError):
            async with asyncio.timeout(ASK_S):
                while self._ledger.get(arrival.migration).phase in UNOWNED:
                    await arrival.changed.wait()
        return False

    async def _heed(self, arrival: Arrival, found: Standing) -> None:
        """Does what the source has decided. It has journalled its decision before anybody can read it."""
        arrival.problem = ""
        if found.phase is Phase.KEPT:
            await self._endings.discard(arrival, found.reason or "the source keeps the machine")
        elif found.phase in HANDED_OVER:
            entry = self._ledger.get(arrival.migration)
            await undivided(
                self._endings.take(arrival, found.handover or Handover(epoch=entry.epoch, run=entry.went)), f"take:{entry.machine}"
            )

    async def _doubted(self, arrival: Arrival, error: QmpdError, silent_s: float) -> None:
        """What to do while the source does not say what it decided."""
        if self._ledger.get(arrival.migration).phase is Phase.AWAITING:
            # Nothing is lost with what is not here as a whole: the source has not given it away.
            unknown = isinstance(error, PeerRefused) and code_of(error) == "not_found"
            if unknown or (silent_s > ABANDON_S and not await self._reception.is_receiving(arrival.machine)):
                await self._endings.discard(arrival, f"the source is gone: {error.message}")
            return
        problem = f"whether {arrival.peer} has given the machine away is not known: {error.message}"
        if problem != arrival.problem:
            arrival.problem = problem
            _log.error("ownership in doubt", extra={"machine": arrival.machine.name, "peer": arrival.peer, "error": error.message})
            self._publish(
                "migration.doubt", arrival.machine.name, {"migration": arrival.migration, "peer": arrival.peer, "reason": problem}
            )
