"""Guests that are here and cannot run yet, because somebody still has the lock of an image: they go on as soon as it is free.

The source's QEMU lets go of its locks when it has said `completed`. On storage of a network they may be seen for longer: until that QEMU is
gone, or, of a host that died, until the lease of its locks is over.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

from qmpd.errors import Busy, MonitorUnavailable, QemuSilent, QmpdError
from qmpd.lifecycle import AT_REST
from qmpd.machine import Machine

#: Leases of locks last for minutes. Who has one for longer means to keep it: then a person decides, and resumes the machine.
LOCK_LIMIT_S: Final = 1_800.0
#: Tried again after this, and then less and less often: an attempt asks the storage for each lock.
LOCK_AGAIN_S: Final = 0.5
LONGEST_AGAIN_S: Final = 10.0


async def unlocked(machine: Machine, go: Callable[[], Awaitable[str]], refusal: str) -> str:
    """Tries `go` until it says of no lock any more that it is taken, as `refusal` did; why it does not go on, where it does not.

    Nothing is said of a machine whose QEMU has ended.
    """
    loop = asyncio.get_running_loop()
    until, pause = loop.time() + LOCK_LIMIT_S, LOCK_AGAIN_S
    while not await machine.until(AT_REST, pause):
        try:
            refusal = await go()
        except (Busy, MonitorUnavailable, QemuSilent):  # it answers again, or ends
            pass
        except QmpdError as error:
            return error.message
        if not refusal:
            return ""
        if loop.time() > until:
            return f"{refusal} (for {LOCK_LIMIT_S:.0f} s)"
        pause = min(2 * pause, LONGEST_AGAIN_S)
    return ""
