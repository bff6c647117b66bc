"""Who is at the other end of a Unix socket, as the kernel noted it when it was connected (unix(7), SO_PEERCRED)."""

from __future__ import annotations

import socket
import struct
from typing import Final

#: struct ucred: pid, uid, gid.
_UCRED: Final = struct.Struct("=iII")


def credentials_of(connection: socket.socket) -> tuple[int, int, int]:
    """Process, user and group id of the other end. Of a socket that was connected to: those of who called listen(2)."""
    pid, uid, gid = _UCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return pid, uid, gid
