"""The judge of nemesis runs accepts every history that can be, and finds what is wrong in those that cannot."""

from __future__ import annotations

import random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scripts.lib.nemesis_history import DOWN, OK, PAUSED, RUNNING, UNKNOWN, Entry
from scripts.lib.nemesis_model import HARMLESS, State, judge, possible, shortest

KINDS = ("create", "replace", "delete", "start", "pause", "resume", "stop", "kill", "definition", "fault-kill", "rest")


def entry(kind: str, begin: float, end: float | None, outcome: str = OK, **facts: object) -> Entry:
    """One entry of machine n00."""
    number = int(begin * 1000)
    fixed = {"number": number, "who": "a", "kind": kind, "machine": "n00", "begin": begin, "end": end, "outcome": outcome}
    return msgspec.convert({**fixed, **facts}, Entry)


def created(begin: float = 0.0, mark: str = "one", revision: int = 5, run: str = "") -> Entry:
    return entry("create", begin, begin + 0.5, mark=mark, given=revision, run=run)


def test_one_thing_after_the_other_is_right() -> None:
    history = [
        created(),
        entry("start", 1, 1.5, run=RUNNING),
        entry("pause", 2, 2.5),
        entry("rest", 3, 3.5, mark="one", revision=5, run=PAUSED),
        entry("stop", 4, 4.5),
        entry("replace", 5, 5.5, mark="two", revision=5, given=6),
        entry("definition", 6, 6.5, mark="two", revision=6),
        entry("delete", 7, 7.5),
        entry("definition", 8, 8.5, "not_found"),
    ]
    assert judge(history).wrong is None


WRONG = {
    "a created machine that is not there": [created(), entry("definition", 1, 2, "not_found")],
    "a machine created twice": [created(), created(1, "two", 6)],
    "a deleted machine that is there": [created(), entry("delete", 1, 2), entry("definition", 3, 4, mark="one", revision=5)],
    "an acknowledged change that is gone": [
        created(), entry("replace", 1, 2, mark="two", revision=5, given=6), entry("definition", 3, 4, mark="one", revision=5),
    ],
    "an old revision that was taken": [
        created(), entry("replace", 1, 2, mark="two", revision=5, given=6), entry("replace", 3, 4, mark="three", revision=5, given=7),
    ],
    "the current revision that was refused": [created(), entry("replace", 1, 2, "stale_revision", mark="two", revision=5)],
    "a change of a running machine": [created(run=RUNNING), entry("replace", 1, 2, mark="two", revision=5, given=6)],
    "a running machine that was deleted": [created(run=RUNNING), entry("delete", 1, 2)],
    "a second start": [created(run=RUNNING), entry("start", 1, 2, run=RUNNING)],
    "a halt of what does not run": [created(), entry("pause", 1, 2)],
    "a halted machine that runs": [
        created(run=RUNNING), entry("pause", 1, 2), entry("rest", 3, 4, mark="one", revision=5, run=RUNNING),
    ],
    "a machine that was started halted and runs": [created(run=PAUSED), entry("rest", 3, 4, mark="one", revision=5, run=RUNNING)],
    "a started machine that is down": [created(run=RUNNING), entry("rest", 3, 4, mark="one", revision=5, run=DOWN)],
    "a stopped machine that runs": [
        created(run=RUNNING), entry("stop", 1, 2), entry("rest", 3, 4, mark="one", revision=5, run=RUNNING),
    ],
    "what was unknown before a rest and comes true after it": [
        created(), entry("delete", 1, None, UNKNOWN), entry("rest", 3, 4, mark="one", revision=5, run=DOWN),
        entry("definition", 5, 6, "not_found"),
    ],
    "a process that nobody started": [entry("rest", 3, 4, run=RUNNING)],
    "a verb on a machine that never was": [entry("reset", 1, 2)],
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_the_judge_finds(name: str) -> None:
    history = WRONG[name]
    assert judge(history).wrong is history[-1]


def test_what_is_unknown_may_have_happened_or_not() -> None:
    for seen in (entry("definition", 3, 4, mark="two", revision=6), entry("definition", 3, 4, mark="one", revision=5)):
        assert judge([created(), entry("replace", 1, None, UNKNOWN, mark="two", revision=5), seen]).wrong is None


def test_what_was_asked_twice_with_a_rest_between_is_one_thing() -> None:
    rest = entry("rest", 2, 2.5, mark="one", revision=5, run=DOWN)
    asked = entry("replace", 1, 4, mark="two", revision=5, given=6)
    assert judge([created(), asked, rest, entry("definition", 5, 6, mark="two", revision=6)]).wrong is None
    assert judge([created(), asked, rest, entry("definition", 5, 6, mark="one", revision=5)]).wrong is not None


def test_what_is_unknown_happens_once() -> None:
    back = [entry("definition", 3, 4, mark="two", revision=6), entry("definition", 5, 6, mark="one", revision=5)]
    assert judge([created(), entry("replace", 1, None, UNKNOWN, mark="two", revision=5), *back]).wrong is back[1]


def test_a_name_is_taken_while_its_machine_is_made() -> None:
    refused = entry("create", 0.1, 0.2, "already_exists", mark="two")
    absent = entry("definition", 0.3, 0.4, "not_found")
    assert judge([created(), refused, absent]).wrong is None
    assert judge([refused, absent]).wrong is refused


def test_the_shortest_history_begins_at_the_last_rest_and_has_only_what_matters() -> None:
    rest = entry("rest", 3, 3.5, mark="one", revision=5, run=DOWN)
    start = entry("start", 4, 4.5, run=RUNNING)
    wrong = entry("rest", 8, 9, mark="one", revision=5, run=PAUSED)
    history = [created(), entry("start", 1, 1.2, run=RUNNING), entry("stop", 2, 2.2), rest, start, entry("wait", 5, 6, "not_yet"), wrong]
    assert shortest(history) == [rest, start, wrong]
    assert shortest(history[:-1]) == []


def simulated(chance: random.Random, count: int) -> list[Entry]:
    """A history that did happen: operations took effect one after another on one machine, each somewhere between its begin and its end."""
    state = State()
    entries = []
    for number in range(count):
        moment = float(number)
        kind = chance.choice(KINDS)
        mark = f"mark{number}"
        revision = chance.choice((state.revision, None, 1)) if kind in {"replace", "delete"} else None
        made = entry(kind, moment, moment, mark=mark if kind in {"create", "replace"} else "", revision=revision, number=number)
        made.run = chance.choice((RUNNING, PAUSED)) if kind == "start" else ""
        made.given = 100 + number if kind in {"create", "replace"} else None
        if kind in {"definition", "rest"}:
            made.mark, made.revision, made.run = state.mark or "", state.revision, state.run if kind == "rest" and state.mark else ""
            if kind == "rest" and state.mark and state.run == DOWN:
                made.run = DOWN
        after = possible(state, made) if kind != "definition" or state.mark else ()
        if kind == "definition" and state.mark is None:
            made.outcome = "not_found"
        elif not after:
            made.outcome = chance.choice(("wrong_state", "held")) if state.mark else "not_found"
            if kind == "create":
                made.outcome = "already_exists"
        else:
            state = after[0]
            if kind != "rest" and chance.random() < 0.15:
                made.outcome = UNKNOWN
        spread = 0.0 if kind == "rest" else chance.uniform(0, 3)
        made.begin, made.end = (
            moment - spread,
            None if made.outcome == UNKNOWN else moment + chance.uniform(0, 0.4 if kind == "rest" else 3),
        )
        entries.append(made)
    return _apart(entries)


def _apart(entries: list[Entry]) -> list[Entry]:
    """At a rest nothing else is under way."""
    rests = [one for one in entries if one.kind == "rest"]
    for rest in rests:
        rest.begin, rest.end = rest.number - 0.1, rest.number + 0.1
        for other in entries:
            if other is rest:
                continue
            if other.number < rest.number and other.end is not None:
                other.end = min(other.end, rest.number - 0.2)
            elif other.number > rest.number:
                other.begin = max(other.begin, rest.number + 0.2)
    return entries


@given(st.integers(0, 10**9), st.integers(1, 30))
def test_every_history_that_happened_is_right(seed: int, count: int) -> None:
    verdict = judge(simulated(random.Random(seed), count))
    assert verdict.wrong is None


@given(st.integers(0, 10**9), st.integers(1, 20))
def test_no_history_hides_a_machine_that_nobody_made(seed: int, count: int) -> None:
    history = simulated(random.Random(seed), count)
    stranger = entry("definition", count + 10.0, count + 11.0, mark="stranger", revision=99, number=10**6)
    assert judge([*history, stranger]).wrong is stranger


def test_what_was_refused_changes_nothing() -> None:
    for outcome in HARMLESS - {"not_found", "already_exists", "stale_revision"}:
        before = State(mark="one", revision=5, run=RUNNING)
        assert possible(before, entry("delete", 0, 1, outcome)) == (before,)
