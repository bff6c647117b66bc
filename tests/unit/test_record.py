"""The launch record: durable or not there, and never misread."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from qmpd.process import Identity
from qmpd.record import (
    BEGUN_NAME,
    FORMAT,
    RECORD_LIMIT,
    RECORD_NAME,
    Definition,
    LaunchRecord,
    has_begun,
    mark_begun,
    read_record,
    remove_record,
    write_record,
)
from qmpd.spec import MachineSpec
from tests.process.emulator import names

ROOT = Path(__file__).parents[2]


def record(run_dir: Path, **changes: object) -> LaunchRecord:
    """A record of a process that never was."""
    made = LaunchRecord(
        identity=Identity(boot_id="boot", pid=4_000_000, start_time=1),
        definition=Definition(spec=MachineSpec(name="one", board="toy"), uuid="u", created_at="then", changed_at="now"),
        argv=("/usr/bin/qemu-system-toy", "-S"),
        sockets={"qmp": "/run/m/qmp.sock"},
        pipes={"serial0": "/run/m/serial0"},
        accel="tcg",
        accel_reason="asked for",
        emulator="/usr/bin/qemu-system-toy",
        emulator_version="7.2.0",
        machine="toyboard",
        started_at="now",
        run_dir=str(run_dir),
    )
    return msgspec.structs.replace(made, **changes)


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    for one in (record(tmp_path), record(tmp_path, machine="another", paused=True)):
        write_record(str(tmp_path), one)
        assert read_record(str(tmp_path)) == one
    assert names(tmp_path) == {RECORD_NAME}
    assert (tmp_path / RECORD_NAME).stat().st_mode & 0o777 == 0o600


def test_a_record_that_is_not_there_is_not_there(tmp_path: Path) -> None:
    for directory in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(FileNotFoundError):
            read_record(str(directory))
        remove_record(str(directory))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is damaged"),
        (b"\xc1", "is damaged"),
        (b"\x91" * 100_000, "is damaged"),
        (msgspec.msgpack.encode({"format": FORMAT}), "is damaged"),
        (b"\0" * (RECORD_LIMIT + 1), "is larger than any launch record"),
    ],
)
def test_what_is_no_record_is_damaged(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / RECORD_NAME).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        read_record(str(tmp_path))


def test_a_record_that_was_cut_off_anywhere_is_damaged(tmp_path: Path) -> None:
    whole = msgspec.msgpack.encode(record(tmp_path))
    for length in range(0, len(whole), 7):
        (tmp_path / RECORD_NAME).write_bytes(whole[:length])
        with pytest.raises(ValueError, match="is damaged"):
            read_record(str(tmp_path))


def test_a_record_of_a_later_daemon_is_left_to_it(tmp_path: Path) -> None:
    write_record(str(tmp_path), record(tmp_path, format=FORMAT + 1))
    with pytest.raises(ValueError, match=f"has format {FORMAT + 1}, this daemon knows {FORMAT}"):
        read_record(str(tmp_path))


def test_a_disk_that_takes_half_a_record_takes_none(tmp_path: Path) -> None:
    before = record(tmp_path)
    write_record(str(tmp_path), before)
    (tmp_path / "next.msgpack").write_bytes(msgspec.msgpack.encode(record(tmp_path, argv=("x" * 4000,))))
    code = (
        "import resource, sys, msgspec\n"
        "from pathlib import Path\n"
        "from qmpd.record import LaunchRecord, write_record\n"
        "record = msgspec.msgpack.decode(Path(sys.argv[1], 'next.msgpack').read_bytes(), type=LaunchRecord)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "write_record(sys.argv[1], record)\n"
    )
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    environ.pop("COVERAGE_PROCESS_CONFIG", None)
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=environ, capture_output=True, text=True)
    assert "File too large" in done.stderr
    assert read_record(str(tmp_path)) == before
    assert names(tmp_path) == {RECORD_NAME, "next.msgpack"}


def test_that_a_guest_was_set_going_is_remembered_with_its_record(tmp_path: Path) -> None:
    write_record(str(tmp_path), record(tmp_path))
    assert not has_begun(str(tmp_path))
    mark_begun(str(tmp_path))
    assert has_begun(str(tmp_path))
    remove_record(str(tmp_path))
    assert names(tmp_path) == set()


def test_a_record_that_cannot_be_removed_is_no_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / RECORD_NAME / "deep").mkdir(parents=True)
    mark_begun(str(tmp_path))
    remove_record(str(tmp_path))
    assert "launch record was not removed" in caplog.text
    assert not (tmp_path / BEGUN_NAME).exists()
