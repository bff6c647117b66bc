"""Random operations and random faults on many machines at once, and a judge of what came of them.

A daemon of its own runs machines with small guests. Clients create, start, halt, replace and delete them, while the daemon, its QEMUs and
their files meet faults. A watcher looks at the processes from outside. Now and then everything rests, and what the daemon says must be
what is the case. At the end the history of every machine must have an order in which all that was answered is true.

    I1  never two QEMUs of one machine
    I2  no QEMU without a reason, none that the daemon does not account for; what it says becomes the truth
    I3  what was acknowledged stays true
    I4  the events of a machine tell a possible life, and every end once
    I5  files that are not the daemon's stay as they are
    I6  the list of machines answers in time
    events, console, idempotency, errors   numbers are never reused, bytes never lost, effects never doubled, answers never 500

What is done follows from the seed; when it happens does not. A broken promise is printed with the seed and the history around it, and
the run is tried again with fewer kinds of faults, to find out which are needed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec

from scripts.lib.nemesis_faults import FAULTS
from scripts.lib.nemesis_run import Outcome, Plan, run
from scripts.lib.progress import say
from scripts.lib.restartable import DaemonFailed

ROOT: Final = Path(__file__).resolve().parents[2]
MINUTE_S: Final = 60.0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs as the command line says and prints what was found; 0 when nothing was broken, 1 when something was."""
    options = _parser().parse_args(argv)
    # Whoever ends this ends its daemon and its machines too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    seed = options.seed if options.seed is not None else random.randrange(10**6)  # noqa: S311  chosen, not secret
    plan = Plan(
        seconds=options.minutes * MINUTE_S,
        seed=seed,
        machines=options.machines,
        faults=tuple(options.faults or FAULTS),
        list_limit_s=options.list_limit,
        history=options.history,
    )
    try:
        outcome = asyncio.run(run(ROOT, plan))
        needed = _needed(plan, outcome, options.reduce * MINUTE_S)
    except DaemonFailed as error:
        sys.stderr.write(f"nemesis: seed {seed}: {error}\n")
        return 1
    if options.json:
        sys.stdout.write(json.dumps({**msgspec.to_builtins(outcome), "needed": needed}, indent=2) + "\n")
    else:
        sys.stdout.write(_text(plan, outcome, needed))
    return 1 if outcome.violations else 0


def _needed(plan: Plan, outcome: Outcome, budget_s: float) -> list[str]:
    """The kinds of faults without which the same promise is not broken again, as far as the time allows to find out."""
    if not outcome.violations or budget_s <= 0:
        return []
    invariants = {violation.invariant for violation in outcome.violations}
    each = min(plan.seconds, max(20.0, outcome.seconds * 1.5))
    needed = list(plan.faults)
    for kind in plan.faults:
        if budget_s < each:
            break
        budget_s -= each
        fewer = tuple(one for one in needed if one != kind)
        say(f"nemesis: the same without {kind}")
        again = asyncio.run(run(ROOT, msgspec.structs.replace(plan, seconds=each, faults=fewer, history=None)))
        if invariants & {violation.invariant for violation in again.violations}:
            needed = list(fewer)
    return needed


def _text(plan: Plan, outcome: Outcome, needed: list[str]) -> str:
    lines = [
        f"seed {plan.seed}, {plan.machines} machines, {outcome.seconds:.0f} s",
        f"{sum(outcome.operations.values())} operations, {sum(outcome.faults.values())} faults, {outcome.rests} rests",
        f"events: {outcome.events}",
        f"slowest list: {outcome.slowest_list_ms:.0f} ms",
        "outcomes: " + ", ".join(f"{count} {name}" for name, count in sorted(outcome.outcomes.items(), key=lambda pair: -pair[1])),
        "faults: " + ", ".join(f"{count} {name}" for name, count in sorted(outcome.faults.items())),
        *(f"{name}: {count}" for name, count in outcome.counts.items()),
    ]
    for violation in outcome.violations:
        lines += ["", f"BROKEN {violation.invariant} (seed {plan.seed}): {violation.what}"]
        lines += [f"    {line}" for line in violation.history[-60:]]
    if needed:
        lines += ["", f"again with: scripts/nemesis --seed {plan.seed} --machines {plan.machines} --faults {' '.join(needed)}"]
    lines.append("nothing was broken" if not outcome.violations else f"{len(outcome.violations)} broken")
    return "\n".join(lines) + "\n"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="scripts/nemesis", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, metavar="M", help="how long (default: 10)")
    parser.add_argument("--seed", type=int, metavar="S", help="what is done follows from it (default: by chance; it is printed)")
    parser.add_argument("--machines", type=int, default=20, metavar="N", help="how many machines (default: 20)")
    parser.add_argument("--faults", nargs="+", choices=list(FAULTS), metavar="FAULT", help=f"only these: {', '.join(FAULTS)}")
    parser.add_argument("--history", type=Path, metavar="FILE", help="every operation as a line of JSON")
    parser.add_argument("--list-limit", type=float, default=2.0, metavar="S", help="how long a list may take (default: 2)")
    parser.add_argument("--reduce", type=float, default=0.0, metavar="M", help="minutes to find out which faults are needed (default: 0)")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of text")
    return parser


if __name__ == "__main__":
    sys.exit(main())
