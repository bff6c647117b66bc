"""Runs the test suite: linters, types, units, and real QEMUs. Everything but the options below goes to pytest (`-k`, paths, ...).

The slow proofs are left out unless --slow asks for them; `scripts/test --slow -k NAME` runs one.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from scripts.lib.progress import say

ROOT: Final = Path(__file__).resolve().parents[2]
#: Tests with real QEMUs are limited by processors; more workers than this only make them slower.
MOST_WORKERS: Final = 4
#: With any of these the caller decides how many workers there are: a debugger needs there to be none.
OWN_WORKERS: Final = ("-n", "--numprocesses", "--pdb", "--trace", "--collect-only", "--co")
#: The pure core, which tests must cover wholly.
CORE: Final = ",".join(
    f"qmpd/{name}"
    for name in (
        "access.py",
        "argv.py",
        "board.py",
        "errors.py",
        "facts.py",
        "lifecycle.py",
        "plan/*",
        "settings.py",
        "spec.py",
        "validation/*",
        "views.py",
    )
)
#: What tests look at to see whether another QEMU than the installed one is meant.
QEMU_VARIABLE: Final = "QMPD_TEST_QEMU"


def main() -> int:
    """Run pytest as the command line says; its exit code is ours."""
    options, rest = _parser().parse_known_args()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if options.qemu is not None:
        programs = _programs(options.qemu)
        if programs is None:
            say(f"test: there is no qemu-system-x86_64 in {options.qemu} or {options.qemu / 'bin'}")
            return 2
        environment |= {QEMU_VARIABLE: str(programs), "PATH": f"{programs}{os.pathsep}{environment.get('PATH', os.defpath)}"}
    measuring = ("-m", "coverage", "run") if options.coverage else ()
    command = [sys.executable, *measuring, "-m", "pytest", *_workers(rest), *(() if options.slow else ("-m", "not slow")), *rest]
    began = time.monotonic()
    code = _run(command, environment)
    if options.coverage and code == 0:
        code = _covered(environment)
    took = time.monotonic() - began
    say(f"test: {'PASSED' if code == 0 else f'FAILED (pytest ended with {code})'} in {took:.0f} s")
    return code


def _programs(directory: Path) -> Path | None:
    """The directory of the programs: what --newer-qemu made, or any directory that holds emulators."""
    for candidate in (directory / "bin", directory):
        if (candidate / "qemu-system-x86_64").exists():
            return candidate.resolve()
    return None


def _workers(rest: Sequence[str]) -> tuple[str, ...]:
    if any(word.startswith(OWN_WORKERS) for word in rest):
        return ()
    return ("-n", str(min(MOST_WORKERS, len(os.sched_getaffinity(0)))), "--dist", "loadgroup")


def _covered(environment: Mapping[str, str]) -> int:
    """Hold the measured branch coverage to the bars of the house style: all of the core, nine tenths of the rest."""
    coverage = (sys.executable, "-m", "coverage")
    code = _run([*coverage, "combine", "--quiet"], environment)
    for what, bar in ((("--include", CORE), 100), (("--omit", CORE), 90)):
        code = code or _run([*coverage, "report", "--skip-covered", *what, f"--fail-under={bar}"], environment)
    return code


def _run(command: list[str], environment: Mapping[str, str]) -> int:
    with subprocess.Popen(command, cwd=ROOT, env=environment) as pytest:
        while True:
            try:
                return pytest.wait()
            except KeyboardInterrupt:
                # The terminal sent it to pytest as well, which ends its QEMUs and reports.
                continue


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scripts/test", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--qemu", type=Path, metavar="DIR", help="use the QEMU in DIR (see scripts/setup --newer-qemu)")
    parser.add_argument("--coverage", action="store_true", help="measure branch coverage, and fail below the bars")
    parser.add_argument("--slow", action="store_true", help="run the slow proofs too")
    return parser


if __name__ == "__main__":
    sys.exit(main())
