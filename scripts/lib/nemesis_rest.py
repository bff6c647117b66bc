"""The rests of a nemesis run: nothing is under way, everything is mended, and what the daemon says must be what is the case."""

from __future__ import annotations

import asyncio
import signal
import time
from typing import Final

from qmpd.errors import QmpdError
from qmpd.lifecycle import ANSWERING, AT_REST, State
from qmpd.views import Event, MachineView
from qmpd_api.client import Client
from scripts.lib.nemesis_checks import misprinted, numbered, told, unaccounted
from scripts.lib.nemesis_faults import end_by_hand
from scripts.lib.nemesis_history import DOWN, PAUSED, RUNNING, UNKNOWN, Life, Violation, of_machine
from scripts.lib.nemesis_model import CHANGES, EFFECTS, judge, shortest
from scripts.lib.nemesis_world import World
from tests.guests.trace import stream

#: A request that nobody waits for any more has reached its machine by now.
SETTLE_S: Final = 1.0
LOOK_S: Final = 0.25
#: The daemon's longest ladder is 40 s, and a host may be loaded: what is not right after this does not become right.
CONVERGE_LIMIT_S: Final = 300.0
#: A QEMU whose files were damaged gets this long to be within reach again; then somebody has to end it by hand.
REACH_LIMIT_S: Final = 6.0
PAGE: Final = 1000
LOG_PIECE: Final = 1 << 20


async def rest(world: World) -> None:
    """Waits until the daemon's word and the truth are the same, and writes both down; what stays different is a broken promise."""
    await asyncio.sleep(SETTLE_S)
    began = time.monotonic()
    async with Client(world.daemon.socket) as client:
        while wrong := await _differences(world, client):
            waited = time.monotonic() - began
            if waited > REACH_LIMIT_S:
                await _end_out_of_reach(world, client)
            if waited > CONVERGE_LIMIT_S:
                for name, what in wrong.items():
                    world.history.broken("I2", f"after {waited:.0f} s of rest: {name}: {what}", name)
                break
            await asyncio.sleep(LOOK_S)
        await _observe(world, client)


async def _end_out_of_reach(world: World, client: Client) -> None:
    """Does what the daemon's message says: ends by hand what it cannot reach. Only where files were damaged may that be needed."""
    for view in (await client.machines()).machines:
        if view.state == State.UNREACHABLE and view.name in world.damaged:
            for life in await asyncio.to_thread(world.watcher.alive, view.name):
                await end_by_hand(world, life, signal.SIGKILL)


async def _differences(world: World, client: Client) -> dict[str, str]:
    """What the daemon says of each machine that is not so, or not settled yet."""
    views = {view.name: view for view in (await client.machines()).machines}
    lives: dict[str, list[Life]] = {}
    for life in await asyncio.to_thread(world.watcher.look):
        lives.setdefault(life.machine, []).append(life)
    wrong = {name: f"not listed, and has {len(found)} QEMUs" for name, found in lives.items() if name not in views}
    for name, view in views.items():
        what = await _difference(client, view, lives.get(name, []))
        if what is not None:
            wrong[name] = what
    for job in (await client.jobs()).jobs:
        if job.state == "running":
            wrong[f"job {job.id}"] = "is running"
    return wrong


async def _difference(client: Client, view: MachineView, lives: list[Life]) -> str | None:
    pids = [life.pid for life in lives]
    if view.operation is not None:
        return f"is held by {view.operation}"
    if view.state in AT_REST:
        return f"is {view.state} with pids {pids}" if pids else None
    if view.state not in ANSWERING or pids != [view.pid]:
        return f"is {view.state} with pid {view.pid}, and there are {pids}"
    try:
        answer = await client.qmp(view.name, "query-status")
    except QmpdError as error:
        return f"is {view.state}, and does not answer: {error.message}"
    runs = isinstance(answer, dict) and answer.get("running") is True
    return None if runs == (view.state == State.RUNNING) else f"is {view.state}, and QEMU says {answer}"


async def _observe(world: World, client: Client) -> None:
    """Writes down what is: exactly this, and nothing else, follows from all that happened. What was unknown is over now."""
    for entry in world.history.entries:
        if entry.outcome == UNKNOWN and entry.end is None:
            entry.end = world.history.now()
    for name in world.names:
        entry = world.history.begin("rest", "rest", name)
        try:
            stored = await client.definition(name)
            view = await client.machine(name)
        except QmpdError as error:
            world.history.end(entry, error.code)
            continue
        entry.mark, entry.revision, entry.pid = stored.spec.labels.get("mark", ""), stored.revision, view.pid
        entry.run = {State.RUNNING: RUNNING, State.PAUSED: PAUSED}.get(view.state, DOWN)
        entry.detail = str(view.state)
        world.history.end(entry)


async def verdict(world: World, followed: dict[str, list[Event]]) -> tuple[list[Violation], dict[str, int]]:
    """Everything that can be said of a run when it is over, and counts of what nobody can know."""
    found = list(world.history.violations)
    counts = {"changes untold": 0, "undecided": 0}
    async with Client(world.daemon.socket) as client:
        kept = await _all_events(client)
        if not world.disk_was_full:
            found += await _logs(world, client)
    found += numbered(followed, kept)
    lives, counts["changes untold"] = told(kept, world.daemon.generation - 1)
    found += lives
    found += unaccounted(world.history.entries, world.watcher.lives)
    for name in world.names:
        own = [entry for entry in of_machine(world.history.entries, name) if entry.kind in EFFECTS or not entry.kind.startswith("fault")]
        own = [entry for entry in own if entry.outcome != UNKNOWN or entry.kind in CHANGES]
        result = await asyncio.to_thread(judge, own)
        counts["undecided"] += not result.decided
        if result.wrong is not None:
            cut = await asyncio.to_thread(shortest, own)
            states = "; ".join(f"{state.mark} at {state.revision}, {state.run}" for state in result.states)
            what = f"nothing explains {result.wrong.kind} of {name} being answered {result.wrong.outcome}: it was {states}"
            found.append(Violation(invariant="I3", what=what, machine=name, history=tuple(entry.line() for entry in cut)))
    return found, counts


async def _all_events(client: Client) -> list[Event]:
    events: list[Event] = []
    while page := (await client.events_page(events[-1].number if events else 0, PAGE)).events:
        events += page
    return events


async def _logs(world: World, client: Client) -> list[Violation]:
    """Whether every byte of every console is one that its guest printed, in its place."""
    found = []
    for view in (await client.machines()).machines:
        log = bytearray()
        while (piece := await client.log(view.name, since=len(log), limit=LOG_PIECE)).data and piece.offset == len(log):
            log += piece.data
        guest = world.guest(view.name)
        what = await asyncio.to_thread(misprinted, bytes(log), guest.name, stream(0, len(log)) if guest.variant == "count" else b"")
        if what is not None:
            found.append(Violation(invariant="console", what=f"the console of {view.name} {what}", machine=view.name))
    return found
