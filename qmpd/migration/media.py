"""What a QEMU has in the disks of its machine at the moment: of one that moved to another file, not what the plan names."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from qmpd.migration.qemu import Qemu, ask_list
from qmpd.plan.disks import disk_of


class Medium(msgspec.Struct, frozen=True, kw_only=True):
    """What QEMU has in a disk: the node, what the guest sees of it, and what the image has, the names of `snapshots` among it."""

    node: str
    virtual_bytes: int = 0
    used_bytes: int = 0
    snapshots: tuple[str, ...] = ()


async def media(qemu: Qemu) -> dict[int, Medium]:
    """What is in each disk that the plan made a device of, by the disk's place in the definition. Raises as `Monitor.execute`."""
    found: dict[int, Medium] = {}
    for item in await ask_list(qemu, "query-block"):
        disk, inserted = disk_of(str(item.get("qdev"))), item.get("inserted")
        if disk is not None and isinstance(inserted, Mapping) and inserted.get("node-name"):
            image = inserted.get("image")
            facts = image if isinstance(image, Mapping) else {}
            found[disk] = Medium(
                node=str(inserted["node-name"]),
                virtual_bytes=int(facts.get("virtual-size", 0)),
                used_bytes=int(facts.get("actual-size", 0)),
                snapshots=tuple(str(snapshot["name"]) for snapshot in facts.get("snapshots", ())),
            )
    return found
