"""Tells peers that they will not get what they were offered, until they have heard it."""

from __future__ import annotations

import asyncio
import logging
from functools import partial

from qmpd.errors import PeerError, QmpdError
from qmpd.machine import Publish
from qmpd.migration.delivery import AGAIN_S, LONGEST_AGAIN_S, asked, code_of
from qmpd.migration.ledger import Entry, Ledger
from qmpd.migration.phases import KEEPABLE, OWNED, Step
from qmpd.migration.protocol import DiscardRequest
from qmpd.peering import Peering

_log = logging.getLogger(__name__)


def reason_of(error: BaseException) -> str:
    """What a migration failed with, for people."""
    if isinstance(error, asyncio.CancelledError):
        return "it was cancelled"
    return error.message if isinstance(error, QmpdError) else repr(error)


class Withdrawals:
    """Settles migrations that came to nothing."""

    def __init__(self, ledger: Ledger, peering: Peering, publish: Publish) -> None:
        self._ledger = ledger
        self._peering = peering
        self._publish = publish

    async def told(self, entry: Entry) -> None:
        """Returns when the peer has heard it, or is none any more; then the entry is settled."""
        if entry.phase in KEEPABLE:
            entry = await self._ledger.step(entry.id, Step.KEEP, reason="the machine is not known here any more")
        try:
            peer = self._peering.peers.get(entry.peer)
        except QmpdError:
            await self._ledger.settle(entry.id)  # it is no peer any more: nothing it says or hears counts
            return
        pause = AGAIN_S
        async with self._peering.dial(peer) as link:
            while True:
                try:
                    found = await asked(partial(link.discard, entry.id, DiscardRequest(reason=entry.reason)))
                    if found.phase in OWNED and not entry.is_copy:  # a copy that a person took there is in nobody's way
                        reason = f"{entry.peer} says that it owns the machine, which was kept here: a person took it there"
                        _log.error("two owners", extra={"machine": entry.machine, "peer": entry.peer, "migration": entry.id})
                        self._publish("migration.doubt", entry.machine, {"migration": entry.id, "peer": entry.peer, "reason": reason})
                    break
                except PeerError as error:
                    if code_of(error) == "not_found":
                        break  # it never heard of it
                await asyncio.sleep(pause)
                pause = min(2 * pause, LONGEST_AGAIN_S)
        await self._ledger.settle(entry.id)
