"""Logs as events with fields, one line each, on standard error: what a journal or a terminal can take."""

from __future__ import annotations

import logging
from typing import Final

#: Attributes every record has; all others came with the event.
_STANDARD: Final = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
#: A field is at most this long in a line; guests and clients choose some of them.
_FIELD_LIMIT: Final = 512


class EventFormatter(logging.Formatter):
    """`LEVEL event key=value …`, control characters escaped, so that nothing logged can forge a line."""

    def format(self, record: logging.LogRecord) -> str:
        """One line for one event; a traceback follows on lines of its own."""
        fields = {name: value for name, value in vars(record).items() if name not in _STANDARD}
        line = " ".join(
            [record.levelname, record.name, record.getMessage(), *(f"{name}={_shown(value)}" for name, value in fields.items())]
        )
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def _shown(value: object) -> str:
    text = str(value)
    shown = "".join(char if char.isprintable() else repr(char)[1:-1] for char in text[:_FIELD_LIMIT])
    return f'"{shown}"' if " " in shown or not shown else shown


def configure(*, verbose: bool) -> None:
    """Sends logs to standard error: warnings and what an operator wants, or with `verbose` everything."""
    handler = logging.StreamHandler()
    handler.setFormatter(EventFormatter())
    logging.basicConfig(level=logging.DEBUG if verbose else logging.INFO, handlers=[handler], force=True)
    logging.getLogger("asyncio").setLevel(logging.WARNING)
    logging.getLogger("aiohttp").setLevel(logging.WARNING)
