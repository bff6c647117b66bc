"""The command that swaps the QEMU under a running machine."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import click

from qmpctl.completion import machine_names
from qmpctl.exits import Exit
from qmpctl.history import exit_of, meter
from qmpctl.invocation import Verb, as_json, perform
from qmpctl.migrating import converted
from qmpctl.quantities import duration
from qmpctl.tables import print_json, printable

if TYPE_CHECKING:
    from qmpd.migrationviews import UpgradeRequest
    from qmpd.views import JobView
    from qmpd_api.client import Client

_MS = 1000


@click.command("upgrade-emulator", cls=Verb)
@click.argument("name", shell_complete=machine_names)
@click.option("--emulator", metavar="NAME|PATH", help="Not the one that a start would take now, but this one. The definition stays.")
@click.option("--detach", is_flag=True, help="Do not wait: print the job.")
def upgrade_emulator_command(name: str, emulator: str | None, detach: bool) -> int:
    """Have another QEMU take the place of a running machine's: the installed one, after an upgrade, say. The guest goes on, but for an
    instant. An interrupt leaves it alone."""
    import msgspec

    from qmpd.migrationviews import UpgradeReport, UpgradeRequest

    request = converted({"emulator": emulator}, UpgradeRequest)
    job = perform(lambda client: _upgraded(client, name, request, wait=not detach))
    if job.state == "running":
        if as_json():
            print_json(job)
        else:
            click.echo(job.id)
        return Exit.OK
    if job.state != "succeeded":
        return exit_of(job)
    report = msgspec.convert(job.result, UpgradeReport)
    if as_json():
        print_json(report)
        return Exit.OK
    stood = duration(report.downtime_ms / _MS)
    click.echo(
        printable(f"{report.machine}: QEMU {report.before_version} -> {report.emulator_version} (downtime {stood}, pid {report.pid})")
    )
    for problem in report.problems:
        click.echo(printable(f"  {problem}"))
    return Exit.OK


async def _upgraded(client: Client, name: str, request: UpgradeRequest, *, wait: bool) -> JobView:
    job = await client.upgrade_emulator(name, request)
    if not wait:
        return job
    with meter(f"replacing the QEMU of {name}") as show:
        try:
            return await client.wait_job(job.id, show)
        except asyncio.CancelledError:
            click.echo(f"qmpctl: it goes on; it is cancelled with: qmpctl cancel {job.id}", err=True)
            raise
