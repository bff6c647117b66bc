"""Errors carry what people and programs need."""

from __future__ import annotations

import re

import pytest

from qmpd import errors
from qmpd.errors import Invalid, Problem, QmpdError, WrongState, details_of, invalid


def leaves(kind: type[QmpdError] = QmpdError) -> list[type[QmpdError]]:
    return [kind, *(leaf for child in kind.__subclasses__() if child.__module__ == errors.__name__ for leaf in leaves(child))]


def test_every_code_means_one_thing() -> None:
    codes = [leaf.code for leaf in leaves()]
    assert len(codes) == len(set(codes))
    assert all(re.fullmatch(r"[a-z_]+", code) for code in codes)


def test_the_tree_in_the_documentation_names_every_error() -> None:
    assert errors.__doc__ is not None
    assert not {leaf.__name__ for leaf in leaves()} - set(re.findall(r"\w+", errors.__doc__))


@pytest.mark.parametrize(("count", "tail"), [(1, ""), (3, " (and 2 more)")])
def test_an_invalid_document_is_told_with_its_first_problem_and_carries_all(count: int, tail: str) -> None:
    problems = [Problem(path=f"$.disks[{index}]", message="is odd") for index in range(count)]
    error = invalid(problems)
    assert isinstance(error, Invalid)
    assert error.message == str(error) == f"$.disks[0]: is odd{tail}"
    assert error.problems == tuple(problems)
    assert details_of(error)["problems"] == [{"path": problem.path, "message": problem.message} for problem in problems]


def test_details_are_what_they_were_given() -> None:
    assert details_of(WrongState("no", state="running", allowed=["stopped"])) == {"state": "running", "allowed": ["stopped"]}
