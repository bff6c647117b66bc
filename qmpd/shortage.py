"""What an `OSError` means when the host is out of something."""

from __future__ import annotations

import errno
import os
from typing import Final

from qmpd.errors import Busy, NoSpace, QmpdError

_NO_SPACE: Final = frozenset({errno.ENOSPC, errno.EDQUOT})
_BUSY: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOMEM, errno.ENOBUFS})


def shortage(error: OSError) -> QmpdError | None:
    """NoSpace for a full disk, Busy for file descriptors, processes and memory, None if the host is not short of anything."""
    if error.errno is None:
        return None
    if error.errno in _NO_SPACE:
        return NoSpace(os.strerror(error.errno), errno=errno.errorcode[error.errno])
    if error.errno in _BUSY:
        return Busy(f"this host is out of something: {os.strerror(error.errno)}", errno=errno.errorcode[error.errno])
    return None
