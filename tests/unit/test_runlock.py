"""The lock says whether a QEMU of a machine is alive, and nothing else looks like one."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from qmpd.errors import Held
from qmpd.runlock import LOCK_NAME, is_taken, taken


def test_a_lock_is_taken_once(tmp_path: Path) -> None:
    with taken(str(tmp_path)):
        assert is_taken(str(tmp_path))
        with pytest.raises(Held), taken(str(tmp_path)):
            pass
    assert not is_taken(str(tmp_path))
    with taken(str(tmp_path)):
        pass


def test_a_machine_without_a_directory_has_no_process(tmp_path: Path) -> None:
    assert not is_taken(str(tmp_path / "nothing"))
    with pytest.raises(FileNotFoundError), taken(str(tmp_path / "nothing")):
        pass


def test_a_link_in_place_of_the_lock_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / LOCK_NAME).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic links"), taken(str(tmp_path)):
        pass
    assert not (tmp_path / "elsewhere").exists()


def test_who_inherited_the_lock_holds_it_until_it_ends(tmp_path: Path) -> None:
    with taken(str(tmp_path)) as descriptor:
        child = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE, pass_fds=[descriptor])
    assert is_taken(str(tmp_path))
    child.communicate()
    assert not is_taken(str(tmp_path))


def test_those_who_look_do_not_see_each_other(tmp_path: Path) -> None:
    def look(turn: int) -> bool:
        if turn % 50:
            return is_taken(str(tmp_path))
        subprocess.run(["true"], check=True)  # a child has every descriptor for a moment
        return False

    with ThreadPoolExecutor(4) as looking:
        assert not any(looking.map(look, range(2000)))


def test_who_takes_it_does_not_see_those_who_look(tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as looking:
        seen = [looking.submit(is_taken, str(tmp_path)) for _ in range(1000)]
        while not all(look.done() for look in seen):
            with taken(str(tmp_path)) as descriptor:
                assert os.fstat(descriptor).st_size == 0


def test_one_that_takes_the_place_of_another_holds_the_other_lock(tmp_path: Path) -> None:
    with taken(str(tmp_path)):
        with taken(str(tmp_path), beside=True), pytest.raises(Held), taken(str(tmp_path), beside=True):
            pass
        assert is_taken(str(tmp_path))
    assert not is_taken(str(tmp_path))


def test_a_machine_is_alive_whichever_lock_is_held(tmp_path: Path) -> None:
    with ExitStack() as old:
        old.enter_context(taken(str(tmp_path)))
        with taken(str(tmp_path), beside=True):
            old.close()
            assert is_taken(str(tmp_path))
            with pytest.raises(Held), taken(str(tmp_path)):
                pass
            with taken(str(tmp_path), beside=True):  # the next one has the first again
                assert is_taken(str(tmp_path))
    assert not is_taken(str(tmp_path))
    with taken(str(tmp_path)):
        pass
