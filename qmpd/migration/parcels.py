"""What two daemons say to each other about what belongs to a machine beside its memory: documents, and nothing that acts.

Items are named by what they are and by their number in the definition, never by a path.
"""

from __future__ import annotations

from typing import Annotated, Final

from msgspec import Meta

from qmpd.viewbase import Request, View

ITEM_PATTERN: Final = r"^(?:(?:disk|log)-(?:0|[1-9][0-9]?)|vars|stderr|exit)\Z"
#: Larger than any file system takes as one file today; sizes come from outside.
MAX_BYTES: Final = 2**50

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
