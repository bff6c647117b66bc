"""What a qmpd of today leaves on the disk, kept for its successors: `python -m tests.stored` writes it to tests/data.

To be run when the schema of the database, the format of the launch record or of the last exit has got a new version, with the code
that has it. What is there of older versions stays as it is: nobody can make it again.
"""

from __future__ import annotations

import asyncio
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import msgspec

from qmpd.database import open_database
from qmpd.endings import keep
from qmpd.journal import open_journal
from qmpd.process import Identity
from qmpd.record import FORMAT, Definition, LaunchRecord, write_record
from qmpd.spec import MachineSpec
from qmpd.sqlite import open_store
from qmpd.statefile import APPLICATION_ID, DATABASE_NAME, MIGRATIONS
from qmpd.views import ExitView, Progress
from tests.unit.toy_definitions import GOOD_ONES

DATA: Final = Path(__file__).parent / "data"
#: Kept answers live for a day: theirs must still be one when this is read.
LATER: Final = datetime(2200, 1, 1, tzinfo=UTC)
Document = dict[str, object]


def definitions() -> Iterator[Definition]:
    """Definitions with everything in them that one can have."""
    for number, (fields, _) in enumerate(GOOD_ONES.values()):
        uuid = f"00000000-0000-4000-8000-{number:012}"
        spec = msgspec.convert({"name": f"machine-{number}", "board": "toy", "uuid": uuid, **fields}, MachineSpec)
        yield Definition(spec=spec, uuid=uuid, created_at="2026-01-02T03:04:05.678Z", changed_at="2026-02-03T04:05:06.789Z")


def a_record(definition: Definition) -> LaunchRecord:
    """The record of a process that never was."""
    return LaunchRecord(
        identity=Identity(boot_id="00000000-0000-4000-8000-000000000000", pid=4_000_000, start_time=1),
        definition=definition,
        argv=("/usr/bin/qemu-system-toy", "-S"),
        sockets={"qmp": "/run/qmpd/m/machine-1/qmp.sock"},
        pipes={"serial0": "/run/qmpd/m/machine-1/serial0"},
        accel="tcg",
        accel_reason="asked for",
        emulator="/usr/bin/qemu-system-toy",
        emulator_version="7.2.0",
        machine="toyboard-7.2",
        started_at="2026-01-02T03:04:05.678Z",
        run_dir="/run/qmpd/m/machine-1",
        paused=True,
    )


def an_exit() -> ExitView:
    """How a process ended that never was."""
    return ExitView(code=1, signal=None, reason="guest-panic", clean=False, at="2026-01-02T03:04:05.678Z", stderr_tail="it panicked\n")


def restored(dump: Path, directory: Path) -> Path:
    """The database of a dump, as the qmpd that made it left it."""
    path = directory / DATABASE_NAME
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(dump.read_text(encoding="utf-8"))
        connection.execute("PRAGMA journal_mode=WAL")
    path.chmod(0o600)
    return path


async def _fill(state_dir: Path) -> Document:
    """Writes everything a database holds; what was written."""
    events, jobs = [], []
    async with open_database(state_dir) as database, open_store(database) as store, open_journal(database, now=lambda: LATER) as journal:
        for definition in definitions():
            await store.commit({}, {f"machine/{definition.spec.name}": msgspec.msgpack.encode(definition)})
        events = [
            await journal.append("machine.created", "machine-1", {"board": "toy", "revision": 2}),
            await journal.append("machine.state", "machine-1", {"state": "running", "previous": "starting", "status": "running"}),
            await journal.append("qmp", "machine-1", {"event": "RESET", "data": {"guest": True}, "count": 1260}),
            await journal.append("events-lost", None, {"count": 3}),
        ]
        done = await journal.create_job("shutdown", "machine-1")
        await journal.update_job(done.id, Progress(phase="waiting", done=1, total=2))
        jobs.append(await journal.finish_job(done.id, "succeeded", result={"method": "acpi", "clean": True}))
        failed = await journal.create_job("shutdown", "machine-2")
        jobs.append(await journal.finish_job(failed.id, "failed", error={"code": "not_yet", "message": "no", "details": {}}))
        jobs.append(await journal.create_job("shutdown", "machine-3"))
        await journal.remember("0:a key", "fingerprint", b"\x00an answer")
    return {
        "definitions": {definition.spec.name: msgspec.to_builtins(definition) for definition in definitions()},
        "events": msgspec.to_builtins(events),
        "jobs": msgspec.to_builtins(jobs),
        "answer": {"key": "0:a key", "fingerprint": "fingerprint", "response": b"\x00an answer".hex()},
    }


def write(directory: Path = DATA) -> None:
    """Writes all three; what is there of this version is replaced."""
    directory.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        content = asyncio.run(_fill(Path(place) / "state"))
        with closing(sqlite3.connect(Path(place) / "state" / DATABASE_NAME)) as connection:
            header = (f"PRAGMA application_id={APPLICATION_ID};", f"PRAGMA user_version={len(MIGRATIONS)};")
            dump = "\n".join((*header, *connection.iterdump())) + "\n"
        (directory / f"database-{len(MIGRATIONS)}.sql").write_bytes(dump.encode())
        (directory / f"database-{len(MIGRATIONS)}.json").write_bytes(msgspec.json.format(msgspec.json.encode(content)) + b"\n")
        record = a_record(list(definitions())[1])
        write_record(place, record)
        keep(place, an_exit())
        for name, value, number in (("launch", record, FORMAT), ("last-exit", an_exit(), 1)):
            (directory / f"{name}-{number}.msgpack").write_bytes((Path(place) / f"{name}.msgpack").read_bytes())
            (directory / f"{name}-{number}.json").write_bytes(msgspec.json.format(msgspec.json.encode(value)) + b"\n")


if __name__ == "__main__":
    write()
