"""Commands for QEMUs that qmpd has lost sight of, or never started: reattach, power off, forget, list, adopt."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from qmpctl.completion import machine_names
from qmpctl.invocation import Verb, as_json, for_each, perform
from qmpctl.power import names_argument, show_end, show_machine
from qmpctl.tables import ago, print_json, print_table, printable

if TYPE_CHECKING:
    from qmpd.processviews import ProcessView
    from qmpd.views import MachineView


@click.command("reattach", cls=Verb)
@names_argument
def reattach_command(names: Sequence[str]) -> int:
    """Try now to reach the QEMU of machines that are unreachable or unresponsive."""
    return for_each(names, lambda client, name: client.reattach(name), show_machine)


@click.command("power-off", cls=Verb)
@names_argument
def power_off_command(names: Sequence[str]) -> int:
    """End QEMU with SIGTERM, which flushes its disks and needs no monitor."""
    return for_each(names, lambda client, name: client.power_off(name), show_end)


@click.command("forget", cls=Verb)
@click.argument("name", shell_complete=machine_names)
@click.option("--yes", is_flag=True, help="Do not ask: its process lives on, and nobody looks after it.")
def forget_command(name: str, yes: bool) -> None:
    """Give up a machine whose QEMU cannot be reached. Its files are kept, its process is left alone."""
    if not yes:
        if not sys.stdin.isatty():
            raise click.UsageError("the process lives on and nobody looks after it: confirm that with --yes")
        click.confirm(f"Give up {name}? Its process lives on and nobody looks after it.", abort=True)
    perform(lambda client: client.forget(name))
    if as_json():
        print_json({"machine": name, "forgotten": True})
    else:
        click.echo(f"{name}: forgotten")


@click.command("processes", cls=Verb)
def processes_command() -> None:
    """List the QEMUs of the daemon's host: its own, strays of its directories, and other people's."""
    found = perform(lambda client: client.processes())
    if as_json():
        print_json(found)
    else:
        print_table(("PID", "KIND", "MACHINE", "USER", "AGE", "COMMAND"), map(_row, found))


def _row(process: ProcessView) -> tuple[str, ...]:
    return (
        str(process.pid),
        process.kind,
        process.machine or "-",
        process.user,
        ago(process.started_at),
        " ".join(process.command),
    )


@click.command("adopt", cls=Verb)
@click.option("--pid", type=click.IntRange(1, 2**22), metavar="N", help="The process; its QMP socket is found on its command line.")
@click.option("--qmp", metavar="PATH", help="The Unix socket of its QMP monitor.")
@click.option("--name", metavar="NAME", help="What the machine is called (default: as QEMU was told with -name, or adopted-PID).")
def adopt_command(pid: int | None, qmp: str | None, name: str | None) -> None:
    """Take over a QEMU that somebody started by hand. Its guest does not notice; its monitor is the daemon's from then on."""
    if pid is None and qmp is None:
        raise click.UsageError("say which QEMU: --pid N or --qmp PATH")
    import msgspec

    from qmpd.processviews import AdoptRequest

    try:
        request = msgspec.convert({"pid": pid, "qmp": qmp, "name": name}, AdoptRequest)
    except msgspec.ValidationError as error:
        from qmpd.spec import explained

        raise click.UsageError(explained(str(error))) from error
    machine = perform(lambda client: client.adopt(request))
    if as_json():
        print_json(machine)
    else:
        _show_adopted(machine)


def _show_adopted(machine: MachineView) -> None:
    click.echo(f"{printable(machine.name)}: {machine.state} (process {machine.pid}, board {printable(machine.board)})")
    if machine.adopted is not None:
        for line in machine.adopted.fixed:
            click.echo(f"  fixed    {printable(line)}")
        for line in machine.adopted.unknown:
            click.echo(f"  unknown  {printable(line)}")
