"""Where the state of a TPM is while one QEMU takes the place of another."""

from __future__ import annotations

from pathlib import Path

import pytest

from qmpd.tpm import begin_anew, drop, take_place


def state(directory: Path, content: str) -> None:
    directory.mkdir()
    (directory / "state").write_text(content)


@pytest.fixture
def former(tmp_path: Path) -> Path:
    return tmp_path / "tpm"


@pytest.fixture
def successor(tmp_path: Path) -> Path:
    return tmp_path / "tpm-next"


@pytest.mark.parametrize("before", ["nothing was done", "the former one was put aside", "all but the end was done", "all of it was done"])
def test_the_successors_state_takes_the_place_wherever_a_daemon_was_killed(former: Path, successor: Path, before: str) -> None:
    aside = former.with_name("tpm-former")
    match before:
        case "nothing was done":
            state(former, "old")
            state(successor, "new")
            state(aside, "older")
        case "the former one was put aside":
            state(aside, "old")
            state(successor, "new")
        case "all but the end was done":
            state(aside, "old")
            state(former, "new")
        case _:
            state(former, "new")
    take_place(str(former), str(successor))
    take_place(str(former), str(successor))
    assert (former / "state").read_text() == "new"
    assert [path.name for path in former.parent.iterdir()] == ["tpm"]


def test_a_machine_without_a_tpm_has_no_place_to_take(former: Path, successor: Path) -> None:
    take_place(str(former), str(successor))
    assert list(former.parent.iterdir()) == []


def test_what_was_left_of_an_earlier_attempt_is_no_state(successor: Path) -> None:
    state(successor, "left")
    begin_anew(str(successor))
    assert list(successor.iterdir()) == []
    assert successor.stat().st_mode & 0o777 == 0o700
    drop(str(successor))
    drop(str(successor))
    assert not successor.exists()
