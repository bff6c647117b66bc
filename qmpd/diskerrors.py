"""Errors of a disk's image for which QEMU halts the guest: from its event, or from its block layer when the event was missed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from qmpd.views import DiskErrorView

#: QEMU's run state for it (QAPI `RunState`).
IO_ERROR: Final = "io-error"
#: How `qmpd.plan` names the devices and the nodes of a definition's disks.
_DISK: Final = re.compile(r"(?:^|/)disk(\d{1,2})(?:-|/|$)")


def halted_by(data: Mapping[str, object], at: str) -> DiskErrorView | None:
    """What the data of a `BLOCK_IO_ERROR` says; None when the guest was not halted for it."""
    if data.get("action") != "stop":
        return None
    names = (str(data.get("device") or ""), str(data.get("node-name") or ""), str(data.get("qom-path") or ""))
    return DiskErrorView(
        device=next((name for name in names if name), ""),
        disk=_index(names),
        operation="read" if data.get("operation") == "read" else "write",
        nospace=data.get("nospace") is True,
        reason=str(data.get("reason") or ""),
        at=at,
    )


def found_in(blocks: object, at: str) -> DiskErrorView | None:
    """The first device in an answer to `query-block` that failed; which of its operations did, nobody knows any more."""
    for block in blocks if isinstance(blocks, list) else []:
        if not isinstance(block, dict) or block.get("io-status") not in {"nospace", "failed"}:
            continue
        names = (str(block.get("device") or ""), str(block.get("qdev") or ""))
        nospace = block["io-status"] == "nospace"
        return DiskErrorView(
            device=next((name for name in names if name), ""),
            disk=_index(names),
            operation=None,
            nospace=nospace,
            reason="No space left on device" if nospace else "",
            at=at,
        )
    return None


def _index(names: tuple[str, ...]) -> int | None:
    found = next((match for name in names if (match := _DISK.search(name))), None)
    return None if found is None else int(found[1])
