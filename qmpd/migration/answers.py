"""What a guest has asked of its TPM and was not told yet when it is halted to leave: an answer that comes later would be lost."""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from qmpd.hostprocess import rests
from qmpd.process import QemuProcess
from qmpd.tpm import is_lost

#: A TPM that makes a key takes seconds; a guest that is halted longer for it is worse off than one that has to ask again.
QUIET_LIMIT_S: Final = 5.0
#: QEMU hands a command on and takes an answer in well under a millisecond; one that is busy with something else is not waited for.
HANDING_LIMIT_S: Final = 0.5
#: Between two looks: what QEMU was asked by its guest is with swtpm sooner, and the answer back, unless the host has no time for them,
#: which is seen as well.
QUIET_LOOK_S: Final = 0.002
QUIET_LOOKS: Final = 2

_log = logging.getLogger(__name__)


async def answered(process: QemuProcess) -> None:
    """Returns when the TPM of a halted guest has answered what it was asked, or at a limit, for a guest whose state is about to be sent.

    The buffer of a command response buffer (tpm-crb) is memory, and QEMU (seen with 7.2) waits for what is missing in it only when all
    memory was sent: the guest would find the rest of an older answer in it. QEMU cannot be asked whether a command is under way.
    """
    companion = process.companion
    if companion is None or is_lost(process):
        return
    loop = asyncio.get_running_loop()
    began = loop.time()
    before, looks = None, 0
    while looks < QUIET_LOOKS:
        if companion.over.done():
            return
        if loop.time() > began + QUIET_LIMIT_S:
            _log.warning("the TPM of a guest that is halted does not come to rest", extra={"pid": companion.identity.pid})
            return
        await asyncio.sleep(QUIET_LOOK_S)
        used, asking = await asyncio.to_thread(lambda: (rests(companion.identity.pid), rests(process.identity.pid)))
        handed = asking is not None or loop.time() > began + HANDING_LIMIT_S
        looks = looks + 1 if handed and used is not None and used == before else 0
        before = used
