"""Log events as systemd's journal keeps them: with every field under a name of its own, so that one can search for it.

Native protocol (systemd.io/JOURNAL_NATIVE_PROTOCOL): one datagram for an event, one line for a field; a value with a line break is
framed by its length. Whether the journal listens at all is said by JOURNAL_STREAM: the device and inode of the stream that systemd
gave the service as its standard error. A daemon whose standard error leads elsewhere writes there.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from qmpd.logevents import fields_of, message_of, traceback_of

SOCKET: Final = Path("/run/systemd/journal/socket")
#: syslog(3). Between two levels of Python's, the lower one's counts.
PRIORITIES: Final = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))
DEBUG_PRIORITY: Final = 7
#: What one event may weigh: a traceback fits, and every kernel takes a datagram of this size.
EVENT_BYTES: Final = 64 * 1024
#: The journal drops fields with longer names.
NAME_LIMIT: Final = 64


def connected(environ: Mapping[str, str], descriptor: int) -> bool:
    """Whether this descriptor is the stream to the journal that systemd says it gave us."""
    try:
        status = os.fstat(descriptor)
    except OSError:
        return False
    return environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def priority(level: int) -> int:
    """The syslog priority of a logging level."""
    return next((number for least, number in PRIORITIES if level >= least), DEBUG_PRIORITY)


def field_name(name: str) -> str:
    """A name of our own for a field of an event: the journal takes capitals, digits and underscores."""
    shown = "".join(char if char.isascii() and char.isalnum() else "_" for char in name).upper()
    return f"QMPD_{shown}"[:NAME_LIMIT]


def datagram(fields: Mapping[str, str]) -> bytes:
    """One event; what is over `EVENT_BYTES` is cut from the end of the longest values."""
    values = {name: value.encode("utf-8", "replace") for name, value in fields.items()}
    while (over := sum(len(name) + len(value) + 16 for name, value in values.items()) - EVENT_BYTES) > 0:
        longest = max(values, key=lambda name: len(values[name]))
        values[longest] = values[longest][: max(0, len(values[longest]) - over)]
    return b"".join(_framed(name.encode(), value) for name, value in values.items())


def _framed(name: bytes, value: bytes) -> bytes:
    if b"\n" in value:
        return name + b"\n" + len(value).to_bytes(8, "little") + value + b"\n"
    return name + b"=" + value + b"\n"


class JournalHandler(logging.Handler):
    """Sends events to the journal; one that it does not take at once goes to `fallback`, and nobody waits for it."""

    def __init__(self, fallback: logging.Handler, path: Path) -> None:
        super().__init__()
        self._fallback = fallback
        self._path = str(path)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)

    def emit(self, record: logging.LogRecord) -> None:
        """Send one event."""
        try:
            self._socket.sendto(datagram(dict(self._fields(record))), self._path)
        except OSError:
            self._fallback.handle(record)

    def close(self) -> None:
        """Let go of the socket."""
        self._socket.close()
        super().close()

    def _fields(self, record: logging.LogRecord) -> Iterator[tuple[str, str]]:
        trace = traceback_of(record)
        yield "MESSAGE", message_of(record) + (f"\n{trace}" if trace else "")
        yield "PRIORITY", str(priority(record.levelno))
        yield "SYSLOG_IDENTIFIER", "qmpd"
        yield "CODE_FILE", record.pathname
        yield "CODE_LINE", str(record.lineno)
        yield "CODE_FUNC", record.funcName or ""
        yield "QMPD_LOGGER", record.name
        yield "QMPD_EVENT", record.getMessage()
        for name, value in fields_of(record).items():
            yield field_name(name), str(value)
