"""Proofs of live migration, on two daemons of their own in two network namespaces (needs root).

matrix   at each failpoint of both daemons one of them dies, a QEMU is killed, or the line between them is cut. A watcher outside of
         the daemons sees that never two copies run; afterwards one host owns the machine, it lost no byte, and nothing is left.
soak     machines of many architectures go back and forth under load, a Linux that writes to its disk among them; every tick, byte
         and block is counted.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec

from scripts.lib import migration_soak
from scripts.lib.progress import say
from scripts.lib.restartable import DaemonFailed
from tests.guests.build import Guest, build_all
from tests.machines import spec_of
from tests.migration.baggage import Baggage, UponBase, WithTpm
from tests.migration.copying import suffered_in_copy, survey_of_copy
from tests.migration.crashes import HARMS, PROMISED, Case, Point, Verdict, crossed, said, suffered, survey
from tests.migration.hosts import Hosts, hosts
from tests.migration.network import NoNetworks
from tests.migration.resting import HARMS_AT_REST, suffered_at_rest, survey_at_rest
from tests.migration.traveller import Broken

ROOT: Final = Path(__file__).resolve().parents[2]
#: Boots at once, and costs little.
GUEST: Final = "x86_64-microvm"
#: What a machine that runs may take along, and the guest that would miss it.
BAGGAGE: Final[dict[str, tuple[type[UponBase] | type[WithTpm], str]]] = {
    "base": (UponBase, "x86_64-pc-blocks"),
    "tpm": (WithTpm, "x86_64-q35-tpm"),
}
#: Has a disk to take along.
GUEST_AT_REST: Final = "x86_64-q35"
#: Of each daemon's log, when something was broken.
LOG_LINES: Final = 60


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a proof and prints what it found; 0 when nothing was broken, 1 when something was."""
    options = _parser().parse_args(argv)
    # Whoever ends this ends its daemons and its machines too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return asyncio.run(_matrix(options) if options.proof == "matrix" else _soak(options))
    except (DaemonFailed, NoNetworks, Broken) as error:
        sys.stderr.write(f"migrations: {error}\n")
        return 1


class Trial:
    """What the machines of a matrix are, and how each is put to the proof."""

    def __init__(self, options: argparse.Namespace, world: Hosts, guests: dict[str, Guest]) -> None:
        self._options = options
        self._world = world
        self._guests = guests
        self._runs = options.copy == "running"

    async def points(self) -> list[Point]:
        """Every point on the way of such a machine."""
        world, everything = self._world, self._options.everything
        if self._options.copy:
            return await survey_of_copy(world, self._guests[GUEST_AT_REST], everything=everything, runs=self._runs)
        if self._options.at_rest:
            return await survey_at_rest(world, self._guests[GUEST_AT_REST], everything=everything)
        return await survey(world, await self._packed("survey"), everything=everything)

    async def verdict(self, name: str, case: Case) -> Verdict:
        """What comes of a case."""
        if self._options.copy:
            return await suffered_in_copy(self._world, self._guests[GUEST_AT_REST], name, case, runs=self._runs)
        if self._options.at_rest:
            return await suffered_at_rest(self._world, self._guests[GUEST_AT_REST], name, case)
        return await suffered(self._world, await self._packed(name), case)

    async def _packed(self, name: str) -> Baggage:
        if self._options.baggage is None:
            return Baggage(spec_of(self._guests[GUEST], name))
        kind, guest = BAGGAGE[self._options.baggage]
        return await kind.packed(self._world, self._guests[guest], name)


async def _matrix(options: argparse.Namespace) -> int:
    guests = await asyncio.to_thread(build_all, ROOT / ".cache" / "guests")
    own = BAGGAGE[options.baggage][0].harms if options.baggage else ()
    harms = options.harms or (HARMS_AT_REST if options.at_rest or options.copy else (*PROMISED, *own))
    verdicts: list[Verdict] = []
    async with hosts() as world:
        await world.start()
        trial = Trial(options, world, guests)
        points = await trial.points()
        chosen = [point for point in points if re.search(options.points, str(point))]
        say(f"migrations: {len(points)} points on the way, {len(chosen)} of them with {', '.join(harms)}")
        for number, case in enumerate(crossed(chosen, harms)):
            verdicts.append(await trial.verdict(f"m{number}", case))
            _tell(verdicts[-1])
            if verdicts[-1].broken:
                say(said(world, LOG_LINES))
    if options.json:
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(verdicts), indent=2).decode() + "\n")
    else:
        sys.stdout.write(table(verdicts, harms))
    return 1 if any(verdict.broken for verdict in verdicts) else 0


def table(verdicts: Sequence[Verdict], harms: Sequence[str]) -> str:
    """A line for each point, a column for each harm: where the machine was in the end, or BROKEN."""
    found = {verdict.case: verdict for verdict in verdicts}
    points = list(dict.fromkeys(verdict.case.point for verdict in verdicts))
    widths = [max(len(harm), len("running at host0")) for harm in harms]
    lines = [" " * 44 + "  ".join(harm.ljust(width) for harm, width in zip(harms, widths, strict=True))]
    for point in points:
        cells = [_cell(found.get(Case(point=point, harm=harm))) for harm in harms]
        lines.append(f"{point!s:44}" + "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)))
    broken = [f"BROKEN: {verdict.case}: {what}" for verdict in verdicts for what in verdict.broken]
    unreached = sum(not verdict.reached for verdict in verdicts)
    summary = f"{len(verdicts)} cases, {unreached} of which did not come by their point; {len(broken)} broken"
    return "\n".join([*lines, "", *broken, summary]) + "\n"


def _cell(verdict: Verdict | None) -> str:
    if verdict is None:
        return ""
    return "BROKEN" if verdict.broken else verdict.end if verdict.reached else "not reached"


def _tell(verdict: Verdict) -> None:
    say(f"  {'BROKEN' if verdict.broken else 'ok':6} {verdict.case}: {'; '.join(verdict.broken) or verdict.end}")


async def _soak(options: argparse.Namespace) -> int:
    began = time.monotonic()
    figures = await migration_soak.measure(ROOT, rounds=options.rounds, boards=options.boards, linux=not options.no_linux)
    if options.json:
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(figures), indent=2).decode() + "\n")
    else:
        lines = [
            f"{figures.moves} moves of {figures.machines} machines in {time.monotonic() - began:.0f} s",
            f"{figures.printed} bytes printed, {figures.blocks} blocks written",
            f"downtime {figures.downtime_median:.0f} ms, at worst {figures.downtime_worst:.0f} ms",
            f"whole move {figures.total_median:.0f} ms, at worst {figures.total_worst:.0f} ms",
            *(f"BROKEN: {what}" for what in figures.broken),
            "nothing was lost" if not figures.broken else f"{len(figures.broken)} broken",
        ]
        sys.stdout.write("\n".join(lines) + "\n")
    return 1 if figures.broken or figures.moves < options.rounds else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="scripts/migrations", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    proofs = parser.add_subparsers(dest="proof", required=True, metavar="PROOF")
    matrix = proofs.add_parser("matrix", help="every crash point")
    matrix.add_argument("--harms", nargs="+", choices=list(HARMS), metavar="HARM", help=f"of {', '.join(HARMS)}")
    what = matrix.add_mutually_exclusive_group()
    what.add_argument("--at-rest", action="store_true", help="of a machine that does not run, and moves as files")
    what.add_argument(
        "--with",
        dest="baggage",
        choices=list(BAGGAGE),
        help="of one that runs, and has a disk upon a base that both hosts have, or a TPM",
    )
    what.add_argument("--copy", choices=("at-rest", "running"), help="of a machine that is copied, while it does not run or while it runs")
    matrix.add_argument("--points", default="", metavar="REGEX", help="only points whose name this fits, like 'source ownership'")
    matrix.add_argument("--everything", action="store_true", help="at all failpoints there are, not those of migrations alone")
    soak = proofs.add_parser("soak", help="back and forth under load")
    soak.add_argument("--rounds", type=int, default=200, metavar="N", help="how many moves (default: 200)")
    soak.add_argument(
        "--boards", nargs="+", default=list(migration_soak.BOARDS), metavar="BOARD", help="boards of tests/guests whose guests count"
    )
    soak.add_argument("--no-linux", action="store_true", help="without the Linux that writes to a disk")
    for proof in (matrix, soak):
        proof.add_argument("--json", action="store_true", help="one JSON document instead of text")
    return parser


if __name__ == "__main__":
    sys.exit(main())
