"""Options as QEMU and a shell read them."""

from __future__ import annotations

import json
import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qmpd.argv import SAME_AS, SINGLE_USE, Option, document, escape, lines, pairs, parse, repeated, word

#: argv holds everything but NUL.
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"))
KEYS = st.from_regex(r"[a-z][a-z0-9._-]{0,10}", fullmatch=True)
NAMES = st.from_regex(r"[a-z][a-z0-9-]{0,10}", fullmatch=True)
SCALARS = st.one_of(TEXT, st.integers(), st.booleans())


def as_qemu_reads(text: str) -> list[str]:
    """The parts of key=value text: a comma ends one, two commas are a comma (QEMU's `get_opt_value`)."""
    parts, rest = [""], text
    while rest:
        if rest.startswith(",,"):
            parts[-1] += ","
            rest = rest[2:]
        elif rest.startswith(","):
            parts.append("")
            rest = rest[1:]
        else:
            parts[-1] += rest[0]
            rest = rest[1:]
    return parts


@given(TEXT)
def test_an_escaped_value_is_read_back_as_it_was(value: str) -> None:
    assert as_qemu_reads(escape(value)) == [value]


@given(TEXT.filter(bool), st.dictionaries(KEYS, st.one_of(SCALARS, st.none())))
def test_pairs_are_read_back_as_they_were(head: str, values: dict[str, str | int | bool | None]) -> None:
    value = pairs("machine", head, values).value
    assert value is not None
    first, *rest = as_qemu_reads(value)
    expected = {key: "on" if item is True else "off" if item is False else str(item) for key, item in values.items() if item is not None}
    assert first == head
    assert dict(part.split("=", 1) for part in rest) == expected


def test_pairs_without_a_head_begin_with_the_first_key() -> None:
    assert pairs("drive", "", {"if": "ide", "media": None, "index": 0}) == Option("drive", "if=ide,index=0")


@pytest.mark.parametrize(("value", "spelled"), [(True, "on"), (False, "off"), (1, "1"), ("a,b", "a,,b")])
def test_a_scalar_is_spelled_as_qemu_wants_it(value: str | int | bool, spelled: str) -> None:
    assert word(value) == spelled


@given(st.dictionaries(TEXT, st.one_of(SCALARS, st.floats(allow_nan=False, allow_infinity=False), st.none())))
def test_a_document_is_json_without_escapes_for_the_reader(value: dict[str, object]) -> None:
    option = document("device", value)
    assert option.value is not None
    assert json.loads(option.value) == value


def test_a_document_holds_no_numbers_json_has_no_word_for() -> None:
    with pytest.raises(ValueError, match="JSON"):
        document("device", {"x": float("nan")})


@given(st.lists(st.builds(Option, NAMES, st.one_of(st.none(), TEXT.filter(lambda text: not (text.startswith("-") and text.strip("-")))))))
def test_words_are_parsed_into_the_options_they_came_from(options: list[Option]) -> None:
    assert parse([item for option in options for item in option.words()]) == tuple(options)


@given(st.lists(TEXT))
def test_words_are_options_or_refused_and_never_lost(words: list[str]) -> None:
    try:
        options = parse(words)
    except ValueError:
        return
    assert [item.lstrip("-") for option in options for item in option.words()] == [item.lstrip("-") for item in words]
    assert all(option.name for option in options)


@pytest.mark.parametrize("words", [["value"], ["-a", "one", "two"], ["-"], ["--"], [""]])
def test_a_value_that_belongs_to_no_option_is_refused(words: list[str]) -> None:
    with pytest.raises(ValueError, match="belongs to no option"):
        parse(words)


def test_two_dashes_are_as_good_as_one() -> None:
    assert parse(["--rtc", "base=utc"]) == (Option("rtc", "base=utc"),)


def test_options_that_count_once_are_found_when_they_are_repeated() -> None:
    options = parse(["-m", "1", "-rtc", "a", "-device", "x", "-device", "y", "-rtc", "b", "-rtc", "c", "-m", "2"])
    assert repeated(options) == ("rtc", "m")


@pytest.mark.parametrize(("one", "other"), sorted(SAME_AS.items()))
def test_two_spellings_of_an_option_are_the_same_option(one: str, other: str) -> None:
    assert repeated([Option(one), Option(other, "x")]) == (other,)
    assert other in SINGLE_USE


@settings(max_examples=25)
@given(st.lists(st.builds(Option, NAMES, st.one_of(st.none(), TEXT)), max_size=8))
def test_the_printed_command_is_what_a_shell_executes(options: list[Option]) -> None:
    text = lines("printf", [Option("-", "%s\\0"), *options])
    done = subprocess.run(["/bin/sh", "-c", text], capture_output=True, check=True)
    words = [item for option in options for item in option.words()]
    assert done.stdout == "".join(f"{item}\0" for item in words).encode() or not words
