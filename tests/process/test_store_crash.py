"""What was acknowledged survives `kill -9`, and a full disk changes nothing."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from qmpd.bus import EVENTS_LOST, open_bus
from qmpd.database import open_database
from qmpd.errors import NoSpace
from qmpd.journal import MAX_PAGE, open_journal
from qmpd.sqlite import open_store
from qmpd.views import Event
from tests.unavailable import need_root

PATIENCE_S = 60

#: Commits and publishes on several lanes at once, and says what was acknowledged.
WRITER = """
    import asyncio, itertools, os, sys
    from pathlib import Path
    from qmpd.bus import open_bus
    from qmpd.database import open_database
    from qmpd.journal import open_journal
    from qmpd.sqlite import open_store

    state_dir, life = Path(sys.argv[1]), sys.argv[2]

    def say(*words):
        os.write(1, (" ".join(map(str, words)) + "\\n").encode())

    async def commit(store, key):
        record = (await store.read(key)).records.get(key)
        revision = record.revision if record else 0
        for n in itertools.count():
            revision = await store.commit({key: revision}, {key: f"{life}.{n}".encode()})
            say("commit", key, revision, f"{life}.{n}")

    async def publish(bus, lane):
        for n in itertools.count():
            event = await bus.publish("tick", None, {"token": f"{life}.{lane}.{n}"})
            say("event", event.number, event.data["token"])

    async def main():
        async with (open_database(state_dir) as database, open_store(database) as store,
                    open_journal(database) as journal, open_bus(journal) as bus):
            say("job", (await journal.create_job("endless")).id)
            lanes = [commit(store, f"own/{n}") for n in range(4)] + [publish(bus, n) for n in range(4)]
            await asyncio.gather(*lanes)

    asyncio.run(main())
"""

#: First starts, each ended by a signal that nothing handles, a little later every time.
BEGINNER = """
    import asyncio, os, signal, sys
    from pathlib import Path
    from qmpd.bus import open_bus
    from qmpd.database import open_database
    from qmpd.journal import open_journal

    async def begin(state_dir):
        async with open_database(state_dir) as database, open_journal(database) as journal, open_bus(journal) as bus:
            while True:
                await bus.publish("tick")

    for life in range(60):
        if not (child := os.fork()):
            signal.setitimer(signal.ITIMER_REAL, 0.0005 * 1.1**life)
            asyncio.run(begin(Path(sys.argv[1]) / f"{life:03}"))
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGALRM
"""


@dataclass
class Acknowledged:
    """What the killed processes said was done."""

    commits: dict[str, tuple[int, str]] = field(default_factory=dict)
    events: dict[int, str] = field(default_factory=dict)
    jobs: list[str] = field(default_factory=list)

    def note(self, line: str) -> None:
        what, *words = line.split()
        if what == "commit":
            self.commits[words[0]] = (int(words[1]), words[2])
        elif what == "event":
            assert int(words[0]) not in self.events, f"event {words[0]} was acknowledged twice"
            self.events[int(words[0])] = words[1]
        else:
            self.jobs.append(words[0])


def write_until_killed(state_dir: Path, life: int, lines: int, acknowledged: Acknowledged) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(WRITER), str(state_dir), str(life)], stdout=subprocess.PIPE, text=True
    ) as writer:
        assert writer.stdout is not None
        for _ in range(lines):
            line = writer.stdout.readline()
            assert line, "the writer ended by itself"
            acknowledged.note(line)
        writer.send_signal(signal.SIGKILL)
        for line in writer.stdout:
            if line.endswith("\n"):
                acknowledged.note(line)
    assert writer.returncode == -signal.SIGKILL


def begin_and_be_killed(directory: Path) -> list[Path]:
    subprocess.run([sys.executable, "-c", textwrap.dedent(BEGINNER), str(directory)], check=True, timeout=PATIENCE_S)
    return sorted(directory.iterdir())


async def all_events(state_dir: Path) -> list[Event]:
    events: list[Event] = []
    async with open_database(state_dir) as database, open_journal(database) as journal:
        while page := (await journal.page(events[-1].number if events else 0, MAX_PAGE)).events:
            events.extend(page)
    return events


async def test_what_was_acknowledged_is_there_after_kill_9_and_no_number_is_given_twice(tmp_path: Path) -> None:
    acknowledged, chance = Acknowledged(), random.Random(7)
    for life in range(6):
        await asyncio.to_thread(write_until_killed, tmp_path, life, chance.randint(1, 250), acknowledged)
        async with open_database(tmp_path) as database, open_store(database) as store, open_journal(database) as journal:
            records = (await store.read("own/")).records
            for key, (revision, value) in acknowledged.commits.items():
                found = records[key]
                # The commit after the acknowledged one may have been under way.
                assert (found.revision, found.value.decode()) == (revision, value) or found.revision > revision
            assert {job.state for job in await journal.jobs()} == {"interrupted"}
            assert {job.id for job in await journal.jobs()} >= set(acknowledged.jobs)
        events = await all_events(tmp_path)
        assert [event.number for event in events] == list(range(1, len(events) + 1))
        tokens = {event.number: event.data["token"] for event in events}
        assert {number: tokens[number] for number in acknowledged.events} == acknowledged.events
        assert len(set(tokens.values())) == len(tokens)


async def test_a_daemon_killed_at_any_moment_of_its_first_start_does_not_spoil_the_next(tmp_path: Path) -> None:
    for state_dir in await asyncio.to_thread(begin_and_be_killed, tmp_path):
        async with open_database(state_dir) as database, open_journal(database) as journal:
            recorded = [event.number for event in (await journal.page(0)).events]
            assert recorded == list(range(1, len(recorded) + 1))
            assert (await journal.append("tick", None, {})).number == len(recorded) + 1


class SmallDisk:
    """A file system of its own, a few hundred KiB large."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.state_dir = path / "state"

    def resize(self, size: str) -> None:
        subprocess.run(["mount", "-o", f"remount,size={size}", str(self.path)], check=True, timeout=PATIENCE_S)

    def fill(self) -> None:
        with (self.path / "ballast").open("ab", buffering=0) as ballast:
            for piece in (65536, 4096):
                try:
                    while True:
                        ballast.write(bytes(piece))
                except OSError:
                    continue

    def free(self) -> None:
        (self.path / "ballast").unlink()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    need_root("mount a small file system")
    path = tmp_path / "disk"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(path)], check=True, timeout=PATIENCE_S)
    try:
        yield SmallDisk(path)
    finally:
        subprocess.run(["umount", str(path)], check=True, timeout=PATIENCE_S)


async def test_a_full_disk_leaves_the_old_records_and_everything_works_again_with_space(disk: SmallDisk) -> None:
    written: dict[str, bytes] = {}
    async with open_database(disk.state_dir) as database, open_store(database) as store:
        revision = await store.commit({}, {"spec/first": b"definition"})
        for n in itertools.count():
            value = os.urandom(20_000)
            try:
                await store.commit({}, {f"spec/{n}": value})
            except NoSpace:
                break
            written[f"spec/{n}"] = value
        assert len(written) > 3
        expected = {"spec/first": b"definition", **written}
        assert {key: record.value for key, record in (await store.read("")).records.items()} == expected
        with pytest.raises(NoSpace):
            await store.commit({"spec/first": revision}, {"spec/first": os.urandom(50_000)})
        assert {key: record.value for key, record in (await store.read("")).records.items()} == expected
        await asyncio.to_thread(disk.resize, "4m")
        await store.commit({"spec/first": revision}, {"spec/first": b"new"})
    async with open_database(disk.state_dir) as database, open_store(database) as store:
        expected["spec/first"] = b"new"
        assert {key: record.value for key, record in (await store.read("")).records.items()} == expected


async def test_a_small_write_survives_beside_one_that_does_not_fit(disk: SmallDisk) -> None:
    async with open_database(disk.state_dir) as database, open_store(database) as store:
        await store.commit({}, {"a": b""})
        outcomes = await asyncio.gather(
            store.commit({}, {"before": b"small"}),
            store.commit({}, {"big": bytes(1_000_000)}),
            store.commit({}, {"after": b"small"}),
            return_exceptions=True,
        )
        assert isinstance(outcomes[1], NoSpace)
        assert list((await store.read("")).records) == ["a", "after", "before"]


async def test_a_daemon_comes_up_on_a_full_disk_and_shows_what_is_so(disk: SmallDisk) -> None:
    async with open_database(disk.state_dir) as database, open_store(database) as store, open_journal(database) as journal:
        await store.commit({}, {"spec/a": b"definition"})
        job = await journal.create_job("migration", "a")
    await asyncio.to_thread(disk.fill)
    async with open_database(disk.state_dir) as database, open_store(database) as store, open_journal(database) as journal:
        assert (await store.read("")).records["spec/a"].value == b"definition"
        assert (await journal.job(job.id)).state == "interrupted"
        assert [listed.state for listed in await journal.jobs()] == ["interrupted"]
        with pytest.raises(NoSpace):
            await store.commit({}, {"spec/b": b"definition"})
        with pytest.raises(NoSpace):
            await journal.create_job("migration", "a")
        assert len(await journal.jobs()) == 1


async def test_events_that_found_no_space_are_said_to_be_lost_and_leave_no_hole(disk: SmallDisk) -> None:
    async with open_database(disk.state_dir) as database, open_journal(database) as journal, open_bus(journal) as bus:
        await bus.publish("tick")
        await asyncio.to_thread(disk.fill)
        async with bus.subscribe(since=0) as stream:
            filler = {"text": "x" * 50_000}
            refused = 0
            for _ in range(20):
                try:
                    await bus.publish("tick", None, filler)
                except NoSpace:
                    refused += 1
            assert refused > 1
            await asyncio.to_thread(disk.free)
            newest = await bus.publish("tock")
            async with asyncio.timeout(PATIENCE_S):
                events = [await anext(stream) for _ in range(newest.number)]
    assert [event.number for event in events] == list(range(1, newest.number + 1))
    assert [event.data for event in events if event.kind == EVENTS_LOST] == [{"count": refused}]


async def test_a_first_start_on_a_full_disk_says_so_and_works_with_space(disk: SmallDisk) -> None:
    disk.state_dir.mkdir(mode=0o700)
    await asyncio.to_thread(disk.fill)
    with pytest.raises(NoSpace):
        async with open_database(disk.state_dir):
            raise AssertionError("a database without space")
    disk.free()
    async with open_database(disk.state_dir) as database, open_store(database) as store:
        assert (await store.read("")).revision == 0
