"""Commands that change what machines do: start, stop and what lies between."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from qmpctl.completion import machine_names
from qmpctl.exits import Exit
from qmpctl.history import finished
from qmpctl.invocation import Verb, as_json, for_each, perform
from qmpctl.tables import print_json
from qmpd.lifecycle import State

if TYPE_CHECKING:
    from qmpd.views import MachineView, StopView
    from qmpd_api.client import Client

names_argument = click.argument("names", metavar="NAME...", nargs=-1, required=True, shell_complete=machine_names)


def _show_machine(name: str, machine: MachineView) -> None:
    if as_json():
        print_json(machine, one_line=True)
    else:
        click.echo(f"{name}: {machine.state}")


def _show_end(name: str, end: StopView) -> None:
    if as_json():
        print_json(end, one_line=True)
    else:
        click.echo(f"{name}: {end.machine.state} ({end.method}{'' if end.clean else ', not clean'})")


@click.command("start", cls=Verb)
@names_argument
@click.option("--paused", is_flag=True, help="Leave it halted before its first instruction.")
def start_command(names: Sequence[str], paused: bool) -> int:
    """Start machines; returns when they run."""
    return for_each(names, lambda client, name: client.start(name, paused=paused), _show_machine)


@click.command("stop", cls=Verb)
@names_argument
def stop_command(names: Sequence[str]) -> int:
    """End QEMU without asking the guest; returns when it is gone. See shutdown for asking the guest."""
    return for_each(names, lambda client, name: client.stop(name), _show_end)


@click.command("kill", cls=Verb)
@names_argument
def kill_command(names: Sequence[str]) -> int:
    """Kill QEMU (SIGKILL); returns when it is gone."""
    return for_each(names, lambda client, name: client.kill(name), _show_end)


@click.command("reset", cls=Verb)
@names_argument
def reset_command(names: Sequence[str]) -> int:
    """Press the reset button."""
    return for_each(names, lambda client, name: client.reset(name), _show_machine)


@click.command("pause", cls=Verb)
@names_argument
def pause_command(names: Sequence[str]) -> int:
    """Halt the processors."""
    return for_each(names, lambda client, name: client.pause(name), _show_machine)


@click.command("resume", cls=Verb)
@names_argument
def resume_command(names: Sequence[str]) -> int:
    """Let the processors go on."""
    return for_each(names, lambda client, name: client.resume(name), _show_machine)


@click.command("shutdown", cls=Verb)
@click.argument("name", shell_complete=machine_names)
@click.option("--timeout", type=click.FloatRange(min=0), metavar="S", help="How long the guest may take (default: the definition's).")
@click.option("--then", type=click.Choice(["nothing", "stop", "kill"]), default="nothing", show_default=True, help="If it takes longer.")
def shutdown_command(name: str, timeout: float | None, then: str) -> int:
    """Ask the guest to shut down, and wait for it."""
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
    _show_machine(name, machine)
    return Exit.OK
