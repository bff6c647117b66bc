"""A host that is short of something, or does something else than it was asked: inodes, descriptors, ports, the log; and many at once."""

from __future__ import annotations

import asyncio
import resource
import signal
import socket
import subprocess
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from qmpd.spec import BlankDisk, Forward, UserNic
from tests.faults.witness import AT_REST, Bench, document_of, pid_of, request, serving, swept, told, until
from tests.guests.build import Guest
from tests.process.test_serve import PATIENCE_S
from tests.unavailable import need_root

pytestmark = pytest.mark.qemu

GUEST = "x86_64-q35-quiet"


@pytest.fixture
async def bench(short_directory: Path) -> AsyncIterator[Bench]:
    made = Bench(short_directory)
    yield made
    for name in ("one", "two"):
        await swept(made, name)


@pytest.fixture
def few_inodes(short_directory: Path) -> Iterator[Path]:
    """A file system with room for few files."""
    need_root("mount a small file system")
    path = short_directory / "few"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m,nr_inodes=40", "tmpfs", str(path)], check=True, timeout=PATIENCE_S)
    yield path
    for name in ("one", "two"):
        asyncio.run(swept(Bench(path), name))  # a process that is left, and its log, would keep it mounted
    subprocess.run(["umount", "--lazy", str(path)], check=True, timeout=PATIENCE_S)


def use_up(directory: Path) -> list[Path]:
    """Makes files until there can be no more."""
    made: list[Path] = []
    for number in range(1000):
        path = directory / f"ballast{number}"
        try:
            path.touch()
        except OSError:
            return made
        made.append(path)
    raise AssertionError("there is no end to the inodes")


async def test_a_disk_without_inodes_refuses_what_needs_one_and_what_runs_can_be_controlled(
    few_inodes: Path, guests: dict[str, Guest]
) -> None:
    bench = Bench(few_inodes)
    one, two = (document_of(guests[GUEST], name, disks=(BlankDisk(size_mib=1, format="raw"),)) for name in ("one", "two"))
    async with serving(bench) as daemon:
        await daemon.ready()
        await told(bench, "POST", "/machines?start=true", one)
        ballast = await asyncio.to_thread(use_up, few_inodes)
        refused = await request(bench, "POST", "/machines", two)
        assert refused is not None
        assert (refused.status, refused.body["code"]) == (507, "no_space")
        assert not bench.own("two").exists()
        for verb in ("pause", "resume", "stop"):
            await told(bench, "POST", f"/machines/one/{verb}")
        ballast = await asyncio.to_thread(use_up, few_inodes)  # what the end of the machine gave back
        refused = await request(bench, "POST", "/machines/one/start")
        assert refused is not None
        assert refused.status == 507
        assert (await told(bench, "GET", "/machines/one"))["state"] == "stopped"
        assert await asyncio.to_thread(bench.processes) == []
        for path in ballast:
            path.unlink()
        await told(bench, "POST", "/machines", two)
        await told(bench, "POST", "/machines/one/start")
        await told(bench, "POST", "/machines/one/kill")
        assert await daemon.stop() == 0
        assert "Traceback" not in daemon.log


async def test_a_daemon_without_descriptors_says_so_and_recovers(bench: Bench, guests: dict[str, Guest]) -> None:
    async with serving(bench) as daemon:
        await daemon.ready()
        await told(bench, "POST", "/machines", document_of(guests[GUEST], "one"))
        await told(bench, "POST", "/machines?start=true", document_of(guests[GUEST], "two"))
        before = len(list(Path(f"/proc/{daemon.process.pid}/fd").iterdir()))  # noqa: ASYNC240
        _, hard = resource.prlimit(daemon.process.pid, resource.RLIMIT_NOFILE)
        # Enough for a request or two, and not for a launch.
        resource.prlimit(daemon.process.pid, resource.RLIMIT_NOFILE, (before + 4, hard))
        refused = await request(bench, "POST", "/machines/one/start")
        assert refused is not None
        assert (refused.status, refused.body["code"]) == (429, "too_many_requests")
        with ExitStack() as opened:
            for _ in range(20):  # those that are not accepted wait in the backlog
                client = opened.enter_context(socket.socket(socket.AF_UNIX))
                client.connect(str(bench.socket))
        resource.prlimit(daemon.process.pid, resource.RLIMIT_NOFILE, (hard, hard))
        for verb in ("pause", "resume"):
            await told(bench, "POST", f"/machines/two/{verb}")
        await told(bench, "POST", "/machines/one/start")
        for name in ("one", "two"):
            await told(bench, "POST", f"/machines/{name}/kill")
        assert await daemon.stop() == 0


async def test_a_port_that_somebody_else_has_is_named_and_the_machine_starts_when_it_is_free(
    bench: Bench, guests: dict[str, Guest]
) -> None:
    async with serving(bench) as daemon:
        await daemon.ready()
        with socket.socket() as holder:
            holder.bind(("127.0.0.1", 0))
            holder.listen()
            port = holder.getsockname()[1]
            nic = UserNic(forwards=(Forward(host_address="127.0.0.1", host_port=port, guest_port=22),))
            await told(bench, "POST", "/machines", document_of(guests[GUEST], "one", nics=(nic,)))
            refused = await request(bench, "POST", "/machines/one/start")
            assert refused is not None
            assert (refused.status, refused.body["code"]) == (502, "launch_failed")
            assert str(port) in str(refused.body["message"])
            assert await asyncio.to_thread(bench.processes) == []
            assert not (bench.running_dir() / "launch.msgpack").exists()
        await told(bench, "POST", "/machines/one/start")
        await told(bench, "POST", "/machines/one/kill")
        assert await daemon.stop() == 0


async def test_a_daemon_whose_log_nobody_takes_goes_on(bench: Bench, guests: dict[str, Guest]) -> None:
    async with serving(bench) as daemon:
        await daemon.ready()
        assert daemon.process.stderr is not None
        daemon.process.stderr._transport.close()  # type: ignore[attr-defined]  # the only way to close the read end of its log
        await told(bench, "POST", "/machines?start=true", document_of(guests[GUEST], "one"))
        await pid_of(bench, "one")
        assert (await told(bench, "POST", "/machines/one/stop"))["method"] == "quit"
        await told(bench, "DELETE", "/machines/one")
        daemon.process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(PATIENCE_S):
            assert await daemon.process.wait() == 0


async def test_racing_verbs_leave_one_machine_at_most_and_no_mistakes(bench: Bench, guests: dict[str, Guest]) -> None:
    document = document_of(guests[GUEST], "one")
    verbs = [("POST", f"/machines/one/{verb}") for verb in ("start", "stop", "kill", "pause", "resume", "reset")]
    verbs += [("DELETE", "/machines/one"), ("POST", "/machines")]
    async with serving(bench) as daemon:
        await daemon.ready()
        statuses: Counter[int] = Counter()
        for _ in range(3):
            racing = [request(bench, method, path, document if path == "/machines" else None) for _ in range(4) for method, path in verbs]
            for reply in await asyncio.gather(*racing):
                assert reply is not None
                statuses[reply.status] += 1
            assert len(await asyncio.to_thread(bench.processes)) <= 1
        assert set(statuses) <= {200, 201, 204, 404, 409, 429, 502, 503}, statuses
        assert statuses[201] >= 1
        if (machines := (await told(bench, "GET", "/machines"))["machines"]) != []:
            assert isinstance(machines, list)
            machine = await until(bench, "one", "running", "paused", *AT_REST)
            alive = [] if machine["state"] in AT_REST else [machine["pid"]]
            assert await asyncio.to_thread(bench.processes) == alive
            await told(bench, "POST", "/machines/one/kill")
        assert await daemon.stop() == 0
        assert "Traceback" not in daemon.log


def held(pid: int) -> tuple[int, int]:
    """How many descriptors and threads a process has."""
    return len(list(Path(f"/proc/{pid}/fd").iterdir())), len(list(Path(f"/proc/{pid}/task").iterdir()))


async def test_machines_that_come_and_go_leave_nothing_in_the_daemon(bench: Bench, guests: dict[str, Guest]) -> None:
    document = document_of(guests[GUEST], "one", disks=(BlankDisk(size_mib=1, format="raw"),))
    async with serving(bench) as daemon:
        await daemon.ready()
        seen = []
        for started in (True, *[False] * 40, True):
            await told(bench, "POST", f"/machines?start={str(started).lower()}", document)
            if started:
                await told(bench, "POST", "/machines/one/kill")
            await told(bench, "DELETE", "/machines/one")
            seen.append(held(daemon.process.pid))
        files, threads = (max(figures) for figures in zip(*seen[1:], strict=True))
        assert files <= seen[0][0] + 2  # a connection of the client that is not closed yet
        assert threads <= 40  # asyncio's pool has its bound, whatever happens
        assert not list(bench.state.glob("machines/*"))
        assert await daemon.stop() == 0
