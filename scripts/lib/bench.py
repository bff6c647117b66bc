"""Measures qmpd, side by side with the floor (the same QEMU spawned by hand and driven over a raw socket) in one run.

What counts are the ratios: absolute times depend on the machine, whose size is printed with them. Where libvirt is installed, a libvirtd
of the benchmark's own does the same for comparison.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Final

import msgspec

from qmpd import __version__
from scripts.lib import (
    bench_adopt,
    bench_console,
    bench_events,
    bench_libvirt,
    bench_list,
    bench_many,
    bench_memory,
    bench_migrate,
    bench_plot,
    bench_qmp,
    bench_start,
    bench_stop,
    bench_table,
)
from scripts.lib.bench_daemon import MACHINES, Bench
from scripts.lib.bench_figures import Report, Row
from scripts.lib.progress import say

ROOT: Final = Path(__file__).resolve().parents[2]
PAGE: Final = ROOT / "docs" / "performance.md"
Measurement = Callable[[Bench], Coroutine[object, object, list[Row]]]
SUBJECTS: Final[dict[str, Measurement]] = {
    "start": bench_start.measure,
    "stop": bench_stop.measure,
    "many": bench_many.measure,
    "qmp": bench_qmp.measure,
    "list": bench_list.measure,
    "adopt": bench_adopt.measure,
    "memory": bench_memory.measure,
    "console": bench_console.measure,
    "events": bench_events.measure,
    "migrate": bench_migrate.measure,
}


def main() -> int:
    """Measures what the command line names and prints it; 0 when every bar holds, 1 when one does not, 2 when charts cannot be drawn."""
    options = _parser().parse_args()
    # Asked to end, it ends its daemons and machines first, as with Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        report = read(options.from_file) if options.from_file else _measured(options)
    except KeyboardInterrupt:
        say("bench: interrupted; its machines and its daemons are gone")
        return 130
    sys.stdout.write(as_json(report) if options.json else bench_table.text(report))
    if options.docs:
        bench_table.write_docs(PAGE, report)
        say(f"bench: wrote {PAGE}")
    try:
        for path in bench_plot.draw(report, options.plot) if options.plot else ():
            say(f"bench: wrote {path}")
    except bench_plot.NoCharts as error:
        say(f"bench: {error}")
        return 2
    return 0 if report.holds else 1


def as_json(report: Report) -> str:
    """The report for programs, and for `--from`."""
    return msgspec.json.format(msgspec.json.encode(report), indent=2).decode() + "\n"


def read(path: Path) -> Report:
    """A report that `--json` wrote."""
    return msgspec.json.decode(path.read_bytes(), type=Report)


def _measured(options: argparse.Namespace) -> Report:
    os.environ.pop("PYTHONPATH", None)
    # An installed daemon does not compile itself anew at every start.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    rows: list[Row] = []
    before = os.getloadavg()[0]
    with contextlib.nullcontext(None) if options.no_libvirt else bench_libvirt.running() as libvirt:
        bench = Bench(root=ROOT, repeat=options.repeat, machines=options.machines, libvirt=libvirt)
        for subject in _chosen(options.subjects):
            say(f"bench: {subject}")
            rows += asyncio.run(SUBJECTS[subject](bench))
    return Report(machine=_machine(before), versions=_versions(), rows=tuple(rows))


def _chosen(subjects: Sequence[str]) -> list[str]:
    return [subject for subject in SUBJECTS if not subjects or subject in subjects]


def _machine(load: float) -> str:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cores = len(os.sched_getaffinity(0))
    return f"{_processor()}, {cores} cores, {memory:.0f} GiB, Linux {os.uname().release}, load {load:.1f} before the run"


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), os.uname().machine)


def _versions() -> str:
    qemu = subprocess.run(["qemu-system-x86_64", "--version"], capture_output=True, text=True, check=True).stdout.split()
    return f"qmpd {__version__}, QEMU {qemu[3]}, Python {sys.version.split()[0]}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "subjects", nargs="*", choices=[*SUBJECTS, []], metavar="SUBJECT", help=f"what to measure: {', '.join(SUBJECTS)} (default: all)"
    )
    parser.add_argument("--repeat", type=_count, metavar="N", help="how often (default: as often as each figure needs)")
    parser.add_argument(
        "--machines", type=_count, default=MACHINES, metavar="N", help="how many run at once, where many do (default: %(default)s)"
    )
    parser.add_argument("--no-libvirt", action="store_true", help="leave libvirt out, even where it is installed")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of a table")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw charts into FILE (.svg or .png), or one by one into a directory")
    parser.add_argument("--docs", action="store_true", help="put the table into docs/performance.md")
    parser.add_argument(
        "--from", dest="from_file", type=Path, metavar="FILE", help="measure nothing: take the figures from FILE, which --json wrote"
    )
    return parser


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


if __name__ == "__main__":
    sys.exit(main())
