"""What happened to a machine before it came to another host: told by its source, and kept among the events of its destination.

It is told once the machine is the destination's own, in pieces that may be told again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Final, Protocol

import msgspec

from qmpd.access import Caller
from qmpd.bus import Bus
from qmpd.errors import NotFound, PeerRefused
from qmpd.journal import PAST, Journal, PastEvent
from qmpd.migration.parcels import TOLD_EVENTS, History, HistoryTaken, ToldEvent
from qmpd.views import Event

#: What is told at once, well below what a body may have.
PIECE_BYTES: Final = 256 * 1024
#: A document may have only so many values, whatever their size.
PIECE_EVENTS: Final = 100
#: What is answered to a document that is beyond the limits of the other end, which may be others than ours.
UNFIT: Final = frozenset({"too_large", "undecodable", "invalid"})

_log = logging.getLogger(__name__)

#: Says which machine a migration of the peer brought here, once it is this host's own. Raises NotFound, and WrongState before.
Arrived = Callable[[Caller, str], str]


def nothing(_caller: Caller, migration: str) -> str:
    """That of a daemon to which no machines come."""
    raise NotFound(f"there is no migration {migration!r}", migration=migration)


class HistoryDesk:
    """Where sources tell what happened."""

    def __init__(self, bus: Bus, arrived: Arrived = nothing) -> None:
        self._bus = bus
        self._arrived = arrived

    async def take(self, caller: Caller, migration: str, history: History) -> HistoryTaken:
        """Keeps what is not known yet. The same may be told again.

        Raises:
            NotFound: the peer has no such migration to this host.
            WrongState: the machine is not this host's own yet.
            NoSpace, Busy, Unknown: nothing was kept, or that is not known.
        """
        machine = self._arrived(caller, migration)
        told = [
            PastEvent(host=event.host or caller.peer or "?", number=event.number, at=event.at, kind=event.kind, data=event.data)
            for event in history.events
        ]
        return HistoryTaken(added=len(await self._bus.relate(machine, told)))


class HistoryLink(Protocol):
    """A connection to the destination; raises the errors of a peer (`PeerError`)."""

    async def tell_history(self, migration: str, history: History) -> HistoryTaken:
        """Tell it."""


async def tell(link: HistoryLink, journal: Journal, migration: str, machine: str) -> int:
    """Tells the newest events of a machine; returns how many were new there. After an error it may be told again.

    Raises:
        PeerError: the other end does not take it, or does not answer.
    """
    events = [_told(event) for event in await journal.recent(machine, TOLD_EVENTS)]
    added = 0
    for piece in _pieces(events):
        try:
            added += (await link.tell_history(migration, History(events=piece))).added
        except PeerRefused as error:
            said = error.details.get("error")
            if not isinstance(said, dict) or said.get("code") not in UNFIT:
                raise
            _log.warning("some of what happened to a machine was not told", extra={"machine": machine, "error": error.message})
    return added


def _told(event: Event) -> ToldEvent:
    match event.data:
        case {"host": str(host), "number": int(number), "kind": str(kind), "data": dict(data)} if event.kind == PAST:
            return ToldEvent(number=number, at=event.at, kind=kind, host=host, data=data)
    return ToldEvent(number=event.number, at=event.at, kind=event.kind, data=event.data)


def _pieces(events: Sequence[ToldEvent]) -> Iterator[tuple[ToldEvent, ...]]:
    piece: list[ToldEvent] = []
    size = 0
    for event in events:
        length = len(msgspec.msgpack.encode(event))
        if piece and (size + length > PIECE_BYTES or len(piece) >= PIECE_EVENTS):
            yield tuple(piece)
            piece, size = [], 0
        piece.append(event)
        size += length
    if piece:
        yield tuple(piece)
