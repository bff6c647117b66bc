"""Proofs that take long: machines outlive a daemon that is killed over and over, and a daemon that starts and stops machines for hours
does not grow.

    readopt   so many machines run; the daemon is killed with SIGKILL and started again, in a loop. Every machine is taken over each time:
              the same process, nothing restarted, event numbers go on. Bars: the API answers 0.5 s after exec, all machines 2 s after.
    cycles    machines are started and stopped in a loop, while the daemon's memory, descriptors and threads are sampled: they stay flat.
              First, what a running machine costs the daemon. Bars: 60 MiB, and 150 KiB for each running machine.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from pathlib import Path
from typing import Final

import msgspec

from scripts.lib import endurance_cycles, endurance_readopt
from scripts.lib.bench_figures import Report, Row
from scripts.lib.restartable import DaemonFailed

ROOT: Final = Path(__file__).resolve().parents[2]


def main() -> int:
    """Runs the proof and prints what it measured; 0 when every bar holds, 1 when one does not."""
    options = _parser().parse_args()
    # Whoever ends this ends its daemon and its machines too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        rows, broken = asyncio.run(_proof(options))
    except DaemonFailed as error:
        sys.stderr.write(f"endurance: {error}\n")
        return 1
    report = Report(machine=_machine(), versions="", rows=tuple(rows))
    if options.json:
        document = {**msgspec.to_builtins(report), "broken": broken}
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(document), indent=2).decode() + "\n")
    else:
        sys.stdout.write(_table(report, broken))
    return 0 if report.holds and not broken else 1


async def _proof(options: argparse.Namespace) -> tuple[list[Row], list[str]]:
    if options.proof == "readopt":
        return await endurance_readopt.measure(ROOT, machines=options.machines, rounds=options.rounds)
    return await endurance_cycles.measure(ROOT, cycles=options.cycles, machines=options.machines)


def _table(report: Report, broken: list[str]) -> str:
    lines = [report.machine]
    for row in report.rows:
        verdict = {None: "", True: "holds", False: "MISSED"}[row.holds]
        lines.append(f"{row.what:58} {row.measured:10.1f} {row.unit:5} {row.bar:>14} {verdict}")
    lines += [f"BROKEN: {line}" for line in broken]
    return "\n".join(lines) + "\n"


def _machine() -> str:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{len(os.sched_getaffinity(0))} cores, {memory:.0f} GiB, Linux {os.uname().release}, load {os.getloadavg()[0]:.1f}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="scripts/endurance", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    proofs = parser.add_subparsers(dest="proof", required=True, metavar="PROOF")
    readopt = proofs.add_parser("readopt", help="kill and start the daemon in a loop, with machines running")
    readopt.add_argument("--rounds", type=int, default=100, metavar="N", help="how often the daemon is killed (default: 100)")
    cycles = proofs.add_parser("cycles", help="start and stop machines in a loop")
    cycles.add_argument("--cycles", type=int, default=10_000, metavar="N", help="how many starts (default: 10000)")
    for proof in (readopt, cycles):
        proof.add_argument("--machines", type=int, metavar="N", default=100, help="how many machines (default: 100)")
        proof.add_argument("--json", action="store_true", help="one JSON document instead of a table")
    return parser


if __name__ == "__main__":
    sys.exit(main())
