"""How a QEMU ended, in its file: the newest one, whole, or none."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from qmpd.endings import ENDING_NAME, judged, keep, last
from qmpd.failpoint import arm
from qmpd.process import ExitStatus

LONG = judged(ExitStatus(code=1), None, "no more room " * 50, "2026-01-01T00:00:00Z")
SHORT = judged(ExitStatus(code=0), "host-qmp-quit", "", "2026-01-02T00:00:00Z")


def test_the_newest_ending_is_kept_whole(tmp_path: Path) -> None:
    assert last(str(tmp_path)) is None
    for ending in (SHORT, LONG, SHORT):
        keep(str(tmp_path), ending)
        assert last(str(tmp_path)) == ending
    assert (tmp_path / ENDING_NAME).stat().st_mode & 0o777 == 0o600


def test_what_is_torn_is_none(tmp_path: Path) -> None:
    """A daemon that is killed between writing the new one and cutting off what is left of the old one."""
    (tmp_path / ENDING_NAME).write_bytes(msgspec.msgpack.encode(SHORT) + b"of the old one")
    assert last(str(tmp_path)) is None


@pytest.mark.parametrize("point", ["exit-keep", "exit-kept"])
def test_an_ending_that_could_not_be_written_leaves_no_older_one(tmp_path: Path, point: str) -> None:
    keep(str(tmp_path), LONG)
    arm(f"{point}:error")
    try:
        keep(str(tmp_path), SHORT)
    finally:
        arm("")
    assert last(str(tmp_path)) is None
