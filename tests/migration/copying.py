"""Crash points of a machine that is copied, at rest or while it runs: a daemon dies, or the line is cut, at a failpoint of either side.

Whatever comes of it: when everything is up and joined again the original is where it was, as it was, every byte of it, and starts, or runs
on as the process that it was; nothing is left beside its images; and the peer has either nothing, or another machine with the same disks,
which starts as well. Both journals say which.
"""

from __future__ import annotations

import asyncio
import contextlib

from qmpd.errors import QmpdError
from qmpd.lifecycle import AT_REST, State
from qmpd.migrationviews import CopyRequest, DiskChoice, MigrateRequest
from qmpd.views import DefinitionView, MachineView
from tests.guests.build import Guest
from tests.migration.baggage import PRINTED
from tests.migration.crashes import Case, Point, Verdict, made_whole, passed, removed, struck
from tests.migration.hosts import Host, Hosts
from tests.migration.resting import OWN, Resting, digest_of, put_to_rest
from tests.migration.traveller import PATIENCE_S, Broken


def _request(resting: Resting) -> MigrateRequest:
    """Copies it under its own name."""
    disks = (DiskChoice(disk=0, how="copy", path=str(resting.there)),)
    return MigrateRequest(peer=resting.sides.destination.name, disks=disks, copy=CopyRequest())


async def survey_of_copy(
    world: Hosts, guest: Guest, name: str = "surveyed", *, everything: bool = False, runs: bool = False
) -> list[Point]:
    """Every point that a copy passes. Leaves the hosts as they were."""
    resting = await put_to_rest(world, guest, name)
    if runs:
        await _running(resting)
    points = await passed(resting.sides, _request(resting), everything=everything, settled=resting.sides.machine.rest)
    await removed(resting.sides.machine)
    return points


async def suffered_in_copy(world: Hosts, guest: Guest, name: str, case: Case, *, runs: bool = False) -> Verdict:
    """One case, from a machine that is made for it until that and its copy are gone again."""
    resting = await put_to_rest(world, guest, name)
    machine = resting.sides.machine
    reached, end = False, ""
    broken: list[str] = []
    try:
        before = await _defined(resting.sides.source, name)
        pid = await _running(resting) if runs else None
        reached = await struck(resting.sides, case, _request(resting), runs=runs)
        await made_whole(world)
        end, broken = await _judged(resting, before, pid)
    except Broken as error:
        broken = [str(error)]
    finally:
        await made_whole(world)
    broken += await asyncio.to_thread(machine.twice)
    with contextlib.suppress(Broken, QmpdError):
        await removed(machine)
    return Verdict(case=case, reached=reached, end=end, broken=tuple(broken))


async def _defined(host: Host, name: str) -> DefinitionView:
    async with host.client() as client:
        return await client.definition(name)


async def _judged(resting: Resting, before: DefinitionView, pid: int | None) -> tuple[str, list[str]]:
    sides, machine = resting.sides, resting.sides.machine
    await machine.rest()
    await machine.idle()
    views = await machine.views()
    original, copy = views.get(sides.source.name), views.get(sides.destination.name)
    if original is None:
        return "lost", [f"the original is gone: {views}"]
    broken = [] if await _defined(sides.source, machine.name) == before else ["the original's definition was changed"]
    if pid is None and original.exit != resting.exit:
        broken.append(f"it ended otherwise: {original.exit}, and {resting.exit} before")
    lines = await asyncio.to_thread(machine.lines, sides.source)
    source_says = lines[-1].phase if lines else "as if nobody had asked"
    if (source_says == "copied") is (copy is None):
        broken.append(f"the source says that it is {source_says}, and the peer has {copy}")
    if copy is None:
        broken += await asyncio.to_thread(machine.left_at, sides.destination)
    elif copy.uuid == original.uuid:
        broken.append("the copy has the UUID of its original")
    if pid is not None:
        broken += await _goes_on(resting, pid)
    broken += await asyncio.to_thread(_files, resting, copy)
    for host, view in ((sides.source, original if pid is None else None), (sides.destination, copy)):
        if view is not None:
            broken += await _starts(host, view, resting)
    return f"{'a copy' if copy is not None else 'no copy'} at {sides.destination.name}", broken


def _files(resting: Resting, copy: MachineView | None) -> list[str]:
    """What is wrong with the files of both, and what there is that should not be."""
    sides, machine = resting.sides, resting.sides.machine
    places = {"original": (resting.image, sides.source)}
    if copy is not None:
        places["copy"] = (resting.there, sides.destination)
    found = {what: (digest_of(image), digest_of(host.own(machine.name) / OWN)) for what, (image, host) in places.items()}
    broken = [f"the disks of the {what} are others" for what, digests in found.items() if digests != resting.digests]
    if copy is None and resting.there.exists():
        broken.append(f"left: {resting.there}")
    looked = (resting.there.parent, *(each.daemon.state_dir / "machines" for each in machine.world.each))
    return broken + [
        f"left: {path}" for place in looked for path in place.rglob(".*") if path.name.endswith((".arriving", ".still", ".new"))
    ]


async def _running(resting: Resting) -> int:
    """Starts the original; the process that it is."""
    machine, source = resting.sides.machine, resting.sides.source
    async with source.client() as client:
        await client.start(machine.name)
    await machine.grown(source, PRINTED)
    view = (await machine.views())[source.name]
    if view.pid is None:
        raise Broken(f"it is {view.state}, and was started")
    return view.pid


async def _goes_on(resting: Resting, pid: int) -> list[str]:
    """What is wrong with an original that ran while it was copied."""
    machine, source = resting.sides.machine, resting.sides.source
    async with source.client() as client:
        view = await client.wait(machine.name, [State.RUNNING], PATIENCE_S)
        if view.pid != pid:
            return [f"another process runs it: {view.pid}, and {pid} before"]
        nodes = await client.qmp(machine.name, "query-named-block-nodes", {"flat": True})
    await machine.grown(source, PRINTED)
    names = [str(node["node-name"]) for node in (nodes if isinstance(nodes, list) else [])]
    left = [name for name in names if name.startswith("still-") and not name.endswith("-filter")]
    return [f"left in QEMU: {what}" for what in (*left, *(each for each in await machine.untouched(source)))]


async def _starts(host: Host, view: MachineView, resting: Resting) -> list[str]:
    if view.state not in AT_REST:
        return [f"{view.name} is {view.state} at {host.name}, and nobody started it"]
    async with host.client() as client:
        await client.start(view.name)
        await resting.sides.machine.grown(host, PRINTED)
        await client.kill(view.name)
    return []
