"""A console's log that came from another host reads like the one it was there, byte by byte and number by number."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qmpd import segments
from qmpd.capture import trim_now
from qmpd.console import Console
from qmpd.errors import HostError, NoSpace
from qmpd.failpoint import CATALOGUE, arm
from qmpd.filewatch import FileWatch, watching
from qmpd.migration.consolelogs import ARRIVING, RUNS_KEPT, ArrivingLog, LogSender, settle_numbering
from qmpd.migration.protocol import ConsoleEnd, console_end
from qmpd.plan import SerialPipe
from tests.unit.serialport import Port

CAP = 1 << 20
PAGE = 4096
PATIENCE_S = 60.0
ROOT = Path(__file__).parents[2]
POINTS = [name for name in CATALOGUE if name.startswith("migration-log-")]


class Place:
    """One host's files of a machine with a serial port, where a QEMU was launched and has the log's newest piece open."""

    def __init__(self, directory: Path, *, cap_bytes: int = CAP) -> None:
        directory.mkdir(exist_ok=True)
        self.port = Port(directory)
        self.port.begin()
        self.cap_bytes = cap_bytes
        self.pipe = SerialPipe(id="serial0", path=self.port.pipe, log=self.port.stem)
        self._open = os.open(f"{self.port.pipe}.out", os.O_WRONLY | os.O_APPEND)

    def prints(self, data: bytes) -> None:
        """The guest prints, over the descriptor that QEMU has had from the start."""
        os.write(self._open, data)

    def close(self) -> None:
        os.close(self._open)

    def arriving(self, end: int | None = None) -> ArrivingLog:
        return ArrivingLog(self.port.stem, self.cap_bytes, end=end)

    def settle(self, tail: ConsoleEnd) -> int:
        return settle_numbering([self.pipe], [tail], self.cap_bytes)[0]


@pytest.fixture
def source(tmp_path: Path) -> Iterator[Place]:
    place = Place(tmp_path / "source")
    yield place
    place.close()


@pytest.fixture
def destination(tmp_path: Path) -> Iterator[Place]:
    place = Place(tmp_path / "destination")
    yield place
    place.close()


@pytest.fixture
async def watch() -> AsyncIterator[FileWatch]:
    with watching() as made:
        yield made


@pytest.fixture(autouse=True)
def disarmed() -> Iterator[None]:
    yield
    arm("")


def runs(stem: str, limit: int = 3000) -> list[tuple[int, bytes]]:
    """All that is kept of a log, with the numbers of the first bytes; what is without a gap is one run."""
    found: list[tuple[int, bytes]] = []
    offset = 0
    while True:
        begin, data = segments.read(stem, offset, limit)
        if not data:
            return found
        if found and begin == offset:
            found[-1] = (found[-1][0], found[-1][1] + data)
        else:
            found.append((begin, data))
        offset = begin + len(data)


def tail_at(end: int, offset: int, data: bytes = b"") -> ConsoleEnd:
    return console_end(0, end, offset, data)


async def test_a_log_is_followed_while_the_guest_prints_and_goes_on_where_it_was(
    source: Place, destination: Place, watch: FileWatch
) -> None:
    here, there = Console(source.port.stem, watch), Console(destination.port.stem, watch)
    arriving = destination.arriving()

    async def send(offset: int, data: bytes) -> None:
        await asyncio.to_thread(arriving.write, offset, data)

    sender = LogSender(0, here, send)
    async with here.connected(source.port.pipe), there.connected(destination.port.pipe):
        source.prints(b"booting\n")
        following = asyncio.create_task(sender.keep_up(), name="logs")
        async with asyncio.timeout(PATIENCE_S):
            while sender.sent < 8:
                await asyncio.sleep(0.01)
        following.cancel()
        await asyncio.wait([following])
        source.prints(b"0123456789")
        tail = await sender.tail(4)
        assert tail == tail_at(18, 8, b"0123")
        received = await asyncio.to_thread(destination.settle, tail)
        await there.moved(destination.port.pipe)
        assert there.piece == str(segments.named(destination.port.stem, 18))
        destination.prints(b"and on\n")
        arriving = destination.arriving(end=18)
        await sender.finish(received, tail.end)
        assert await there.read(14, 100) == (14, b"456789"[2:])
        async with asyncio.timeout(PATIENCE_S):
            while there.end < 25:
                await asyncio.sleep(0.01)
    assert runs(destination.port.stem) == [(0, b"booting\n0123456789and on\n")]
    assert there.last_line() == "and on"


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_whatever_was_written_and_dropped_it_reads_the_same(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    directory = tmp_path_factory.mktemp("logs")
    chance = random.Random(data.draw(st.integers(0, 2**32)))
    source = Port(directory / "s")
    (directory / "s").mkdir()
    for _ in range(data.draw(st.integers(0, 4))):
        source.begin()
        Path(f"{source.pipe}.in").unlink()
        source.prints(chance.randbytes(data.draw(st.sampled_from([0, 1, 100, PAGE, 3 * PAGE + 17, 10 * PAGE]))))
        keep = data.draw(st.sampled_from([None, PAGE, 2 * PAGE]))
        if keep is not None:
            trim_now(os.path.realpath(f"{source.pipe}.out"), keep)
    wanted, (end, _) = runs(source.stem), segments.size_and_tail(source.stem, 0)
    place = Place(directory / "d")
    offset = 0
    while True:
        begin, piece = segments.read(source.stem, offset, data.draw(st.integers(1, 5 * PAGE)))
        if not piece or data.draw(st.integers(0, 9)) == 0:
            break
        assert begin + len(piece) <= place.arriving().write(begin, piece) == place.arriving().received()
        again = data.draw(st.integers(0, 3)) == 0  # the answer was lost, and the source asks what it was
        offset = begin + len(piece) if not again else data.draw(st.integers(begin, begin + len(piece)))
    begin, piece = segments.read(source.stem, place.arriving().received(), data.draw(st.integers(1, PAGE)))
    received = place.settle(tail_at(end, begin, piece))
    while True:
        begin, piece = segments.read(source.stem, received, data.draw(st.integers(1, 5 * PAGE)))
        if not piece:
            break
        received = place.arriving(end).write(begin, piece)
    assert runs(place.port.stem) == wanted
    place.prints(b"more")
    expected = [*wanted[:-1], (wanted[-1][0], wanted[-1][1] + b"more")] if wanted else [(end, b"more")]
    assert runs(place.port.stem) == expected
    place.arriving(end).secure()
    place.close()


def test_a_smaller_cap_drops_the_oldest_bytes_and_no_number_changes(tmp_path: Path) -> None:
    place = Place(tmp_path / "d", cap_bytes=8 * PAGE)
    data = os.urandom(50 * PAGE + 123)
    for offset in range(0, len(data), 3000):
        place.arriving().write(offset, data[offset : offset + 3000])
        disk = sum(path.stat().st_blocks * 512 for _, path in segments.pieces(place.port.stem, ARRIVING))
        assert disk <= 9 * PAGE
    place.settle(tail_at(len(data), len(data)))
    ((begin, kept),) = runs(place.port.stem)
    assert data.endswith(kept)
    assert begin + len(kept) == len(data)
    assert 8 * PAGE <= len(kept) <= 9 * PAGE
    place.close()


def test_a_source_of_crumbs_does_not_fill_the_directory(destination: Place) -> None:
    for number in range(3 * RUNS_KEPT):
        destination.arriving().write(number * 10, b"x")
    assert len(segments.pieces(destination.port.stem, ARRIVING)) == RUNS_KEPT
    assert destination.arriving().received() == (3 * RUNS_KEPT - 1) * 10 + 1


def test_bytes_behind_the_end_are_the_new_qemus(destination: Place) -> None:
    destination.arriving().write(0, b"0123456789")
    destination.arriving().write(20, b"nonsense")
    destination.settle(tail_at(8, 10, b"late"))
    destination.prints(b"ab")
    assert destination.arriving(end=8).write(6, b"6789") == 8
    assert runs(destination.port.stem) == [(0, b"01234567ab")]


def test_a_log_of_a_machine_at_rest_gets_its_place_without_a_qemu(tmp_path: Path) -> None:
    log = ArrivingLog(str(tmp_path / "serial0.log"), CAP)
    log.write(100, b"old")
    log.write(200, b"new")
    assert segments.pieces(str(tmp_path / "serial0.log")) == []
    log.place(203)
    log.place(203)
    assert runs(str(tmp_path / "serial0.log")) == [(100, b"old"), (200, b"new")]
    assert segments.begin(str(tmp_path / "serial0.log"), CAP).name.endswith("203")


def test_a_port_that_is_not_kept_here_and_a_log_that_is_empty_are_no_trouble(destination: Place, caplog: pytest.LogCaptureFixture) -> None:
    tails = [tail_at(0, 0), msgspec.structs.replace(tail_at(5, 0, b"hello"), port=3)]
    assert settle_numbering([destination.pipe], tails, CAP) == {0: 0}
    assert "not kept here" in caplog.text
    destination.prints(b"first")
    assert runs(destination.port.stem) == [(0, b"first")]


def test_bytes_that_the_new_qemu_wrote_too_early_come_after_the_old_ones(destination: Place) -> None:
    destination.prints(b"y")
    destination.arriving().write(0, b"old x")
    destination.settle(tail_at(5, 5))
    assert runs(destination.port.stem) == [(0, b"old xy")]


def test_a_piece_that_is_gone_or_in_the_way_is_named(destination: Place) -> None:
    own = Path(f"{destination.port.pipe}.out").readlink()
    blocking = segments.named(destination.port.stem, 7)
    blocking.touch()
    with pytest.raises(HostError, match=f"another piece in its place.*{blocking.name}"):
        destination.settle(tail_at(7, 7))
    own.unlink()
    with pytest.raises(HostError, match=f"is gone.*{own.name}"):
        destination.settle(tail_at(8, 8))
    Path(f"{destination.port.pipe}.out").unlink()
    with pytest.raises(HostError, match=r"serial0\.out"):
        destination.settle(tail_at(8, 8))


def test_a_full_disk_loses_nothing_that_is_sent_again(destination: Place) -> None:
    arm("migration-log-write:error@2")
    destination.arriving().write(0, b"abc")
    with pytest.raises(NoSpace, match="No space left"):
        destination.arriving().write(3, b"def")
    assert destination.arriving().received() == 3
    assert destination.arriving().write(3, b"def") == 6
    arm("migration-log-write:error")
    assert destination.settle(tail_at(9, 6, b"ghi")) == 6
    arm("")
    assert destination.arriving(end=9).write(6, b"ghi") == 9
    assert runs(destination.port.stem) == [(0, b"abcdefghi")]


SETTLING = """
import sys
import msgspec
from qmpd.failpoint import arm
from qmpd.migration.consolelogs import settle_numbering
from qmpd.migration.protocol import ConsoleEnd
from qmpd.plan import SerialPipe
arm(sys.argv[1])
pipe = SerialPipe(id="serial0", path=sys.argv[2], log=sys.argv[3])
print(settle_numbering([pipe], [msgspec.json.decode(sys.argv[4], type=ConsoleEnd)], 1 << 20))
"""


def settled_elsewhere(place: Place, tail: ConsoleEnd, armed: str) -> int:
    """What becomes of a process that numbers the log."""
    words = [armed, place.port.pipe, place.port.stem, msgspec.json.encode(tail).decode()]
    return subprocess.run([sys.executable, "-c", SETTLING, *words], cwd=ROOT, timeout=PATIENCE_S).returncode


@pytest.mark.parametrize("kept", [True, False], ids=["from zero", "without its beginning"])
@pytest.mark.parametrize("case", [f"{name}:kill@{number}" for name in POINTS for number in (1, 2)])
def test_killed_at_any_point_and_called_again_it_ends_in_the_same_state(destination: Place, case: str, kept: bool) -> None:
    start = 0 if kept else 1000
    destination.arriving().write(start, b"first,")
    destination.arriving().write(5000, b"second,")
    tail = tail_at(5012, 5007, b"third")
    killed = settled_elsewhere(destination, tail, case)
    assert killed == (0 if case.endswith(("write:kill@2", "renumber:kill@2", "relink:kill@2")) else -signal.SIGKILL)
    for _ in range(2):
        assert settled_elsewhere(destination, tail, "") == 0
        assert runs(destination.port.stem) == [(start, b"first,"), (5000, b"second,third")]
        assert Path(f"{destination.port.pipe}.out").readlink() == segments.named(destination.port.stem, 5012)
    destination.prints(b" and on")
    assert settled_elsewhere(destination, tail, "") == 0
    assert runs(destination.port.stem) == [(start, b"first,"), (5000, b"second,third and on")]
    assert not list(Path(destination.port.stem).parent.glob("*.new"))
