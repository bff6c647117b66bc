"""Crash points that matter most of a machine at rest that moves or is copied; all: `scripts/migrations matrix`."""

from __future__ import annotations

from typing import Any

import pytest

from scripts.lib import migrations
from tests.guests.build import Guest
from tests.migration.copying import suffered_in_copy, survey_of_copy
from tests.migration.crashes import OF_MIGRATION, Case, Point, said
from tests.migration.hosts import hosts
from tests.migration.network import NoNetworks
from tests.migration.resting import HARMS_AT_REST, suffered_at_rest, survey_at_rest
from tests.unavailable import unavailable

pytestmark = pytest.mark.qemu

#: Around the commits that move the ownership, in the middle of a file, and where files get their names or lose them.
POINTS = (
    Point(side="source", failpoint="migration-performing-written", number=1),
    Point(side="source", failpoint="ownership-give", number=1),
    Point(side="source", failpoint="ownership-given", number=1),
    Point(side="source", failpoint="files-remove", number=1),
    Point(side="destination", failpoint="migration-file-write", number=2),
    Point(side="destination", failpoint="migration-loaded-written", number=1),
    Point(side="destination", failpoint="migration-file-placed", number=1),
    Point(side="destination", failpoint="ownership-take", number=1),
    Point(side="destination", failpoint="ownership-taken", number=1),
)
#: Around the note that makes a copy the peer's to take, and in the middle of a file.
COPY_POINTS = (
    Point(side="source", failpoint="migration-performing-written", number=1),
    Point(side="source", failpoint="migration-released", number=1),
    Point(side="source", failpoint="migration-released-written", number=1),
    Point(side="source", failpoint="migration-copied", number=1),
    Point(side="destination", failpoint="migration-file-write", number=2),
    Point(side="destination", failpoint="migration-loaded-written", number=1),
    Point(side="destination", failpoint="migration-file-placed", number=1),
    Point(side="destination", failpoint="ownership-take", number=1),
    Point(side="destination", failpoint="ownership-taken", number=1),
)
#: While a guest runs that is copied: what it could be left halted by, or with images that nobody needs.
LIVE_POINTS = (
    Point(side="source", failpoint="still-make", number=1),
    Point(side="source", failpoint="still-halt", number=1),
    Point(side="source", failpoint="still-halted", number=1),
    Point(side="source", failpoint="still-cont", number=1),
    Point(side="source", failpoint="still-remove", number=1),
    Point(side="source", failpoint="migration-released-written", number=1),
    Point(side="destination", failpoint="migration-loaded-written", number=1),
)
#: A case takes seconds; one of a cut line a few more.
LIMIT_S = 1200
MATRIX_LIMIT_S = 4 * 3600


def but_for(*quick: str) -> list[Any]:
    """All harms, of which these are not left to the slow proofs: one host that loses its daemon is a part of both that do."""
    return [harm if harm in quick else pytest.param(harm, marks=pytest.mark.slow) for harm in HARMS_AT_REST]


@pytest.mark.timeout(LIMIT_S)
@pytest.mark.parametrize("harm", but_for("both-daemons", "link-flap"))
async def test_a_machine_at_rest_is_somewhere_and_whole_whatever_dies(guests: dict[str, Guest], harm: str) -> None:
    try:
        async with hosts() as world:
            await world.start()
            for number, point in enumerate(POINTS[1::3] if harm == "link-flap" else POINTS):
                verdict = await suffered_at_rest(world, guests[migrations.GUEST_AT_REST], f"m{number}", Case(point=point, harm=harm))
                assert not verdict.broken, f"{verdict}\n{said(world, migrations.LOG_LINES)}"
                assert verdict.reached
    except NoNetworks as reason:
        unavailable(reason)


@pytest.mark.timeout(LIMIT_S)
@pytest.mark.parametrize("harm", but_for("both-daemons"))
async def test_a_copy_is_whole_or_nothing_and_its_original_untouched_whatever_dies(guests: dict[str, Guest], harm: str) -> None:
    try:
        async with hosts() as world:
            await world.start()
            for number, point in enumerate(COPY_POINTS[1::3] if harm == "link-flap" else COPY_POINTS[::2]):
                verdict = await suffered_in_copy(world, guests[migrations.GUEST_AT_REST], f"m{number}", Case(point=point, harm=harm))
                assert not verdict.broken, f"{verdict}\n{said(world, migrations.LOG_LINES)}"
                assert verdict.reached
    except NoNetworks as reason:
        unavailable(reason)


@pytest.mark.timeout(LIMIT_S)
@pytest.mark.parametrize("harm", but_for("both-daemons"))
async def test_a_guest_that_is_copied_goes_on_whatever_dies(guests: dict[str, Guest], harm: str) -> None:
    guest = guests[migrations.GUEST_AT_REST]
    try:
        async with hosts() as world:
            await world.start()
            for number, point in enumerate(LIVE_POINTS[2::3] if harm == "link-flap" else LIVE_POINTS[1::2]):
                verdict = await suffered_in_copy(world, guest, f"m{number}", Case(point=point, harm=harm), runs=True)
                assert not verdict.broken, f"{verdict}\n{said(world, migrations.LOG_LINES)}"
                assert verdict.reached
    except NoNetworks as reason:
        unavailable(reason)


@pytest.mark.timeout(LIMIT_S)
async def test_the_points_of_such_a_move_are_those_of_both_journals(guests: dict[str, Guest]) -> None:
    try:
        async with hosts() as world:
            await world.start()
            points = await survey_at_rest(world, guests[migrations.GUEST_AT_REST])
            of_copy = await survey_of_copy(world, guests[migrations.GUEST_AT_REST])
    except NoNetworks as reason:
        unavailable(reason)
    assert {point for point in POINTS if point.failpoint.startswith(OF_MIGRATION)} <= set(points)
    assert {point for point in COPY_POINTS if point.failpoint.startswith(OF_MIGRATION)} <= set(of_copy)
    assert not {"migration-given", "ownership-give", "migration-moved"} & {point.failpoint for point in of_copy}


@pytest.mark.slow
@pytest.mark.timeout(MATRIX_LIMIT_S)
@pytest.mark.parametrize("what", [["--at-rest"], ["--copy", "at-rest"], ["--copy", "running"]])
def test_every_crash_point_at_rest(guests: dict[str, Guest], capsys: pytest.CaptureFixture[str], what: list[str]) -> None:
    assert guests
    status = migrations.main(["matrix", *what])
    assert status == 0, capsys.readouterr().out
