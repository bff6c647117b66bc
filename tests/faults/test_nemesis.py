"""Random operations and random faults for a minute: whatever comes of them, nothing that was promised is broken."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.lib.endurance_cycles import measure as measure_cycles
from scripts.lib.endurance_readopt import measure as measure_readopt
from scripts.lib.nemesis_faults import FAULTS
from scripts.lib.nemesis_run import Plan, run
from tests.guests.build import Guest

ROOT = Path(__file__).parents[2]
SECONDS = 60
#: What follows the minute on a host that is loaded by something else: each rest may take five minutes.
LIMIT_S = 1800
#: Here nobody's speed is judged: a list must come, however late.
LIST_LIMIT_S = 120.0


@pytest.mark.qemu
@pytest.mark.timeout(LIMIT_S)
async def test_a_minute_of_faults_breaks_nothing(guests: dict[str, Guest]) -> None:
    assert guests
    plan = Plan(seconds=SECONDS, seed=7, machines=5, faults=tuple(FAULTS), list_limit_s=LIST_LIMIT_S)
    outcome = await run(ROOT, plan)
    said = "\n".join(line for violation in outcome.violations for line in (f"{violation.invariant}: {violation.what}", *violation.history))
    assert not outcome.violations, f"scripts/nemesis --seed {plan.seed} --machines {plan.machines}\n{said}"
    assert outcome.outcomes.get("ok", 0) > 0
    assert outcome.faults


@pytest.mark.qemu
@pytest.mark.timeout(LIMIT_S)
async def test_every_daemon_takes_over_what_the_one_before_it_left(guests: dict[str, Guest]) -> None:
    assert guests
    rows, broken = await measure_readopt(ROOT, machines=4, rounds=3)
    assert broken == []
    assert rows


@pytest.mark.qemu
@pytest.mark.timeout(LIMIT_S)
async def test_starting_and_stopping_leaves_no_process(guests: dict[str, Guest]) -> None:
    assert guests
    rows, left = await measure_cycles(ROOT, cycles=24, machines=6)
    assert left == []
    assert rows
