"""Bitmaps of disks: what was written since somebody began to take note of it, which backups go by."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from qmpd.errors import CannotMove
from qmpd.migration.qemu import Qemu, ask_list


class Bitmap(msgspec.Struct, frozen=True, kw_only=True):
    """A named bitmap of a node. A persistent one is kept in the image; `obstacle` is why it can go nowhere."""

    name: str
    persistent: bool
    obstacle: str | None = None


async def bitmaps(qemu: Qemu) -> dict[str, tuple[Bitmap, ...]]:
    """The nodes that have bitmaps, and which. One without a name belongs to a job, and ends with it."""
    found: dict[str, tuple[Bitmap, ...]] = {}
    for node in await ask_list(qemu, "query-named-block-nodes", {"flat": True}):
        listed = node.get("dirty-bitmaps")
        named = tuple(_bitmap(item) for item in listed if item.get("name")) if isinstance(listed, list) else ()
        if named:
            found[str(node.get("node-name"))] = named
    return found


def check_movable(found: Mapping[str, tuple[Bitmap, ...]]) -> None:
    """Raises CannotMove for a bitmap that QEMU does not send: all of the migration would fail."""
    for node, named in found.items():
        for bitmap in named:
            if bitmap.obstacle is not None:
                raise CannotMove(f"bitmap {bitmap.name!r} of {node} {bitmap.obstacle}", node=node, bitmap=bitmap.name)


def _bitmap(item: Mapping[str, object]) -> Bitmap:
    obstacle = None
    if item.get("inconsistent") is True:
        obstacle = "is inconsistent since its QEMU was killed, and of no use: remove it (block-dirty-bitmap-remove)"
    elif item.get("busy") is True:
        obstacle = "is in use by a job or an export: let that end first"
    return Bitmap(name=str(item.get("name")), persistent=item.get("persistent") is True, obstacle=obstacle)
