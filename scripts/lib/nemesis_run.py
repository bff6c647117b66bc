"""One nemesis run, from the first machine to the verdict."""

from __future__ import annotations

import asyncio
import hashlib
import os
import pwd
import random
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Final

import msgspec

from qmpd.errors import QmpdError
from qmpd.views import Event
from qmpd_api.client import Client
from qmpd_api.streams_client import EventGap
from scripts.lib.nemesis_faults import FAULTS
from scripts.lib.nemesis_history import History, Violation, recording
from scripts.lib.nemesis_operations import chosen, create
from scripts.lib.nemesis_rest import rest, verdict
from scripts.lib.nemesis_watch import watching
from scripts.lib.nemesis_world import World, small_file_system
from scripts.lib.progress import say
from scripts.lib.restartable import restartable
from tests.guests.build import build_all

#: Between two operations of one client, on average: enough to keep a small host busy, not to drown it.
THINK_S: Final = 0.15
#: Between two faults, on average.
FAULT_S: Final = 2.0
#: What a daemon gets at most before the next fault of a daemon: sometimes it is killed while it still takes over machines.
UP_S: Final = 4.0
#: Between two rests.
ROUND_S: Final = 15.0
#: How often the list is timed.
LIST_S: Final = 0.5
#: A follower that lost the daemon comes back this soon.
FOLLOW_S: Final = 0.3
#: After the last event was made a follower on a loaded host has it by now.
CATCH_UP_S: Final = 60.0
LOOK_S: Final = 0.1


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What a run does."""

    seconds: float
    seed: int
    machines: int
    faults: tuple[str, ...]
    list_limit_s: float
    history: Path | None = None


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What came of it."""

    seed: int
    seconds: float
    operations: dict[str, int]
    outcomes: dict[str, int]
    faults: dict[str, int]
    rests: int
    events: int
    slowest_list_ms: float
    counts: dict[str, int]
    violations: tuple[Violation, ...]


async def run(root: Path, plan: Plan) -> Outcome:
    """Runs a plan. Afterwards no process of it is left. Raises DaemonFailed when a daemon does not start or end."""
    guests = await asyncio.to_thread(build_all, root / ".cache" / "guests")
    settings: dict[str, object] = {"events_kept": 1_000_000, "qmp_users": [pwd.getpwuid(os.getuid()).pw_name]}
    with (
        tempfile.TemporaryDirectory(prefix="qnf-", ignore_cleanup_errors=True) as place,
        small_file_system(Path(place) / "s"),
        recording(plan.history) as history,
    ):
        async with restartable(root / ".cache", settings, prefix="qn-", state_dir=Path(place) / "s") as daemon:
            with watching(daemon.run_dir, history) as watcher:
                world = World(daemon, history, watcher, guests, plan.machines)
                files = [guest.file for guest in guests.values()]
                with _untouched(files, Path(place), history):
                    return await _Run(world, plan).whole()


@contextmanager
def _untouched(files: list[Path], place: Path, history: History) -> Iterator[None]:
    """Notes it when a file changes that is not the daemon's: guests that it boots, and one that lies beside its own directory."""
    canary = place / "canary"
    canary.write_bytes(b"not qmpd's")
    before = {path: hashlib.sha256(path.read_bytes()).digest() for path in [*files, canary]}
    yield
    for path, digest in before.items():
        if not path.exists() or hashlib.sha256(path.read_bytes()).digest() != digest:
            history.broken("I5", f"{path} was changed")


class _Run:
    def __init__(self, world: World, plan: Plan) -> None:
        self._world = world
        self._plan = plan
        self._chance = random.Random(plan.seed)  # noqa: S311  chosen, not secret
        self._followed: dict[str, list[Event]] = {"first follower": [], "second follower": []}
        self._faults: Counter[str] = Counter()
        self._rests = 0
        self._slowest_s = 0.0

    async def whole(self) -> Outcome:
        world, history = self._world, self._world.history
        world.daemon.start()
        await asyncio.to_thread(world.daemon.wait_answer)
        for name in world.names:
            await create(world, "client", name, self._chance)
        async with self._beside():
            while history.now() < self._plan.seconds and not history.violations:
                await self._round()
                say(f"  {history.now():4.0f} s: {len(history.entries)} entries, {sum(self._faults.values())} faults, {self._rests} rests")
            await self._caught_up()
        found, counts = await verdict(world, self._followed)
        operations = [entry for entry in history.entries if entry.who not in {"nemesis", "rest"}]
        return Outcome(
            seed=self._plan.seed,
            seconds=history.now(),
            operations=dict(Counter(entry.kind for entry in operations)),
            outcomes=dict(Counter(entry.outcome for entry in operations)),
            faults=dict(self._faults),
            rests=self._rests,
            events=len(self._followed["first follower"]),
            slowest_list_ms=self._slowest_s * 1e3,
            counts=counts,
            violations=tuple(found),
        )

    @asynccontextmanager
    async def _beside(self) -> AsyncIterator[None]:
        """The clients, the followers and the one who looks at the clock, for as long as the block lasts."""
        clients = max(4, self._plan.machines // 2)
        work = [self._client(number) for number in range(clients)]
        work += [self._follow(events) for events in self._followed.values()]
        work.append(self._time_lists())
        tasks = [asyncio.create_task(one, name=f"nemesis:{number}") for number, one in enumerate(work)]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            ended = await asyncio.gather(*tasks, return_exceptions=True)
            failed = [one for one in ended if isinstance(one, Exception)]
            if failed:
                raise failed[0]

    async def _round(self) -> None:
        """Faults for a while, some at the same time; then a rest."""
        until = min(self._world.history.now() + ROUND_S, self._plan.seconds)
        daemon = asyncio.Lock()
        async with asyncio.TaskGroup() as group:
            while self._world.history.now() < until:
                await asyncio.sleep(self._chance.expovariate(1 / FAULT_S))
                if self._plan.faults:
                    group.create_task(self._fault(daemon, random.Random(self._chance.random())), name="fault")  # noqa: S311  chosen, not secret
        async with self._world.gate.closed():
            await rest(self._world)
        self._rests += 1

    async def _fault(self, daemon: asyncio.Lock, chance: random.Random) -> None:
        name = chance.choices(self._plan.faults, [FAULTS[name][1] for name in self._plan.faults])[0]
        if not name.startswith("daemon"):
            self._faults[name] += 1
            await FAULTS[name][0](self._world, chance)
        elif not daemon.locked():  # or else it would be down most of the time, and nothing would be asked of it
            self._faults[name] += 1
            async with daemon:
                await FAULTS[name][0](self._world, chance)
                await asyncio.sleep(chance.uniform(0, UP_S))

    async def _client(self, number: int) -> None:
        chance = random.Random(f"{self._plan.seed}:{number}")  # noqa: S311  chosen, not secret
        pace = random.Random(number)  # noqa: S311  another one: how often a client waits for the daemon must not change what it does
        while True:
            await asyncio.sleep(pace.expovariate(1 / THINK_S))
            # Most clients that find no daemon wait for it.
            if not self._world.was_disturbed(self._world.history.now()) or pace.random() < 0.1:
                await chosen(self._world, f"client{number}", chance)

    async def _follow(self, events: list[Event]) -> None:
        """Follows the events over every end of the daemon, always from the last number seen."""
        while True:
            try:
                async with Client(self._world.daemon.socket) as client:
                    async for item in client.events(since=events[-1].number if events else 0):
                        if isinstance(item, EventGap):
                            self._world.history.broken("events", f"events are not kept: {item}")
                        else:
                            events.append(item)
            except QmpdError:
                await asyncio.sleep(FOLLOW_S)

    async def _caught_up(self) -> None:
        """Waits until the followers have what there is."""
        async with Client(self._world.daemon.socket) as client:
            last = (await client.events_page(None, 1)).last
        for _ in range(int(CATCH_UP_S / LOOK_S)):
            if all(events and events[-1].number >= last for events in self._followed.values()):
                return
            await asyncio.sleep(LOOK_S)
        self._world.history.broken("events", f"a follower was not told of event {last}")

    async def _time_lists(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(LIST_S)
            began, clock = self._world.history.now(), loop.time()
            try:
                async with Client(self._world.daemon.socket) as client:
                    await client.machines()
            except QmpdError:
                continue
            took = loop.time() - clock
            if self._world.was_disturbed(began):
                continue
            self._slowest_s = max(self._slowest_s, took)
            if took > self._plan.list_limit_s:
                self._world.history.broken("I6", f"a list took {took:.1f} s")
