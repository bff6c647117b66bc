"""The daemon as it is run: a process with a configuration, a socket, and machines that outlive it."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest

from tests.process.standin_qemu import BOARD, make

ROOT = Path(__file__).parents[2]
PATIENCE_S = 60.0


class Place:
    """Where a daemon keeps everything."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.socket = directory / "api.sock"
        self.config = directory / "qmpd.toml"
        program = make(directory / "bin", {})
        (directory / "boards").mkdir()
        (directory / "boards" / "toy.toml").write_text(BOARD)
        self.settings: dict[str, object] = {
            "socket": str(self.socket),
            "state_dir": f"{directory}/s",
            "run_dir": f"{directory}/r",
            "cache_dir": f"{directory}/c",
            "boards": [f"{directory}/boards"],
            "emulators": [str(program)],
        }
        self.configure()

    def configure(self, **changes: object) -> None:
        """Writes the configuration file."""
        values = {**self.settings, **changes}
        self.config.write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items()))

    def command(self, *words: str) -> list[str]:
        """The daemon on this configuration."""
        return [sys.executable, "-m", "qmpd", "serve", "--config", str(self.config), *words]


class Daemon:
    """A daemon that was started."""

    def __init__(self, process: asyncio.subprocess.Process, place: Place) -> None:
        self.process = process
        self.place = place
        self.log = ""

    async def ready(self) -> None:
        """Returns when it says so."""
        assert self.process.stderr is not None
        async with asyncio.timeout(PATIENCE_S):
            while "qmpd ready" not in self.log:
                line = await self.process.stderr.readline()
                self.log += line.decode()
                assert line, self.log

    async def ended(self) -> int:
        """Its status, once it has ended."""
        assert self.process.stderr is not None
        async with asyncio.timeout(PATIENCE_S):
            self.log += (await self.process.stderr.read()).decode()
            return await self.process.wait()

    async def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return await self.ended()

    async def ask(self, method: str, path: str, body: object = None) -> dict[str, object]:
        """The answer of its API."""
        connector = aiohttp.UnixConnector(str(self.place.socket))
        async with (
            aiohttp.ClientSession(connector=connector) as session,
            session.request(method, f"http://localhost/v1{path}", json=body) as reply,
        ):
            answer = await reply.json() if reply.status != 204 else {}
            assert reply.status < 300, answer
            assert isinstance(answer, dict)
            return answer


def environment(**changes: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'api'}", **changes}


@asynccontextmanager
async def started(place: Place, *words: str, command: Sequence[str] = (), **environ: str) -> AsyncIterator[Daemon]:
    """A daemon, killed at the end if it still runs."""
    argv = [*command, *place.command(*words)]
    process = await asyncio.create_subprocess_exec(*argv, cwd="/", env=environment(**environ), stderr=asyncio.subprocess.PIPE)
    try:
        yield Daemon(process, place)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


@pytest.fixture
async def place(short_directory: Path) -> AsyncIterator[Place]:
    made = Place(short_directory)
    yield made
    if not await asyncio.to_thread(Path(f"{short_directory}/r/m").exists):
        return
    async with started(made) as daemon:
        await daemon.ready()
        machines = (await daemon.ask("GET", "/machines"))["machines"]
        assert isinstance(machines, list)
        for machine in machines:
            await daemon.ask("POST", f"/machines/{machine['name']}/kill")
        assert await daemon.stop() == 0


async def running_pid(daemon: Daemon) -> object:
    machine = await daemon.ask("GET", "/machines/one/wait?state=running&timeout_s=60")
    assert machine["state"] == "running"
    return machine["pid"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_daemon_that_is_told_to_end_ends_and_its_machines_go_on(place: Place, number: signal.Signals) -> None:
    async with started(place) as daemon:
        await daemon.ready()
        await daemon.ask("POST", "/machines?start=true", {"name": "one", "board": "toy"})
        pid = await running_pid(daemon)
        assert await daemon.stop(number) == 0
        assert "Traceback" not in daemon.log
    async with started(place) as daemon:
        await daemon.ready()
        assert await running_pid(daemon) == pid
        assert (await daemon.ask("GET", "/version"))["machines_running"] == 1


async def test_a_daemon_that_is_killed_forgets_nothing(place: Place) -> None:
    pid = last = None
    for turn in range(3):
        async with started(place) as daemon:
            await daemon.ready()
            if turn == 0:
                await daemon.ask("POST", "/machines", {"name": "two", "board": "toy"})
                await daemon.ask("POST", "/machines?start=true", {"name": "one", "board": "toy"})
                pid = await running_pid(daemon)
            assert await running_pid(daemon) == pid
            assert (await daemon.ask("GET", "/machines/two"))["state"] == "stopped"
            page = await daemon.ask("GET", "/events")
            assert last is None or page["first"] == 1
            last = page["last"]
            assert await daemon.stop(signal.SIGKILL) == -signal.SIGKILL


async def test_a_machine_that_ended_while_no_daemon_ran_is_told_and_starts_again_if_it_shall(place: Place) -> None:
    async with started(place) as daemon:
        await daemon.ready()
        await daemon.ask("POST", "/machines?start=true", {"name": "one", "board": "toy", "restart": {"when": "always", "backoff_s": 0.1}})
        await daemon.ask("POST", "/machines?start=true", {"name": "two", "board": "toy"})
        pids = [(await daemon.ask("GET", f"/machines/{name}"))["pid"] for name in ("one", "two")]
        await daemon.stop(signal.SIGKILL)
    for pid in pids:
        assert isinstance(pid, int)
        await ended(pid)
    async with started(place) as daemon:
        await daemon.ready()
        two = await daemon.ask("GET", "/machines/two")
        assert two["state"] == "crashed"
        assert isinstance(two["exit"], dict)
        assert (two["exit"]["reason"], two["exit"]["clean"]) == ("ended while no daemon ran", False)
        again = await daemon.ask("GET", f"/machines/one/wait?state=running&timeout_s={PATIENCE_S:g}")
        assert again["pid"] not in pids
        assert await daemon.stop() == 0


async def ended(pid: int) -> None:
    """Kills a process that is not our child, and returns when it has gone."""
    descriptor = os.pidfd_open(pid)
    gone = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(descriptor, gone.set)
    try:
        signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        async with asyncio.timeout(PATIENCE_S):
            await gone.wait()
            while Path(f"/proc/{pid}").exists():  # noqa: ASYNC240  whoever inherited it has yet to reap it
                await asyncio.sleep(0.01)
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)


async def test_a_second_daemon_is_told_who_is_there(place: Place, short_directory: Path) -> None:
    async with started(place) as first:
        await first.ready()
        async with started(place, "--socket", str(short_directory / "other.sock")) as second:
            assert await second.ended() == 1
        assert f"in use by another qmpd, pid {first.process.pid}" in second.log
        async with started(place, "--state-dir", str(short_directory / "s2"), "--run-dir", str(short_directory / "r2")) as third:
            assert await third.ended() == 1
        assert str(place.socket) in third.log
        for log in (second.log, third.log):
            assert "Traceback" not in log
        assert (await first.ask("GET", "/version"))["pid"] == first.process.pid


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"socket = ", "Invalid value"),
        (b'sockets = "/x"', "unknown field `sockets`"),
        (b'socket = "x"', "$.socket"),
        (b"\xff", "utf-8"),
        (None, "No such file"),
    ],
)
async def test_a_configuration_with_a_mistake_is_named(place: Place, text: bytes | None, message: str) -> None:
    good = place.config.read_bytes()
    place.config.unlink() if text is None else place.config.write_bytes(text)
    async with started(place) as daemon:
        assert await daemon.ended() == 78
    place.config.write_bytes(good)
    assert daemon.log.startswith("qmpd: ")
    assert str(place.config) in daemon.log
    assert message in daemon.log
    assert len(daemon.log.splitlines()) == 1


@pytest.mark.parametrize("option", ["--state-dir", "--run-dir", "--cache-dir", "--socket"])
async def test_a_place_that_cannot_be_is_named(place: Place, option: str) -> None:
    impossible = place.config / "below-a-file"
    async with started(place, option, str(impossible)) as daemon:
        assert await daemon.ended() == 1
    assert "below-a-file" in daemon.log
    assert "Traceback" not in daemon.log


async def test_a_user_without_a_name_has_a_daemon_too(place: Place, short_directory: Path) -> None:
    unshare = shutil.which("unshare")
    nobody = (unshare or "unshare", "--user", "--map-user=54321", "--map-group=54321")
    probe = await asyncio.create_subprocess_exec(*nobody, "true", stderr=asyncio.subprocess.DEVNULL) if unshare else None
    if probe is None or await probe.wait() != 0:
        pytest.skip("this host makes no user namespaces")
    async with started(place, command=nobody, HOME=str(short_directory)) as daemon:
        await daemon.ready()
        await daemon.ask("POST", "/machines?start=true", {"name": "one", "board": "toy"})
        await daemon.ask("POST", "/machines/one/kill")
        assert await daemon.stop() == 0


@pytest.mark.parametrize("words", [(), ("--verbose",)])
async def test_a_daemon_says_when_it_is_ready_and_when_it_ends(place: Place, words: tuple[str, ...]) -> None:
    async with started(place, *words) as daemon:
        await daemon.ready()
        assert await daemon.stop() == 0
    assert f"INFO qmpd ready socket={place.socket}" in daemon.log
    assert daemon.log.endswith("INFO qmpd ending; machines go on\n")


async def test_the_command_says_its_version_and_what_it_takes() -> None:
    for words, status, text in ((["--version"], 0, "qmpd "), ([], 2, "usage: qmpd"), (["serve", "--nonsense"], 2, "usage: qmpd")):
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "qmpd", *words, env=environment(), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
        )
        output, _ = await process.communicate()
        assert process.returncode == status
        assert output.decode().startswith(text)
