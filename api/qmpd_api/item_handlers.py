"""What the routes do through which a peer hands in what belongs to a machine."""

from __future__ import annotations

from qmpd.migration.parcels import History, HistoryTaken, ItemStanding
from qmpd_api.exchange import Call
from qmpd_api.queries import ItemQuery, Query


async def item(call: Call[None, Query]) -> ItemStanding:
    """How far an item is."""
    return await call.service.items.item(call.caller, call.id, call.item)


async def put_item(call: Call[bytes, ItemQuery]) -> ItemStanding:
    """Take a piece of one."""
    return await call.service.items.put(call.caller, call.id, call.item, call.query.offset, call.body)


async def tell_history(call: Call[History, Query]) -> HistoryTaken:
    """Take what happened to a machine before it came."""
    return await call.service.history.take(call.caller, call.id, call.body)
