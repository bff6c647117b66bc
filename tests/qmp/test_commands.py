from __future__ import annotations

import json
import math
from collections.abc import Mapping

import pytest

from qmpd.commands import COMMAND_LIMIT, DEPTH_LIMIT, deadline_for, encode
from qmpd.errors import Invalid, TooLarge


def problems(arguments: Mapping[str, object], command: str = "x") -> list[tuple[str, str]]:
    with pytest.raises(Invalid) as caught:
        encode(command, arguments, ident="q1")
    return [(problem.path, problem.message) for problem in caught.value.problems]


def nested(depth: int) -> dict[str, object]:
    value: dict[str, object] = {}
    for _ in range(depth):
        value = {"a": value}
    return value


def test_a_command_is_one_message_with_its_id() -> None:
    assert json.loads(encode("query-status", None, ident="q1")) == {"execute": "query-status", "id": "q1"}
    assert json.loads(encode("yank", {"instances": []}, ident="o2", oob=True)) == {
        "exec-oob": "yank",
        "id": "o2",
        "arguments": {"instances": []},
    }


@pytest.mark.parametrize(
    "value",
    [None, True, 0, -(2**63), 2**64 - 1, 1.5, "", "ä😀\0\x1b\n", [1, [2]], (1, 2), {"a": {"b": None}}, nested(DEPTH_LIMIT - 2)],
    ids=repr,
)
def test_what_qemu_can_parse_arrives_as_it_is(value: object) -> None:
    sent = json.loads(encode("x", {"value": value}, ident="q1"))["arguments"]["value"]
    assert sent == (list(value) if isinstance(value, tuple) else value)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (math.nan, "no NaN"),
        (math.inf, "no infinity"),
        (-math.inf, "no infinity"),
        ("a\ud800", "U+D800 is not a character"),
        ("\udfff", "U+DFFF"),
        ("\ufdd0", "U+FDD0"),
        ("\ufffe", "U+FFFE"),
        ("\uffff", "U+FFFF"),
        ("\U0001fffe", "U+1FFFE"),
        ("\U0010ffff", "U+10FFFF"),
        (2**64, "64-bit"),
        (-(2**63) - 1, "64-bit"),
        (10**5000, "64-bit"),
        (b"bytes", "no bytes"),
        ({1, 2}, "no set"),
        (object(), "no object"),
    ],
    ids=lambda value: repr(value)[:20] if not isinstance(value, int) else "integer",
)
def test_what_would_break_qemus_parser_is_refused_with_its_place(value: object, words: str) -> None:
    ((path, message),) = problems({"list": [1, {"deep": value}]})
    assert path == "$.arguments.list[1].deep"
    assert words in message


def test_all_problems_are_reported_together_in_the_documents_order() -> None:
    assert [path for path, _ in problems({"a": [math.nan, 1, "\uffff"], "b": math.inf}, command="\ud800")] == [
        "$.execute",
        "$.arguments.a[0]",
        "$.arguments.a[2]",
        "$.arguments.b",
    ]


def test_names_are_strings_that_qemu_can_parse() -> None:
    keys: dict[object, object] = {1: 0, "\uffff": 0}
    assert problems({"a": keys}) == [
        ("$.arguments.a", "the name int is a int, names are strings"),
        ("$.arguments.a", "the name \\uffff: U+FFFF is not a character that QEMU takes"),
    ]


def test_a_path_repeats_little_of_what_the_caller_sent() -> None:
    ((path, _),) = problems({"x" * 10_000 + "\n": math.nan})
    assert path == "$.arguments." + "x" * 64


def test_deep_arguments_are_refused_and_not_walked() -> None:
    ((path, message),) = problems(nested(100_000))
    assert path.count(".") == DEPTH_LIMIT + 1
    assert "64 deep" in message


@pytest.mark.parametrize("value", ["x" * COMMAND_LIMIT, "ä" * (COMMAND_LIMIT // 6), [0] * COMMAND_LIMIT], ids=["long", "escaped", "many"])
def test_a_command_that_is_too_long_is_refused_with_the_limit(value: object) -> None:
    with pytest.raises(TooLarge, match="65536") as caught:
        encode("x", {"value": value}, ident="q1")
    assert caught.value.details == {"limit": COMMAND_LIMIT}


def test_a_value_that_is_shared_many_times_is_too_large() -> None:
    bomb: list[object] = []
    for _ in range(40):
        bomb = [bomb, bomb]
    with pytest.raises(TooLarge):
        encode("x", {"value": bomb}, ident="q1")


@pytest.mark.parametrize(
    ("command", "deadline_s"),
    [
        ("query-status", 5),
        ("x-query-irq", 5),
        ("qom-get", 5),
        ("qom-list-types", 5),
        ("device-list-properties", 5),
        ("qom-set", 60),
        ("device_add", 60),
        ("human-monitor-command", 60),
        ("cont", 60),
        ("quit", 60),
        ("no-such-query-command", 60),
    ],
)
def test_the_deadline_goes_by_the_class_of_the_command(command: str, deadline_s: float) -> None:
    assert deadline_for(command) == deadline_s
