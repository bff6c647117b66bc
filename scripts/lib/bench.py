"""Measures qmpd, side by side with the floor (the same QEMU spawned by hand and driven over a raw socket) in one run.

What counts are the ratios: absolute times depend on the machine, whose size is printed with them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Final

from scripts.lib import bench_list, bench_start
from scripts.lib.bench_figures import Row
from scripts.lib.progress import say

ROOT: Final = Path(__file__).resolve().parents[2]
Measurement = Callable[[Path, int | None], Coroutine[object, object, list[Row]]]
SUBJECTS: Final[dict[str, Measurement]] = {"start": bench_start.measure, "list": bench_list.measure}


def main() -> int:
    """Measures what the command line names and prints it; 0 when every bar holds, 1 when one does not."""
    options = _parser().parse_args()
    rows: list[Row] = []
    for subject in options.subjects or list(SUBJECTS):
        say(f"bench: {subject}")
        rows += asyncio.run(SUBJECTS[subject](ROOT, options.repeat))
    sys.stdout.write(_json(rows) if options.json else _table(rows))
    return 0 if all(row.holds for row in rows) else 1


def _table(rows: Sequence[Row]) -> str:
    lines = [f"{_machine()}", f"{'what':46} {'floor':>10} {'qmpd':>10} {'ratio':>7} {'bar':>14}"]
    for row in rows:
        floor = "" if row.floor is None else f"{row.floor:.1f} {row.unit}"
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        lines.append(
            f"{row.what:46} {floor:>10} {row.measured:.1f} {row.unit:>4} {ratio:>8} {row.bar:>14} {'holds' if row.holds else 'MISSED'}"
        )
    return "\n".join(lines) + "\n"


def _json(rows: Sequence[Row]) -> str:
    return json.dumps({"machine": _machine(), "rows": [row.as_dict() for row in rows]}, indent=2) + "\n"


def _machine() -> str:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    load = os.getloadavg()[0]
    return f"{len(os.sched_getaffinity(0))} cores, {memory:.0f} GiB, Linux {os.uname().release}, load {load:.1f}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "subjects", nargs="*", choices=[*SUBJECTS, []], metavar="SUBJECT", help=f"what to measure: {', '.join(SUBJECTS)} (default: all)"
    )
    parser.add_argument("--repeat", type=int, metavar="N", help="how often (default: as often as the figure needs)")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of a table")
    return parser


if __name__ == "__main__":
    sys.exit(main())
