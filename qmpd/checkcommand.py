"""The command `qmpd check`."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import sys
from collections.abc import Iterator
from functools import partial
from typing import Final, TextIO

import msgspec

from qmpd import checkreport
from qmpd.accelerator import Accelerators
from qmpd.hostcheck import check
from qmpd.inventory import certificate_lines
from qmpd.probe import Emulators
from qmpd.settings import Settings
from qmpd.views import CheckReport

#: Written while the first check of a host takes its seconds, and erased again (carriage return, erase to the end of the line).
PATIENCE: Final = "asking the emulators and measuring KVM ..."
ERASE: Final = "\r\x1b[K"


def run(json: bool, settings: Settings, *, output: TextIO | None = None, progress: TextIO | None = None) -> int:
    """Check this host and print the report, as text or as the exact JSON of the API; 0 if machines can run here, else 1."""
    output = sys.stdout if output is None else output
    with _patience(sys.stderr if progress is None else progress):
        report = asyncio.run(_report(settings))
    output.write(msgspec.json.encode(report).decode() + "\n" if json else _text(report, output))
    return 0 if report.ok else 1


@contextlib.contextmanager
def _patience(progress: TextIO) -> Iterator[None]:
    """Say on a terminal that something is going on, for as long as it is."""
    if not progress.isatty():
        yield
        return
    progress.write(PATIENCE)
    progress.flush()
    try:
        yield
    finally:
        progress.write(ERASE)
        progress.flush()


async def _report(settings: Settings) -> CheckReport:
    emulators = Emulators(settings.cache_dir, settings.emulators)
    accelerators = Accelerators(settings.run_dir)
    return await check(
        emulators,
        accelerators,
        state_dir=settings.state_dir,
        machines_cgroup=settings.machines_cgroup,
        further=partial(certificate_lines, settings),
    )


def _text(report: CheckReport, output: TextIO) -> str:
    return checkreport.text(report, width=shutil.get_terminal_size().columns, colour=checkreport.coloured(output))
