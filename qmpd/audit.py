"""The audit log: every request that changes something, and every one that was refused, as JSON lines in the state directory.

A request only puts its entry into memory; a task hands what has gathered to a thread, as soon as the one before is written. So a
request never waits for the disk, a daemon that is killed loses what came in the last moments, and a host that loses power the
last seconds: nothing is synced. When the disk is full, entries are counted, and the next one that can be written says how many
are missing (`lost`). Two files are kept, each half of the cap; the older one goes when the newer one is full.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Final

import msgspec

from qmpd.auditviews import AuditEntry, AuditPage
from qmpd.capture import open_appending
from qmpd.failpoint import failpoint
from qmpd.tasks import alongside, undivided

NAME: Final = "audit.log"
#: Entries that wait for the thread; a disk that stands still does not fill the memory. Each takes about 1 KiB.
WAITING: Final = 10_000
#: Entries between two looks at the size of the file.
TOGETHER: Final = 256
#: Who reads waits so long for what is being written: that takes milliseconds, or the disk stands still.
CATCH_UP_S: Final = 5.0
#: What is read at a time, from the end.
BLOCK_BYTES: Final = 256 * 1024

_log = logging.getLogger(__name__)


class Sought(msgspec.Struct, frozen=True, kw_only=True):
    """Which entries are wanted. `since`: not older than this. `who`: by name, or by the credential that was shown."""

    since: datetime | None = None
    machine: str | None = None
    who: str | None = None
    limit: int = 100


class Audit:
    """The log of one daemon. Made by `open_audit`."""

    def __init__(self, directory: Path, cap_bytes: int) -> None:
        self._path = directory / NAME
        self._older = directory / f"{NAME}.1"
        self._half = cap_bytes // 2
        self._waiting: deque[AuditEntry] = deque()
        self._lost = 0
        self._came = asyncio.Event()
        self._written = asyncio.Condition()
        self._noted = self._done = 0

    def note(self, entry: AuditEntry) -> None:
        """Keeps an entry. It is on its way to the file when this returns, and no more."""
        if len(self._waiting) >= WAITING:
            self._lost += 1
            return
        self._waiting.append(entry)
        self._noted += 1
        self._came.set()

    async def read(self, sought: Sought) -> AuditPage:
        """The newest entries that fit, with all that were noted before, unless the disk stands still."""
        until = self._noted
        with suppress(TimeoutError):
            async with asyncio.timeout(CATCH_UP_S), self._written:
                await self._written.wait_for(lambda: self._done >= until)
        return await asyncio.to_thread(self._read, sought)

    async def write(self) -> None:
        """For ever: writes what was noted. Cancelled, it writes what is left."""
        try:
            while True:
                await self._came.wait()
                await self._batch()
        finally:
            await self._batch()

    async def _batch(self) -> None:
        self._came.clear()
        batch, lost = list(self._waiting), self._lost
        if batch:
            try:
                written = await undivided(asyncio.to_thread(self._append, batch, lost), "audit-write")
            finally:
                # Not before: what is being written counts as waiting, so that a disk that stands still is noticed.
                for _ in batch:
                    self._waiting.popleft()
                self._done += len(batch)
            self._lost = self._lost - lost if written else self._lost + len(batch)
        async with self._written:
            self._written.notify_all()

    def _append(self, batch: Sequence[AuditEntry], lost: int) -> bool:
        first = msgspec.structs.replace(batch[0], lost=lost) if lost else batch[0]
        entries = (first, *batch[1:])
        try:
            failpoint("audit-write")
            for start in range(0, len(entries), TOGETHER):
                self._write(b"".join(msgspec.json.encode(entry) + b"\n" for entry in entries[start : start + TOGETHER]))
        except OSError as error:
            _log.error("audit log cannot be written", extra={"path": str(self._path), "error": error.strerror, "entries": len(batch)})
            return False
        return True

    def _write(self, lines: bytes) -> None:
        self._make_room(len(lines))
        file = open_appending(str(self._path))
        try:
            _write_all(file, (b"\n" if _cut_short(self._path) else b"") + lines)
        finally:
            os.close(file)

    def _make_room(self, size: int) -> None:
        try:
            full = self._path.stat().st_size + size > self._half
        except FileNotFoundError:
            return
        if full:
            self._path.replace(self._older)

    def _read(self, sought: Sought) -> AuditPage:
        found: list[AuditEntry] = []
        for line in _lines_backwards(self._path, self._older):
            if not _may_fit(line, sought):
                continue
            try:
                entry = msgspec.json.decode(line, type=AuditEntry)
                at = datetime.fromisoformat(entry.at)
            except (msgspec.DecodeError, msgspec.ValidationError, ValueError):
                continue  # cut short by a crash, or by a full disk
            if sought.since is not None and at < sought.since:
                break
            if sought.machine not in (None, entry.machine) or sought.who not in (None, entry.who, entry.credential):
                continue
            if len(found) >= sought.limit:
                return AuditPage(entries=tuple(found), more=True)
            found.append(entry)
        return AuditPage(entries=tuple(found), more=False)


@asynccontextmanager
async def open_audit(directory: Path, cap_bytes: int) -> AsyncIterator[Audit]:
    """The log in this directory. What was noted before the block is left has been written after it, if the disk takes it."""
    audit = Audit(directory, cap_bytes)
    async with alongside(audit.write(), "audit"):
        yield audit


def _may_fit(line: bytes, sought: Sought) -> bool:
    """Says of most lines without decoding them that they do not fit."""
    return all(word is None or msgspec.json.encode(word) in line for word in (sought.machine, sought.who))


def _write_all(file: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]


def _cut_short(path: Path) -> bool:
    """Whether the last line has no end, because somebody died over it."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        if not size:
            return False
        file.seek(size - 1)
        return file.read(1) != b"\n"


def _lines_backwards(*paths: Path) -> Iterator[bytes]:
    """The lines of files, the newest first. All are opened before one is read: one that gets another name meanwhile is not read twice."""
    with ExitStack() as stack:
        files = []
        for path in paths:
            with suppress(FileNotFoundError):
                files.append(stack.enter_context(path.open("rb")))
        for file in files:
            rest, place = b"", file.seek(0, os.SEEK_END)
            while place:
                start = max(0, place - BLOCK_BYTES)
                file.seek(start)
                first, *lines = (file.read(place - start) + rest).split(b"\n")
                yield from reversed([line for line in lines if line])
                rest, place = first, start
            if rest:
                yield rest
