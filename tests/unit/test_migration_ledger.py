"""The ledger: what is written is there after a restart, in the phase that was written last."""

from __future__ import annotations

from pathlib import Path

import pytest

from qmpd.database import open_database
from qmpd.errors import NotFound
from qmpd.migration import ledger
from qmpd.migration.ledger import Entry, open_ledger
from qmpd.migration.phases import IllegalStep, Phase, Step
from qmpd.migration.protocol import VERSION, Offer
from qmpd.spec import MachineSpec

UUID = "123e4567-e89b-42d3-a456-426614174000"


def entry(ident: str, machine: str = "web") -> Entry:
    """A migration that has begun."""
    spec = MachineSpec(name=machine, board="x86_64-q35")
    offer = Offer(
        protocol=VERSION, id=ident, epoch=1, spec=spec, uuid=UUID, created_at="c", changed_at="c", state="running", machine="pc-q35-7.2",
        accel="tcg", emulator_version="7.2.22",
    )  # fmt: skip
    return Entry(
        id=ident, role="source", machine=machine, uuid=UUID, peer="b", epoch=1, phase=Phase.BEGUN, offer=offer, went=True, began_at="t",
        changed_at="t",
    )  # fmt: skip


async def test_what_was_written_is_there_after_a_restart(tmp_path: Path) -> None:
    async with open_database(tmp_path) as database, open_ledger(database) as opened:
        await opened.begin(entry("0" * 16))
        await opened.begin(entry("1" * 16))
        await opened.step("0" * 16, Step.ACCEPTED)
        await opened.note("0" * 16, made=("/x",))
        await opened.step("1" * 16, Step.KEEP, reason="no")
        await opened.settle("1" * 16)
        before = opened.all()
    async with open_database(tmp_path) as database, open_ledger(database) as opened:
        assert opened.all() == before
        assert [found.id for found in opened.unsettled("source")] == ["0" * 16]
        assert opened.unsettled("destination") == []
        assert (found := opened.of("web")) is not None
        assert (found.phase, found.made) == (Phase.PREPARED, ("/x",))
        assert opened.of("other") is None
        assert opened.get("1" * 16).reason == "no"


async def test_an_illegal_step_changes_nothing(tmp_path: Path) -> None:
    async with open_database(tmp_path) as database, open_ledger(database) as opened:
        await opened.begin(entry("0" * 16))
        with pytest.raises(IllegalStep):
            await opened.step("0" * 16, Step.GIVE)
        assert opened.get("0" * 16).phase is Phase.BEGUN
        with pytest.raises(NotFound):
            opened.get("f" * 16)


async def test_only_the_newest_settled_ones_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "KEPT_SETTLED", 2)
    async with open_database(tmp_path) as database, open_ledger(database) as opened:
        for number in range(5):
            await opened.begin(entry(f"{number:016x}"))
            await opened.settle(f"{number:016x}")
        await opened.begin(entry("f" * 16))
        kept = [found.id for found in opened.all()]
    assert kept == ["f" * 16, f"{4:016x}", f"{3:016x}"]
    async with open_database(tmp_path) as database, open_ledger(database) as opened:
        assert "f" * 16 in {found.id for found in opened.all()}
        assert len(opened.all()) <= len(kept)
