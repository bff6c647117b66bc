"""Events in systemd's journal: every field under its own name, in the journal's own protocol."""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from qmpd import journald, logs
from qmpd.journald import EVENT_BYTES, JournalHandler, connected, datagram, field_name, priority


class Journal:
    """What listens where journald does."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(path))
        self.socket.setblocking(False)

    def next(self) -> dict[str, str]:
        """The fields of the next event, read as systemd reads them."""
        data = self.socket.recv(1 << 20)
        fields: dict[str, str] = {}
        while data:
            line, _, data = data.partition(b"\n")
            name, given, value = line.partition(b"=")
            if not given:
                size = int.from_bytes(data[:8], "little")
                value, data = data[8 : 8 + size], data[8 + size + 1 :]
            fields[name.decode()] = value.decode()
        return fields


@pytest.fixture
def journal(short_directory: Path) -> Iterator[Journal]:
    listening = Journal(short_directory / "journal")
    yield listening
    listening.socket.close()


class Kept(logging.Handler):
    """Where events go that the journal did not take."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@pytest.fixture
def handler(journal: Journal) -> Iterator[JournalHandler]:
    made = JournalHandler(Kept(), journal.path)
    yield made
    made.close()


def record(message: str, *, level: int = logging.INFO, **fields: object) -> logging.LogRecord:
    made = logging.LogRecord("qmpd.test", level, "/src/qmpd/file.py", 7, message, (), None, func="work")
    vars(made).update(fields)
    return made


def test_an_event_arrives_with_its_fields(journal: Journal, handler: JournalHandler) -> None:
    handler.handle(record("machine ended", level=logging.WARNING, machine="one", clean=False))
    assert journal.next() == {
        "MESSAGE": "machine ended machine=one clean=False",
        "PRIORITY": "4",
        "SYSLOG_IDENTIFIER": "qmpd",
        "CODE_FILE": "/src/qmpd/file.py",
        "CODE_LINE": "7",
        "CODE_FUNC": "work",
        "QMPD_LOGGER": "qmpd.test",
        "QMPD_EVENT": "machine ended",
        "QMPD_MACHINE": "one",
        "QMPD_CLEAN": "False",
    }


def test_a_value_cannot_become_a_field_of_its_own(journal: Journal, handler: JournalHandler) -> None:
    handler.handle(record("event", path="a\nPRIORITY=0\nMESSAGE=forged", odd="\ud800"))
    fields = journal.next()
    assert (fields["PRIORITY"], fields["QMPD_PATH"]) == ("6", "a\nPRIORITY=0\nMESSAGE=forged")
    assert fields["QMPD_ODD"] == "?"


def test_a_traceback_is_part_of_the_message(journal: Journal, handler: JournalHandler) -> None:
    made = record("failed", level=logging.ERROR)
    made.exc_info = (ValueError, ValueError("of this"), None)
    handler.handle(made)
    assert journal.next()["MESSAGE"].splitlines() == ["failed", "ValueError: of this"]


def test_an_event_that_is_too_large_loses_the_end_of_its_longest_value(journal: Journal, handler: JournalHandler) -> None:
    handler.handle(record("event", machine="one", long="x" * 10 * EVENT_BYTES))
    fields = journal.next()
    assert fields["QMPD_MACHINE"] == "one"
    assert EVENT_BYTES / 2 < len(fields["QMPD_LONG"]) < EVENT_BYTES
    assert len(datagram({"A": "x" * EVENT_BYTES, "B": "y" * EVENT_BYTES})) <= EVENT_BYTES


def test_what_the_journal_does_not_take_goes_elsewhere_and_nobody_waits(journal: Journal) -> None:
    fallback = Kept()
    handler = JournalHandler(fallback, journal.path)
    while not fallback.messages:  # until the queue of a journal that reads nothing is full
        handler.handle(record("event"))
    journal.socket.close()
    journal.path.unlink()
    handler.handle(record("nobody there"))
    assert fallback.messages == ["event", "nobody there"]
    handler.close()


def test_names_and_priorities_are_the_journals() -> None:
    assert field_name("delay-s") == "QMPD_DELAY_S"
    assert field_name("naïve") == "QMPD_NA_VE"
    assert len(field_name("x" * 100)) == 64
    assert [priority(level) for level in (logging.CRITICAL, logging.ERROR, logging.WARNING, logging.INFO, logging.DEBUG)] == [2, 3, 4, 6, 7]


def test_the_journal_is_used_only_where_standard_error_is_its_stream(tmp_path: Path) -> None:
    with (tmp_path / "stream").open("w") as stream:
        status = os.fstat(stream.fileno())
        assert connected({"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"}, stream.fileno())
        assert not connected({"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino + 1}"}, stream.fileno())
        assert not connected({}, stream.fileno())
    assert not connected({"JOURNAL_STREAM": "1:2"}, -1)


@pytest.fixture
def own_logging() -> Iterator[None]:
    """The handlers that there were, put back."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers[:] = []
    yield
    for made in root.handlers:
        made.close()
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.mark.usefixtures("own_logging")
def test_a_daemon_of_systemd_logs_to_the_journal(journal: Journal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journald, "SOCKET", journal.path)
    with (tmp_path / "stream").open("w+") as stream:
        status = os.fstat(stream.fileno())
        monkeypatch.setattr(sys, "stderr", stream)
        logs.configure(verbose=False, environ={"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"})
        logging.getLogger("qmpd.test").warning("event", extra={"machine": "one"})
        assert journal.next()["QMPD_MACHINE"] == "one"
        stream.seek(0)
        assert stream.read() == ""
