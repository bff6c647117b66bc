"""What the codec takes, and what it refuses before any type is looked at."""

from __future__ import annotations

import json
import tracemalloc

import msgpack
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpd.errors import Invalid, QmpdError, TooLarge, Undecodable
from qmpd.spec import MachineSpec
from qmpd_api.codec import decode, decode_aside, encode
from qmpd_api.limits import Limits
from qmpd_api.media import Media

LIMITS = Limits()


class Anything(msgspec.Struct, forbid_unknown_fields=True):
    value: object = None


def nested(depth: int) -> bytes:
    return b'{"value":' + b"[" * (depth - 1) + b"]" * (depth - 1) + b"}"


BAD_JSON = {
    "empty": b"",
    "blank": b"  ",
    "truncated": b'{"value": [1, 2',
    "truncated string": b'{"value": "abc',
    "truncated escape": b'{"value": "abc\\',
    "trailing": b'{"value": 1} {}',
    "comment": b'{"value": 1 /* no */}',
    "deep": b'{"value":' + b"[" * 100_000,
    "too deep by one": nested(LIMITS.depth + 1),
    "deep in a string's shadow": b'{"a": "\\"[", "value":' + b"[" * 100,
    "5,000 digits": b'{"value": ' + b"9" * 5000 + b"}",
    "5,000 digits, negative": b'{"value": -' + b"9" * 5000 + b"}",
    "2**64": b'{"value": 18446744073709551616}',
    "-2**63-1": b'{"value": -9223372036854775809}',
    "invalid UTF-8": b'{"value": "\xff\xfe"}',
    "overlong UTF-8": b'{"value": "\xc0\x80"}',
    "surrogate in UTF-8": b'{"value": "\xed\xa0\x80"}',
    "UTF-16": '{"value": 1}'.encode("utf-16"),
    "UTF-16 without mark": '{"value": 1}'.encode("utf-16-le"),
    "byte order mark": b'\xef\xbb\xbf{"value": 1}',
    "duplicate key": b'{"value": 1, "value": 1}',
    "duplicate key, escaped": b'{"value": 1, "v\\u0061lue": 1}',
    "duplicate key, nested": b'{"value": {"a": 1, "b": {"c": 1, "c": 2}}}',
    "NaN": b'{"value": NaN}',
    "Infinity": b'{"value": Infinity}',
    "-Infinity": b'{"value": -Infinity}',
    "1e400": b'{"value": 1e400}',
    "-1e400": b'{"value": [-1e400]}',
    "lone surrogate": b'{"value": "\\ud800"}',
    "lone surrogate as a key": b'{"value": {"\\udfff": 1}}',
    "reversed surrogates": b'{"value": "\\udc00\\ud800"}',
    "U+FFFE": b'{"value": "\\ufffe"}',
    "U+FFFF": '{"value": "\uffff"}'.encode(),
    "U+FDD0": '{"value": "\ufdd0"}'.encode(),
    "U+1FFFE": '{"value": "\U0001fffe"}'.encode(),
    "U+10FFFF": b'{"value": "\\udbff\\udfff"}',
    "control character": b'{"value": "a\nb"}',
    "top-level list": b"[]",
    "top-level string": b'"value"',
    "top-level null": b"null",
    "top-level number": b"1",
    "single quotes": b"{'value': 1}",
    "leading zero": b'{"value": 01}',
}


@pytest.mark.parametrize("body", BAD_JSON.values(), ids=BAD_JSON)
def test_json_that_is_no_document_is_undecodable(body: bytes) -> None:
    with pytest.raises(Undecodable):
        decode(body, Media.JSON, Anything, LIMITS)


BAD_MSGPACK = {
    "empty": b"",
    "truncated map": b"\x82\xa5value\x01",
    "truncated string": b"\x81\xa5val",
    "truncated length": b"\x81\xda\x00",
    "array of 2**32-1": b"\x81\xa5value\xdd\xff\xff\xff\xff",
    "map of 2**32-1": b"\xdf\xff\xff\xff\xff",
    "string of 2**32-1": b"\x81\xa5value\xdb\xff\xff\xff\xff",
    "1,100 deep": b"\x81\xa5value" + b"\x91" * 1100 + b"\xc0",
    "600 deep": b"\x81\xa5value" + b"\x91" * 600 + b"\xc0",
    "integer key": b"\x81\x01\x01",
    "nil key": b"\x81\xc0\x01",
    "list key": b"\x81\x91\x01\x01",
    "integer key, nested": b"\x81\xa5value\x81\x01\x01",
    "extension": b"\x81\xa5value\xd4\x05\x00",
    "large extension": b"\x81\xa5value\xc7\x01\x05\x00",
    "timestamp": msgpack.packb({"value": msgpack.Timestamp(1)}),
    "binary": msgpack.packb({"value": b"bytes"}),
    "binary key": b"\x81\xc4\x05value\x01",
    "reserved byte": b"\x81\xa5value\xc1",
    "trailing bytes": b"\x81\xa5value\x01\x00",
    "NaN": msgpack.packb({"value": float("nan")}),
    "infinity": msgpack.packb({"value": [float("inf")]}),
    "duplicate key": b"\x82\xa5value\x01\xa5value\x02",
    "invalid UTF-8": b"\x81\xa5value\xa2\xff\xfe",
    "lone surrogate": b"\x81\xa5value\xa3\xed\xa0\x80",
    "noncharacter": msgpack.packb({"value": "\U0010ffff"}),
    "top-level list": b"\x90",
    "top-level nil": b"\xc0",
    "JSON": b'{"value": 1}',
}


@pytest.mark.parametrize("body", BAD_MSGPACK.values(), ids=BAD_MSGPACK)
def test_msgpack_that_is_no_document_is_undecodable(body: bytes) -> None:
    with pytest.raises(Undecodable):
        decode(body, Media.MSGPACK, Anything, LIMITS)


MANY = {
    "empty maps in JSON": (b'{"value":[' + b",".join([b"{}"] * 340_000) + b"]}", Media.JSON),
    "numbers in JSON": (b'{"value":[' + b",".join([b"1"] * 500_000) + b"]}", Media.JSON),
    "labels in JSON": (json.dumps({"value": {str(i): "" for i in range(50_000)}}).encode(), Media.JSON),
    "empty maps in msgpack": (msgpack.packb({"value": [{}] * 1_000_000}), Media.MSGPACK),
    "nils in msgpack": (msgpack.packb({"value": [None] * 1_000_000}), Media.MSGPACK),
}


@pytest.mark.parametrize(("body", "media"), MANY.values(), ids=MANY)
def test_a_document_with_too_many_values_is_refused_before_it_is_built(body: bytes, media: Media) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(TooLarge):
            decode(body, media, Anything, LIMITS)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 8 * len(body)


def test_a_body_of_nothing_but_quotes_is_refused_in_linear_time() -> None:
    with pytest.raises(Undecodable):
        decode(b'{"' + b'\\"' * 500_000, Media.JSON, Anything, LIMITS)


@pytest.mark.parametrize("media", Media)
def test_the_deepest_allowed_document_is_read(media: Media) -> None:
    body = nested(LIMITS.depth)
    decode(body if media is Media.JSON else msgpack.packb(json.loads(body)), media, Anything, LIMITS)


@pytest.mark.parametrize("value", [2**64 - 1, -(2**63), 0, -1, 1.5, "\U0001f600", "ﬀ", True, None, [], {}, "[{" * 40])
@pytest.mark.parametrize("media", Media)
def test_a_document_comes_through_unchanged(value: object, media: Media) -> None:
    assert decode(encode(Anything(value), media), media, Anything, LIMITS).value == value


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(), inner, max_size=5),
    max_leaves=20,
)


@given(value=_JSON, media=st.sampled_from(Media))
def test_whatever_a_program_sends_is_decoded_or_named(value: object, media: Media) -> None:
    body = encode({"value": value}, media)
    try:
        assert decode(body, media, Anything, LIMITS).value == value
    except Undecodable as error:
        assert "is not a character" in error.message  # noqa: PT017


@given(body=st.binary(max_size=200), media=st.sampled_from(Media))
def test_no_bytes_raise_anything_but_our_errors(body: bytes, media: Media) -> None:
    try:
        decode(body, media, MachineSpec, LIMITS)
    except QmpdError:
        return


WRONG = {
    "unknown field": ({"name": "a", "board": "b", "colour": 1}, "$", "Object contains unknown field `colour`"),
    "wrong type": ({"name": "a", "board": "b", "memory_mib": "1"}, "$.memory_mib", "Expected `int | null`, got `str`"),
    "bool for int": ({"name": "a", "board": "b", "cpu": {"count": True}}, "$.cpu.count", "Expected `int | null`, got `bool`"),
    "missing": ({"name": "a"}, "$", "Object missing required field `board`"),
    "in a list": (
        {"name": "a", "board": "b", "disks": [{"kind": "image", "path": 5, "format": "raw"}]},
        "$.disks[0].path",
        "Expected `str`, got `int`",
    ),
    "a key": ({"name": "a", "board": "b", "labels": {"-": "x"}}, "$.labels", None),
    "2**63 MiB": ({"name": "a", "board": "b", "memory_mib": 2**63}, "$.memory_mib", None),
    "1e30 MiB": ({"name": "a", "board": "b", "memory_mib": 1e30}, "$.memory_mib", None),
    "unknown kind": ({"name": "a", "board": "b", "firmware": {"kind": "magic"}}, "$.firmware.kind", "Invalid value 'magic'"),
    "a field that is no sentence": (
        {"name": "a", "board": "b", "\x1b[31m\u202e": 1},
        "$",
        r"Object contains unknown field `\x1b[31m\u202e`",
    ),
}


@pytest.mark.parametrize(("document", "path", "message"), WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("media", Media)
def test_a_wrong_field_is_named_with_its_path(document: dict[str, object], path: str, message: str | None, media: Media) -> None:
    with pytest.raises(Invalid) as caught:
        decode(encode(document, media), media, MachineSpec, LIMITS)
    (problem,) = caught.value.problems
    assert problem.path == path
    assert message is None or problem.message == message


def test_what_the_caller_sent_is_echoed_briefly() -> None:
    with pytest.raises(Invalid) as caught:
        decode(encode({"name": "a", "board": "b", "x" * 10_000: 1}, Media.JSON), Media.JSON, MachineSpec, LIMITS)
    assert len(caught.value.message) < 200


BAD_NAMES = ["", ".", "..", "a" * 64, "-a", "a b", "a/b", "a\0", "a\n", "\x1b[31m", "a\u202eb", "A", "é", "e\u0301", "a_b", "a.b"]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_bad_machine_name_is_invalid(name: str) -> None:
    with pytest.raises(Invalid) as caught:
        decode(encode({"name": name, "board": "b"}, Media.JSON), Media.JSON, MachineSpec, LIMITS)
    assert caught.value.problems[0].path == "$.name"


async def test_a_large_body_is_decoded_the_same_way() -> None:
    text = "x" * (LIMITS.offload_bytes + 1)
    assert (await decode_aside(encode(Anything(text), Media.JSON), Media.JSON, Anything, LIMITS)).value == text


@pytest.mark.parametrize("media", Media)
def test_a_lone_surrogate_in_an_answer_is_replaced(media: Media) -> None:
    body = encode(Anything({"a\ud800": ["\udfff"]}), media)
    assert decode(body, media, Anything, LIMITS).value == {"a?": ["?"]}
