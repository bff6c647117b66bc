"""A cache file is read as if anybody had written it, and written so that it is never half there."""

from __future__ import annotations

import stat
from pathlib import Path

import msgpack
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpd import factcache
from qmpd.factcache import Damaged, decode, read, write


class Note(msgspec.Struct, frozen=True):
    """A document."""

    text: str
    numbers: tuple[int, ...] = ()


NOTE = Note(text="hello", numbers=(1, 2, 3))


def packed(value: object) -> bytes:
    """The value as msgpack."""
    data: bytes = msgpack.packb(value)
    return data


def nested(depth: int) -> object:
    """Lists in lists."""
    tree: object = 1
    for _ in range(depth):
        tree = [tree]
    return tree


def test_what_was_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "new" / "notes.msgpack"
    write(path, NOTE)
    assert read(path, Note) == NOTE
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_missing_file_is_nothing(tmp_path: Path) -> None:
    assert read(tmp_path / "none", Note) is None


def test_a_damaged_file_is_nothing(tmp_path: Path) -> None:
    path = tmp_path / "notes.msgpack"
    path.write_bytes(b"\xc1")
    assert read(path, Note) is None


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "notes.msgpack"
    path.mkdir()  # a directory cannot be replaced by a file
    with pytest.raises(OSError, match=r"notes\.msgpack"):
        write(path, NOTE)
    assert [entry.name for entry in tmp_path.iterdir()] == ["notes.msgpack"]


BAD = {
    "nothing": b"",
    "cut off": packed({"text": "hello"})[:-1],
    "trailing bytes": packed({"text": "hello"}) + b"\xc0",
    "a key twice": b"\x82\xa4text\xa1a\xa4text\xa1b",
    "a number as key": packed({1: "text"}),
    "a missing field": packed({"numbers": []}),
    "another type": packed({"text": 1}),
    "binary": packed({"text": b"hello"}),
    "an extension": packed(msgpack.ExtType(4, b"hello")),
    "a time": packed(msgpack.Timestamp(0)),
    "no UTF-8": b"\x81\xa4text\xa1\xff",
    "a list that claims 2**32 - 1 items": b"\xdd\xff\xff\xff\xff",
    "a map that claims 2**32 - 1 items": b"\xdf\xff\xff\xff\xff",
    "a text over the limit": packed({"text": "x" * (factcache.MAX_TEXT_BYTES + 1)}),
    "a list over the limit": packed({"text": "", "numbers": [0] * (factcache.MAX_ITEMS + 1)}),
    "too deep for us": packed({"text": "", "more": nested(factcache.MAX_DEPTH)}),
    "too deep for msgpack": b"\x91" * 2000 + b"\xc0",
    "too long": b"\0" * (factcache.MAX_BYTES + 1),
}


@pytest.mark.parametrize("data", BAD.values(), ids=BAD.keys())
def test_bytes_that_are_no_such_document_are_refused(data: bytes) -> None:
    with pytest.raises(Damaged):
        decode(data, Note)


def test_too_many_values_are_refused() -> None:
    row = packed([0] * factcache.MAX_ITEMS)
    rows = factcache.MAX_VALUES // factcache.MAX_ITEMS + 1
    with pytest.raises(Damaged, match="more than 1000000 values"):
        decode(b"\xdc" + rows.to_bytes(2, "big") + row * rows, Note)


def test_the_deepest_allowed_document_is_read() -> None:
    assert decode(packed({"text": "x", "more": nested(factcache.MAX_DEPTH - 2)}), Note).text == "x"


@given(st.binary(max_size=200))
def test_no_bytes_do_anything_but_be_read_or_refused(data: bytes) -> None:
    try:
        decode(data, Note)
    except Damaged:
        return


@given(st.integers(0, 30), st.binary(min_size=1, max_size=1))
def test_no_changed_byte_does_anything_but_be_read_or_refused(position: int, byte: bytes) -> None:
    data = bytearray(packed(msgspec.to_builtins(NOTE)))
    data[position % len(data)] = byte[0]
    try:
        decode(bytes(data), Note)
    except Damaged:
        return
