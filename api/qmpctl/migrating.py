"""Commands that move machines to other hosts."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

from qmpctl.completion import machine_names
from qmpctl.exits import Exit
from qmpctl.history import exit_of, meter
from qmpctl.invocation import Verb, as_json, perform
from qmpctl.journeys import copy_lines, dry_run_lines, progress_text, report_lines
from qmpctl.quantities import DurationType, SizeType
from qmpctl.tables import ago, print_facts, print_json, print_table, printable

if TYPE_CHECKING:
    import msgspec

    from qmpd.migrationviews import MigrateRequest, MigrationView, MoveDiskRequest
    from qmpd.views import JobView
    from qmpd_api.client import Client

F = TypeVar("F", bound=Callable[..., Any])
R = TypeVar("R", bound="msgspec.Struct")

THEN: Final = ("pause", "postcopy", "abort")
_MS: Final = 1000
_AUTO_CONVERGE: Final[dict[str, object]] = {"on": True, "off": False, "auto": "auto"}
_STORAGE: Final = {(False, False): "auto", (True, False): "copy", (False, True): "shared"}


def goal_options(*, changing: bool = False) -> Callable[[F], F]:
    """The options that make a goal; those that change one may take a limit away with `none`."""
    options = (
        click.option("--downtime", type=DurationType(), metavar="TIME", help="How long the guest may stand still (default: 300ms)."),
        click.option("--deadline", type=DurationType(limit=changing), metavar="TIME", help="From the beginning; then --then is done."),
        click.option("--then", type=click.Choice(THEN), help="At the deadline: halt the guest (default), go over to postcopy, or stay."),
        click.option("--bandwidth", type=SizeType(limit=changing), metavar="AMOUNT", help="At most so much a second, like 100MiB."),
        click.option(
            "--auto-converge",
            type=click.Choice(list(_AUTO_CONVERGE)),
            help="Slow a guest that changes too much: when nothing else helps (default), from the beginning, or never.",
        ),
    )

    def decorate(command: F) -> F:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def goal_of(wishes: Mapping[str, object]) -> dict[str, object]:
    """The options of `goal_options` as the fields of a goal; those not given are left out."""
    downtime = wishes["downtime"]
    fields = {
        "downtime_ms": round(downtime * _MS) if isinstance(downtime, float) else None,
        "deadline_s": wishes["deadline"],
        "then": wishes["then"],
        "bandwidth_mib_s": wishes["bandwidth"],
        "auto_converge": _AUTO_CONVERGE.get(str(wishes["auto_converge"])),
    }
    return {name: value for name, value in fields.items() if value is not None}


def converted(document: Mapping[str, object], kind: type[R]) -> R:
    """A request. Raises UsageError for values it does not take."""
    import msgspec

    from qmpd.spec import explained

    try:
        return msgspec.convert(document, kind)
    except msgspec.ValidationError as error:
        raise click.UsageError(explained(str(error))) from error


def _disk(text: str) -> dict[str, object]:
    how, *settings = text.split(",")
    number, equals, way = how.partition("=")
    pairs = dict(setting.split("=", 1) for setting in settings if "=" in setting)
    if not number.isdigit() or not equals or len(pairs) != len(settings) or not pairs.keys() <= {"path", "format", "base"}:
        raise click.UsageError(f"--disk {text!r} is not N=copy or N=shared, with path=…, format=… and base=… after commas")
    return {"disk": int(number), "how": way, **pairs}


@click.command("migrate", cls=Verb)
@click.argument("name", shell_complete=machine_names)
@click.argument("peer")
@click.option("--dry-run", is_flag=True, help="Only find out what is in the way, and how long it would take.")
@goal_options()
@click.option("--copy", is_flag=True, help="Make another machine of it there, stopped; this one stays as it is.")
@click.option("--as", "copy_name", metavar="NEWNAME", help="With --copy: what the copy is called (default: the same).")
@click.option("--channels", type=click.IntRange(0, 64), default=0, metavar="N", help="More connections for memory (multifd).")
@click.option("--tunnel", is_flag=True, help="Everything through the API's port: slower, where no other is open.")
@click.option("--copy-storage", is_flag=True, help="Copy the disks, whatever is at the destination.")
@click.option("--shared-storage", is_flag=True, help="Both hosts see the disks at the same paths.")
@click.option(
    "--disk", "disks", multiple=True, metavar="N=HOW", help="One disk: 0=copy,path=/srv/x.qcow2,base=/srv/b.raw; may be repeated."
)
@click.option("--accept", multiple=True, metavar="CODE", help="A finding that shall not prevent it; may be repeated.")
@click.option("--detach", is_flag=True, help="Do not wait: print the job.")
def migrate_command(name: str, detach: bool, **wishes: Any) -> int:
    """Move a machine to another daemon's host, or copy it there. Its guest goes on, but for an instant. An interrupt leaves the migration
    alone."""
    if wishes["copy_name"] is not None and not wishes["copy"]:
        raise click.UsageError("--as names a copy: give --copy as well")
    if wishes["then"] is not None and wishes["deadline"] is None:
        raise click.UsageError("--then says what happens at the deadline: give a --deadline")
    if wishes["copy_storage"] and wishes["shared_storage"]:
        raise click.UsageError("disks are either copied (--copy-storage) or shared (--shared-storage); --disk says it of one")
    from qmpd.migrationviews import MigrateRequest

    request = converted(
        {
            "peer": wishes["peer"],
            "dry_run": wishes["dry_run"],
            "goal": goal_of(wishes),
            "storage": _STORAGE[wishes["copy_storage"], wishes["shared_storage"]],
            "disks": [_disk(text) for text in wishes["disks"]],
            "channels": wishes["channels"],
            "tunnel": wishes["tunnel"],
            "accept": wishes["accept"],
            "copy": {"name": wishes["copy_name"]} if wishes["copy"] else None,
        },
        MigrateRequest,
    )
    job = perform(lambda client: migrated(client, name, request, wait=not detach))
    return _show_begun(job) if job.state == "running" else show_outcome(job, request)


async def migrated(client: Client, name: str, request: MigrateRequest, *, wait: bool) -> JobView:
    """Begins a migration, and shows how far it is until it has ended, if that is to be waited for."""
    job = await client.migrate(name, request)
    if not wait:
        return job
    verbs = ("move", "moving") if request.copy is None else ("be copied", "copying")
    what = f"looking whether {name} can {verbs[0]} to {request.peer}" if request.dry_run else f"{verbs[1]} {name} to {request.peer}"
    with meter(what) as show:
        try:
            return await client.wait_job(job.id, show)
        except asyncio.CancelledError:
            click.echo(f"qmpctl: the migration goes on; it is cancelled with: qmpctl cancel {job.id}", err=True)
            raise


def _show_begun(job: JobView) -> int:
    if as_json():
        print_json(job)
    else:
        click.echo(job.id)
    return Exit.OK


def show_outcome(job: JobView, request: MigrateRequest, *, one_line: bool = False) -> int:
    """Print what became of a migration that has ended; the exit code says whether it is what was wanted."""
    import msgspec

    from qmpd.migrationviews import CopyReport, DryRunReport, MigrationReport

    if job.state != "succeeded":
        if job.error is None:
            click.echo(f"{printable(job.machine or '')}: {job.state}: the machine is where it was", err=True)
        return exit_of(job)
    if request.dry_run:
        dry = msgspec.convert(job.result, DryRunReport)
        _print(dry, dry_run_lines(dry, "moved" if request.copy is None else "copied"), one_line=one_line)
        return Exit.OK if dry.possible else Exit.NO
    if request.copy is not None:
        copy = msgspec.convert(job.result, CopyReport)
        _print(copy, copy_lines(copy), one_line=one_line)
        return Exit.OK
    report = msgspec.convert(job.result, MigrationReport)
    _print(report, report_lines(report), one_line=one_line)
    return Exit.OK if report.owner == "destination" else Exit.NO


def _print(document: object, lines: Iterator[str], *, one_line: bool) -> None:
    if as_json():
        print_json(document, one_line=one_line)
        return
    for line in lines:
        click.echo(printable(line))


@click.command("migration-tune", cls=Verb)
@click.argument("name", shell_complete=machine_names)
@goal_options(changing=True)
def migration_tune_command(name: str, **wishes: object) -> None:
    """Give a migration that is under way another goal; `none` takes a deadline or a bandwidth away."""
    fields = goal_of(wishes)
    if not fields:
        raise click.UsageError("say what is to change: --downtime, --deadline, --then, --bandwidth or --auto-converge")
    from qmpd.migrationviews import GoalChanges

    changes = converted(fields, GoalChanges)
    _show(perform(lambda client: client.tune_migration(name, changes)))


def _show(migration: MigrationView) -> None:
    if as_json():
        print_json(migration)
        return
    goal = migration.goal
    print_facts(
        {
            "migration": migration.id,
            "machine": migration.machine,
            "peer": f"{migration.peer} ({'to' if migration.role == 'source' else 'from'} there)",
            "phase": migration.phase,
            "owner": migration.owner,
            "copy": None if migration.copy is None else f"{migration.copy.name} ({migration.copy.uuid}) of {migration.copy.original}",
            "doubt": migration.doubt,
            "downtime": None if goal is None else f"{goal.downtime_ms} ms",
            "deadline": None if goal is None or goal.deadline_s is None else f"{goal.deadline_s:g} s, then {goal.then}",
            "bandwidth": None if goal is None or goal.bandwidth_mib_s is None else f"{goal.bandwidth_mib_s} MiB/s",
            "progress": progress_text(migration.progress) or None if migration.progress is not None else None,
        }
    )


@click.command("migrations", cls=Verb)
@click.option("--machine", metavar="NAME", shell_complete=machine_names, help="Only those of one machine.")
def migrations_command(machine: str | None) -> None:
    """List the migrations to and from this host, newest first."""
    listing = perform(lambda client: client.migrations(machine))
    if as_json():
        print_json(listing)
        return
    print_table(("MIGRATION", "MACHINE", "PEER", "PHASE", "OWNER", "BEGAN", "REMARK"), map(_row, listing.migrations))


def _row(migration: MigrationView) -> tuple[str, ...]:
    made = f"copied as {migration.copy.name}" if migration.copy is not None and migration.role == "source" else ""
    remark = migration.doubt or made or (progress_text(migration.progress) if migration.progress is not None else "")
    if not remark and migration.report is not None:
        remark = next(report_lines(migration.report))
    return (
        migration.id,
        migration.machine,
        f"{'to' if migration.role == 'source' else 'from'} {migration.peer}",
        migration.phase,
        migration.owner,
        ago(migration.began_at),
        remark,
    )


_RESOLUTIONS: Final = {
    "keep": "it is here, and does not run at the destination",
    "take": "it is here, and does not run at its source",
    "discard": "what came of it is thrown away here",
    "moved": "its destination has it, and what is left of it here is removed, its disks included",
}


@click.command("migration-resolve", cls=Verb)
@click.argument("name", shell_complete=machine_names)
@click.option("--keep", "action", flag_value="keep", help="At its source: it stays, because the other side does not run it.")
@click.option("--take", "action", flag_value="take", help="At its destination: it runs here, because its source does not run it.")
@click.option("--discard", "action", flag_value="discard", help="At its destination: throw away what came of it.")
@click.option("--moved", "action", flag_value="moved", help="At its source: the other side has it; remove what is left of it here.")
@click.option("--yes", is_flag=True, help="Do not ask: you have made sure what the other side does with it.")
def migration_resolve_command(name: str, action: str | None, yes: bool) -> None:
    """Say how a migration ended that no daemon can find out about. Wrong, and the machine runs twice or not at all."""
    if action is None:
        raise click.UsageError("say what is the case: --keep, --take, --discard or --moved")
    if not yes:
        if not sys.stdin.isatty():
            raise click.UsageError("make sure what the other side does with it, and confirm that with --yes")
        click.confirm(f"{name}: {_RESOLUTIONS[action]}. Did you make sure?", abort=True)
    from qmpd.migrationviews import ResolveRequest

    request = converted({"action": action, "confirm": name}, ResolveRequest)
    _show(perform(lambda client: client.resolve_migration(name, request)))


@click.command("move-disk", cls=Verb)
@click.argument("name", shell_complete=machine_names)
@click.argument("index", type=click.IntRange(min=0))
@click.argument("path")
@click.option("--format", "image_format", type=click.Choice(["raw", "qcow2"]), help="Of the new image (default: the same).")
@click.option("--bandwidth", type=SizeType(), metavar="AMOUNT", help="At most so much a second, like 100MiB.")
def move_disk_command(name: str, index: int, path: str, image_format: str | None, bandwidth: int | None) -> int:
    """Move disk INDEX of a running machine to the file PATH of its host, which must not exist. An interrupt leaves the move alone."""
    from qmpd.migrationviews import MoveDiskRequest

    fields = {"path": path, "format": image_format, "bandwidth_mib_s": bandwidth}
    request = converted(fields, MoveDiskRequest)
    job = perform(lambda client: _disk_moved(client, name, index, request))
    if as_json():
        print_json(job)
    return exit_of(job)


async def _disk_moved(client: Client, name: str, index: int, request: MoveDiskRequest) -> JobView:
    job = await client.move_disk(name, index, request)
    with meter(f"moving disk {index} of {name} to {request.path}") as show:
        return await client.wait_job(job.id, show)
