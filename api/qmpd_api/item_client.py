"""The methods of the client through which a daemon hands in what belongs to a machine."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Final

from qmpd.migration.parcels import History, HistoryTaken, ItemStanding
from qmpd_api.connection import Connection, segment

#: A piece is a megabyte at most; who needs longer for it is asked how far it is.
PIECE_DEADLINE_S: Final = 60.0


class ItemVerbs(ABC):
    """One method per route, as in the rest of the client."""

    @property
    @abstractmethod
    def connection(self) -> Connection:
        """The pool of connections to the daemon."""

    async def item(self, migration: str, item: str) -> ItemStanding:
        """How much of an item the destination has."""
        return await self.connection.call("GET", _at(migration, item), ItemStanding)

    async def put_item(self, migration: str, item: str, offset: int, data: bytes) -> ItemStanding:
        """Hand in a piece of an item."""
        return await self.connection.call(
            "PUT", _at(migration, item), ItemStanding, query={"offset": offset}, body=data, deadline_s=PIECE_DEADLINE_S
        )

    async def tell_history(self, migration: str, history: History) -> HistoryTaken:
        """Tell the destination what happened to a machine before."""
        return await self.connection.call("POST", f"/v1/peer/migrations/{segment(migration)}/history", HistoryTaken, body=history)


def _at(migration: str, item: str) -> str:
    return f"/v1/peer/migrations/{segment(migration)}/items/{segment(item)}"
