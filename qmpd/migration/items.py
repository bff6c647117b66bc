"""What belongs to a machine beside its memory, and has to be at its new host.

Items are named by what they are and by their number in the definition, never by a path. Where each lies is derived on either host from
that host's copy of the definition and its own directories, so no peer can name a file.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, Literal

import msgspec

from qmpd.endings import ENDING_NAME
from qmpd.errors import Problem, invalid
from qmpd.facts import MachinePaths
from qmpd.migration.parcels import MAX_BYTES, Parcel
from qmpd.plan.disks import disk_path
from qmpd.spec import BlankDisk, MachineSpec, PflashFirmware

#: The largest flash of a machine of QEMU has 64 MiB.
MAX_VARIABLES_BYTES: Final = 256 * 1024 * 1024
#: What swtpm keeps of a TPM, in one file: 6 KB when it is new, and up to 128 KB in its own non-volatile memory.
TPM_STATE: Final = "tpm2-00.permall"
MAX_TPM_BYTES: Final = 1024 * 1024
#: How a QEMU ended, with the end of what it printed.
MAX_EXIT_BYTES: Final = 1024 * 1024
MIB: Final = 1024 * 1024

Kind = Literal["disk", "log", "vars", "tpm", "stderr", "exit"]


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """Where an item lies on this host. `own`: in the machine's own directory; otherwise in a pool, where it may be in somebody's way.

    `exact` is the length it must have, if that is known, and `limit` the most it can have. Of a log the path is the stem.
    """

    kind: Kind
    path: str
    own: bool = True
    exact: int | None = None
    limit: int = MAX_BYTES


def targets(spec: MachineSpec, paths: MachinePaths, serial_ports: Sequence[int] = ()) -> dict[str, Target]:
    """Everything that can belong to a machine, by the name of the item; `serial_ports` are those whose logs are kept."""
    return dict(_targets(spec, paths, serial_ports))


def _targets(spec: MachineSpec, paths: MachinePaths, serial_ports: Sequence[int]) -> Iterator[tuple[str, Target]]:
    for index, disk in enumerate(spec.disks):
        own = isinstance(disk, BlankDisk)
        exact = disk.size_mib * MIB if isinstance(disk, BlankDisk) and disk.format == "raw" else None
        yield f"disk-{index}", Target(kind="disk", path=disk_path(spec, paths, index), own=own, exact=exact)
    if isinstance(spec.firmware, PflashFirmware):
        yield "vars", Target(kind="vars", path=paths.variables, limit=MAX_VARIABLES_BYTES)
    if spec.tpm is not None:
        yield "tpm", Target(kind="tpm", path=f"{paths.tpm}/{TPM_STATE}", limit=MAX_TPM_BYTES)
    for port in serial_ports:
        yield log_item(port), Target(kind="log", path=paths.log(f"serial{port}"))
    yield "stderr", Target(kind="stderr", path=paths.log("stderr"))
    yield "exit", Target(kind="exit", path=f"{paths.state}/{ENDING_NAME}", limit=MAX_EXIT_BYTES)


def log_item(port: int) -> str:
    """The item that the log of a serial port is."""
    return f"log-{port}"


def check_parcels(parcels: Sequence[Parcel], known: dict[str, Target]) -> None:
    """Raises Invalid with everything that is wrong with an announcement: items that the definition has not, twice the same, wrong sizes."""
    found = list(_problems(parcels, known))
    if found:
        raise invalid(found)


def _problems(parcels: Sequence[Parcel], known: dict[str, Target]) -> Iterator[Problem]:
    seen: set[str] = set()
    for index, parcel in enumerate(parcels):
        where = f"$.parcels[{index}]"
        target = known.get(parcel.item)
        if target is None:
            yield Problem(path=f"{where}.item", message=f"the definition has no {parcel.item}; it has {', '.join(known)}")
            continue
        if parcel.item in seen:
            yield Problem(path=f"{where}.item", message=f"{parcel.item} is announced twice")
        seen.add(parcel.item)
        if target.exact is not None and parcel.size != target.exact:
            yield Problem(path=f"{where}.size", message=f"{parcel.item} has {target.exact} bytes by its definition, not {parcel.size}")
        if parcel.size > target.limit:
            yield Problem(path=f"{where}.size", message=f"{parcel.item} may have {target.limit} bytes")
        if parcel.allocated > parcel.size + MIB:
            yield Problem(path=f"{where}.allocated", message=f"{parcel.item} takes more than its size")
