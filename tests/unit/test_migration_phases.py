"""The tables of a migration: what they allow, and what must follow from them for there never to be two owners."""

from __future__ import annotations

import pytest

from qmpd.migration.phases import ENDED, FIRST, KEEPABLE, TABLES, UNOWNED, IllegalStep, Phase, Role, Step, after, diagram

ROLES: tuple[Role, ...] = ("source", "destination")


@pytest.mark.parametrize("role", ROLES)
def test_what_is_decided_stays_decided(role: Role) -> None:
    for phase, row in TABLES[role].items():
        assert (row == {}) is (phase in ENDED)


@pytest.mark.parametrize("role", ROLES)
def test_every_phase_can_be_reached_and_left_for_an_end(role: Role) -> None:
    reached, waiting = set(), [FIRST[role]]
    while waiting:
        phase = waiting.pop()
        reached.add(phase)
        waiting += [to for to in TABLES[role][phase].values() if to not in reached]
    assert reached == set(TABLES[role])
    assert reached & ENDED


def test_the_source_gives_from_one_phase_only_and_never_keeps_what_it_gave() -> None:
    assert [phase for phase, row in TABLES["source"].items() if Step.GIVE in row] == [Phase.PERFORMING]
    assert {phase for phase, row in TABLES["source"].items() if Step.KEEP in row} == KEEPABLE
    assert TABLES["source"][Phase.GIVEN] == {Step.CONFIRM: Phase.MOVED, Step.RETURNED: Phase.KEPT}


def test_the_destination_takes_only_what_it_has_as_a_whole_and_discards_only_what_is_not_its_own() -> None:
    assert [phase for phase, row in TABLES["destination"].items() if Step.TAKE in row] == [Phase.LOADED]
    assert {phase for phase, row in TABLES["destination"].items() if Step.DISCARD in row} == UNOWNED


@pytest.mark.parametrize("role", ROLES)
def test_what_the_table_does_not_list_is_illegal(role: Role) -> None:
    for phase, row in TABLES[role].items():
        for step in Step:
            if step in row:
                assert after(role, phase, step) is row[step]
            else:
                with pytest.raises(IllegalStep, match=phase.value):
                    after(role, phase, step)


def test_the_diagram_has_every_step() -> None:
    assert "    loaded --> taken: take\n" in diagram("destination")
    assert "    [*] --> begun\n" in diagram("source")
    assert "    moved --> [*]\n" in diagram("source")
