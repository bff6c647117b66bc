"""Files on their way: what fits is taken piece by piece, what does not is refused, and nobody can name a path."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from qmpd.errors import AlreadyExists, HostError, Invalid, NoSpace, WrongState
from qmpd.facts import MachinePaths
from qmpd.failpoint import CATALOGUE, arm
from qmpd.migration.arrivingfiles import ArrivingFile, ArrivingVariables
from qmpd.migration.extents import BLOCK, Opened, allocated, blocks, fingerprint
from qmpd.migration.items import check_parcels, targets
from qmpd.migration.parcels import Parcel
from qmpd.spec import BlankDisk, ImageDisk, MachineSpec, PflashFirmware

ROOT = Path(__file__).parents[2]
PATIENCE_S = 60.0
PATHS = MachinePaths(run="/run/m", state="/var/m")
SPEC = MachineSpec(
    name="one",
    board="x86_64-q35",
    firmware=PflashFirmware(code="/c", vars="/v"),
    disks=(BlankDisk(size_mib=2, format="raw"), BlankDisk(size_mib=2), ImageDisk(path="/srv/there.img", format="raw")),
)
POINTS = [name for name in CATALOGUE if name.startswith("migration-file-")]


@pytest.fixture(autouse=True)
def disarmed() -> Iterator[None]:
    yield
    arm("")


def test_items_are_where_this_host_has_them() -> None:
    found = targets(SPEC, PATHS, (0, 2))
    assert {item: target.path for item, target in found.items()} == {
        "disk-0": "/var/m/disk0.raw",
        "disk-1": "/var/m/disk1.qcow2",
        "disk-2": "/srv/there.img",
        "vars": "/var/m/firmware-vars.fd",
        "log-0": "/var/m/serial0.log",
        "log-2": "/var/m/serial2.log",
        "stderr": "/var/m/stderr.log",
        "exit": "/var/m/last-exit.msgpack",
    }
    assert [item for item, target in found.items() if not target.own] == ["disk-2"]
    assert set(targets(MachineSpec(name="one", board="x"), PATHS)) == {"stderr", "exit"}


def test_everything_wrong_with_an_announcement_is_said_at_once() -> None:
    known = targets(SPEC, PATHS, (0,))
    check_parcels([Parcel(item="disk-0", size=2 << 20), Parcel(item="disk-2", size=7), Parcel(item="log-0", size=2**40)], known)
    wrong = [
        Parcel(item="disk-3", size=1),
        Parcel(item="log-1", size=1),
        Parcel(item="disk-0", size=1 << 20),
        Parcel(item="vars", size=2**30),
        Parcel(item="vars", size=10, allocated=2**30),
        Parcel(item="exit", size=2**21),
    ]
    with pytest.raises(Invalid) as caught:
        check_parcels(wrong, known)
    assert [problem.path for problem in caught.value.problems] == [
        "$.parcels[0].item",
        "$.parcels[1].item",
        "$.parcels[2].size",
        "$.parcels[3].size",
        "$.parcels[4].item",
        "$.parcels[4].allocated",
        "$.parcels[5].size",
    ]


def holed(path: Path, seed: int) -> bytes:
    """A file with holes, zeros that are no holes, and an end that is no whole block."""
    chance = random.Random(seed)
    size = 12 * BLOCK + 12345
    with path.open("wb") as file:
        file.truncate(size)
        for block in (0, 3, 4, 9, 12):
            file.seek(block * BLOCK + chance.randrange(1000))
            file.write(chance.randbytes(5000))
        file.seek(6 * BLOCK)
        file.write(bytes(BLOCK))
    return path.read_bytes()


def test_a_file_is_read_without_its_holes_and_zeros_from_anywhere(tmp_path: Path) -> None:
    data = holed(tmp_path / "disk", 1)
    with Opened(str(tmp_path / "disk")) as file:
        found = list(blocks(file.descriptor, 0))
        assert [offset // BLOCK for offset, _ in found] == [0, 3, 4, 9, 12]
        assert all(data[offset : offset + len(piece)] == piece for offset, piece in found)
        rest = list(blocks(file.descriptor, 3 * BLOCK + 600))
        assert [offset for offset, _ in rest] == [3 * BLOCK + 600, 4 * BLOCK, 9 * BLOCK, 12 * BLOCK]
        assert list(blocks(file.descriptor, len(data))) == []


async def test_a_digest_knows_no_holes_but_every_byte_and_the_length(tmp_path: Path) -> None:
    data = holed(tmp_path / "holes", 2)
    (tmp_path / "plain").write_bytes(data)
    assert allocated(str(tmp_path / "holes")) < allocated(str(tmp_path / "plain"))
    digests = [await fingerprint(str(tmp_path / name)) for name in ("holes", "plain")]
    changed = bytearray(data)
    changed[5 * BLOCK] ^= 1
    for name, other in (("changed", bytes(changed)), ("longer", data + b"\0"), ("shorter", data[:-1]), ("empty", b"")):
        (tmp_path / name).write_bytes(other)
        digests.append(await fingerprint(str(tmp_path / name)))
    assert digests[0] == digests[1]
    assert len(set(digests)) == 5


@pytest.mark.parametrize("seed", range(5))
def test_pieces_that_come_again_or_in_parts_make_the_same_file(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    data = holed(tmp_path / "source", seed)
    target = tmp_path / "there" / "disk0.raw"
    target.parent.mkdir()
    while True:
        arriving = ArrivingFile(str(target), "0123", len(data))  # made anew each time, as after a restart
        with Opened(str(tmp_path / "source")) as file:
            pieces = blocks(file.descriptor, arriving.received())
            for _ in range(chance.randrange(1, 4)):
                piece = next(pieces, None)
                if piece is None:
                    break
                offset, block = piece
                part = block[: chance.randrange(len(block)) + 1]
                assert arriving.write(offset, part) == max(arriving.received(), offset + len(part))
                arriving.write(max(0, offset - 50), data[max(0, offset - 50) : offset + len(part)])
            else:
                continue
            if next(blocks(file.descriptor, arriving.received()), None) is None:
                break
    assert arriving.write(len(data), b"") == len(data) == arriving.received()
    assert not target.exists()
    assert arriving.path.stat().st_mode & 0o777 == 0o600
    assert allocated(str(arriving.path)) < len(data) / 2
    arriving.place()
    arriving.place()
    assert target.read_bytes() == data
    assert (arriving.received(), arriving.write(0, data[:10]), arriving.whole) == (len(data), len(data), target)
    assert [entry.name for entry in target.parent.iterdir()] == ["disk0.raw"]


def test_more_than_was_announced_is_refused_and_less_has_no_name(tmp_path: Path) -> None:
    arriving = ArrivingFile(str(tmp_path / "disk"), "0123", 100)
    for offset, data in ((0, bytes(101)), (100, b"x"), (101, b""), (2**63, b"x")):
        with pytest.raises(Invalid, match="beyond the announced size, 100"):
            arriving.write(offset, data)
    assert not arriving.path.exists()
    with pytest.raises(WrongState, match="0 of 100 bytes"):
        arriving.place()
    arriving.write(0, bytes(99))
    with pytest.raises(WrongState, match="99 of 100 bytes"):
        arriving.place()
    arriving.discard()
    arriving.discard()
    assert list(tmp_path.iterdir()) == []


def test_a_file_without_bytes_is_one(tmp_path: Path) -> None:
    arriving = ArrivingFile(str(tmp_path / "exit"), "0123", 0)
    assert arriving.write(0, b"") == 0
    arriving.place()
    assert (tmp_path / "exit").read_bytes() == b""


def test_nothing_takes_the_place_of_what_is_there(tmp_path: Path) -> None:
    arriving = ArrivingFile(str(tmp_path / "disk"), "0123", 3)
    arriving.write(0, b"new")
    (tmp_path / "disk").write_bytes(b"old")
    with pytest.raises(AlreadyExists):
        arriving.place()
    assert (tmp_path / "disk").read_bytes() == b"old"
    arriving.discard()
    assert (tmp_path / "disk").exists()


def test_a_link_in_the_way_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    arriving = ArrivingFile(str(tmp_path / "disk"), "0123", 100)
    arriving.path.symlink_to(tmp_path / "secret")
    with pytest.raises(HostError, match="symbolic links"):
        arriving.write(0, b"overwritten")
    assert (tmp_path / "secret").read_bytes() == b"secret"


def test_a_full_disk_is_said_and_nothing_is_lost(tmp_path: Path) -> None:
    arriving = ArrivingFile(str(tmp_path / "disk"), "0123", 6)
    arriving.write(0, b"abc")
    arm("migration-file-write:error@1")
    with pytest.raises(NoSpace):
        arriving.write(3, b"def")
    assert arriving.received() == 3
    assert arriving.write(3, b"def") == 6
    for point in ("migration-file-place", "migration-file-placed"):
        arm(f"{point}:error")
        with pytest.raises((NoSpace, HostError)):
            arriving.place()
    arm("")
    arriving.place()
    assert (tmp_path / "disk").read_bytes() == b"abcdef"


PLACING = """
import sys
from qmpd.failpoint import arm
from qmpd.migration.arrivingfiles import ArrivingFile
arm(sys.argv[1])
arriving = ArrivingFile(sys.argv[2], "0123", 6)
arriving.write(3, b"def")
arriving.place()
"""


@pytest.mark.parametrize("point", POINTS)
def test_killed_at_any_point_and_called_again_it_ends_in_the_same_state(tmp_path: Path, point: str) -> None:
    target = str(tmp_path / "disk")
    ArrivingFile(target, "0123", 6).write(0, b"abc")
    for armed, status in ((f"{point}:kill", -signal.SIGKILL), ("", 0), ("", 0)):
        words = [sys.executable, "-c", PLACING, armed, target]
        assert subprocess.run(words, cwd=ROOT, timeout=PATIENCE_S).returncode == status
    assert Path(target).read_bytes() == b"abcdef"
    assert os.listdir(tmp_path) == ["disk"]  # noqa: PTH208  names alone


def test_variables_are_written_into_the_file_that_qemu_has_open(tmp_path: Path) -> None:
    arriving = ArrivingVariables(str(tmp_path / "vars"), 10)
    arriving.make()
    arriving.make()
    with (tmp_path / "vars").open("rb") as opened:
        assert arriving.write(0, b"01234") == 5
        assert arriving.write(5, b"56789") == arriving.received() == 10
        assert arriving.write(2, b"\0") == 10
        arriving.secure()
        assert opened.read() == b"01\x003456789"
    with pytest.raises(Invalid):
        arriving.write(8, b"xyz")
    with pytest.raises(AlreadyExists):
        ArrivingVariables(str(tmp_path / "vars"), 11).make()
    arm("migration-variables-write:error")
    with pytest.raises(HostError):
        arriving.write(0, b"x")
    arm("")
    (tmp_path / "vars").unlink()
    for broken in (arriving.secure, lambda: arriving.write(0, b"x")):
        with pytest.raises(HostError):
            broken()
