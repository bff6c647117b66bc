"""Commands about what happened and what is under way: events and jobs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

import click

from qmpctl.completion import job_ids, machine_names
from qmpctl.exits import Exit, report
from qmpctl.invocation import Verb, as_json, perform
from qmpctl.journeys import progress_text
from qmpctl.tables import ago, print_facts, print_json, print_table, printable

if TYPE_CHECKING:
    from qmpd.views import Event, JobView
    from qmpd_api.client import Client

#: How many of the newest events are shown without --since: a screenful.
RECENT: Final = 20
#: One request's worth when events are listed.
PAGE: Final = 1000


@click.command("events", cls=Verb)
@click.option("-f", "--follow", is_flag=True, help="Go on, across restarts of the daemon, until interrupted.")
@click.option("--since", type=click.IntRange(min=0), metavar="N", help=f"All after number N (default: the newest {RECENT}).")
@click.option("--machine", metavar="NAME", shell_complete=machine_names, help="Only those of one machine.")
def events_command(follow: bool, since: int | None, machine: str | None) -> None:
    """Show numbered events; with --json one per line."""
    perform(lambda client: _events(client, since, machine, follow=follow))


async def _events(client: Client, since: int | None, machine: str | None, *, follow: bool) -> None:
    from qmpd.views import Event

    if since is None:
        newest = await client.events_page(limit=1)
        since = max(newest.first - 1, newest.last - RECENT, 0)
    if not follow:
        await _past(client, since, machine)
        return
    async for item in client.events(since, machine):
        if isinstance(item, Event):
            _print_event(item)
        else:
            _print_gap(item.since, item.first)


async def _past(client: Client, since: int, machine: str | None) -> None:
    while True:
        page = await client.events_page(since, PAGE, machine)
        if page.gap:
            _print_gap(since, page.first)
        for event in page.events:
            _print_event(event)
        if len(page.events) < PAGE:
            return
        since = page.events[-1].number


def _print_event(event: Event) -> None:
    if as_json():
        print_json(event, one_line=True)
        return
    import msgspec

    kind, where = event.kind, ""
    data: object = event.data
    if kind == "machine.past":
        kind, data = str(event.data.get("kind")), event.data.get("data")
        where = f"  (number {event.data.get('number')} of {event.data.get('host')})"
    text = msgspec.json.encode(data).decode() if data else ""
    click.echo(printable(f"{event.number:>6}  {event.at}  {event.machine or '-'}  {kind}  {text}".rstrip() + where))


def _print_gap(since: int, first: int) -> None:
    click.echo(f"qmpctl: events {since + 1} to {first - 1} are no longer kept", err=True)


@click.command("jobs", cls=Verb)
@click.option("--machine", metavar="NAME", shell_complete=machine_names, help="Only those of one machine.")
def jobs_command(machine: str | None) -> None:
    """List the jobs, newest first."""
    listing = perform(lambda client: client.jobs(machine))
    if as_json():
        print_json(listing)
        return
    rows = ((job.id, job.kind, job.machine or "-", job.state, _progress(job), ago(job.created_at)) for job in listing.jobs)
    print_table(("JOB", "KIND", "MACHINE", "STATE", "PROGRESS", "BEGAN"), rows)


@click.command("job", cls=Verb)
@click.argument("job", metavar="ID", shell_complete=job_ids)
@click.option("--wait", is_flag=True, help="Wait until it has ended, and exit as it did.")
def job_command(job: str, wait: bool) -> int:
    """Show one job."""

    async def look(client: Client) -> int:
        view = await client.job(job)
        if wait:
            return await finished(client, view, view.kind)
        _print_job(view)
        return Exit.OK

    return perform(look)


@click.command("cancel", cls=Verb)
@click.argument("job", metavar="ID", shell_complete=job_ids)
def cancel_command(job: str) -> None:
    """Ask a job to stop."""
    _print_job(perform(lambda client: client.cancel(job)))


def _print_job(job: JobView) -> None:
    if as_json():
        print_json(job)
        return
    import msgspec

    print_facts(
        {
            "job": job.id,
            "kind": job.kind,
            "machine": job.machine,
            "state": job.state,
            "progress": _progress(job) or None,
            "began": job.created_at,
            "ended": job.ended_at,
            "result": msgspec.json.encode(job.result).decode() if job.result else None,
            "error": str(job.error.get("message")) if job.error else None,
        }
    )


def _progress(job: JobView) -> str:
    progress = job.progress
    if progress.migration is not None:
        return progress_text(progress.migration)
    parts = [progress.phase]
    if progress.total:
        parts.append(f"{progress.done:g}/{progress.total:g} {progress.unit}".rstrip())
    if progress.eta_s is not None:
        parts.append(f"{progress.eta_s:.0f} s left")
    return " ".join(part for part in parts if part)


async def finished(client: Client, job: JobView, what: str) -> int:
    """Wait for a job with a progress bar, and print how it ended; returns its exit code."""
    with meter(what) as show:
        view = await client.wait_job(job.id, show)
    _print_job(view)
    return exit_of(view)


def exit_of(job: JobView) -> int:
    """The exit code of a job that has ended; its error has been printed."""
    if job.state == "succeeded":
        return Exit.OK
    if job.error is None:
        return Exit.NO
    import msgspec

    from qmpd.views import ErrorBody
    from qmpd_api.connection import error_of

    return report(error_of(msgspec.convert(job.error, ErrorBody)))


@contextmanager
def meter(what: str) -> Iterator[Callable[[JobView], None]]:
    """Where a job's progress goes: a bar on stderr if that is a terminal, else nowhere."""
    with meters() as begin:
        yield begin(what)


@contextmanager
def meters() -> Iterator[Callable[[str], Callable[[JobView], None]]]:
    """The same for several jobs at once: a bar for each as long as it is not over."""
    import sys

    if not sys.stderr.isatty():
        yield lambda _what: lambda _job: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[phase]}", markup=False),
        TimeElapsedColumn(),
    )
    # What is printed while bars are shown goes above them, but not if it goes somewhere else than to the terminal.
    with Progress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=sys.stdout.isatty()) as bar:

        def begin(what: str) -> Callable[[JobView], None]:
            task = bar.add_task(printable(what), total=None, phase="")

            def show(job: JobView) -> None:
                bar.update(task, completed=job.progress.done, total=job.progress.total, phase=printable(_progress(job)))
                bar.update(task, visible=job.state == "running")

            return show

        yield begin
