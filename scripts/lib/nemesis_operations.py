"""What the clients of a nemesis run do, chosen by chance: every verb, and the ways in which a client can behave badly."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Final, Literal

import msgspec

from qmpd.lifecycle import State
from qmpd.spec import MachineSpec
from qmpd.views import ExpectRequest, MachineView, ShutdownRequest
from scripts.lib.nemesis_history import OK, PAUSED, REFUSED, RUNNING, UNKNOWN, Entry
from scripts.lib.nemesis_world import OPERATION_LIMIT_S, World

#: Statuses that ask a client to come again are not kept for a repeated key (API reference): 429, 500 and 503.
NOT_KEPT: Final = frozenset({REFUSED, "too_many_requests", "internal", "monitor_unavailable", "host_error"})

Operation = Callable[[World, str, str, random.Random], Awaitable[None]]


async def create(world: World, who: str, name: str, chance: random.Random) -> None:
    """A new machine, started or not."""
    mark = f"{who}-{len(world.history.entries)}"
    start, paused = chance.random() < 0.6, chance.random() < 0.2
    run = "" if not start else PAUSED if paused else RUNNING
    async with world.operation(who, "create", name, mark=mark, run=run) as (client, entry):
        entry.given = (await client.create(world.spec(name, mark, chance), start=start, paused=start and paused)).revision


async def start(world: World, who: str, name: str, chance: random.Random) -> None:
    """A start, sometimes paused."""
    paused = chance.random() < 0.25
    async with world.operation(who, "start", name, run=PAUSED if paused else RUNNING) as (client, entry):
        entry.pid = (await client.start(name, paused=paused)).pid


async def stop(world: World, who: str, name: str, _chance: random.Random) -> None:
    """An end in order."""
    async with world.operation(who, "stop", name) as (client, entry):
        entry.detail = (await client.stop(name)).method


async def kill(world: World, who: str, name: str, _chance: random.Random) -> None:
    """An end at once."""
    async with world.operation(who, "kill", name) as (client, entry):
        entry.detail = (await client.kill(name)).method


def simple(verb: str) -> Operation:
    """One of the verbs that say everything with their name."""

    async def act(world: World, who: str, name: str, _chance: random.Random) -> None:
        async with world.operation(who, verb, name) as (client, _):
            await {"pause": client.pause, "resume": client.resume, "reset": client.reset}[verb](name)

    return act


async def shutdown(world: World, who: str, name: str, chance: random.Random) -> None:
    """Asks the guest, which does not hear it; what is to follow comes later, with nobody waiting."""
    then: Literal["nothing", "stop", "kill"] = chance.choice(("nothing", "stop", "kill"))
    request = ShutdownRequest(timeout_s=chance.uniform(0.2, 2), then=then)
    async with world.operation(who, "ask-shutdown", name) as (client, entry):
        if then != "nothing":
            _later(world, entry, "shutdown")
        await client.shutdown(name, request)


async def replace(world: World, who: str, name: str, chance: random.Random) -> None:
    """Reads a definition and writes it back with another mark; sometimes with an old revision."""
    mark = f"{who}-{len(world.history.entries)}"
    revision = await _definition(world, who, name)
    if revision is None:
        return
    given = revision if chance.random() < 0.75 else max(1, revision - chance.randint(1, 5))
    async with world.operation(who, "replace", name, mark=mark, revision=given) as (client, entry):
        entry.given = (await client.replace(name, world.spec(name, mark, chance), given)).revision


async def delete(world: World, who: str, name: str, chance: random.Random) -> None:
    """Deletes what is at rest; sometimes only what was read, sometimes with an old revision."""
    revision = await _definition(world, who, name) if chance.random() < 0.6 else None
    if revision is not None and chance.random() < 0.2:
        revision = max(1, revision - 1)
    async with world.operation(who, "delete", name, revision=revision) as (client, _):
        await client.delete(name, revision)


async def _definition(world: World, who: str, name: str) -> int | None:
    async with world.operation(who, "definition", name) as (client, entry):
        view = await client.definition(name)
        entry.mark, entry.revision = view.spec.labels.get("mark", ""), view.revision
    return entry.revision


async def look(world: World, who: str, name: str, chance: random.Random) -> None:
    """One machine: as it is, or its definition."""
    if chance.random() < 0.5:
        await _definition(world, who, name)
        return
    async with world.operation(who, "view", name) as (client, entry):
        _seen(entry, await client.machine(name))


async def listing(world: World, who: str, _name: str, chance: random.Random) -> None:
    """All machines, or those with a label or in a state. What is not there is an answer, too."""
    group = chance.choice((None, None, "a", "b"))
    state = chance.choice((None, None, None, State.RUNNING))
    begin = world.history.now()
    async with world.operation(who, "lists") as (client, asked):
        found = (await client.machines({"group": group} if group else {}, state)).machines
    if asked.outcome != OK:
        return
    if any(group not in (None, view.labels.get("group")) or state not in (None, view.state) for view in found):
        world.history.broken("list", f"a list of {group} {state} has others")
    views = {view.name: view for view in found}
    for name in world.names if group is None and state is None else views:
        entry = world.history.begin(who, "list", name)
        entry.begin = begin
        if name in views:
            _seen(entry, views[name])
        world.history.end(entry, OK if name in views else "not_found")


def _seen(entry: Entry, view: MachineView) -> None:
    entry.mark, entry.revision, entry.pid = view.labels.get("mark", ""), view.revision, view.pid
    entry.detail = str(view.state)


async def wait(world: World, who: str, name: str, chance: random.Random) -> None:
    """Waits for a state that may never come."""
    async with world.operation(who, "wait", name) as (client, _):
        await client.wait(name, [chance.choice(list(State))], chance.uniform(0, 3))


async def qmp(world: World, who: str, name: str, chance: random.Random) -> None:
    """Talks to QEMU itself, behind the daemon's back so to say."""
    command = chance.choice(("query-status", "query-name", "query-block", "stop", "cont", "quit"))
    kind = f"qmp-{command}" if command in {"stop", "cont"} else "qmp"
    async with world.operation(who, kind, name, detail=command) as (client, entry):
        if command == "quit":
            _later(world, entry, "qmp-quit")
        await client.qmp(name, command)


def _later(world: World, asked: Entry, kind: str) -> None:
    """Notes what a request may bring about after it was answered."""
    effect = world.history.begin(asked.who, kind, asked.machine)
    effect.begin = asked.begin
    world.history.end(effect, UNKNOWN)


async def console_read(world: World, who: str, name: str, chance: random.Random) -> None:
    """Reads a piece of the console's log again, and compares it with what was read before."""
    async with world.operation(who, "console-read", name) as (client, entry):
        uuid = (await client.machine(name)).uuid
        known = world.consoles.setdefault(uuid, bytearray())
        since = chance.randint(0, len(known))
        before = len(known)
        read = await client.log(name, since=since, limit=65_536)
        if (await client.machine(name)).uuid != uuid:
            return
        entry.detail = f"{read.offset}+{len(read.data)} of {read.end}"
        problem = compared(known, read.offset, read.data)
        if read.end < before:
            problem = f"had {before} bytes and has {read.end}"
        if problem is not None:
            world.history.broken("console", f"the console of {name} {problem}", name)


def compared(known: bytearray, offset: int, data: bytes) -> str | None:
    """What contradicts what is known of a log in these bytes of it; bytes that go on where it ends are added."""
    overlap = bytes(known[offset : offset + len(data)])
    if overlap != data[: len(overlap)]:
        return f"has changed: at {offset} was {overlap[:60]!r}, is {data[:60]!r}"
    if offset <= len(known) < offset + len(data):
        known += data[len(known) - offset :]
    return None


async def console_write(world: World, who: str, name: str, chance: random.Random) -> None:
    """Types, and looks at what comes first."""
    async with world.operation(who, "console-write", name) as (client, _), client.console(name, scrollback=64) as console:
        await console.write(bytes(chance.randrange(32, 127) for _ in range(chance.randint(1, 40))))


async def expect(world: World, who: str, name: str, chance: random.Random) -> None:
    """Waits for the banner."""
    request = ExpectRequest(pattern="BM-OK [a-z0-9_-]+", from_start=True, timeout_s=chance.uniform(0, 3))
    async with world.operation(who, "expect", name) as (client, entry):
        found = await client.expect(name, request)
        entry.detail = found.reason
        if found.matched and not world.guest(name).banner.startswith(found.text):
            world.history.broken("console", f"the console of {name} greets with {found.text!r}", name)


async def stall(world: World, who: str, name: str, chance: random.Random) -> None:
    """Opens a console and does not read."""
    async with world.operation(who, "stall", name) as (client, _), client.console(name, since=0):
        await asyncio.sleep(chance.uniform(0.5, 5))


async def vanish(world: World, who: str, name: str, chance: random.Random) -> None:
    """Sends a request, or a part of one, and is gone."""
    verb = chance.choice(("start", "stop", "kill", "pause", "resume", "reset"))
    request = f"POST /v1/machines/{name}/{verb} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n".encode()
    whole = chance.random() < 0.6
    async with world.gate.passed():
        entry = world.history.begin(who, verb if whole else "half-a-request", name if whole else "", detail="and left")
        if verb == "start":
            entry.run = RUNNING
        outcome = REFUSED
        try:
            _, writer = await asyncio.open_unix_connection(world.daemon.socket)
            outcome = UNKNOWN
            writer.write(request if whole else request[: chance.randrange(len(request))])
            await writer.drain()
            await asyncio.sleep(chance.choice((0, 0, 0.01, 0.1)))
            writer.close()
            await writer.wait_closed()
        except OSError:
            pass
        world.history.end(entry, outcome)


async def repeat(world: World, who: str, name: str, chance: random.Random) -> None:
    """The same request twice with one key: the second gets the answer of the first, whatever happened to that."""
    kind = chance.choice(("create", "start"))
    mark = f"{who}-{len(world.history.entries)}"
    body = world.spec(name, mark, chance) if kind == "create" else None
    first, one = await _with_key(world, who, name, kind, mark, body)
    await asyncio.sleep(chance.choice((0, 0.2, 2)))
    second, two = await _with_key(world, who, name, kind, mark, body)
    if first.outcome == UNKNOWN:
        # The second may be answered as the first would have been: then there was one effect, somewhere between both.
        second.begin = first.begin
        first.kind = "repeated" if second.outcome == OK else kind
        return
    same = first.outcome == second.outcome and one == two
    if not same and (first.outcome in NOT_KEPT or _was_full(world, first)):
        return
    second.kind, second.machine = "repeated", ""
    if not same and second.outcome not in (UNKNOWN, REFUSED):
        what = f"{kind} with key {mark} was answered {first.outcome} and then {second.outcome}"
        world.history.broken("idempotency", f"{what}: {one[:200]!r} and {two[:200]!r}", name)


def _was_full(world: World, entry: Entry) -> bool:
    """Whether the disk was full while this went on: then its answer reached the client, and could not be kept."""
    return any(
        other.kind == "fault-full" and other.begin <= (entry.end or other.begin) and (other.end is None or other.end >= entry.begin)
        for other in world.history.entries
    )


async def _with_key(world: World, who: str, name: str, kind: str, mark: str, body: MachineSpec | None) -> tuple[Entry, bytes]:
    answer = b""
    facts: dict[str, object] = {"mark": mark} if kind == "create" else {"run": RUNNING}
    async with world.operation(who, kind, name, **facts, detail="with a key") as (client, entry):
        path = "/v1/machines" if body is not None else f"/v1/machines/{name}/start"
        headers = {"Idempotency-Key": mark}
        reply = await client.connection.fetch("POST", path, headers=headers, body=body, deadline_s=OPERATION_LIMIT_S)
        answer = reply.body
        entry.given = msgspec.msgpack.decode(answer, type=MachineView).revision if body is not None else None
    return entry, answer


#: How often each is chosen, of all.
WEIGHTS: Final[dict[Operation, int]] = {
    create: 9, start: 14, simple("pause"): 6, simple("resume"): 6, simple("reset"): 4, shutdown: 3, stop: 6, kill: 4, replace: 5,
    delete: 2, look: 8, listing: 4, wait: 4, qmp: 8, console_read: 6, console_write: 3, expect: 4, stall: 1, vanish: 4, repeat: 4,
}  # fmt: skip


async def chosen(world: World, who: str, chance: random.Random) -> None:
    """One operation on one machine, by chance."""
    name = chance.choice(world.names)
    operation = chance.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
    # Chance of its own, so that how an operation ends does not change what is chosen next.
    await operation(world, who, name, random.Random(chance.random()))  # noqa: S311  chosen, not secret
