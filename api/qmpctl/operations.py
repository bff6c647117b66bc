"""Commands for whoever looks after a daemon: what is wrong with it, and what to send along with a question about it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import click

from qmpctl.exits import Exit
from qmpctl.invocation import Verb, as_json, perform
from qmpctl.tables import print_json, printable

if TYPE_CHECKING:
    from qmpd.views import DoctorReport
    from qmpd_api.client import Client

_COLOURS = {"fail": "red", "warn": "yellow", "note": "cyan"}


@click.command("doctor", cls=Verb)
def doctor_command() -> int:
    """Say what is wrong with the daemon and its machines, and what to do. Exits with 1 if anything is a failure."""
    report = perform(lambda client: client.doctor())
    if as_json():
        print_json(report)
    else:
        _print(report)
    return Exit.OK if report.ok else Exit.NO


def _print(report: DoctorReport) -> None:
    for finding in report.findings:
        click.echo(f"{click.style(finding.severity, fg=_COLOURS[finding.severity])}  {printable(finding.where)}: {printable(finding.what)}")
        click.echo(f"      > {printable(finding.remedy)}")
    counts = {severity: sum(finding.severity == severity for finding in report.findings) for severity in _COLOURS}
    numbers = ", ".join(f"{count} {severity}" for severity, count in counts.items() if count) or "nothing is wrong"
    click.echo(f"{report.machines} machine{'' if report.machines == 1 else 's'}: {numbers}")


@click.command("bundle", cls=Verb)
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
def bundle_command(file: Path) -> None:
    """Write a support bundle: what is known of the daemon and its machines, without secrets, as FILE (.tar.gz)."""
    with _new(file) as output:
        size = perform(lambda client: _copied(client, output))
    if as_json():
        print_json({"file": str(file), "bytes": size})
    else:
        click.echo(f"{printable(str(file))}: {size} bytes. Look at it before you send it: qmpd hides what looks like a secret, and no more")


async def _copied(client: Client, output: BinaryIO) -> int:
    size = 0
    async for piece in client.bundle():
        size += output.write(piece)
    return size


@contextmanager
def _new(file: Path) -> Iterator[BinaryIO]:
    """A file that gets its name when it is whole, and that only its owner may read."""
    import os
    import tempfile

    descriptor, name = tempfile.mkstemp(dir=file.parent, prefix=".qmpd-bundle-")
    temporary = Path(name)
    with os.fdopen(descriptor, "wb") as output:
        try:
            yield output
            output.flush()
            temporary.rename(file)
        except BaseException:
            temporary.unlink()
            raise
