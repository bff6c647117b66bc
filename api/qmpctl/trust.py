"""Commands for other daemons."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

import click

from qmpctl.exits import Exit
from qmpctl.invocation import AT_ONCE, Verb, as_json, perform
from qmpctl.tables import print_json, print_table

if TYPE_CHECKING:
    from qmpd.peerviews import PeerHealth, PeerView
    from qmpd_api.client import Client

_COLUMNS: Final = ("NAME", "URL", "SENDS", "RECEIVES", "STATE", "VERSION", "CLOCK", "CERTIFICATE UNTIL")


@click.command("peers", cls=Verb)
@click.option("--ask/--no-ask", default=True, show_default=True, help="Ask each peer whether it can be reached.")
def peers_command(ask: bool) -> int:
    """List the other daemons that machines are moved to and from, and whether they answer."""
    listed, healths = perform(lambda client: _asked(client, ask=ask))
    if as_json():
        print_json(healths if ask else listed)
    else:
        print_table(_COLUMNS, [_row(peer, healths[place] if ask else None) for place, peer in enumerate(listed)])
        for health in healths:
            if health.problem is not None:
                click.echo(f"{health.name}: {health.problem}", err=True)
    return Exit.NO if any(not health.reachable for health in healths) else Exit.OK


async def _asked(client: Client, *, ask: bool) -> tuple[tuple[PeerView, ...], list[PeerHealth]]:
    listed = await client.peers()
    if not ask:
        return listed, []
    turns = asyncio.Semaphore(AT_ONCE)

    async def one(name: str) -> PeerHealth:
        async with turns:
            return await client.peer_health(name)

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one(peer.name), name=f"qmpctl {peer.name}") for peer in listed]
    return listed, [task.result() for task in tasks]


def _row(peer: PeerView, health: PeerHealth | None) -> tuple[str, ...]:
    state = "-" if health is None else "reachable" if health.reachable else (health.code or "unreachable").replace("_", " ")
    greeting = None if health is None else health.greeting
    shown = None if health is None else health.certificate
    ahead = None if health is None else health.clock_ahead_s
    return (
        peer.name,
        peer.url,
        "yes" if peer.may_send else "no",
        "yes" if peer.may_receive else "no",
        state,
        "-" if greeting is None else greeting.version,
        "-" if ahead is None else f"{ahead:+.1f} s",
        "-" if shown is None else shown.expires_at[:10],
    )
