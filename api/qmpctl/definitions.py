"""Commands about machine definitions: check, store, change and print them."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qmpctl.completion import machine_names
from qmpctl.documents import decoded, is_name, read, spec_of, toml_of
from qmpctl.exits import Exit, report
from qmpctl.invocation import Verb, as_json, for_each, perform
from qmpctl.tables import print_json, printable
from qmpd.errors import Invalid, QmpdError, Undecodable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qmpd.spec import MachineSpec
    from qmpd.views import DefinitionView, MachineView, ValidationReport
    from qmpd_api.client import Client


@click.command("validate", cls=Verb)
@click.argument("file")
def validate_command(file: str) -> int:
    """Name everything that is wrong with a definition. FILE ends in .toml, .json or .msgpack; - reads stdin. Exits with 1 if any."""
    from qmpd.views import ValidationReport

    try:
        spec = read(file)
    except Invalid as error:
        return _validated(ValidationReport(ok=False, problems=error.problems), file)
    return _validated(perform(lambda client: client.validate(spec)), file)


def _validated(found: ValidationReport, file: str) -> int:
    if as_json():
        print_json(found)
        return Exit.OK if found.ok else Exit.NO
    for problem in found.problems:
        click.echo(f"{printable(file)}: {printable(problem.path)}: {printable(problem.message)}")
    for warning in found.warnings:
        click.echo(f"{printable(file)}: {printable(warning.path)}: warning: {printable(warning.message)}")
    if found.ok:
        click.echo(f"{printable(file)}: valid")
    return Exit.OK if found.ok else Exit.NO


@click.command("command", cls=Verb)
@click.argument("source", metavar="FILE|NAME", shell_complete=machine_names)
def command_command(source: str) -> None:
    """Print the exact QEMU command of a definition file or of a machine, one option per line, to be pasted into a shell."""
    if is_name(source):
        view = perform(lambda client: client.machine_command(source))
    else:
        spec = read(source)
        view = perform(lambda client: client.command(spec))
    if as_json():
        print_json(view)
        return
    click.echo(f"# QEMU {printable(view.emulator_version)}, {view.accel}: {printable(view.accel_reason)}", err=True)
    click.echo(view.text.rstrip("\n"))


@click.command("create", cls=Verb)
@click.argument("file")
@click.option("--name", help="Use this name instead of the one in the file.")
@click.option("--start", is_flag=True, help="Start the machine, too.")
@click.option("--paused", is_flag=True, help="With --start: leave it halted before its first instruction.")
def create_command(file: str, name: str | None, start: bool, paused: bool) -> None:
    """Store a definition, and with --start run it. FILE is as for validate."""
    if paused and not start:
        raise click.UsageError("--paused says how to start: it needs --start")
    spec = read(file, name=name)
    machine = perform(lambda client: client.create(spec, start=start, paused=paused))
    if as_json():
        print_json(machine)
    else:
        click.echo(f"{machine.name}: created, {machine.state}")


@click.command("replace", cls=Verb)
@click.argument("file")
@click.option("--revision", type=click.IntRange(min=0), help="Only if the stored definition is at this revision (default: whatever it is).")
def replace_command(file: str, revision: int | None) -> None:
    """Replace the definition of the machine that is named in FILE."""
    spec = read(file)
    machine = perform(lambda client: _replace(client, spec, revision))
    _changed(machine)


async def _replace(client: Client, spec: MachineSpec, revision: int | None) -> MachineView:
    if revision is None:
        revision = (await client.definition(spec.name)).revision
    return await client.replace(spec.name, spec, revision)


def _changed(machine: MachineView) -> None:
    if as_json():
        print_json(machine)
    else:
        click.echo(f"{machine.name}: replaced, now revision {machine.revision}")


@click.command("delete", cls=Verb)
@click.argument("names", metavar="NAME...", nargs=-1, required=True, shell_complete=machine_names)
def delete_command(names: Sequence[str]) -> int:
    """Delete machines that do not run, with the disks that were made for them."""

    async def delete(client: Client, name: str) -> None:
        await client.delete(name)

    def deleted(name: str, _answer: None) -> None:
        if as_json():
            print_json({"deleted": name}, one_line=True)
        else:
            click.echo(f"{name}: deleted")

    return for_each(names, delete, deleted)


@click.command("protect", cls=Verb)
@click.argument("names", metavar="NAME...", nargs=-1, required=True, shell_complete=machine_names)
def protect_command(names: Sequence[str]) -> int:
    """Keep machines from being deleted, until they are unprotected. Works while they run."""
    return _protect(names, protected=True)


@click.command("unprotect", cls=Verb)
@click.argument("names", metavar="NAME...", nargs=-1, required=True, shell_complete=machine_names)
def unprotect_command(names: Sequence[str]) -> int:
    """Let machines be deleted again."""
    return _protect(names, protected=False)


def _protect(names: Sequence[str], *, protected: bool) -> int:
    from qmpd.spec import MachineChanges

    async def protect(client: Client, name: str) -> MachineView:
        return await client.update(name, MachineChanges(protected=protected), (await client.machine(name)).revision)

    def done(name: str, machine: MachineView) -> None:
        if as_json():
            print_json(machine, one_line=True)
        else:
            click.echo(f"{name}: {'protected' if machine.protected else 'not protected'}")

    return for_each(names, protect, done)


@click.command("definition", cls=Verb)
@click.argument("name", shell_complete=machine_names)
@click.option("--format", "form", type=click.Choice(["toml", "json"]), default="toml", show_default=True, help="How to write it.")
def definition_command(name: str, form: str) -> None:
    """Print a machine's definition, as replace takes it back. With --json it comes with its revision and times."""
    view = perform(lambda client: client.definition(name))
    if as_json():
        print_json(view)
    elif form == "json":
        print_json(view.spec)
    else:
        click.echo(_text_of(view), nl=False)


def _text_of(view: DefinitionView) -> str:
    return f"# {view.spec.name}, revision {view.revision}\n{toml_of(view.spec)}"


@click.command("edit", cls=Verb)
@click.argument("name", shell_complete=machine_names)
def edit_command(name: str) -> int:
    """Change a machine's definition in $EDITOR. What is refused can be edited again; what is given up is kept in a file."""
    view = perform(lambda client: client.definition(name))
    original = text = _text_of(view)
    while True:
        edited = click.edit(text, extension=".toml")
        if edited is None or edited == original:
            click.echo(f"{name}: not changed")
            return Exit.OK
        text = edited
        try:
            _replace_by(name, text, view.revision)
        except QmpdError as error:
            code = report(error, name)
            if not _again(error):
                click.echo(f"qmpctl: what you wrote is in {_kept(name, text)}", err=True)
                return code
        else:
            return Exit.OK


def _replace_by(name: str, text: str, revision: int) -> None:
    spec = spec_of(decoded(text.encode(), ".toml", "what you wrote"), Path.cwd())
    _changed(perform(lambda client: client.replace(name, spec, revision)))


def _again(error: QmpdError) -> bool:
    """Whether another look at the text could help, and somebody is there who wants one."""
    return isinstance(error, Invalid | Undecodable) and sys.stdin.isatty() and click.confirm("Edit again?", default=True, err=True)


def _kept(name: str, text: str) -> str:
    with tempfile.NamedTemporaryFile("w", prefix=f"{name}-", suffix=".toml", delete=False) as file:
        file.write(text)
    return file.name
