"""Looking at files: what does not answer hides itself, and what is behind it on the same file system; and holds up nothing else."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from qmpd.doctor.condition import Silence
from qmpd.doctor.limits import limits
from qmpd.doctor.looking import Look, Lookout, point_of
from qmpd.hostcheck.tree import HostTree
from tests.unit import hosttree


@pytest.fixture(autouse=True)
def _short_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qmpd.doctor.looking.LOOK_DEADLINE_S", 0.2)


def blocked(path: Path) -> bytes:
    """A call that waits in the kernel, as one on a dead mount does: nobody writes to a FIFO."""
    with path.open("rb") as fifo:
        return fifo.read()


@contextmanager
def fifo(path: Path) -> Iterator[Path]:
    """A FIFO; who waits for it goes on at the end."""
    os.mkfifo(path)
    yield path
    os.close(os.open(path, os.O_RDWR | os.O_NONBLOCK))


@pytest.fixture
def dead(tmp_path: Path) -> Iterator[Path]:
    with fifo(tmp_path / "dead") as path:
        yield path


@pytest.fixture
def mounts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host with one more file system, at /elsewhere."""
    table = tmp_path / "mountinfo"
    table.write_text("1 0 8:1 / / rw - ext4 /dev/a rw\n2 1 8:2 / /elsewhere rw - nfs server:/ rw\n")
    monkeypatch.setattr("qmpd.doctor.looking.MOUNTS", table)


@pytest.mark.usefixtures("mounts")
async def test_what_does_not_answer_hides_only_what_is_behind_it(dead: Path) -> None:
    lookout = Lookout()
    looks = [
        Look(path="/elsewhere/a", work=lambda: "seen"),
        Look(path="/elsewhere/b", work=partial(blocked, dead)),
        Look(path="/elsewhere/c", work=lambda: "never"),
        Look(path="/home", work=lambda: "seen too"),
    ]
    assert await lookout.look(looks) == ["seen", Silence(), Silence(behind="/elsewhere/b"), "seen too"]


@pytest.mark.usefixtures("mounts")
async def test_a_file_system_that_is_stuck_is_not_looked_at_again_until_it_answers(tmp_path: Path) -> None:
    lookout = Lookout()
    with fifo(tmp_path / "dead") as path:
        assert await lookout.look([Look(path="/elsewhere", work=partial(blocked, path))]) == [Silence()]
        again = [Look(path="/elsewhere", work=lambda: "seen"), Look(path="/", work=lambda: "seen")]
        one, two = await asyncio.gather(lookout.look(again), lookout.look(again))
        assert one == two == [Silence(), "seen"]
    async with asyncio.timeout(20):
        while await lookout.look(again) != ["seen", "seen"]:
            await asyncio.sleep(0.01)


async def test_an_error_is_an_answer(tmp_path: Path) -> None:
    (answer,) = await Lookout().look([Look(path=str(tmp_path), work=(tmp_path / "missing").stat)])
    assert isinstance(answer, FileNotFoundError)


def test_a_path_belongs_to_the_nearest_mount_point_in_its_name() -> None:
    points = ["/", "/srv", "/srv/images"]
    assert [point_of(path, points) for path in ("/srv/images/a", "/srv/images2", "/srv", "/etc")] == ["/srv/images", "/srv", "/srv", "/"]
    assert point_of("/a", []) == "/"


def test_limits_are_what_the_kernel_says(tmp_path: Path) -> None:
    tree = hosttree.host(
        tmp_path,
        {
            "/proc/self/fd/0": "",
            "/proc/self/fd/1": "",
            "/proc/self/fdinfo/0": "pos: 0\n",
            "/proc/self/fdinfo/1": "inotify wd:1 ino:1\ninotify wd:2 ino:2\n",
            "/proc/sys/fs/inotify/max_user_watches": "1000\n",
            "/proc/sys/fs/inotify/max_user_instances": "128\n",
            "/proc/self/cgroup": "0::/qmpd.service\n",
            "/sys/fs/cgroup/qmpd.service/pids.max": "500\n",
            "/sys/fs/cgroup/qmpd.service/pids.current": "12\n",
        },
    )
    seen = {limit.what: (limit.used, limit.limit) for limit in limits(tree)}
    files, _ = seen.pop("open files of the daemon")
    assert files == 2
    assert seen == {"inotify watches": (2, 1000), "inotify instances": (1, 128), "processes and threads of the service": (12, 500)}


def test_what_is_not_limited_is_not_said(tmp_path: Path) -> None:
    tree = hosttree.host(tmp_path, {"/proc/self/cgroup": "0::/\n", "/sys/fs/cgroup/pids.max": "max\n"})
    assert [limit.what for limit in limits(tree)] == ["open files of the daemon"]
    assert len(limits(HostTree())) >= 2
