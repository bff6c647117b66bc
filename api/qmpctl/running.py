"""`qmpctl run`: from a board and some files to a running machine and its console, in one command."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final, TypeVar

import click

from qmpctl.attachment import Ending, attach, hint
from qmpctl.completion import board_ids
from qmpctl.consoles import KeyType, expectation, show_match
from qmpctl.exits import Exit, report
from qmpctl.invocation import Verb, as_json, perform
from qmpctl.machines import ended
from qmpctl.tables import print_json, printable
from qmpctl.wishes import Wishes, spec_from
from qmpd.errors import AlreadyExists, NotYet, QemuError, QmpdError
from qmpd.lifecycle import AT_REST, State

if TYPE_CHECKING:
    from qmpd.spec import MachineSpec
    from qmpd.views import ExpectRequest, MachineView
    from qmpd_api.client import Client

F = TypeVar("F", bound=Callable[..., object])

#: Four hexadecimal digits, so the chance that this many names in a row are taken is nil below tens of thousands of machines.
NAME_TRIES: Final = 5
#: A board's id, a dash and four digits must fit into the 63 characters of a name.
STEM_LENGTH: Final = 58
#: One request's worth of waiting for a guest that may run for months.
WAIT_ROUND_S: Final = 3600.0
#: What --rm may take when qmpctl itself is being ended: systemd and most supervisors kill after 90 s.
REMOVE_LIMIT_S: Final = 60.0

#: Whether a file is there, and may be used, is for the daemon to say.
_FILE: Final = click.Path()
_OPTIONS: Final = (
    click.option("--name", help="The machine's name (default: made of the board's)."),
    click.option("--kernel", type=_FILE, metavar="FILE", help="Boot this kernel."),
    click.option("--initrd", type=_FILE, metavar="FILE", help="With this initial ramdisk."),
    click.option("--append", metavar="TEXT", help="And these words on its command line; the board's console is put in front."),
    click.option("--dtb", type=_FILE, metavar="FILE", help="And this device tree."),
    click.option("--bios", metavar="FILE|none", help="Use this firmware, or none at all."),
    click.option("--disk", "disks", multiple=True, metavar="FILE[,bus=B][,format=F][,ro]", help="Attach an image; may be repeated."),
    click.option("--cdrom", "cdroms", multiple=True, type=_FILE, metavar="FILE", help="Attach a CD image; may be repeated."),
    click.option("--memory", type=click.IntRange(min=1), metavar="MIB", help="How much memory (default: the board's)."),
    click.option("--cpus", type=click.IntRange(min=1), metavar="N", help="How many processors."),
    click.option("--cpu", metavar="MODEL", help="Which processor (default: the board's)."),
    click.option("--nic", type=click.Choice(["user", "none"]), help="Attach a NIC: on QEMU's user network, or with its cable cut."),
    click.option(
        "--forward", "forwards", multiple=True, metavar="HOST:GUEST", help="Lead a port of the host into the guest; implies --nic user."
    ),
    click.option("--rng", is_flag=True, help="Attach a random number generator."),
    click.option("--vnc", is_flag=True, help="Attach a display, served over VNC."),
    click.option("--accel", type=click.Choice(["auto", "kvm", "tcg"]), help="How to run the processors."),
    click.option("--device", "devices", multiple=True, metavar="JSON", help="Attach any device, as -device takes it; may be repeated."),
)


def _wishes_options(function: F) -> F:
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


@click.command("run", cls=Verb)
@click.argument("board", shell_complete=board_ids)
@_wishes_options
@click.option("--rm", "remove", is_flag=True, help="Delete the machine when its console is left, --expect is done, or the guest ends.")
@click.option("--console/--no-console", default=None, help="Attach to the console (default: unless --expect or --json is given).")
@click.option("--escape", type=KeyType(), default="^]", show_default=True, metavar="KEY", help="The key that detaches; none: no key does.")
@click.option("--expect", "pattern", metavar="REGEX", help="Wait for the console to print this; exits with 1 if it does not.")
@click.option("--timeout", type=click.FloatRange(0, 3600), metavar="S", help="How long --expect waits (default: 60).")
def run_command(
    board: str,
    remove: bool,
    console: bool | None,
    escape: bytes | None,
    pattern: str | None,
    timeout: float | None,
    **options: object,
) -> int:
    """Define a machine, start it, and attach to its console.

    The machine stays when the console is left, unless --rm is given.
    """
    import msgspec

    if timeout is not None and pattern is None:
        raise click.UsageError("--timeout limits --expect, which was not given")
    if console and as_json():
        raise click.UsageError("a console is a stream of bytes: --console and --json exclude each other")
    wishes = msgspec.convert({key: value for key, value in options.items() if value is not None}, Wishes)
    named = wishes.name is not None
    request = None if pattern is None else expectation(pattern, send=None, timeout_s=timeout or 60.0, from_start=True, port=None)
    attached = console if console is not None else pattern is None and not as_json()

    async def run(client: Client) -> int:
        spec = spec_from(board, wishes, wishes.name or _made_up(board))
        spec = await _create(client, spec, named=named)
        async with _kept(client, spec.name, remove=remove):
            code = await _run(client, spec.name, request, escape, attached=attached)
            if remove and request is None and not attached:
                await _until_ended(client, spec.name)
            return code

    return perform(run)


async def _run(client: Client, name: str, request: ExpectRequest | None, escape: bytes | None, *, attached: bool) -> int:
    """Start the machine and do what was asked for with it; returns the exit code."""
    machine = await client.start(name)
    code: int = Exit.OK
    if request is not None:
        code = show_match(await client.expect(name, request), request.timeout_s)
    elif not attached:
        _started(machine)
    if attached and await attach(client, name, None, escape=escape, since=0) is Ending.ENDED:
        return code or _exit_of(await client.machine(name))
    return code


def _started(machine: MachineView) -> None:
    if as_json():
        print_json(machine)
    else:
        click.echo(f"{machine.name}: {machine.state}")


def _exit_of(machine: MachineView) -> int:
    """What the guest's end means: a crash of QEMU is a failure."""
    if machine.state is not State.CRASHED or machine.exit is None:
        return Exit.OK
    click.echo(f"qmpctl: {machine.name}: QEMU crashed: {printable(ended(machine.exit))}", err=True)
    for line in machine.exit.stderr_tail.splitlines():
        click.echo(f"  stderr: {printable(line)}", err=True)
    return Exit.QEMU


def _made_up(board: str) -> str:
    return f"{board[:STEM_LENGTH]}-{secrets.token_hex(2)}"


async def _create(client: Client, spec: MachineSpec, *, named: bool) -> MachineSpec:
    """Store the definition; a made-up name that is taken is made up again. Returns what was stored."""
    import msgspec

    for _ in range(NAME_TRIES - 1):
        try:
            await client.create(spec)
        except AlreadyExists:
            if named:
                raise
            spec = msgspec.structs.replace(spec, name=_made_up(spec.board))
        else:
            return spec
    await client.create(spec)
    return spec


@asynccontextmanager
async def _kept(client: Client, name: str, *, remove: bool) -> AsyncIterator[None]:
    """The machine, deleted on the way out if `remove`: however that way is taken, and whatever the guest thinks of it."""
    try:
        yield
    except QmpdError:
        if not remove:
            click.echo(f"qmpctl: {name} stays defined; `qmpctl delete {name}` deletes it", err=True)
        raise
    finally:
        if remove:
            try:
                async with asyncio.timeout(REMOVE_LIMIT_S):
                    await _remove(client, name)
            except QmpdError as error:
                report(error, f"{name} could not be deleted")
            except TimeoutError:
                click.echo(f"qmpctl: {name} could not be deleted within {REMOVE_LIMIT_S:g} s", err=True)


async def _remove(client: Client, name: str) -> None:
    if (await client.machine(name)).state not in AT_REST:
        try:
            await client.stop(name)
        except QemuError:
            await client.kill(name)
    await client.delete(name)
    hint(f"{name} is deleted")


async def _until_ended(client: Client, name: str) -> None:
    while True:
        with contextlib.suppress(NotYet):
            await client.wait(name, AT_REST, WAIT_ROUND_S)
            return
