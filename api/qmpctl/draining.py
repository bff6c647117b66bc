"""Emptying a host: all its machines to other ones, a few at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import click

from qmpctl.exits import Exit, report
from qmpctl.history import meters
from qmpctl.invocation import Verb, perform
from qmpctl.machines import LabelType
from qmpctl.migrating import converted, goal_of, goal_options, show_outcome
from qmpd.errors import QmpdError
from qmpd.lifecycle import ANSWERING, AT_REST, State

if TYPE_CHECKING:
    from qmpd.migrationviews import MigrateRequest
    from qmpd.views import JobView, MachineView
    from qmpd_api.client import Client

    Show = Callable[[JobView], None]
    Begin = Callable[[str], Show]

#: Each takes as much of the network as it gets: more at once only make each one's downtime longer.
PARALLEL: Final = 2
#: Errors of one peer that another one may not have: it does not take the machine, or cannot be reached.
_ELSEWHERE: Final = frozenset({"cannot_move", "peer_unavailable", "peer_refused", "peer_silent"})


@click.command("drain", cls=Verb)
@click.argument("peers", metavar="PEER...", nargs=-1, required=True)
@click.option("--parallel", type=click.IntRange(1, 64), default=PARALLEL, show_default=True, metavar="N", help="So many at a time.")
@click.option("--label", "labels", type=LabelType(), multiple=True, help="Only machines with this label; may be repeated.")
@click.option("--all", "everything", is_flag=True, help="Also machines that do not run.")
@click.option("--dry-run", is_flag=True, help="Only find out which could move where.")
@goal_options()
def drain_command(
    peers: Sequence[str], parallel: int, labels: Sequence[tuple[str, str]], everything: bool, dry_run: bool, **wishes: Any
) -> int:
    """Move every machine that runs or is paused to the peers, in turn; to another one of them if the first does not take it."""
    if wishes["then"] is not None and wishes["deadline"] is None:
        raise click.UsageError("--then says what happens at the deadline: give a --deadline")
    from qmpd.migrationviews import MigrateRequest

    requests = [converted({"peer": peer, "dry_run": dry_run, "goal": goal_of(wishes)}, MigrateRequest) for peer in dict.fromkeys(peers)]
    states = ANSWERING | AT_REST if everything else ANSWERING
    return perform(lambda client: _drain(client, requests, parallel, dict(labels), states))


async def _drain(
    client: Client, requests: Sequence[MigrateRequest], parallel: int, labels: Mapping[str, str], states: frozenset[State]
) -> int:
    listing = await client.machines(labels)
    turns = asyncio.Semaphore(parallel)
    exits: list[int] = []

    async def one(machine: MachineView, place: int, begin: Begin) -> None:
        order = [*requests[place % len(requests) :], *requests[: place % len(requests)]]
        async with turns:
            try:
                job, request = await _moved(client, machine.name, order, begin)
            except QmpdError as error:
                exits.append(report(error, machine.name))
            else:
                exits.append(show_outcome(job, request, one_line=True))

    movable = [machine for machine in listing.machines if machine.state in states]
    with meters() as begin:
        async with asyncio.TaskGroup() as group:
            for place, machine in enumerate(movable):
                group.create_task(one(machine, place, begin), name=f"qmpctl drain {machine.name}")
    for machine in listing.machines:
        if machine not in movable:
            click.echo(f"{machine.name}: left here: it is {machine.state}", err=True)
    return next((code for code in exits if code), Exit.OK)


async def _moved(client: Client, name: str, order: Sequence[MigrateRequest], begin: Begin) -> tuple[JobView, MigrateRequest]:
    """The job of the first peer that takes the machine, or that of the last one that does not."""
    *others, last = order
    for request in others:
        try:
            job = await _tried(client, name, request, begin)
        except QmpdError as error:
            if error.code not in _ELSEWHERE:
                raise
        else:
            if job.error is None or job.error.get("code") not in _ELSEWHERE:
                return job, request
    return await _tried(client, name, last, begin), last


async def _tried(client: Client, name: str, request: MigrateRequest, begin: Begin) -> JobView:
    job = await client.migrate(name, request)
    return await client.wait_job(job.id, begin(f"{name} to {request.peer}"))
