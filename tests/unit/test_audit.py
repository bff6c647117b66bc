"""The audit log's files: what is noted is written in order, kept small, found again, and never in anybody's way."""

from __future__ import annotations

import asyncio
import stat
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qmpd.audit import BLOCK_BYTES, NAME, WAITING, Audit, Sought, open_audit
from qmpd.auditviews import AuditEntry
from qmpd.failpoint import arm

NOW = datetime(2026, 11, 1, tzinfo=UTC)
CAP = 64 * 1024


def entry(number: int = 0, **how: object) -> AuditEntry:
    at = (NOW + timedelta(seconds=number)).isoformat()
    made = AuditEntry(at=at, request=f"r-{number}", method="POST", route="/v1/machines", status=201)
    return msgspec.structs.replace(made, **how)


@pytest.fixture
def _failing() -> Iterator[None]:
    yield
    arm("")


def numbers(entries: tuple[AuditEntry, ...]) -> list[int]:
    return [int(found.request.removeprefix("r-")) for found in entries]


async def test_what_was_noted_is_found_newest_first(tmp_path: Path) -> None:
    async with open_audit(tmp_path, CAP) as audit:
        for number in range(10):
            audit.note(entry(number))
        page = await audit.read(Sought(limit=3))
        assert (numbers(page.entries), page.more) == ([9, 8, 7], True)
        page = await audit.read(Sought(limit=10))
        assert (numbers(page.entries), page.more) == ([*reversed(range(10))], False)
    assert stat.S_IMODE((tmp_path / NAME).stat().st_mode) == 0o600


async def test_what_was_noted_last_is_written_when_the_daemon_ends(tmp_path: Path) -> None:
    async with open_audit(tmp_path, CAP) as audit:
        audit.note(entry(1))
        await audit.read(Sought())
        audit.note(entry(2))
    lines = (tmp_path / NAME).read_bytes().splitlines()
    assert [msgspec.json.decode(line, type=AuditEntry) for line in lines] == [entry(1), entry(2)]


async def test_entries_are_chosen_by_time_machine_and_who(tmp_path: Path) -> None:
    async with open_audit(tmp_path, CAP) as audit:
        audit.note(entry(1, machine="a", who="admin:ada", credential="c1"))
        audit.note(entry(2, machine="b", who="token:ci", credential="c2"))
        audit.note(entry(3, machine="a", who="token:ci", credential="c2"))
        audit.note(entry(4))
        for sought, expected in (
            (Sought(machine="a"), [3, 1]),
            (Sought(who="token:ci"), [3, 2]),
            (Sought(who="c1"), [1]),
            (Sought(machine="a", who="c2"), [3]),
            (Sought(since=NOW + timedelta(seconds=3)), [4, 3]),
            (Sought(machine="admin:ada"), []),
        ):
            assert numbers((await audit.read(sought)).entries) == expected


async def test_the_files_stay_below_the_cap_and_the_newest_entries_stay(tmp_path: Path) -> None:
    async with open_audit(tmp_path, CAP) as audit:
        for number in range(2000):
            audit.note(entry(number))
            if number % 50 == 0:
                await audit.read(Sought(limit=1))
        page = await audit.read(Sought(limit=2000))
    files = await asyncio.to_thread(lambda: {path.name: path.stat().st_size for path in tmp_path.iterdir()})
    assert set(files) == {NAME, f"{NAME}.1"}
    assert sum(files.values()) <= CAP
    found = numbers(page.entries)
    assert found == [*range(1999, 1999 - len(found), -1)]
    assert len(found) > 200


async def test_many_at_once_stay_below_the_cap_too(tmp_path: Path) -> None:
    async with open_audit(tmp_path, 1 << 20) as audit:
        for number in range(WAITING):
            audit.note(entry(number, machine="x" * 100))
    assert sum(path.stat().st_size for path in await asyncio.to_thread(lambda: list(tmp_path.iterdir()))) <= 1 << 20


async def test_a_line_that_was_cut_short_costs_no_other(tmp_path: Path) -> None:
    whole = msgspec.json.encode(entry(1))
    (tmp_path / NAME).write_bytes(whole + b"\n" + b"\xff{}\n" + whole[:-20])
    async with open_audit(tmp_path, CAP) as audit:
        audit.note(entry(2))
        assert numbers((await audit.read(Sought())).entries) == [2, 1]


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(st.text(max_size=BLOCK_BYTES // 8), max_size=6))
async def test_whatever_is_in_an_entry_is_found_again(tmp_path: Path, texts: list[str]) -> None:
    (tmp_path / NAME).unlink(missing_ok=True)
    notes = [entry(number, subject=text.encode("utf-8", "replace").decode()) for number, text in enumerate(texts)]
    async with open_audit(tmp_path, 1 << 24) as audit:
        for note in notes:
            audit.note(note)
        assert list((await audit.read(Sought())).entries) == [*reversed(notes)]


@pytest.mark.usefixtures("_failing")
async def test_a_full_disk_is_waited_out_and_what_is_missing_is_counted(tmp_path: Path) -> None:
    async with open_audit(tmp_path, CAP) as audit:
        arm("audit-write:error")
        for number in (1, 2):
            audit.note(entry(number))
        assert (await audit.read(Sought())).entries == ()
        arm("")
        audit.note(entry(3))
        assert (await audit.read(Sought())).entries == (entry(3, lost=2),)
        audit.note(entry(4))
        assert (await audit.read(Sought(limit=1))).entries == (entry(4),)


async def test_more_than_can_wait_is_counted_and_not_kept(tmp_path: Path) -> None:
    async with open_audit(tmp_path, 1 << 24) as audit:
        for number in range(WAITING + 5):  # without a pause in which the thread could take one
            audit.note(entry(number))
        page = await audit.read(Sought(limit=WAITING))
    assert numbers(page.entries) == [*reversed(range(WAITING))]
    assert [found.lost for found in page.entries if found.lost] == [5]
    assert page.entries[-1].lost == 5


async def test_reading_a_log_that_is_not_there_finds_nothing(tmp_path: Path) -> None:
    async with open_audit(tmp_path, CAP) as audit:
        assert (await audit.read(Sought())).entries == ()
        assert isinstance(audit, Audit)
