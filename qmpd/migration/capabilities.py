"""The switches and dials of QEMU's migration: read, set, and put back as they were.

What QEMU knows is asked of the one that runs, whose file may have been replaced since. Both ends must agree on most of it, and QEMU does
not check that: `multifd` on one side alone hangs without a word.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import msgspec

from qmpd.errors import MigrationFailed
from qmpd.migration.qemu import Qemu, ask_list, ask_map

#: A destination reports its end (else a source says `completed` of one that died), and neither takes the other's machine.
_BOTH: Final = ("events", "return-path", "validate-uuid")
#: The source waits with its guest halted, so that disks can be closed and the step that cannot be undone is taken on purpose.
SOURCE: Final = (*_BOTH, "pause-before-switchover")
#: The destination leaves its disks alone until its guest is set going.
DESTINATION: Final = (*_BOTH, "late-block-activate")


class Dials(msgspec.Struct, frozen=True, kw_only=True):
    """All capabilities and parameters of a QEMU at one time."""

    capabilities: dict[str, bool]
    parameters: dict[str, object]


class Agreed(msgspec.Struct, frozen=True, kw_only=True):
    """What both ends must do alike: connections beside the first (0: none), memory that follows the guest, bitmaps of disks."""

    channels: int = 0
    postcopy: bool = False
    bitmaps: bool = False


async def read(qemu: Qemu) -> Dials:
    """How a QEMU is set at the moment."""
    listed = await ask_list(qemu, "query-migrate-capabilities")
    known = {str(item.get("capability")): item.get("state") is True for item in listed}
    return Dials(capabilities=known, parameters=await ask_map(qemu, "query-migrate-parameters"))


async def apply(qemu: Qemu, always: tuple[str, ...], agreed: Agreed, parameters: Mapping[str, object]) -> None:
    """Sets exactly these capabilities, all others off, and these parameters.

    Raises:
        MigrationFailed: this QEMU lacks a capability.
    """
    before = await read(qemu)
    chosen = {"multifd": agreed.channels > 0, "postcopy-ram": agreed.postcopy, "dirty-bitmaps": agreed.bitmaps}
    on = {*always, *(name for name, wanted in chosen.items() if wanted)}
    if lacking := on - before.capabilities.keys():
        raise MigrationFailed(f"this QEMU has no migration capability {', '.join(sorted(lacking))}")
    await _set(qemu, before, {name: name in on for name in before.capabilities})
    dials = dict(parameters)
    if agreed.channels:
        dials["multifd-channels"] = agreed.channels
    await qemu.execute("migrate-set-parameters", dials)


async def restore(qemu: Qemu, before: Dials) -> None:
    """Sets what differs from what was read before. No migration may be under way."""
    now = await read(qemu)
    await _set(qemu, now, before.capabilities)
    changed = {name: value for name, value in before.parameters.items() if now.parameters.get(name) != value}
    if changed:
        await qemu.execute("migrate-set-parameters", changed)


async def _set(qemu: Qemu, now: Dials, wanted: Mapping[str, bool]) -> None:
    changed = [{"capability": name, "state": state} for name, state in wanted.items() if now.capabilities.get(name) is not state]
    if changed:
        await qemu.execute("migrate-set-capabilities", {"capabilities": changed})
