"""The table of states has no holes and no traps."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpd.lifecycle import ALIVE, ANSWERING, AT_REST, TABLE, Happening, IllegalTransition, State, after, diagram

LEGAL = [(state, happening) for state, row in TABLE.items() for happening in row]
ILLEGAL = [(state, happening) for state in State for happening in Happening if happening not in TABLE[state]]
ENDINGS = {Happening.EXITED, Happening.DIED, Happening.LAUNCH_FAILED}


def reachable(start: State) -> set[State]:
    found, edge = {start}, [start]
    while edge:
        new = set(TABLE[edge.pop()].values()) - found
        found |= new
        edge += new
    return found


@pytest.mark.parametrize("state", State)
def test_every_state_leads_to_every_state(state: State) -> None:
    assert reachable(state) == set(State)


@pytest.mark.parametrize("happening", Happening)
def test_everything_that_can_happen_can_happen_to_some_machine(happening: Happening) -> None:
    assert any(happening in row for row in TABLE.values())


def test_a_machine_is_at_rest_or_alive() -> None:
    assert set(TABLE) == set(State)
    assert set(State) == ALIVE | AT_REST
    assert not ALIVE & AT_REST
    assert ANSWERING < ALIVE


@pytest.mark.parametrize(("state", "happening"), ILLEGAL)
def test_what_the_table_does_not_list_raises(state: State, happening: Happening) -> None:
    with pytest.raises(IllegalTransition, match=f"{happening} cannot happen to a machine that is {state}"):
        after(state, happening)


@pytest.mark.parametrize(("state", "happening"), LEGAL)
def test_only_an_observed_end_brings_a_living_machine_to_rest(state: State, happening: Happening) -> None:
    if state in ALIVE:
        assert (after(state, happening) in AT_REST) == (happening in ENDINGS)


@pytest.mark.parametrize(("state", "happening"), LEGAL)
def test_only_a_launch_or_a_find_wakes_a_machine_at_rest(state: State, happening: Happening) -> None:
    if state in AT_REST:
        assert (after(state, happening) in ALIVE) == (happening in {Happening.LAUNCH, Happening.FOUND})


def test_that_a_machine_did_not_stop_but_die_may_turn_out_later_and_not_the_reverse() -> None:
    assert {pair for pair in LEGAL if pair[0] in AT_REST and pair[1] in ENDINGS} == {(State.STOPPED, Happening.DIED)}


@given(st.lists(st.sampled_from(Happening)))
def test_an_illegal_happening_changes_nothing(happenings: list[Happening]) -> None:
    state = State.STOPPED
    for happening in happenings:
        before = state
        try:
            state = after(state, happening)
        except IllegalTransition:
            assert state is before
        assert state in TABLE


def test_a_machine_that_was_asked_to_end_does_not_run_again_by_itself() -> None:
    assert after(State.STOPPING, Happening.RAN) is State.STOPPING
    assert after(State.STOPPING, Happening.HALTED) is State.STOPPING


def test_the_diagram_has_every_transition_that_changes_something() -> None:
    rows = diagram().splitlines()
    assert rows[:2] == ["stateDiagram-v2", "    [*] --> stopped"]
    assert set(rows[2:]) == {
        f"    {state} --> {after(state, happening)}: {happening}" for state, happening in LEGAL if after(state, happening) is not state
    }
