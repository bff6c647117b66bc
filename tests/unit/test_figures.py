"""Figures of machines: what the kernel and QEMU say, and what is counted of machines' fates."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from qmpd.process import Identity
from qmpd.procfigures import figures_of
from qmpd.sampling import BOUNDS_S, DISKS_LIMIT, DiskFigures, RoundTrips, disks_of
from qmpd.tally import Tally

#: As proc(5) has it: utime, stime, start time and resident pages are fields 14, 15, 22 and 24.
STAT = "7 (a) b) c) S 1 7 7 0 -1 0 0 0 0 0 {ticks} 50 0 0 20 0 3 0 4711 90000 25 0 0"


def process(proc: Path, pid: int, *, ticks: int = 150, io: str | None = "rchar: 1\nread_bytes: 4096\nwrite_bytes: 8192\n") -> Identity:
    directory = proc / str(pid)
    directory.mkdir()
    (directory / "stat").write_text(STAT.format(ticks=ticks))
    if io is not None:
        (directory / "io").write_text(io)
    return Identity(boot_id="b", pid=pid, start_time=4711)


def test_a_process_figures_are_read_whatever_it_is_called(tmp_path: Path) -> None:
    (found,) = figures_of({"one": process(tmp_path, 7)}, tmp_path).values()
    assert found.cpu_seconds == 200 / os.sysconf("SC_CLK_TCK")
    assert found.resident_bytes == 25 * os.sysconf("SC_PAGE_SIZE")
    assert (found.read_bytes, found.written_bytes) == (4096, 8192)


def test_a_process_that_is_gone_or_another_one_has_no_figures(tmp_path: Path) -> None:
    other = Identity(boot_id="b", pid=process(tmp_path, 7).pid, start_time=4712)
    gone = Identity(boot_id="b", pid=8, start_time=4711)
    assert figures_of({"other": other, "gone": gone}, tmp_path) == {}


def test_where_the_kernel_does_not_tell_there_is_no_figure_of_storage(tmp_path: Path) -> None:
    found = figures_of({"one": process(tmp_path, 7, io=None)}, tmp_path)["one"]
    assert (found.read_bytes, found.written_bytes) == (None, None)


STATS = {"rd_bytes": 1, "wr_bytes": 2, "rd_operations": 3, "wr_operations": 4, "flush_operations": 5, "failed_rd_operations": 6}


def test_drives_are_called_as_in_the_definition() -> None:
    answer = [
        {"qdev": "/machine/peripheral/disk0/virtio-backend", "stats": STATS},
        {"qdev": "/machine/peripheral/disk1", "stats": {}},
        {"device": "floppy0", "qdev": "/machine/unattached/device[21]", "stats": {}},
        {"device": "pflash0", "stats": {}},
        {"device": "", "node-name": "node", "stats": {}},
    ]
    found = disks_of(answer)
    assert list(found) == ["disk0", "disk1", "/machine/unattached/device[21]", "pflash0", "node"]
    assert found["disk0"] == DiskFigures(read_bytes=1, written_bytes=2, reads=3, writes=4, flushes=5, failures=6)


@pytest.mark.parametrize("answer", [None, {}, [None], [{}], [{"device": "a"}], [{"device": "a", "stats": []}], [{"stats": {}}]], ids=repr)
def test_an_answer_that_is_not_qemus_has_no_drives(answer: object) -> None:
    assert disks_of(answer) == {}


def test_a_figure_that_is_no_number_is_none() -> None:
    assert disks_of([{"device": "a", "stats": {"rd_bytes": "many"}}]) == {"a": DiskFigures()}


def test_no_machine_has_more_drives_than_anybody_watches() -> None:
    assert len(disks_of([{"device": str(number), "stats": {}} for number in range(2 * DISKS_LIMIT)])) == DISKS_LIMIT


def test_a_round_trip_is_counted_where_it_belongs() -> None:
    trips = RoundTrips()
    for seconds in (0.0005, BOUNDS_S[0], 0.3, 100.0):
        trips.add(seconds)
    assert trips.counts[0] == 2
    assert trips.counts[BOUNDS_S.index(0.5)] == 1
    assert trips.counts[-1] == 1
    assert sum(trips.counts) == 4


async def test_fates_are_counted_and_forgotten_with_the_machine() -> None:
    tally = Tally()
    published: list[str] = []

    def publish(kind: str, machine: str, _data: Mapping[str, object]) -> None:
        published.append(f"{kind} {machine}")

    async def start(name: str) -> bool:
        return name == "one"

    seen, again = tally.counting(publish), tally.restarting(start)
    for state in ("running", "crashed", "starting", "crashed"):
        seen("machine.state", "one", {"state": state})
    assert [await again(name) for name in ("one", "two")] == [True, False]
    assert (tally.crashes["one"], tally.restarts["one"], tally.restarts["two"]) == (2, 1, 0)
    seen("machine.deleted", "one", {})
    assert (tally.crashes["one"], tally.restarts["one"]) == (0, 0)
    assert len(published) == 5
