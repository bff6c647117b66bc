"""Crash points of a migration that matter most, here; all of them: `scripts/migrations matrix`."""

from __future__ import annotations

from typing import Final

import pytest

from scripts.lib import migrations
from tests.guests.build import Guest
from tests.machines import spec_of
from tests.migration.baggage import Baggage, WithTpm
from tests.migration.crashes import PROMISED, Case, Point, said, suffered, survey
from tests.migration.hosts import hosts
from tests.migration.network import NoNetworks
from tests.unavailable import tool, unavailable

pytestmark = pytest.mark.qemu

GUEST = "x86_64-microvm"
#: Around the commits that move the ownership, and in the middle of the way.
POINTS: Final[tuple[Point, ...]] = (
    Point(side="source", failpoint="migration-performing-written", number=1),
    Point(side="source", failpoint="ownership-give", number=1),
    Point(side="source", failpoint="ownership-given", number=1),
    Point(side="destination", failpoint="migration-loaded-written", number=1),
    Point(side="destination", failpoint="ownership-take", number=1),
    Point(side="destination", failpoint="ownership-taken", number=1),
)
#: Where each costs half a minute, or more of them show no more.
FEWER: Final[dict[str, slice]] = {"link-cut": slice(1, 2), "link-flap": slice(None, None, 2)}
#: The same where something is taken along, and while that is made at the destination, or goes at the source.
LADEN_POINTS = {
    "base": (
        Point(side="destination", failpoint="image-made", number=1),
        Point(side="source", failpoint="migration-performing-written", number=1),
        Point(side="destination", failpoint="migration-loaded-written", number=1),
        Point(side="destination", failpoint="ownership-taken", number=1),
    ),
    "tpm": (
        Point(side="destination", failpoint="tpm-go", number=1),
        Point(side="source", failpoint="ownership-given", number=1),
        Point(side="destination", failpoint="ownership-take", number=1),
        Point(side="source", failpoint="files-remove", number=1),
    ),
}
#: Those that are not left to the slow proofs.
LADEN = {("both-daemons", "base"), ("destination-qemu", "tpm")}
#: A case takes seconds; one in which the line is cut for good, half a minute.
LIMIT_S = 1200
#: All of them.
MATRIX_LIMIT_S = 4 * 3600


@pytest.mark.timeout(LIMIT_S)
@pytest.mark.parametrize("harm", PROMISED)
async def test_a_machine_runs_once_whatever_dies(guests: dict[str, Guest], harm: str) -> None:
    try:
        async with hosts() as world:
            await world.start()
            for number, point in enumerate(POINTS[FEWER.get(harm, slice(None))]):
                verdict = await suffered(world, Baggage(spec_of(guests[GUEST], f"m{number}")), Case(point=point, harm=harm))
                assert not verdict.broken, f"{verdict}\n{said(world, migrations.LOG_LINES)}"
                assert verdict.reached, said(world, migrations.LOG_LINES)
    except NoNetworks as reason:
        unavailable(reason)


@pytest.mark.timeout(LIMIT_S)
async def test_the_points_of_a_migration_are_those_of_both_journals(guests: dict[str, Guest]) -> None:
    try:
        async with hosts() as world:
            await world.start()
            points = await survey(world, Baggage(spec_of(guests[GUEST], "survey")))
    except NoNetworks as reason:
        unavailable(reason)
    assert set(POINTS) <= set(points)
    for side in ("source", "destination"):
        assert any(point.side == side and point.failpoint == "migration-settled" for point in points)


@pytest.mark.timeout(LIMIT_S)
@pytest.mark.parametrize(
    ("harm", "what"),
    [
        (harm, what) if (harm, what) in LADEN else pytest.param(harm, what, marks=pytest.mark.slow)
        for harm in ("both-daemons", "source-qemu", "destination-qemu", "link-flap")
        for what in LADEN_POINTS
    ],
)
async def test_what_a_machine_takes_along_is_whole_whatever_dies(guests: dict[str, Guest], what: str, harm: str) -> None:
    tool("swtpm", "swtpm")
    kind, guest = migrations.BAGGAGE[what]
    try:
        async with hosts() as world:
            await world.start()
            for number, point in enumerate(LADEN_POINTS[what]):
                verdict = await suffered(world, await kind.packed(world, guests[guest], f"m{number}"), Case(point=point, harm=harm))
                assert not verdict.broken, f"{verdict}\n{said(world, migrations.LOG_LINES)}"
                assert verdict.reached
    except NoNetworks as reason:
        unavailable(reason)


@pytest.mark.timeout(LIMIT_S)
@pytest.mark.parametrize(
    ("number", "harm", "end"),
    [
        (2, "destination-tpm", "running at host0"),
        pytest.param(0, "source-tpm", "running at host0", marks=pytest.mark.slow),  # without it, as nobody has it any more
        pytest.param(2, "source-tpm", "running at host1", marks=pytest.mark.slow),
        pytest.param(5, "destination-tpm", "running at host1", marks=pytest.mark.slow),
    ],
)
async def test_a_guest_is_not_taken_without_its_tpm_while_the_other_host_has_both(
    guests: dict[str, Guest], number: int, harm: str, end: str
) -> None:
    tool("swtpm", "swtpm")
    try:
        async with hosts() as world:
            await world.start()
            machine = await WithTpm.packed(world, guests["x86_64-q35-tpm"], "machine")
            verdict = await suffered(world, machine, Case(point=POINTS[number], harm=harm))
            assert not verdict.broken, f"{verdict}\n{said(world, migrations.LOG_LINES)}"
            assert (verdict.reached, verdict.end) == (True, end)
    except NoNetworks as reason:
        unavailable(reason)


@pytest.mark.slow
@pytest.mark.timeout(MATRIX_LIMIT_S)
@pytest.mark.parametrize("what", [[], ["--with", "base"], ["--with", "tpm"]])
def test_every_crash_point(guests: dict[str, Guest], capsys: pytest.CaptureFixture[str], what: list[str]) -> None:
    assert guests
    status = migrations.main(["matrix", *what])
    assert status == 0, capsys.readouterr().out
