"""A log record as an event: what happened, and the fields that came with it."""

from __future__ import annotations

import logging
from typing import Final

#: Attributes every record has; all others came with the event.
_STANDARD: Final = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "event_line"}
#: A field is at most this long in a line; guests and clients choose some of them.
FIELD_LIMIT: Final = 512


def fields_of(record: logging.LogRecord) -> dict[str, object]:
    """What came with an event."""
    return {name: value for name, value in vars(record).items() if name not in _STANDARD}


def message_of(record: logging.LogRecord) -> str:
    """An event and its fields in one line."""
    return " ".join([record.getMessage(), *(f"{name}={_shown(value)}" for name, value in fields_of(record).items())])


def traceback_of(record: logging.LogRecord) -> str:
    """The traceback of an event, empty where it has none."""
    return logging.Formatter().formatException(record.exc_info) if record.exc_info else ""


def _shown(value: object) -> str:
    text = str(value)
    if len(text) <= FIELD_LIMIT and text.isprintable():
        return f'"{text}"' if " " in text or not text else text
    shown = "".join(char if char.isprintable() else repr(char)[1:-1] for char in text[:FIELD_LIMIT])
    return f'"{shown}"' if " " in shown or not shown else shown
