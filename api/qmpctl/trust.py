"""Commands for whom the daemon trusts: other daemons, and who did what."""

from __future__ import annotations

import asyncio
import re
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Final

import click

from qmpctl.completion import machine_names
from qmpctl.exits import Exit
from qmpctl.invocation import AT_ONCE, Verb, as_json, perform
from qmpctl.tables import print_json, print_table

if TYPE_CHECKING:
    from qmpd.auditviews import AuditEntry
    from qmpd.peerviews import PeerHealth, PeerView
    from qmpd_api.client import Client

#: How the entries of the audit log are shown.
_ENTRIES: Final = ("AT", "STATUS", "WHO", "FROM", "MACHINE", "REQUEST")
_AGES: Final = re.compile(r"(\d+)([smhd])")
_SECONDS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
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


class Moment(click.ParamType[str]):
    """A time (RFC 3339; without a zone: of this host), or how long ago: `90s`, `15m`, `2h`, `7d`. Becomes a time in UTC."""

    name = "time"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The time as the API wants it."""
        text = str(value)
        age = _AGES.fullmatch(text)
        try:
            if age is not None:
                moment = datetime.now(UTC) - timedelta(seconds=int(age[1]) * _SECONDS[age[2]])
            else:
                moment = datetime.fromisoformat(text)
            return moment.astimezone(UTC).isoformat()
        except (ValueError, OverflowError):
            self.fail(f"{text!r} is neither a time like 2026-11-01T12:00:00Z nor an age like 2h", param, ctx)


@click.command("audit", cls=Verb)
@click.option("--since", type=Moment(), help="Only entries not older than this: a time, or an age like 2h.")
@click.option("--machine", metavar="NAME", shell_complete=machine_names, help="Only requests about one machine.")
@click.option("--who", metavar="NAME|ID", help="Only those of one user, like root or admin:ada, or of one token or certificate.")
@click.option("--limit", type=click.IntRange(1, 1000), default=100, show_default=True, help="At most so many, the newest.")
def audit_command(since: str | None, machine: str | None, who: str | None, limit: int) -> None:
    """Show who changed what, and who was refused, the newest last."""
    page = perform(lambda client: client.audit(since=since, machine=machine, who=who, limit=limit))
    if as_json():
        print_json(page)
        return
    print_table(_ENTRIES, [_entry(entry) for entry in reversed(page.entries)])
    if page.more:
        click.echo(f"qmpctl: there are more than {limit}; --limit and --since choose", err=True)


def _entry(entry: AuditEntry) -> tuple[str, ...]:
    process = None if entry.uid is None else f"uid {entry.uid} pid {entry.pid}"
    status = f"{entry.status} {entry.code}" if entry.code else str(entry.status) if entry.status else "broke off"
    what = f"{entry.method} {entry.route}" if entry.subject is None else f"{entry.method} {entry.route} {entry.subject}"
    return (entry.at, status, entry.who or "-", entry.origin or process or "-", entry.machine or "-", what)
