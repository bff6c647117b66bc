"""What a guest says that uses its TPM."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Final, Protocol

import msgspec

from qmpd.views import ExpectRequest, ExpectResult

#: A TPM that answers.
WORKS: Final = "00000000"
#: PCR 10 after the guest has extended it once.
MEASURED: Final = hashlib.sha256(bytes(32) + b"this is what was measured of it.").hexdigest()[:16]
LINE: Final = r"TPM rc=([0-9a-f]{8}) pcr=([0-9a-f]{16}) resets=([0-9a-f]{8})\r"
#: Means that something hangs.
HUNG_S: Final = 60.0


class Said(msgspec.Struct, frozen=True):
    """The TPM's answer, what begins the register, and how often the TPM was reset."""

    code: str
    register: str
    resets: int


class Expecting(Protocol):
    """A service, or a client of one."""

    async def expect(self, name: str, request: ExpectRequest, /) -> ExpectResult:
        """Wait for a pattern."""


async def said(service: Expecting, name: str) -> Said:
    """What the guest says next."""
    found = await service.expect(name, ExpectRequest(pattern=LINE, timeout_s=HUNG_S))
    assert found.matched, found
    code, register, resets = found.groups
    assert code is not None
    assert register is not None
    assert resets is not None
    return Said(code, register, int(resets, 16))


def tpms_below(directory: Path) -> list[int]:
    """The processes that have their state below a directory. Blocks."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cwd"):
        try:
            if directory in entry.readlink().parents:
                found.append(int(entry.parent.name))
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
    return found
