"""Logs as events with fields: to systemd's journal, to a terminal, or as JSON for whatever collects them."""

from __future__ import annotations

import logging
import os
import sys
from collections import deque
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Final

import msgspec

from qmpd import journald
from qmpd.journal import timestamp, utc_now
from qmpd.logevents import FIELD_LIMIT, fields_of, message_of, traceback_of
from qmpd.settings import LogFormat

#: The newest lines are kept for the support bundle: the last minutes of a daemon in trouble, the last days of one without.
KEPT_LINES: Final = 1000


class EventFormatter(logging.Formatter):
    """`LEVEL event key=value …`, control characters escaped, so that nothing logged can forge a line."""

    def format(self, record: logging.LogRecord) -> str:
        """One line for one event; a traceback follows on lines of its own. The handlers that show it share the work."""
        known: str | None = getattr(record, "event_line", None)
        if known is None:
            trace = traceback_of(record)
            known = f"{record.levelname} {record.name} {message_of(record)}"
            record.event_line = known = f"{known}\n{trace}" if trace else known
        return known


class JsonFormatter(logging.Formatter):
    """One JSON object on one line: time, level, logger, event, the event's own fields under `fields`, and the traceback."""

    def format(self, record: logging.LogRecord) -> str:
        """One line for one event."""
        document: dict[str, object] = {
            "at": timestamp(utc_now()),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": _encodable(record.getMessage()),
            "fields": {name: _plain(value) for name, value in fields_of(record).items()},
        }
        trace = traceback_of(record)
        if trace:
            document["traceback"] = _encodable(trace)
        return msgspec.json.encode(document).decode()


class Recent(logging.Handler):
    """Keeps the newest lines in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(EventFormatter())
        self._kept: deque[tuple[float, str]] = deque(maxlen=KEPT_LINES)

    def emit(self, record: logging.LogRecord) -> None:
        """Keep one event."""
        self._kept.append((record.created, self.format(record)))

    def lines(self) -> list[str]:
        """What is kept, oldest first, each with its time."""
        return [f"{timestamp(datetime.fromtimestamp(created, UTC))} {line}" for created, line in list(self._kept)]


def _plain(value: object) -> object:
    return value if value is None or isinstance(value, bool | int | float) else _encodable(str(value)[:FIELD_LIMIT])


def _encodable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


def recent_lines() -> list[str]:
    """The newest lines that were logged, oldest first; none where `configure` was not called."""
    return [line for handler in logging.getLogger().handlers if isinstance(handler, Recent) for line in handler.lines()]


def configure(log_format: LogFormat = "auto", *, verbose: bool, environ: Mapping[str, str] = os.environ) -> None:
    """Sends logs where `log_format` says: warnings and what an operator wants, or with `verbose` everything.

    `auto` is the journal where standard error leads there, else text on standard error.
    """
    handler: logging.Handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if log_format == "json" else EventFormatter())
    if log_format == "auto" and journald.connected(environ, sys.stderr.fileno()):
        handler = journald.JournalHandler(handler, journald.SOCKET)
    logging.basicConfig(level=logging.DEBUG if verbose else logging.INFO, handlers=[handler, Recent()], force=True)
    logging.getLogger("asyncio").setLevel(logging.WARNING)
    logging.getLogger("aiohttp").setLevel(logging.WARNING)
