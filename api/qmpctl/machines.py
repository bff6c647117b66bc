"""Commands that look at machines, and talk to their QEMU."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from qmpctl.completion import machine_names
from qmpctl.invocation import Verb, as_json, perform
from qmpctl.tables import ago, print_facts, print_json, print_table, printable, size
from qmpctl.watching import HEADERS, row, watch_list
from qmpd.lifecycle import State

if TYPE_CHECKING:
    from qmpd.processviews import AdoptedView
    from qmpd.views import DiskErrorView, ExitView, MachineView
    from qmpd_api.client import Client

#: Other names people have for keys; the rest are QEMU's qcodes.
KEYS: Final = {"enter": "ret", "return": "ret", "del": "delete", "escape": "esc", "space": "spc", "control": "ctrl", "super": "meta_l"}


class LabelType(click.ParamType[tuple[str, str]]):
    """`key=value`."""

    name = "key=value"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        """The pair; a usage error if there is no `=`."""
        key, equals, wanted = str(value).partition("=")
        if not key or not equals:
            self.fail(f"{value!r} is not key=value", param, ctx)
        return key, wanted


@click.command("list", cls=Verb)
@click.option("--label", "labels", type=LabelType(), multiple=True, help="Only machines with this label; may be repeated.")
@click.option("--state", type=click.Choice([str(state) for state in State]), help="Only machines in this state.")
@click.option("--watch", is_flag=True, help="Go on: redraw on a terminal; elsewhere print each machine that changed.")
def list_command(labels: Sequence[tuple[str, str]], state: str | None, watch: bool) -> None:
    """List the machines."""
    wanted = State(state) if state else None
    if watch:
        perform(lambda client: watch_list(client, dict(labels), wanted))
        return
    listing = perform(lambda client: client.machines(dict(labels), wanted))
    if as_json():
        print_json(listing)
    else:
        print_table(HEADERS, map(row, listing.machines))


@click.command("show", cls=Verb)
@click.argument("name", shell_complete=machine_names)
def show_command(name: str) -> None:
    """Show one machine."""
    machine = perform(lambda client: client.machine(name))
    if as_json():
        print_json(machine)
        return
    print_facts(_facts(machine))
    if machine.exit is not None:
        for line in machine.exit.stderr_tail.splitlines():
            click.echo(f"  stderr: {printable(line)}")


def _facts(machine: MachineView) -> dict[str, str | None]:
    emulator = f"{machine.emulator} {machine.emulator_version or ''}".rstrip() if machine.emulator else None
    return {
        "name": machine.name,
        "title": machine.title or None,
        "state": f"{machine.state} for {ago(machine.since)}",
        "status": machine.status,
        "trouble": None if machine.trouble is None else f"{machine.trouble.reason} (tried {machine.trouble.attempts} times)",
        "operation": machine.operation,
        "board": f"{machine.board} ({machine.arch}, {machine.machine})",
        "uuid": machine.uuid,
        "revision": str(machine.revision),
        "cpus": str(machine.cpus),
        "memory": size(machine.memory_mib),
        "accel": machine.accel,
        "emulator": emulator,
        "pid": None if machine.pid is None else str(machine.pid),
        "cgroup": machine.cgroup,
        "started": machine.started_at,
        "resets": str(machine.resets) if machine.resets else None,
        "console": f"{machine.console_bytes} bytes, last: {machine.console_line}",
        "exit": None if machine.exit is None else ended(machine.exit),
        "TPM lost": machine.tpm_lost,
        "halted by": None if machine.disk_error is None else _halted(machine.disk_error),
        "autostart": "yes" if machine.autostart else None,
        "protected": "yes" if machine.protected else None,
        "adopted": None if machine.adopted is None else adopted(machine.adopted),
        "labels": ", ".join(f"{key}={value}" for key, value in sorted(machine.labels.items())) or None,
    }


def _halted(error: DiskErrorView) -> str:
    which = error.device if error.disk is None else f"disks[{error.disk}]"
    why = "the host's disk is full" if error.nospace else error.reason or "an error of the host's disk"
    return f"{which}: {why}; resume lets it go on"


def adopted(how: AdoptedView) -> str:
    """That somebody else started it, and what is not known of it, in a few words."""
    return f"{how.at}, monitor at {how.qmp}" + (f"; not understood: {', '.join(how.unknown)}" if how.unknown else "")


def ended(how: ExitView) -> str:
    """How a QEMU process ended, in a few words."""
    by = f"signal {how.signal}" if how.signal else "exit code unknown" if how.code is None else f"exit code {how.code}"
    parts = ["clean" if how.clean else "not clean", by, *([how.reason] if how.reason else []), *([how.at] if how.at else [])]
    return ", ".join(parts)


@click.command("qmp", cls=Verb)
@click.argument("name", shell_complete=machine_names)
@click.argument("command")
@click.argument("arguments", metavar="[JSON | KEY=VALUE...]", nargs=-1)
@click.option("--oob", is_flag=True, help="Send it out of band.")
def qmp_command(name: str, command: str, arguments: Sequence[str], oob: bool) -> None:
    """Send one QMP command and print what QEMU returned, as JSON.

    A VALUE is taken as JSON if it is JSON, else as text; a dotted KEY goes into a nested object.
    """
    given = qmp_arguments(arguments)
    print_json(perform(lambda client: client.qmp(name, command, given, oob=oob)))


def qmp_arguments(words: Sequence[str]) -> dict[str, object]:
    """The arguments of a QMP command as they are written on the command line."""
    import msgspec

    if len(words) == 1 and words[0].lstrip().startswith("{"):
        try:
            return msgspec.json.decode(words[0], type=dict[str, object])
        except msgspec.DecodeError as error:
            raise click.UsageError(f"the arguments are not JSON: {error}") from error
    arguments: dict[str, object] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise click.UsageError(f"{word!r} is not KEY=VALUE")
        *above, last = key.split(".")
        holder = arguments
        for step in above:
            inner = holder.setdefault(step, {})
            if not isinstance(inner, dict):
                raise click.UsageError(f"{word!r}: {step!r} already has a value that is not an object")
            holder = inner
        holder[last] = _value(value)
    return arguments


def _value(text: str) -> object:
    import msgspec

    try:
        value: object = msgspec.json.decode(text)
    except msgspec.DecodeError:
        return text
    return value


@click.command("screenshot", cls=Verb)
@click.argument("name", shell_complete=machine_names)
@click.argument("file", metavar="FILE.png", type=click.Path(dir_okay=False, writable=True, allow_dash=True))
def screenshot_command(name: str, file: str) -> None:
    """Save the display as a PNG image; - writes it to stdout."""
    image = perform(lambda client: client.screenshot(name))
    if file == "-":
        sys.stdout.buffer.write(image)
        return
    Path(file).write_bytes(image)
    if as_json():
        print_json({"file": file, "bytes": len(image)})
    else:
        click.echo(f"{printable(file)}: {len(image)} bytes")


@click.command("send-key", cls=Verb)
@click.argument("name", shell_complete=machine_names)
@click.argument("chords", metavar="KEYS...", nargs=-1, required=True)
@click.option("--hold", "hold_ms", type=click.IntRange(1, 10_000), default=100, show_default=True, metavar="MS", help="How long to press.")
def send_key_command(name: str, chords: Sequence[str], hold_ms: int) -> None:
    """Press keys: each word is a chord like ctrl-alt-delete, pressed together; several words are pressed one after the other."""
    pressed = [chord_of(word) for word in chords]

    async def press(client: Client) -> None:
        for keys in pressed:
            await client.send_key(name, keys, hold_ms)

    perform(press)
    if as_json():
        print_json({"machine": name, "pressed": pressed})


def chord_of(word: str) -> tuple[str, ...]:
    """The qcodes of `ctrl-alt-delete`. The minus key itself is `minus`."""
    keys = tuple(KEYS.get(key.lower(), key.lower()) for key in word.split("-"))
    if not all(keys):
        raise click.UsageError(f"{word!r} is not a chord like ctrl-alt-delete; the minus key is called minus")
    return keys
