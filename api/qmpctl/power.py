"""Commands that change what machines do: start, stop and what lies between."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from qmpctl.completion import machine_names
from qmpctl.exits import Exit
from qmpctl.history import exit_of, finished, meter
from qmpctl.invocation import Verb, as_json, for_each, perform
from qmpctl.tables import print_json, printable
from qmpd.lifecycle import State

if TYPE_CHECKING:
    from qmpd.views import HostShutdownRequest, JobView, MachineView, StopView
    from qmpd_api.client import Client

names_argument = click.argument("names", metavar="NAME...", nargs=-1, required=True, shell_complete=machine_names)


def show_machine(name: str, machine: MachineView) -> None:
    """Say in which state a machine is."""
    if as_json():
        print_json(machine, one_line=True)
    else:
        click.echo(f"{name}: {machine.state}")


def show_end(name: str, end: StopView) -> None:
    """Say how a machine ended."""
    if as_json():
        print_json(end, one_line=True)
    else:
        click.echo(f"{name}: {end.machine.state} ({end.method}{'' if end.clean else ', not clean'})")


@click.command("start", cls=Verb)
@names_argument
@click.option("--paused", is_flag=True, help="Leave it halted before its first instruction.")
def start_command(names: Sequence[str], paused: bool) -> int:
    """Start machines; returns when they run."""
    return for_each(names, lambda client, name: client.start(name, paused=paused), show_machine)


@click.command("stop", cls=Verb)
@names_argument
def stop_command(names: Sequence[str]) -> int:
    """End QEMU without asking the guest; returns when it is gone. See shutdown for asking the guest."""
    return for_each(names, lambda client, name: client.stop(name), show_end)


@click.command("kill", cls=Verb)
@names_argument
def kill_command(names: Sequence[str]) -> int:
    """Kill QEMU (SIGKILL); returns when it is gone."""
    return for_each(names, lambda client, name: client.kill(name), show_end)


@click.command("reset", cls=Verb)
@names_argument
def reset_command(names: Sequence[str]) -> int:
    """Press the reset button."""
    return for_each(names, lambda client, name: client.reset(name), show_machine)


@click.command("pause", cls=Verb)
@names_argument
def pause_command(names: Sequence[str]) -> int:
    """Halt the processors."""
    return for_each(names, lambda client, name: client.pause(name), show_machine)


@click.command("resume", cls=Verb)
@names_argument
def resume_command(names: Sequence[str]) -> int:
    """Let the processors go on."""
    return for_each(names, lambda client, name: client.resume(name), show_machine)


@click.command("shutdown", cls=Verb)
@click.argument("name", required=False, shell_complete=machine_names)
@click.option("--all", "everything", is_flag=True, help="All machines, as at the end of the host: none can be started meanwhile.")
@click.option("--timeout", type=click.FloatRange(0, 86_400), metavar="S", help="How long the guest may take (default: the definition's).")
@click.option(
    "--then", type=click.Choice(["nothing", "stop", "kill"]), help="If it takes longer (default: nothing; with --all stop, or else kill)."
)
def shutdown_command(name: str | None, everything: bool, timeout: float | None, then: str | None) -> int:
    """Ask the guest to shut down, and wait for it. With --all, end every machine in the reverse order of their autostart."""
    if everything == (name is not None):
        raise click.UsageError("give either the NAME of a machine, or --all")
    if everything:
        return _shut_down_all(timeout, then or "stop")
    return _shut_down(name or "", timeout, then or "nothing")


def _shut_down_all(timeout: float | None, then: str) -> int:
    import msgspec

    from qmpd.views import HostShutdownRequest, HostShutdownView

    if then == "nothing":
        raise click.UsageError("--all ends every machine: --then nothing goes with a NAME only")
    request = msgspec.convert({"timeout_s": timeout, "then": then}, HostShutdownRequest)
    job = perform(lambda client: _ended_host(client, request))
    if job.state != "succeeded":
        return exit_of(job)
    ends = msgspec.convert(job.result, HostShutdownView)
    for end in ends.machines:
        if as_json():
            print_json(end, one_line=True)
        elif end.error is not None:
            click.echo(f"{end.machine}: still there: {printable(end.error.message)}")
        else:
            click.echo(f"{end.machine}: ended ({end.method}{'' if end.clean else ', not clean'})")
    return Exit.OK if not ends.left else Exit.NO


async def _ended_host(client: Client, request: HostShutdownRequest) -> JobView:
    job = await client.shutdown_host(request)
    with meter("shutting down all machines") as show:
        return await client.wait_job(job.id, show)


def _shut_down(name: str, timeout: float | None, then: str) -> int:
    import msgspec

    from qmpd.views import ShutdownRequest

    request = msgspec.convert({"timeout_s": timeout, "then": then}, ShutdownRequest)

    async def shut_down(client: Client) -> int:
        job = await client.shutdown(name, request)
        return await finished(client, job, f"shutting down {name}")

    return perform(shut_down)


@click.command("wait", cls=Verb)
@click.argument("name", shell_complete=machine_names)
@click.option(
    "--state", "states", type=click.Choice([str(state) for state in State]), multiple=True, required=True, help="May be repeated."
)
@click.option("--timeout", type=click.FloatRange(0, 3600), default=60.0, show_default=True, metavar="S", help="How long to wait.")
def wait_command(name: str, states: Sequence[str], timeout: float) -> int:
    """Wait until a machine is in a state. Exits with 1 if it is not in time."""
    machine = perform(lambda client: client.wait(name, [State(state) for state in states], timeout))
    show_machine(name, machine)
    return Exit.OK
