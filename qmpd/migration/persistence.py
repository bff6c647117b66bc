"""What must be done before anything else may be done with a machine: tried until it succeeds, and said while it does not.

A disk that is full, a database that does not answer, a directory that cannot be removed: none of that changes who owns a machine, and none
of it may leave one that nobody goes on with.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

from qmpd.errors import QmpdError

#: People clear disks, databases come back: once a second is soon enough.
AGAIN_S: Final = 1.0
T = TypeVar("T")

_log = logging.getLogger(__name__)


async def persist(work: Callable[[], Awaitable[T]], *, what: str, say: Callable[[str], None], ending: Callable[[], bool]) -> T:
    """The result of `work`, as soon as it has one. `say` is told what keeps it, and the empty text when nothing does any more.

    Raises:
        QmpdError, OSError: it fails, and the daemon is `ending`: the next one goes on.
    """
    failed = False
    while True:
        try:
            result = await work()
        except (QmpdError, OSError) as error:
            if ending():
                raise
            if not failed:
                _log.error("cannot go on yet", extra={"what": what, "error": str(error)})
            failed = True
            say(f"{what} is not possible yet: {error}")
        else:
            if failed:
                say("")
            return result
        await asyncio.sleep(AGAIN_S)
