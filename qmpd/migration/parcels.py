"""What two daemons say to each other about what belongs to a machine beside its memory, and what happened to it: documents alone.

Items are named by what they are and by their number in the definition, never by a path.
"""

from __future__ import annotations

from typing import Annotated, Final

from msgspec import Meta

from qmpd.viewbase import Request, View

ITEM_PATTERN: Final = r"^(?:(?:disk|log)-(?:0|[1-9][0-9]?)|vars|tpm|stderr|exit)\Z"
#: The item that a firmware's variables are.
VARIABLES: Final = "vars"
#: Larger than any file system takes as one file today; sizes come from outside.
MAX_BYTES: Final = 2**50
#: Every disk that a definition may have, its logs, and what else there is of it.
MAX_PARCELS: Final = 64
#: Of a machine's events so many of the newest are told.
TOLD_EVENTS: Final = 1_000
TIME_PATTERN: Final = r"^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}\.[0-9]{3}Z\Z"
KIND_PATTERN: Final = r"^[a-z][a-z.-]{0,63}\Z"
HOST_PATTERN: Final = r"^[^\x00-\x1f\x7f]{1,255}\Z"

ItemName = Annotated[str, Meta(pattern=ITEM_PATTERN)]
Size = Annotated[int, Meta(ge=0, le=MAX_BYTES)]


class Parcel(Request, frozen=True, kw_only=True):
    """An item that will be sent: how long it is, holes included, and how much of that is there. Of a log, where it ended."""

    item: ItemName
    size: Size
    allocated: Size = 0


class ItemStanding(View, frozen=True, kw_only=True):
    """How much of an item is here. `size` is what was announced; `digest` is there when all of it is, and has been read again."""

    item: str
    received: int
    size: int | None = None
    digest: str | None = None


class ToldEvent(Request, frozen=True, kw_only=True):
    """An event of the source; `host` is set where that had it from another host."""

    number: Annotated[int, Meta(ge=1, le=2**63 - 1)]
    at: Annotated[str, Meta(pattern=TIME_PATTERN)]
    kind: Annotated[str, Meta(pattern=KIND_PATTERN)]
    host: Annotated[str, Meta(pattern=HOST_PATTERN)] | None = None
    data: dict[str, object] = {}


class History(Request, frozen=True, kw_only=True):
    """Events of a machine, oldest first."""

    events: Annotated[tuple[ToldEvent, ...], Meta(max_length=TOLD_EVENTS)]


class HistoryTaken(View, frozen=True, kw_only=True):
    """How many of them were new."""

    added: int
