"""The entry point of qmpctl: which command is where, and how each failure ends."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Final

import click

from qmpctl.exits import EXPLAINED, Exit, Terminated, report
from qmpctl.invocation import GLOBAL_OPTIONS
from qmpctl.tables import printable
from qmpd.errors import QmpdError

#: Where each command is; a module is imported when one of its commands is wanted.
COMMANDS: Final = {
    name: module
    for module, names in {
        "catalogue": ("boards", "board", "emulators", "check", "version"),
        "definitions": ("validate", "command", "create", "replace", "edit", "delete", "protect", "unprotect", "definition"),
        "machines": ("list", "show", "screenshot", "send-key", "qmp"),
        "power": ("start", "stop", "kill", "reset", "pause", "resume", "shutdown", "wait"),
        "migrating": ("migrate", "migration-tune", "migrations", "migration-resolve", "move-disk"),
        "draining": ("drain",),
        "upgrading": ("upgrade-emulator",),
        "recovery": ("reattach", "power-off", "forget", "processes", "adopt"),
        "consoles": ("console", "log", "expect"),
        "history": ("events", "jobs", "job", "cancel"),
        "running": ("run",),
        "operations": ("doctor", "bundle"),
        "tokens": ("tokens", "token-create", "token-revoke"),
        "trust": ("peers", "audit"),
        "completion": ("completion",),
    }.items()
    for name in names
}


class Commands(click.Group):
    """All commands, found by `COMMANDS`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names, in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of this name."""
        if cmd_name not in COMMANDS:
            return None
        module = import_module(f"qmpctl.{COMMANDS[cmd_name]}")
        command: object = getattr(module, f"{cmd_name.replace('-', '_')}_command")
        return command if isinstance(command, click.Command) else None


cli = Commands(
    name="qmpctl",
    params=list(GLOBAL_OPTIONS),
    help="Define, run and watch machines of a qmpd daemon.",
    epilog=EXPLAINED,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)


def run(arguments: Sequence[str]) -> int:
    """Do what `arguments` say; returns the exit code. Every failure has been printed, but that of a closed pipe, which is raised."""
    try:
        result: object = cli.main(list(arguments), prog_name="qmpctl", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as wanted:
        wanted.show()
        return Exit.USAGE
    except click.UsageError as error:
        return _misused(error)
    except click.ClickException as error:
        click.echo(f"qmpctl: {error.format_message()}", err=True)
        return Exit.OTHER
    except QmpdError as error:
        return report(error)
    except BrokenPipeError:
        raise
    except OSError as error:
        click.echo(f"qmpctl: {printable(str(error.filename or 'input or output'))}: {error.strerror or error}", err=True)
        return Exit.OTHER
    except Terminated as signalled:
        return 128 + signalled.number
    except (KeyboardInterrupt, click.Abort):
        return 130
    return result if isinstance(result, int) else Exit.OK


def main() -> None:
    """Run qmpctl and exit."""
    try:
        code = run(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader of a pipe has read enough. What is still buffered would fail again when the interpreter flushes it.
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = Exit.OK
    sys.exit(code)


def _misused(error: click.UsageError) -> int:
    if error.ctx is not None:
        click.echo(error.ctx.get_usage(), err=True)
    click.echo(f"qmpctl: {error.format_message()}", err=True)
    if error.ctx is not None:
        click.echo(f"Try '{error.ctx.command_path} --help'.", err=True)
    return Exit.USAGE


if __name__ == "__main__":
    main()
