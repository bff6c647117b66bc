"""The local logs of one host: numbered events, jobs, and answers kept for clients that ask twice.

Events are numbered 1, 2, 3… by the transaction that makes them durable: the table's highest number plus one. The newest event is
never deleted, so that no number is given twice; a transaction that fails gives none, so that none is missing.

Data is msgpack. What a guest may have made (event data, results and errors of jobs) is never refused: where it cannot be encoded
or is over the limit, `{"omitted": reason}` stands in its place.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import sqlite3
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Final, Literal

import msgspec

from qmpd.database import Database
from qmpd.errors import NoSpace, NotFound, TooLarge
from qmpd.failpoint import failpoint
from qmpd.views import Event, EventPage, JobView, Progress

#: Events kept, give or take one in a hundred: about 14 MB of database.
KEPT_EVENTS: Final = 100_000
#: Events come in bursts, three with the end of a machine; together they cost one sync of the disk. No answer waits for an event, but
#: viewers do. A daemon that is killed meanwhile has told nobody of them, and the next one finds out what the machines do now.
EVENT_LINGER_S: Final = 0.005
#: Ended jobs kept; running ones always are.
KEPT_JOBS: Final = 1_000
#: Events in one page, however many were asked for.
MAX_PAGE: Final = 1_000
#: A page ends early when its data reaches this size, so that large events do not make huge answers.
MAX_PAGE_BYTES: Final = 4 << 20
#: Data of one event, result or error of one job; QMP events are a few hundred bytes.
MAX_DATA_BYTES: Final = 64 << 10
#: One kept answer. Those of the API's POST requests are a few KiB.
MAX_ANSWER_BYTES: Final = 1 << 20
#: Kept answers together; the oldest go first.
KEPT_ANSWERS: Final = 10_000
#: How long a client may come back with the same idempotency key.
ANSWER_LIFE: Final = timedelta(hours=24)

#: Kind of the events that other hosts recorded.
PAST: Final = "machine.past"

Ending = Literal["succeeded", "failed", "cancelled"]

_INTERRUPTED: Final = {"code": "interrupted", "message": "qmpd ended while the job was under way", "details": {}}

_log = logging.getLogger(__name__)


class PastEvent(msgspec.Struct, frozen=True, kw_only=True):
    """An event of another host, which that host (`host`, as somebody called it) gave this number."""

    host: str
    number: int
    at: str
    kind: str
    data: dict[str, object] = {}


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What was answered to a request (its `fingerprint`) that came with an idempotency key."""

    fingerprint: str
    response: bytes


def utc_now() -> datetime:
    """The wall clock."""
    return datetime.now(UTC)


def timestamp(at: datetime) -> str:
    """A time as the API writes it: RFC 3339 in UTC, to the millisecond."""
    return at.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


class Journal:
    """Events, jobs and kept answers, in the tables of the open database. Made by `open_journal`.

    Every method that writes returns when the change is durable, and raises `NoSpace` or `Busy` when nothing was changed
    and `Unknown` when that is not known. Every method can raise `Unknown` when the database does not answer.
    """

    def __init__(self, database: Database, kept_events: int, now: Callable[[], datetime]) -> None:
        if kept_events < 1:
            raise ValueError("the newest event is always kept: its number must not be given twice")
        self._database = database
        self._kept_events = kept_events
        self._now = now
        self._running: set[str] = set()

    # -- events

    async def append(self, kind: str, machine: str | None, data: Mapping[str, object]) -> Event:
        """Record an event. Only the bus does so, or its subscribers would not see it; others use `Bus.publish`."""
        return await self._database.answer(self.enqueue(kind, machine, data))

    def enqueue(self, kind: str, machine: str | None, data: Mapping[str, object]) -> asyncio.Future[Event]:
        """Like `append` without waiting; events get their numbers in the order of the calls, and are durable a moment later."""
        event = Event(number=0, at=timestamp(self._now()), kind=kind, machine=machine, data=_storable(data))
        return self._database.enqueue(partial(_append, event=event, kept=self._kept_events), linger_s=EVENT_LINGER_S)

    def enqueue_past(self, machine: str, events: Sequence[PastEvent]) -> asyncio.Future[tuple[Event, ...]]:
        """Record what happened to a machine on other hosts before it came to this one, all at once; the future has those that are new here.

        Each is an event of kind `machine.past` with its own time. Only the bus does so.
        """
        return self._database.enqueue(partial(_append_past, machine=machine, events=tuple(events), kept=self._kept_events))

    async def recent(self, machine: str, limit: int) -> tuple[Event, ...]:
        """The newest events of a machine, oldest first."""
        return await self._database.read(partial(_recent, machine=machine, limit=limit))

    async def page(self, since: int, limit: int = MAX_PAGE, machine: str | None = None) -> EventPage:
        """The oldest events with numbers above `since`, at most `limit`, only those of `machine` if one is given.

        There are no more when the page has no events. `gap` is true when older ones that were asked for are no longer kept,
        or when `since` is a number that was never reached: then it is not from this database.
        """
        return await self._database.read(partial(_page, since=since, limit=max(1, min(limit, MAX_PAGE)), machine=machine))

    async def last(self) -> int:
        """The number of the newest event, 0 when there is none."""
        return (await self._database.read(_kept))[1]

    # -- jobs

    async def create_job(self, kind: str, machine: str | None = None) -> JobView:
        """Begin a job. It is `running` until `finish_job`, or `interrupted` when this process ends before."""
        job = JobView(id=secrets.token_hex(8), kind=kind, machine=machine, state="running", created_at=timestamp(self._now()))
        self._running.add(job.id)
        try:
            await self._database.write(partial(_create_job, job=job))
        except BaseException:
            # Should it turn out to be there after all, nobody is working on it.
            self._running.discard(job.id)
            raise
        return job

    async def update_job(self, job_id: str, progress: Progress) -> JobView:
        """Record how far a job is. One that has ended stays as it is, and is returned.

        Raises:
            NotFound: there is no such job.
        """
        return await self._database.write(partial(_change_job, job_id=job_id, changes={"progress": progress}))

    async def finish_job(
        self, job_id: str, state: Ending, *, result: Mapping[str, object] | None = None, error: Mapping[str, object] | None = None
    ) -> JobView:
        """End a job. The first ending stands: the job is returned as it ended. After an error the job is still running: call again.

        Raises:
            NotFound: there is no such job.
        """
        changes = {
            "state": state,
            "ended_at": timestamp(self._now()),
            "result": None if result is None else _storable(result),
            "error": None if error is None else _storable(error),
        }
        job = await self._database.write(partial(_change_job, job_id=job_id, changes=changes))
        self._running.discard(job_id)
        return job

    async def job(self, job_id: str) -> JobView:
        """The job of this id.

        Raises:
            NotFound: there is none, or it is no longer kept.
        """
        return self._seen(await self._database.read(partial(_job, job_id=job_id)))

    async def jobs(self, machine: str | None = None, limit: int = KEPT_JOBS) -> tuple[JobView, ...]:
        """The newest jobs, newest first; only those of `machine` if one is given."""
        found = await self._database.read(partial(_jobs, machine=machine, limit=max(0, limit)))
        return tuple(self._seen(job) for job in found)

    def _seen(self, job: JobView) -> JobView:
        # Normally the database says so itself, unless the disk was full when this process began.
        return _interrupted(job, None) if job.state == "running" and job.id not in self._running else job

    # -- kept answers

    async def remember(self, key: str, fingerprint: str, response: bytes) -> Answer:
        """Keep what was answered under an idempotency key for `ANSWER_LIFE`; of several the first stands, and is returned.

        Raises:
            TooLarge: over `MAX_ANSWER_BYTES`; nothing is kept.
        """
        if len(response) > MAX_ANSWER_BYTES:
            raise TooLarge(f"an answer of {len(response)} bytes, over the limit of {MAX_ANSWER_BYTES}", limit=MAX_ANSWER_BYTES)
        answer = Answer(fingerprint=fingerprint, response=response)
        return await self._database.write(partial(_remember, key=key, answer=answer, now_s=int(self._now().timestamp())))

    async def recall(self, key: str) -> Answer | None:
        """What was answered under this idempotency key, if that is still kept."""
        return await self._database.read(partial(_recall, key=key, now_s=int(self._now().timestamp())))


@asynccontextmanager
async def open_journal(
    database: Database, *, kept_events: int = KEPT_EVENTS, now: Callable[[], datetime] = utc_now
) -> AsyncIterator[Journal]:
    """The database's journal. Jobs that an earlier process left running are `interrupted` from here on."""
    journal = Journal(database, kept_events, now)
    try:
        await database.write(partial(_interrupt, at=timestamp(now())))
    except NoSpace:
        # A daemon must come up on a full disk; `Journal.jobs` shows these jobs as interrupted anyway.
        _log.error("the disk is full: interrupted jobs are not recorded as such")
    yield journal


def _storable(data: Mapping[str, object]) -> dict[str, object]:
    """The data as it will be read back, or a note of why it was left out."""
    try:
        encoded = msgspec.msgpack.encode(dict(data))
        if len(encoded) > MAX_DATA_BYTES:
            return {"omitted": f"{len(encoded)} bytes, over the limit of {MAX_DATA_BYTES}"}
        return msgspec.msgpack.decode(encoded, type=dict[str, object])
    except (ValueError, OverflowError, RecursionError) as error:
        return {"omitted": f"cannot be encoded: {error}"}


def _kept(connection: sqlite3.Connection) -> tuple[int, int]:
    """Numbers of the oldest and the newest event; 1 and 0 where there are none."""
    first, last = connection.execute("SELECT (SELECT min(number) FROM event), (SELECT max(number) FROM event)").fetchone()
    return first or 1, last or 0


def _append(connection: sqlite3.Connection, event: Event, kept: int) -> Event:
    failpoint("event-write")
    (number,) = connection.execute(
        # NULL is the highest number plus one.
        "INSERT INTO event VALUES (NULL, ?, ?, ?, ?) RETURNING number",
        (event.at, event.kind, event.machine, msgspec.msgpack.encode(event.data)),
    ).fetchone()
    # Many at once: deleting one for each that is added would double the pages written.
    if number % max(1, kept // 100) == 0:
        connection.execute("DELETE FROM event WHERE number <= ?", (number - kept,))
    return msgspec.structs.replace(event, number=number)


def _append_past(connection: sqlite3.Connection, machine: str, events: tuple[PastEvent, ...], kept: int) -> tuple[Event, ...]:
    known = set()
    for at, data in connection.execute("SELECT at, data FROM event WHERE machine = ? AND kind = ?", (machine, PAST)):
        there = msgspec.msgpack.decode(data)
        known.add((there.get("host"), there.get("number"), at))
    added = []
    for event in events:
        if (event.host, event.number, event.at) in known or _is_ours(connection, machine, event):
            continue
        data = {"host": event.host, "number": event.number, "kind": event.kind, "data": _storable(event.data)}
        added.append(_append(connection, Event(number=0, at=event.at, kind=PAST, machine=machine, data=data), kept))
        known.add((event.host, event.number, event.at))
    return tuple(added)


def _is_ours(connection: sqlite3.Connection, machine: str, event: PastEvent) -> bool:
    """Whether it is one of this host's own, which comes back with the machine: only its number is needed to know it."""
    found = connection.execute("SELECT at, kind, machine FROM event WHERE number = ?", (event.number,)).fetchone()
    return bool(found == (event.at, event.kind, machine))


def _recent(connection: sqlite3.Connection, machine: str, limit: int) -> tuple[Event, ...]:
    rows = connection.execute(
        "SELECT number, at, kind, data FROM event WHERE machine = ? ORDER BY number DESC LIMIT ?", (machine, limit)
    ).fetchall()
    return tuple(
        Event(number=number, at=at, kind=kind, machine=machine, data=msgspec.msgpack.decode(data)) for number, at, kind, data in rows[::-1]
    )


def _page(connection: sqlite3.Connection, since: int, limit: int, machine: str | None) -> EventPage:
    first, last = _kept(connection)
    events: list[Event] = []
    size = 0
    for number, at, kind, of_machine, data in connection.execute(
        "SELECT number, at, kind, machine, data FROM event WHERE number > ? ORDER BY number LIMIT ?"
        if machine is None
        else "SELECT number, at, kind, machine, data FROM event WHERE number > ? AND machine = ? ORDER BY number LIMIT ?",
        (since, limit) if machine is None else (since, machine, limit),
    ):
        size += len(data)
        if events and size > MAX_PAGE_BYTES:
            break
        events.append(Event(number=number, at=at, kind=kind, machine=of_machine, data=msgspec.msgpack.decode(data)))
    return EventPage(events=tuple(events), first=first, last=last, gap=not first - 1 <= since <= last)


def _create_job(connection: sqlite3.Connection, job: JobView) -> None:
    failpoint("job-create")
    number = connection.execute(
        "INSERT INTO job VALUES (NULL, ?, ?, TRUE, ?)", (job.id, job.machine, msgspec.msgpack.encode(job))
    ).lastrowid
    connection.execute("DELETE FROM job WHERE number <= ? - ? AND NOT running", (number, KEPT_JOBS))


def _job(connection: sqlite3.Connection, job_id: str) -> JobView:
    row = connection.execute("SELECT view FROM job WHERE id = ?", (job_id,)).fetchone()
    if row is None:
        raise NotFound(f"there is no job {job_id}")
    return msgspec.msgpack.decode(row[0], type=JobView)


def _jobs(connection: sqlite3.Connection, machine: str | None, limit: int) -> list[JobView]:
    rows = connection.execute(
        "SELECT view FROM job WHERE ?1 IS NULL OR machine = ?1 ORDER BY number DESC LIMIT ?2",
        (machine, limit),
    )
    return [msgspec.msgpack.decode(view, type=JobView) for (view,) in rows]


def _change_job(connection: sqlite3.Connection, job_id: str, changes: Mapping[str, object]) -> JobView:
    job = _job(connection, job_id)
    if job.state != "running":
        return job
    failpoint("job-change")
    job = msgspec.structs.replace(job, **changes)
    connection.execute("UPDATE job SET running = ?, view = ? WHERE id = ?", (job.state == "running", msgspec.msgpack.encode(job), job_id))
    return job


def _interrupt(connection: sqlite3.Connection, at: str) -> None:
    for (view,) in connection.execute("SELECT view FROM job WHERE running").fetchall():
        job = _interrupted(msgspec.msgpack.decode(view, type=JobView), at)
        connection.execute("UPDATE job SET running = FALSE, view = ? WHERE id = ?", (msgspec.msgpack.encode(job), job.id))


def _interrupted(job: JobView, at: str | None) -> JobView:
    return msgspec.structs.replace(job, state="interrupted", ended_at=at, error=_INTERRUPTED)


def _remember(connection: sqlite3.Connection, key: str, answer: Answer, now_s: int) -> Answer:
    kept = _recall(connection, key, now_s)
    if kept is not None:
        return kept
    failpoint("answer-keep")
    connection.execute("DELETE FROM answer WHERE expires <= ?", (now_s,))
    number = connection.execute(
        "INSERT INTO answer VALUES (NULL, ?, ?, ?, ?)",
        (key, answer.fingerprint, answer.response, now_s + int(ANSWER_LIFE.total_seconds())),
    ).lastrowid
    connection.execute("DELETE FROM answer WHERE number <= ? - ?", (number, KEPT_ANSWERS))
    return answer


def _recall(connection: sqlite3.Connection, key: str, now_s: int) -> Answer | None:
    row = connection.execute("SELECT fingerprint, response FROM answer WHERE key = ? AND expires > ?", (key, now_s)).fetchone()
    return None if row is None else Answer(fingerprint=row[0], response=row[1])
