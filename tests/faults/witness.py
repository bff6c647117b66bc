"""A real daemon with real machines, a client that remembers what it was told, and the questions that are asked afterwards.

What a daemon acknowledged must be true for every later one. What it did not acknowledge happened entirely or not at all. `Witness`
keeps both as a set of worlds that are possible: (the definition's title or None, whether a QEMU runs).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import msgspec
import psutil

from qmpd.spec import BlankDisk
from tests.conftest import CACHE, ROOT
from tests.guests.build import Guest
from tests.machines import spec_of
from tests.process.test_serve import PATIENCE_S, Daemon, Place, started

World = tuple[str | None, bool]
Document = dict[str, object]

#: These tests start hundreds of daemons: most of what a start costs is compiling what it imports.
BYTECODE = ROOT / ".cache" / "bytecode"
AT_REST = {"stopped", "crashed"}
NAME = "one"
FIRST, SECOND = "first", "second"


class Bench(Place):
    """Where a daemon with real emulators keeps everything. What emulators said of themselves is shared by all tests."""

    def __init__(self, directory: Path, cache: Path = CACHE) -> None:
        self.directory = directory
        self.socket = directory / "api.sock"
        self.config = directory / "qmpd.toml"
        self.state = directory / "s"
        self.run = directory / "r"
        places = {"socket": self.socket, "state_dir": self.state, "run_dir": self.run, "cache_dir": cache}
        self.settings = {**{name: str(path) for name, path in places.items()}, "pools": ["/"]}
        self.configure()

    def own(self, name: str = NAME) -> Path:
        """The directory of a machine's disks and logs."""
        return self.state / "machines" / name

    def running_dir(self, name: str = NAME) -> Path:
        """The directory of a machine's sockets and launch record."""
        return self.run / "m" / name

    def processes(self, name: str = NAME) -> list[int]:
        """Every process that was started for a machine, gates and those nobody knows of included: found by what they were told."""
        marks = (str(self.running_dir(name)), str(self.own(name)))
        return [process.pid for process, words in _command_lines() if any(mark in word for word in words for mark in marks)]


def _command_lines() -> Iterable[tuple[psutil.Process, list[str]]]:
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            yield process, process.cmdline()


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    """What came back."""

    status: int
    body: Document
    revision: str = ""

    @property
    def good(self) -> bool:
        """Whether it was acknowledged."""
        return self.status < 300


async def request(bench: Place, method: str, path: str, body: object = None, headers: Mapping[str, str] | None = None) -> Reply | None:
    """The daemon's answer, or None if there was none: then nothing is known."""
    connector = aiohttp.UnixConnector(str(bench.socket))
    try:
        async with (
            aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=PATIENCE_S)) as session,
            session.request(method, f"http://localhost/v1{path}", json=body, headers=headers) as reply,
        ):
            answer = await reply.json() if reply.status != 204 else {}
            assert isinstance(answer, dict)
            return Reply(status=reply.status, body=answer, revision=reply.headers.get("ETag", ""))
    except aiohttp.ClientError:
        return None


async def told(bench: Place, method: str, path: str, body: object = None) -> Document:
    """The daemon's answer, which must be a good one."""
    reply = await request(bench, method, path, body)
    assert reply is not None, f"no answer to {method} {path}"
    assert reply.good, reply
    return reply.body


class Witness:
    """A client that goes through a machine's life, and knows what must be true."""

    def __init__(self, bench: Bench, guest: Guest) -> None:
        self.bench = bench
        self.guest = guest
        self.worlds: set[World] = {(None, False)}
        self.pid: object = None
        self.events: dict[int, object] = {}

    def definition(self, title: str) -> Document:
        """The machine's definition; the second one has one disk more."""
        disks = (BlankDisk(size_mib=1, format="raw"),) * (1 if title == FIRST else 2)
        return document_of(self.guest, NAME, title=title, disks=disks)

    async def create(self) -> Reply | None:
        """Asks for the machine, always under the same key."""
        return await request(self.bench, "POST", "/machines", self.definition(FIRST), {"Idempotency-Key": "the first"})

    async def live(self) -> str | None:
        """Goes through the whole life; the name of the step in which the daemon went away, None if it did not."""
        for name, turn in LIFE.items():
            for attempt in range(2):
                before = set(self.worlds)
                reply = await DEEDS[name](self)
                if reply is not None and reply.good:
                    self.worlds = {turn(world) for world in before}
                    break
                self.worlds = before | {turn(world) for world in before}
                if reply is None:
                    return name
                assert reply.status in {429, 502, 503, 504, 507}, reply
                assert reply.body.get("code") not in {None, "internal"}, reply
                if not await self.look():
                    return name
                if self.worlds == {turn(world) for world in before}:
                    break  # it failed behind the point of no return
                assert attempt == 0, reply
            if not await self.look():
                return name
        return None

    async def look(self) -> bool:
        """Asks the daemon what is so, holds it against what may be so, and remembers it. Whether it was there to be asked."""
        listed = await request(self.bench, "GET", "/machines")
        if listed is None:
            return False
        machines = listed.body["machines"]
        assert isinstance(machines, list)
        assert len(machines) <= 1
        view = machines[0] if machines else None
        if view is None:
            seen: World = (None, False)
        else:
            if view["state"] in {"starting", "unreachable", "unresponsive"}:
                view = await until(self.bench, NAME, "running", *AT_REST)
            seen = (str(view["title"]), view["state"] not in AT_REST)
        assert seen in self.worlds, f"the daemon says {seen} ({view}), possible was {self.worlds}"
        self.worlds = {seen}
        self.pid = None if view is None else view["pid"]
        return True

    async def nothing_else(self) -> None:
        """What holds beside what the daemon says: files and processes are those of this world, and of no other."""
        ((title, runs),) = self.worlds
        async with asyncio.timeout(PATIENCE_S):
            while len(found := await asyncio.to_thread(self.bench.processes)) > runs:
                await asyncio.sleep(0.05)  # a gate whose daemon died reads the end of its pipe
        assert found == ([self.pid] if runs else [])
        assert await asyncio.to_thread(self._disks) == self.disks_of(title)
        if title is None:
            assert not self.bench.own().exists()
            assert not self.bench.running_dir().exists()
        else:
            assert not (self.bench.own() / ".unfinished").exists()

    def disks_of(self, title: str | None) -> set[str]:
        """The disks that a definition has."""
        return {None: set[str](), FIRST: {"disk0.raw"}, SECOND: {"disk0.raw", "disk1.raw"}}[title]

    def _disks(self) -> set[str]:
        return {path.name for path in self.bench.own().glob("*disk*")}

    async def numbers(self) -> None:
        """Event numbers rise by one, and none that was seen has become another event."""
        page = await told(self.bench, "GET", "/events?limit=1000")
        events = page["events"]
        assert isinstance(events, list)
        assert [event["number"] for event in events] == list(range(1, len(events) + 1))
        now: dict[int, object] = {event["number"]: (event["at"], event["kind"], event["data"]) for event in events}
        assert {number: now.get(number) for number in self.events} == self.events
        self.events = now

    async def end(self) -> None:
        """Whatever became of it, the machine can be used, and deleted with all that was made for it."""
        ((title, runs),) = self.worlds
        if title is not None:
            if not runs:
                await told(self.bench, "POST", f"/machines/{NAME}/start")
            assert (await told(self.bench, "POST", f"/machines/{NAME}/kill"))["method"] == "sigkill"
            await told(self.bench, "DELETE", f"/machines/{NAME}")
        self.worlds = {(None, False)}
        assert await self.look()
        await self.nothing_else()


async def _start(witness: Witness) -> Reply | None:
    return await request(witness.bench, "POST", f"/machines/{NAME}/start")


async def _stop(witness: Witness) -> Reply | None:
    return await request(witness.bench, "POST", f"/machines/{NAME}/stop")


async def _replace(witness: Witness) -> Reply | None:
    reply = await request(witness.bench, "GET", f"/machines/{NAME}/definition")
    if reply is None:
        return None
    return await request(witness.bench, "PUT", f"/machines/{NAME}", witness.definition(SECOND), {"If-Match": reply.revision})


async def _shut_down(witness: Witness) -> Reply | None:
    """The guest has no power button, so this ends with SIGKILL."""
    reply = await request(witness.bench, "POST", f"/machines/{NAME}/shutdown", {"timeout_s": 0.1, "then": "kill"})
    if reply is None or not reply.good:
        return reply
    async with asyncio.timeout(PATIENCE_S):
        while (job := await request(witness.bench, "GET", f"/jobs/{reply.body['id']}")) is not None:
            if job.body["state"] == "succeeded":
                return job
            if job.body["state"] == "failed":
                error = job.body["error"]
                assert isinstance(error, dict)
                return Reply(status=503, body=error)
            await asyncio.sleep(0.02)
    return None


async def _delete(witness: Witness) -> Reply | None:
    return await request(witness.bench, "DELETE", f"/machines/{NAME}")


DEEDS = {
    "create": Witness.create,
    "start": _start,
    "stop": _stop,
    "replace": _replace,
    "start again": _start,
    "shut down": _shut_down,
    "delete": _delete,
}
LIFE: dict[str, Callable[[World], World]] = {
    "create": lambda world: (FIRST, False),
    "start": lambda world: (world[0], True),
    "stop": lambda world: (world[0], False),
    "replace": lambda world: (SECOND, world[1]),
    "start again": lambda world: (world[0], True),
    "shut down": lambda world: (world[0], False),
    "delete": lambda world: (None, False),
}


async def ready(daemon: Daemon) -> bool:
    """Whether the daemon came up; False when it ended before."""
    assert daemon.process.stderr is not None
    async with asyncio.timeout(PATIENCE_S):
        while "qmpd ready" not in daemon.log:
            line = await daemon.process.stderr.readline()
            daemon.log += line.decode()
            if not line:
                return False
    return True


@asynccontextmanager
async def serving(bench: Bench, failpoints: str = "") -> AsyncIterator[Daemon]:
    """A daemon, with failpoints if they are named; killed at the end if it still runs. Machines go on. A test that fails shows its log."""
    async with started(bench, QMPD_FAILPOINT=failpoints, PYTHONDONTWRITEBYTECODE="", PYTHONPYCACHEPREFIX=str(BYTECODE)) as daemon:
        try:
            yield daemon
        finally:
            if daemon.process.returncode is None:
                await daemon.stop(signal.SIGKILL)
            sys.stdout.write(daemon.log)


async def swept(bench: Bench, name: str = NAME) -> None:
    """Ends every process of a machine, whoever knows of it."""
    for pid in await asyncio.to_thread(bench.processes, name):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


async def launched(bench: Bench, guest: Guest, *names: str) -> dict[str, int]:
    """Machines that run although their daemon was killed; their pids by name."""
    async with serving(bench) as daemon:
        await daemon.ready()
        for name in names:
            await told(bench, "POST", "/machines?start=true", document_of(guest, name))
        pids = {name: await pid_of(bench, name) for name in names}
        assert await daemon.stop(signal.SIGKILL) == -signal.SIGKILL
    return pids


def document_of(guest: Guest, name: str, **changes: object) -> Document:
    """The definition of a machine, as a client sends it."""
    document = msgspec.to_builtins(spec_of(guest, name, **changes))
    assert isinstance(document, dict)
    return document


async def pid_of(bench: Bench, name: str) -> int:
    """The pid of a machine that runs."""
    pid = (await until(bench, name, "running"))["pid"]
    assert isinstance(pid, int)
    return pid


async def until(bench: Bench, name: str, *states: str) -> Document:
    """The machine, once it is in one of these states."""
    wanted = "&".join(f"state={state}" for state in sorted(states))
    return await told(bench, "GET", f"/machines/{name}/wait?{wanted}&timeout_s={PATIENCE_S:g}")
