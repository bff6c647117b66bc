"""Makes a checkout ready to run, and says what it does. Quick when there is nothing to do."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Final

from scripts.lib import apt, environment, newer_qemu, packages
from scripts.lib.progress import say

ROOT: Final = Path(__file__).resolve().parents[2]


def main() -> int:
    """Set this checkout up as the command line says; 1 when something is missing that only the user can add."""
    # The directory that makes `scripts` importable is no business of pip and of the programs it starts.
    os.environ.pop("PYTHONPATH", None)
    options = _options()
    try:
        if options.newer_qemu is not None:
            newer_qemu.unpack(options.newer_qemu or ROOT / ".cache" / f"qemu-{options.suite}", options.suite)
        else:
            _set_up(options.purpose)
    except apt.SetupError as error:
        say(f"setup: {error}")
        return 1
    except KeyboardInterrupt:
        say("setup: interrupted; run it again to go on")
        return 130
    return 0


def _set_up(purpose: str) -> None:
    with environment.alone(ROOT):
        names = packages.needed(purpose, ROOT)
        if not environment.ready(ROOT, purpose):
            names = (*environment.venv_packages(), *names)
        absent = _missing(names)
        if absent:
            apt.install(absent)
        if not environment.ready(ROOT, purpose):
            environment.make(ROOT, purpose)
    say(f"setup: all is there for `{purpose}` (packages: {len(names)}, environment: {ROOT / '.venv'})")


def _missing(names: tuple[str, ...]) -> tuple[str, ...]:
    try:
        return packages.missing(names)
    except FileNotFoundError:
        say("setup: there is no dpkg here: QEMU and its firmware are taken as they are found")
        return ()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/setup", description=__doc__)
    parser.add_argument(
        "--for",
        dest="purpose",
        choices=packages.PURPOSES,
        default="run",
        help="run: QEMU and firmware (default); demo: and the guests of the demo; bench: and what the charts need; "
        "test: and what the test suite needs; slow: and what its slow proofs need",
    )
    parser.add_argument(
        "--newer-qemu",
        metavar="DIR",
        nargs="?",
        const="",
        type=lambda text: Path(text).resolve() if text else "",
        help="unpack a newer Debian's QEMU into DIR (default: .cache/qemu-SUITE) and install nothing; run it from DIR/bin",
    )
    parser.add_argument(
        "--suite", choices=newer_qemu.SUITES, default=newer_qemu.SUITES[0], help="where --newer-qemu comes from (default: %(default)s)"
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
