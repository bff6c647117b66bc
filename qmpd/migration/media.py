"""What a QEMU has in the disks of its machine at the moment: of one that moved to another file, not what the plan names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

import msgspec

from qmpd.migration.qemu import Qemu, ask_list

#: A disk's device, by its id or its path (virtio's backend is below it).
_DEVICE: Final = re.compile(r"(?:^|/)disk([0-9]+)(?:/|$)")


class Medium(msgspec.Struct, frozen=True, kw_only=True):
    """What QEMU has in a disk: the node, what the guest sees of it, and what the image has."""

    node: str
    virtual_bytes: int = 0
    used_bytes: int = 0


async def media(qemu: Qemu) -> dict[int, Medium]:
    """What is in each disk that the plan made a device of, by the disk's place in the definition. Raises as `Monitor.execute`."""
    found: dict[int, Medium] = {}
    for item in await ask_list(qemu, "query-block"):
        device, inserted = _DEVICE.search(str(item.get("qdev"))), item.get("inserted")
        if device is not None and isinstance(inserted, Mapping) and inserted.get("node-name"):
            image = inserted.get("image")
            sizes = image if isinstance(image, Mapping) else {}
            found[int(device[1])] = Medium(
                node=str(inserted["node-name"]),
                virtual_bytes=int(sizes.get("virtual-size", 0)),
                used_bytes=int(sizes.get("actual-size", 0)),
            )
    return found
