"""Every crash point of a migration: at each failpoint of both daemons one of them dies, a QEMU dies, or the line between them is cut.

The daemon that reaches the failpoint stands still there (`stop`) while the harm is done, and then goes on, if it still can. Whatever
comes of it: never two copies at once; and when everything is up and joined again, one host owns the machine, it runs there without a lost
byte (unless its QEMU was killed), and nothing is left on the other.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, Literal

import msgspec

from qmpd.errors import QmpdError
from qmpd.failpoint import CATALOGUE
from qmpd.lifecycle import AT_REST, State
from qmpd.migrationviews import MigrateRequest
from qmpd.views import JobView
from tests.migration.baggage import PRINTED, Baggage, Ending, kill_tpm
from tests.migration.hosts import Host, Hosts
from tests.migration.traveller import LOOK_S, PATIENCE_S, Broken, Traveller

Side = Literal["source", "destination"]

#: The failpoints of both journals, of what one daemon says to the other, and of the disks of one moment.
OF_MIGRATION: Final = ("migration-", "ownership-", "peer-", "still-")
#: A line that is cut for a moment: longer than a question takes, shorter than anybody's patience.
FLAP_S: Final = 3.0
#: A line that is cut for good is looked at for so long: whoever can decide by himself has done so.
CUT_S: Final = 25.0
#: From the harm until daemons are started again: what goes on without them goes on.
APART_S: Final = 1.0
_PASSED: Final = re.compile(r"failpoint passed failpoint=(\S+) what=stop")


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """A moment of a migration: the N-th time that one side comes by a failpoint."""

    side: Side
    failpoint: str
    number: int

    def __str__(self) -> str:
        return f"{self.side} {self.failpoint}@{self.number}"


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """What happens when."""

    point: Point
    harm: str

    def __str__(self) -> str:
        return f"{self.point} {self.harm}"


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """What came of a case. `reached`: the migration came by the point. `end` is where the machine is then, and in which state."""

    case: Case
    reached: bool
    end: str
    broken: tuple[str, ...] = ()


class Sides(msgspec.Struct, frozen=True, kw_only=True):
    """The hosts of a migration, and the machine."""

    source: Host
    destination: Host
    machine: Traveller

    def of(self, side: Side) -> Host:
        """The host of a side."""
        return self.source if side == "source" else self.destination


async def _kill(*hosts: Host) -> None:
    for host in hosts:
        await host.kill()


async def _kill_qemu(host: Host, machine: Traveller) -> None:
    await asyncio.to_thread(host.kill_qemu, machine.name)


async def _kill_tpm(host: Host, machine: Traveller) -> None:
    await asyncio.to_thread(kill_tpm, host, machine.name)


async def _cut(sides: Sides) -> None:
    await asyncio.to_thread(sides.machine.world.network.cut)


async def _deafen(sides: Sides, to: Side) -> None:
    network = sides.machine.world.network
    other = sides.of("source" if to == "destination" else "destination")
    await asyncio.to_thread(network.deafen, other.station, sides.of(to).station)


async def _nothing(_sides: Sides) -> None:
    """Only the time that it took."""


HARMS: Final[dict[str, Callable[[Sides], Awaitable[None]]]] = {
    "source-daemon": lambda sides: _kill(sides.source),
    "destination-daemon": lambda sides: _kill(sides.destination),
    "both-daemons": lambda sides: _kill(sides.source, sides.destination),
    "source-qemu": lambda sides: _kill_qemu(sides.source, sides.machine),
    "destination-qemu": lambda sides: _kill_qemu(sides.destination, sides.machine),
    "source-tpm": lambda sides: _kill_tpm(sides.source, sides.machine),
    "destination-tpm": lambda sides: _kill_tpm(sides.destination, sides.machine),
    "link-cut": _cut,
    "link-flap": _cut,
    "deaf-source": lambda sides: _deafen(sides, "source"),
    "deaf-destination": lambda sides: _deafen(sides, "destination"),
    "pause": _nothing,
}
#: What is asked for unless somebody says otherwise: the list of the promise.
PROMISED: Final = ("source-daemon", "destination-daemon", "both-daemons", "source-qemu", "destination-qemu", "link-cut", "link-flap")
#: How long the harm lasts before everything is made whole again.
LASTING: Final = {"link-cut": CUT_S, "link-flap": FLAP_S, "deaf-source": CUT_S, "deaf-destination": CUT_S, "pause": 0.0}


async def survey(world: Hosts, baggage: Baggage, *, everything: bool = False) -> list[Point]:
    """Every point that a migration passes. Leaves the hosts as they were."""
    machine = Traveller(world, baggage.spec, copied=baggage.copied)
    await machine.begin(world[0])
    await baggage.begun(machine, world[0])
    sides = Sides(source=world[0], destination=world[1], machine=machine)
    points = await passed(sides, baggage.request(world[1]), everything=everything, own=baggage.points)
    await removed(machine)
    return points


async def passed(
    sides: Sides,
    request: MigrateRequest,
    *,
    everything: bool = False,
    own: tuple[str, ...] = (),
    settled: Callable[[], Awaitable[object]] | None = None,
) -> list[Point]:
    """Every point that this migration passes, which must end well: both daemons stop at each failpoint, and are sent on. `own` are those of
    what is taken along. `settled` waits until all is over; as a rule one host has the machine then."""
    world, machine = sides.machine.world, sides.machine
    names = [name for name in CATALOGUE if everything or name.startswith((*OF_MIGRATION, *own))]
    begun = {host.name: len(host.log()) for host in world.each}
    thawing = asyncio.create_task(_thawed(world), name="thawing")  # a daemon may come by one before it answers
    try:
        for host in world.each:
            await host.restart(",".join(f"{name}:stop" for name in names if name != "database-migrate"))
        await ended(sides, await asked(sides, request))
        await (settled or machine.at_home)()
    finally:
        thawing.cancel()
        await asyncio.gather(thawing, return_exceptions=True)
    points: list[Point] = []
    for side in ("source", "destination"):
        host = sides.of(side)
        counts: Counter[str] = Counter()
        for name in _PASSED.findall(host.log()[begun[host.name] :]):
            counts[name] += 1
            points.append(Point(side=side, failpoint=name, number=counts[name]))
    for host in world.each:
        await host.restart()
    return points


async def suffered(world: Hosts, baggage: Baggage, case: Case) -> Verdict:
    """One case, from a machine that is made for it until that is gone again."""
    machine = Traveller(world, baggage.spec, copied=baggage.copied)
    sides = Sides(source=world[0], destination=world[1], machine=machine)
    reached, end = False, ""
    broken: list[str] = []
    try:
        await machine.begin(sides.source)
        await baggage.begun(machine, sides.source)
        reached = await struck(sides, case, baggage.request(sides.destination))
        await made_whole(world)
        end, broken = await _judged(sides, case, baggage)
    except Broken as error:
        broken = [str(error)]
    finally:
        await made_whole(world)
    broken += await asyncio.to_thread(machine.twice)
    with contextlib.suppress(Broken, QmpdError):
        await removed(machine)
    return Verdict(case=case, reached=reached, end=end, broken=tuple(broken))


async def struck(sides: Sides, case: Case, request: MigrateRequest, *, runs: bool = True) -> bool:
    """The migration, and the harm at its moment, until the time comes to make things whole again."""
    host = sides.of(case.point.side)
    await sides.machine.world.other(host).armed("")
    await host.armed(f"{case.point.failpoint}:stop@{case.point.number}")
    if runs:  # a daemon answers before it has taken its machines over
        async with sides.source.client() as client:
            await client.wait(sides.machine.name, [State.RUNNING], PATIENCE_S)
    asking = asyncio.create_task(_tried(sides, request), name="asking")
    try:
        if not await _stopped(host, asking, sides):
            return False
        await HARMS[case.harm](sides)
        await asyncio.to_thread(sides.machine.visit, sides.destination)
        host.thaw()
        await asyncio.sleep(LASTING.get(case.harm, APART_S))
        await asyncio.to_thread(sides.machine.visit, sides.destination)
        return True
    finally:
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)


async def _stopped(host: Host, asking: asyncio.Task[JobView | None], sides: Sides) -> bool:
    """Whether the host comes to stand still before its migration is over, and everything about it is settled."""
    loop = asyncio.get_running_loop()
    end = loop.time() + PATIENCE_S
    while not host.stands_still:
        if asking.done() and not await asyncio.to_thread(sides.machine.unsettled):
            return False
        if loop.time() > end:
            raise Broken("neither did the daemon stand still nor was the migration settled")
        await asyncio.sleep(LOOK_S / 10)
    return True


async def _judged(sides: Sides, case: Case, baggage: Baggage) -> tuple[str, list[str]]:
    machine = sides.machine
    host, view = await machine.at_home()
    await asyncio.to_thread(machine.visit, host)
    end = f"{view.state} at {host.name}"
    if view.state in AT_REST:
        if not case.harm.endswith("-qemu"):
            return end, [f"it ended, and nobody killed it: {view.exit}"]
        broken = [] if view.exit is not None else ["it ended, and nobody says how"]
        broken += [] if view.state == "crashed" else [f"its QEMU was killed, and it is {view.state}"]
        return end, broken + await baggage.lost(Ending(machine=machine, host=host, runs=False, harm=case.harm))
    if view.state != "running":
        return end, [f"it is {view.state} ({view.status}) at {host.name}"]
    broken = []
    running = await asyncio.to_thread(machine.world.onlooker.running, machine.uuid)
    if [life.pid for life in running] != [view.pid]:
        broken.append(f"the daemon says that pid {view.pid} runs it, and {[life.pid for life in running]} do")
    await machine.grown(host, PRINTED)
    broken += [f"left in QEMU at {host.name}: {what}" for what in await machine.untouched(host)]
    return end, broken + await baggage.lost(Ending(machine=machine, host=host, runs=True, harm=case.harm))


async def made_whole(world: Hosts) -> None:
    """The line is healed; every daemon runs, without failpoints."""
    await asyncio.to_thread(world.network.heal)
    for host in world.each:
        host.thaw()
        if not host.up:
            await host.start()


async def removed(machine: Traveller) -> None:
    """Ends and deletes it wherever it is known."""
    for host in machine.world.each:
        async with host.client() as client:
            if any(view.name == machine.name for view in (await client.machines()).machines):
                await client.kill(machine.name)
                await client.delete(machine.name)


async def asked(sides: Sides, request: MigrateRequest) -> JobView:
    """Has the source move the machine to the destination; the job."""
    async with sides.source.client() as client:
        return await client.migrate(sides.machine.name, request)


async def _tried(sides: Sides, request: MigrateRequest) -> JobView | None:
    """The job's end, or None where its daemon is no more."""
    try:
        return await ended(sides, await asked(sides, request))
    except QmpdError:
        return None


async def ended(sides: Sides, job: JobView) -> JobView:
    """A job of the source, when it has ended."""
    async with sides.source.client() as client:
        return await client.wait_job(job.id)


async def _thawed(world: Hosts) -> None:
    """Sends on whoever stands still, for ever."""
    while True:
        for host in world.each:
            host.thaw()
        await asyncio.sleep(LOOK_S / 10)


def crossed(points: Sequence[Point], harms: Sequence[str]) -> list[Case]:
    """Every harm at every point."""
    return [Case(point=point, harm=harm) for point in points for harm in harms]


def said(world: Hosts, lines: int) -> str:
    """The ends of both daemons' logs."""
    return "\n".join(f"--- {host.name}\n" + "\n".join(host.log().splitlines()[-lines:]) for host in world.each)
