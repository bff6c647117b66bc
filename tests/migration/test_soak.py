"""Machines go back and forth between two hosts, and nothing is lost; two hundred times: `scripts/migrations soak`."""

from __future__ import annotations

import pytest

from scripts.lib import migrations
from scripts.lib.migration_soak import BOARDS, measure
from tests.conftest import ROOT
from tests.guests.build import Guest
from tests.migration.network import NoNetworks
from tests.unavailable import unavailable

pytestmark = pytest.mark.qemu

#: Of a machine of each kind, there and back.
FEW = 8
LIMIT_S = 1200
SOAK_LIMIT_S = 4 * 3600


@pytest.mark.timeout(LIMIT_S)
async def test_nothing_is_lost_on_the_way_there_and_back(guests: dict[str, Guest]) -> None:
    assert guests
    try:
        figures = await measure(ROOT, rounds=FEW, boards=BOARDS[:2], linux=False)
    except NoNetworks as reason:
        unavailable(reason)
    assert figures.broken == ()
    assert figures.moves == FEW
    assert figures.printed > 0
    assert figures.blocks > 0


@pytest.mark.slow
@pytest.mark.timeout(SOAK_LIMIT_S)
def test_two_hundred_moves_lose_nothing(guests: dict[str, Guest], capsys: pytest.CaptureFixture[str]) -> None:
    assert guests
    status = migrations.main(["soak"])
    assert status == 0, capsys.readouterr().out
