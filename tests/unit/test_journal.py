"""Numbered events, jobs, and answers kept for clients that ask twice."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest

from qmpd.database import Database, open_database
from qmpd.errors import NotFound, TooLarge
from qmpd.journal import (
    ANSWER_LIFE,
    KEPT_ANSWERS,
    KEPT_JOBS,
    MAX_ANSWER_BYTES,
    MAX_DATA_BYTES,
    MAX_PAGE,
    MAX_PAGE_BYTES,
    Answer,
    Journal,
    open_journal,
    timestamp,
    utc_now,
)
from qmpd.views import Event, Progress


class Clock:
    def __init__(self) -> None:
        self.now = datetime(2025, 3, 1, 12, 0, 0, 123_456, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.now


@asynccontextmanager
async def opened(state_dir: Path, *, kept_events: int = 1000, clock: Clock | None = None) -> AsyncIterator[tuple[Database, Journal]]:
    now = clock or Clock()
    async with open_database(state_dir) as database, open_journal(database, kept_events=kept_events, now=now) as journal:
        yield database, journal


@pytest.fixture
async def journal(tmp_path: Path) -> AsyncIterator[Journal]:
    async with opened(tmp_path) as (_, opened_journal):
        yield opened_journal


def numbers(events: tuple[Event, ...]) -> list[int]:
    return [event.number for event in events]


async def one_turn() -> None:
    """The loop runs once: tasks made before have begun."""
    await asyncio.sleep(0)


# -- events


async def test_an_event_is_numbered_dated_and_read_back_as_it_was_given(journal: Journal) -> None:
    event = await journal.append("machine-state", "vm1", {"state": "running", "list": [1, None, 2.5, True]})
    assert event == Event(
        number=1,
        at="2025-03-01T12:00:00.123Z",
        kind="machine-state",
        machine="vm1",
        data={"state": "running", "list": [1, None, 2.5, True]},
    )
    assert (await journal.page(0)).events == (event,)


async def test_what_is_returned_is_what_will_be_read(journal: Journal) -> None:
    event = await journal.append("kind", None, {"tuple": (1, 2), "bytes": b"\xff"})
    assert (await journal.page(0)).events == (event,)
    assert event.data["tuple"] == [1, 2]


async def test_an_empty_journal_has_no_gap(journal: Journal) -> None:
    page = await journal.page(0)
    assert (page.events, page.first, page.last, page.gap) == ((), 1, 0, False)
    assert await journal.last() == 0


async def test_concurrent_events_are_numbered_without_a_hole_in_the_order_of_the_calls(journal: Journal) -> None:
    events = await asyncio.gather(*(journal.append("kind", None, {"call": n}) for n in range(500)))
    assert [(event.number, event.data["call"]) for event in events] == [(n + 1, n) for n in range(500)]


async def test_a_request_that_fails_beside_an_event_takes_no_number(tmp_path: Path) -> None:
    async with opened(tmp_path) as (database, journal):

        def append_and_raise(connection: object) -> None:
            raise NotFound("nothing")

        first = journal.enqueue("kind", None, {})
        failing = database.enqueue(append_and_raise)
        second = journal.enqueue("kind", None, {})
        outcomes = await asyncio.gather(first, failing, second, return_exceptions=True)
        assert isinstance(outcomes[1], NotFound)
        assert (first.result().number, second.result().number) == (1, 2)


async def test_numbers_go_on_after_reopening(tmp_path: Path) -> None:
    async with opened(tmp_path) as (_, journal):
        await journal.append("kind", None, {})
        await journal.append("kind", None, {})
    async with opened(tmp_path) as (_, journal):
        assert (await journal.append("kind", None, {})).number == 3
        assert numbers((await journal.page(0)).events) == [1, 2, 3]


async def test_pages_follow_each_other_by_number(journal: Journal) -> None:
    for _ in range(10):
        await journal.append("kind", None, {})
    assert numbers((await journal.page(0, 4)).events) == [1, 2, 3, 4]
    assert numbers((await journal.page(4, 4)).events) == [5, 6, 7, 8]
    last = await journal.page(8, 4)
    assert (numbers(last.events), last.first, last.last, last.gap) == ([9, 10], 1, 10, False)
    end = await journal.page(10, 4)
    assert (end.events, end.gap) == ((), False)


async def test_a_page_can_be_of_one_machine(journal: Journal) -> None:
    for n in range(9):
        await journal.append("kind", ("vm1", "vm2", None)[n % 3], {})
    page = await journal.page(1, 10, "vm1")
    assert (numbers(page.events), page.first, page.last) == ([4, 7], 1, 9)
    assert numbers((await journal.page(0, 1, "vm2")).events) == [2]
    assert (await journal.page(0, 10, "vm3")).events == ()


async def test_a_page_is_bounded_in_events(journal: Journal) -> None:
    await asyncio.gather(*(journal.append("kind", None, {}) for _ in range(MAX_PAGE + 5)))
    assert len((await journal.page(0, 10**6)).events) == MAX_PAGE
    assert len((await journal.page(0, 0)).events) == 1


async def test_a_page_is_bounded_in_bytes_and_never_empty_for_that(journal: Journal) -> None:
    data = {"text": "x" * (MAX_DATA_BYTES - 100)}
    total = MAX_PAGE_BYTES // MAX_DATA_BYTES + 10
    await asyncio.gather(*(journal.append("kind", None, data) for _ in range(total)))
    first = (await journal.page(0)).events
    assert 0 < len(first) < total
    rest = (await journal.page(first[-1].number)).events
    assert numbers(first + rest) == list(range(1, total + 1))


async def test_old_events_are_dropped_and_asking_for_them_is_a_gap(tmp_path: Path) -> None:
    async with opened(tmp_path, kept_events=10) as (_, journal):
        for _ in range(25):
            await journal.append("kind", None, {})
        page = await journal.page(0)
        assert (numbers(page.events), page.first, page.last, page.gap) == (list(range(16, 26)), 16, 25, True)
        assert (await journal.page(14)).gap
        assert not (await journal.page(15)).gap


async def test_old_events_are_dropped_many_at_a_time(tmp_path: Path) -> None:
    async with opened(tmp_path, kept_events=1000) as (_, journal):
        await asyncio.gather(*(journal.append("kind", None, {}) for _ in range(1009)))
        assert (await journal.page(1008)).first == 1
        await journal.append("kind", None, {})
        assert (await journal.page(1008)).first == 11


async def test_a_number_that_was_never_reached_is_a_gap(journal: Journal) -> None:
    await journal.append("kind", None, {})
    assert (await journal.page(2)).gap
    assert (await journal.page(2)).events == ()


async def test_the_newest_event_outlives_any_retention_so_that_its_number_is_not_used_again(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="newest event"):
        async with opened(tmp_path, kept_events=0):
            raise AssertionError("a journal that keeps nothing")
    async with opened(tmp_path, kept_events=1) as (_, journal):
        for _ in range(3):
            await journal.append("kind", None, {})
        assert numbers((await journal.page(2)).events) == [3]
    async with opened(tmp_path, kept_events=1) as (_, journal):
        assert (await journal.append("kind", None, {})).number == 4


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ({"text": "\ud800"}, "surrogates not allowed"),
        ({"number": 2**70}, "can't serialize ints"),
        ({"text": "x" * MAX_DATA_BYTES}, "over the limit"),
    ],
    ids=["lone surrogate", "number", "size"],
)
async def test_what_a_guest_made_unfit_is_left_out_and_the_event_recorded(journal: Journal, data: dict[str, object], reason: str) -> None:
    event = await journal.append("guest", "vm1", data)
    assert reason in str(event.data["omitted"])
    assert (await journal.page(0)).events == (event,)


async def test_data_nested_without_end_is_left_out(journal: Journal) -> None:
    data: dict[str, object] = {}
    for _ in range(100_000):
        data = {"deeper": data}
    assert "omitted" in (await journal.append("guest", "vm1", data)).data


async def test_data_of_a_type_no_format_has_is_a_mistake_of_the_caller(journal: Journal) -> None:
    with pytest.raises(TypeError):
        journal.enqueue("kind", None, {"object": object()})


def test_times_are_written_in_utc_to_the_millisecond() -> None:
    at = datetime(2025, 3, 1, 1, 30, tzinfo=timezone(timedelta(hours=2)))
    assert timestamp(at) == "2025-02-28T23:30:00.000Z"
    assert utc_now().tzinfo is UTC


# -- jobs


async def test_a_job_goes_from_running_over_progress_to_its_result(journal: Journal) -> None:
    job = await journal.create_job("migration", "vm1")
    assert (job.kind, job.machine, job.state, job.created_at) == ("migration", "vm1", "running", "2025-03-01T12:00:00.123Z")
    progress = Progress(phase="precopy", done=5, total=10, unit="bytes")
    updated = await journal.update_job(job.id, progress)
    assert (updated.state, updated.progress) == ("running", progress)
    assert await journal.job(job.id) == updated
    ended = await journal.finish_job(job.id, "succeeded", result={"downtime_ms": 12})
    assert (ended.state, ended.result, ended.error, ended.progress) == ("succeeded", {"downtime_ms": 12}, None, progress)
    assert ended.ended_at == "2025-03-01T12:00:00.123Z"
    assert await journal.job(job.id) == ended


async def test_the_first_ending_of_a_job_stands(journal: Journal) -> None:
    job = await journal.create_job("shutdown", "vm1")
    cancelled = await journal.finish_job(job.id, "cancelled")
    assert await journal.finish_job(job.id, "failed", error={"code": "late"}) == cancelled
    assert await journal.update_job(job.id, Progress(done=1)) == cancelled
    assert await journal.job(job.id) == cancelled


async def test_a_failed_job_keeps_its_error_even_if_a_guest_made_it_unfit(journal: Journal) -> None:
    job = await journal.create_job("shutdown", "vm1")
    ended = await journal.finish_job(job.id, "failed", error={"code": "qemu_died", "message": "\udcff"})
    assert ended.state == "failed"
    assert ended.error is not None
    assert "omitted" in ended.error


async def test_a_job_that_is_not_there_is_not_found(journal: Journal) -> None:
    for attempt in (journal.job("none"), journal.update_job("none", Progress()), journal.finish_job("none", "failed")):
        with pytest.raises(NotFound, match="no job none"):
            await attempt


async def test_jobs_are_listed_newest_first_and_by_machine(journal: Journal) -> None:
    made = [await journal.create_job("shutdown", machine) for machine in ("vm1", "vm2", "vm1", None)]
    assert [job.id for job in await journal.jobs()] == [job.id for job in reversed(made)]
    assert [job.id for job in await journal.jobs("vm1")] == [made[2].id, made[0].id]
    assert [job.id for job in await journal.jobs(limit=1)] == [made[3].id]
    assert await journal.jobs(limit=-5) == ()


async def test_jobs_that_ran_when_the_daemon_ended_are_interrupted(tmp_path: Path) -> None:
    async with opened(tmp_path) as (_, journal):
        running = await journal.create_job("migration", "vm1")
        done = await journal.finish_job((await journal.create_job("shutdown")).id, "succeeded")
    async with opened(tmp_path) as (_, journal):
        job = await journal.job(running.id)
        assert (job.state, job.ended_at) == ("interrupted", "2025-03-01T12:00:00.123Z")
        assert job.error is not None
        assert job.error["code"] == "interrupted"
        assert await journal.job(done.id) == done
        assert await journal.finish_job(running.id, "succeeded") == job


async def test_a_job_is_running_from_the_moment_it_can_be_seen(journal: Journal) -> None:
    creating = asyncio.ensure_future(journal.create_job("shutdown"))
    await one_turn()
    assert [job.state for job in await journal.jobs()] == ["running"]
    await creating


async def test_a_job_nobody_waited_for_is_not_running(tmp_path: Path) -> None:
    async with opened(tmp_path) as (_, journal):
        creating = asyncio.ensure_future(journal.create_job("shutdown"))
        await one_turn()
        creating.cancel()
        with pytest.raises(asyncio.CancelledError):
            await creating
        assert [job.state for job in await journal.jobs()] == ["interrupted"]


async def test_old_ended_jobs_are_dropped_and_running_ones_never(tmp_path: Path) -> None:
    async with opened(tmp_path) as (_, journal):
        running = await journal.create_job("long", "vm1")
        ended = await asyncio.gather(*(journal.create_job("short") for _ in range(KEPT_JOBS)))
        await asyncio.gather(*(journal.finish_job(job.id, "succeeded") for job in ended))
        await asyncio.gather(*(journal.create_job("short") for _ in range(3)))
        kept = {job.id for job in await journal.jobs(limit=2 * KEPT_JOBS)}
        assert running.id in kept
        assert len(kept) == KEPT_JOBS + 1
        assert ended[2].id not in kept
        assert ended[3].id in kept


# -- kept answers


async def test_an_answer_is_recalled_by_its_key(journal: Journal) -> None:
    assert await journal.recall("key") is None
    answer = Answer(fingerprint="POST /v1/machines abc", response=b"\x00answer")
    assert await journal.remember("key", answer.fingerprint, answer.response) == answer
    assert await journal.recall("key") == answer
    assert await journal.recall("other") is None


async def test_of_several_answers_under_one_key_the_first_stands(journal: Journal) -> None:
    outcomes = await asyncio.gather(*(journal.remember("key", "fingerprint", b"%d" % n) for n in range(5)))
    assert {answer.response for answer in outcomes} == {b"0"}


async def test_an_answer_is_kept_for_a_day_and_over_a_restart(tmp_path: Path) -> None:
    clock = Clock()
    async with opened(tmp_path, clock=clock) as (_, journal):
        await journal.remember("key", "fingerprint", b"1")
    clock.now += ANSWER_LIFE - timedelta(seconds=1)
    async with opened(tmp_path, clock=clock) as (database, journal):
        assert await journal.recall("key") is not None
        clock.now += timedelta(seconds=1)
        assert await journal.recall("key") is None
        assert (await journal.remember("key", "another", b"2")).response == b"2"
        (rows,) = await database.read(lambda connection: connection.execute("SELECT count(*) FROM answer").fetchone())
        assert rows == 1


async def test_an_answer_over_the_limit_is_refused(journal: Journal) -> None:
    await journal.remember("fits", "fingerprint", bytes(MAX_ANSWER_BYTES))
    with pytest.raises(TooLarge):
        await journal.remember("key", "fingerprint", bytes(MAX_ANSWER_BYTES + 1))


async def test_only_so_many_answers_are_kept(tmp_path: Path) -> None:
    async with opened(tmp_path) as (database, journal):
        far = 1 << 40
        rows = [(f"key{n}", "fingerprint", b"", far) for n in range(KEPT_ANSWERS)]
        await database.write(
            lambda connection: connection.executemany("INSERT INTO answer VALUES (NULL, ?, ?, ?, ?)", rows).rowcount,
        )
        await journal.remember("newest", "fingerprint", b"")
        assert await journal.recall("key0") is None
        assert await journal.recall("key1") is not None
        assert await journal.recall("newest") is not None


async def test_events_jobs_and_answers_can_wait_in_one_transaction(tmp_path: Path) -> None:
    async with opened(tmp_path) as (database, journal):
        go = threading.Event()
        blocked = database.enqueue(lambda _: go.wait(20))
        together = asyncio.gather(journal.append("kind", None, {}), journal.create_job("kind"), journal.remember("key", "f", b""))
        await one_turn()
        go.set()
        event, job, _ = await together
        assert await blocked
        assert event.number == 1
        assert (await journal.job(job.id)).state == "running"
