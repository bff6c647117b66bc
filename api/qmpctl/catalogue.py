"""Commands about what there is before any machine: boards, emulators, the host, the versions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from qmpctl.completion import board_ids
from qmpctl.exits import Exit
from qmpctl.invocation import Verb, as_json, perform
from qmpctl.tables import print_facts, print_json, print_table, printable, size, yes
from qmpd import __version__
from qmpd.errors import NotFound

if TYPE_CHECKING:
    from qmpd.views import BoardView
    from qmpd_api.client import Client


@click.command("boards", cls=Verb)
@click.argument("arch", required=False)
def boards_command(arch: str | None) -> None:
    """List the boards, or those of one architecture."""
    boards = perform(lambda client: _boards(client, arch))
    if as_json():
        print_json(boards)
        return
    rows = ((board.id, board.arch, yes(board.runnable), board.accel or "-", size(board.memory_mib), board.title) for board in boards)
    print_table(("BOARD", "ARCH", "RUNS HERE", "ACCEL", "MEMORY", "TITLE"), rows)


async def _boards(client: Client, arch: str | None) -> tuple[BoardView, ...]:
    found = await client.boards(arch)
    if arch is not None and not found:
        known = sorted({board.arch for board in await client.boards()})
        raise NotFound(f"there is no board of architecture {arch!r}; there are boards of {', '.join(known)}")
    return found


@click.command("board", cls=Verb)
@click.argument("board", metavar="ID", shell_complete=board_ids)
def board_command(board: str) -> None:
    """Show a board file."""
    found = perform(lambda client: client.board(board))
    if as_json():
        print_json(found)
        return
    from qmpctl.documents import toml_of

    click.echo(f"# {printable(found.id)}, from {printable(found.source)}")
    click.echo(toml_of(found.board), nl=False)


@click.command("emulators", cls=Verb)
def emulators_command() -> None:
    """List the emulators that the daemon found on its host."""
    emulators = perform(lambda client: client.emulators())
    if as_json():
        print_json(emulators)
        return
    rows = (
        (
            emulator.name,
            emulator.version,
            str(emulator.machines),
            str(emulator.cpus),
            str(emulator.devices),
            yes(emulator.kvm),
            emulator.path,
            emulator.problem or emulator.kvm_reason,
        )
        for emulator in emulators
    )
    print_table(("EMULATOR", "VERSION", "MACHINES", "CPUS", "DEVICES", "KVM", "PATH", "REMARK"), rows)


@click.command("check", cls=Verb)
def check_command() -> int:
    """Say what the daemon's host can and cannot do. Exits with 1 if anything failed."""
    report = perform(lambda client: client.check())
    if as_json():
        print_json(report)
        return Exit.OK if report.ok else Exit.NO
    print_table(("VERDICT", "TOPIC", "SUBJECT", "FOUND"), ((line.verdict, line.topic, line.subject, line.found) for line in report.lines))
    for line in report.lines:
        if line.verdict != "pass":
            click.echo(f"\n{line.verdict}: {printable(line.subject)}: {printable(line.meaning or line.found)}")
            if line.mend:
                click.echo(f"  mend: {printable(line.mend)}")
    return Exit.OK if report.ok else Exit.NO


@click.command("version", cls=Verb)
def version_command() -> None:
    """Show the versions of qmpctl and of the daemon."""
    if not as_json():
        print_facts({"qmpctl": __version__})
    daemon = perform(lambda client: client.version())
    if as_json():
        print_json({"qmpctl": __version__, "daemon": daemon})
        return
    print_facts(
        {
            "daemon": f"{daemon.version} (API {daemon.api})",
            "pid": str(daemon.pid),
            "started": daemon.started_at,
            "machines running": str(daemon.machines_running),
        }
    )
