"""What makes a machine one of its own and not another one's copy: name, UUID, MAC addresses. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

import msgspec

from qmpd.migration.discrepancy import found
from qmpd.migrationviews import MigrationFinding
from qmpd.plan import mac_address
from qmpd.spec import MachineSpec

#: In an option of QEMU's, what may be the original's alone.
_OWN: Final = ("mac=", "uuid=")
#: Findings whose way out is another one where the machine stays.
_MENDS: Final = {
    "name-taken": "give the copy another name (--as NAME)",
    "base-differs": "put the source's file there: a copy is sent as files, which lie upon the same path everywhere",
    "disk-is-shared": "name another path for the copy's disk (--disk N=copy,path=...)",
    "disk-target-exists": "name another path for the copy's disk (--disk N=copy,path=...), or remove what is there",
}


def renewed(spec: MachineSpec, name: str, uuid: str) -> MachineSpec:
    """The definition of a copy. Two guests of one network must not have the same address, so it gets others, made of its UUID; and no host
    starts it by itself: its guest has the original's addresses and names of its own making."""
    bare = tuple(msgspec.structs.replace(nic, mac=None) for nic in spec.nics)
    copy = msgspec.structs.replace(spec, name=name, uuid=uuid, nics=bare, autostart=False)
    nics = tuple(msgspec.structs.replace(nic, mac=mac_address(copy, index)) for index, nic in enumerate(bare))
    return msgspec.structs.replace(copy, nics=nics)


def copy_findings(original: MachineSpec, copy: MachineSpec) -> Iterator[MigrationFinding]:
    """In what a copy is another machine than its original, and in what it should be and is not."""
    for index, (before, after) in enumerate(zip(original.nics, copy.nics, strict=True)):
        message = f"the copy has the MAC address {after.mac} here; {before.mac} stays the original's"
        yield found("info", "mac-new", message, path=f"$.nics[{index}]")
    for index, device in enumerate(original.devices):
        if "mac" in device:
            message = f"this device of the copy has the MAC address of the original's, {device['mac']}"
            mend = "on one network they would disturb each other: change the copy's before it is started"
            yield found("warning", "mac-kept", message, path=f"$.devices[{index}]", mend=mend)
    for index, text in enumerate(original.extra_args):
        if any(own in text for own in _OWN):
            mend = "change the copy's before it is started"
            yield found("warning", "mac-kept", "this option may be the original's alone", path=f"$.extra_args[{index}]", mend=mend)
    if original.tpm is not None:
        message = "the copy's TPM has the state of the original's, with its keys: what is sealed with them on the disks can be opened"
        yield found("info", "tpm-kept", message, path="$.tpm")
    if original.autostart:
        yield found("info", "autostart-off", "the copy is not started with its host", path="$.autostart")


def mended_for_copy(findings: Iterable[MigrationFinding]) -> tuple[MigrationFinding, ...]:
    """The findings with ways out that a copy has."""
    return tuple(msgspec.structs.replace(one, mend=_MENDS.get(one.code, one.mend)) for one in findings)
