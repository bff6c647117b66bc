from __future__ import annotations

import asyncio

import pytest

from qmpd import lines as module
from qmpd.lines import LINE_LIMIT, Lines, Refused
from qmpd.tasks import alongside


class Taken:
    """Everything that was handed on, and the sizes of what was too long; refuses the line `refused`."""

    def __init__(self) -> None:
        self.lines: list[bytes] = []
        self.overlong: list[int] = []

    def __call__(self, line: bytes) -> None:
        if line == b"refused":
            raise Refused("that one")
        self.lines.append(line)

    def reader(self) -> Lines:
        return Lines(self.overlong.append, Refused)


async def test_lines_wait_for_whoever_asks_and_keep_their_order_across_pieces() -> None:
    lines = Taken().reader()
    lines.feed_data(b"one\ntw")
    lines.feed_data(b"o\n\nfour\r\nfi")
    assert [await lines.next() for _ in range(4)] == [b"one", b"two", b"", b"four\r"]
    waiting = asyncio.create_task(lines.next(), name="five")
    await asyncio.sleep(0)
    lines.feed_data(b"ve\n")
    assert await waiting == b"five"


async def test_from_the_handing_over_on_a_line_is_taken_in_the_turn_it_arrives_in_and_none_before_those_that_waited() -> None:
    taken = Taken()
    lines = taken.reader()
    lines.feed_data(b"first\nsecond\nhalf")
    async with alongside(lines.hand_to(taken), "taking"):
        await asyncio.sleep(0)
        assert taken.lines == [b"first", b"second"]
        lines.feed_data(b" a line\nthird\n")
        assert taken.lines == [b"first", b"second", b"half a line", b"third"]


async def test_the_end_comes_after_all_lines_and_half_of_one_is_none() -> None:
    lines = Taken().reader()
    lines.feed_data(b"last\nhalf")
    lines.feed_eof()
    assert await lines.next() == b"last"
    with pytest.raises(EOFError):
        await lines.next()
    with pytest.raises(EOFError):
        await lines.hand_to(lambda _line: None)


async def test_what_broke_the_connection_is_raised_to_whoever_reads() -> None:
    taken = Taken()
    lines = taken.reader()
    async with alongside(lines.hand_to(taken), "taking") as taking:
        await asyncio.sleep(0)
        lines.set_exception(ConnectionResetError("gone"))
        with pytest.raises(ConnectionResetError, match="gone"):
            await taking


async def test_after_a_line_that_was_refused_no_other_is_taken() -> None:
    taken = Taken()
    lines = taken.reader()
    async with alongside(lines.hand_to(taken), "taking") as taking:
        await asyncio.sleep(0)
        lines.feed_data(b"good\nrefused\nlate\n")
        lines.feed_data(b"later\n")
        with pytest.raises(Refused, match="that one"):
            await taking
    assert taken.lines == [b"good"]


async def test_nobody_is_given_lines_any_more_who_was_cancelled() -> None:
    taken = Taken()
    lines = taken.reader()
    async with alongside(lines.hand_to(taken), "taking"):
        await asyncio.sleep(0)
    lines.feed_data(b"late\n")
    assert taken.lines == []


@pytest.mark.parametrize("size", [LINE_LIMIT - 1, LINE_LIMIT])
async def test_a_line_up_to_the_limit_is_read(size: int) -> None:
    taken = Taken()
    lines = taken.reader()
    lines.feed_data(b"x" * size + b"\n")
    assert len(await lines.next()) == size
    assert taken.overlong == []


@pytest.mark.parametrize("pieces", [1, 7])
async def test_a_longer_one_is_skipped_and_the_next_one_read(pieces: int) -> None:
    taken = Taken()
    lines = taken.reader()
    size = 2 * LINE_LIMIT + 5
    data = b"x" * size + b"\nnext\n"
    step = -(-len(data) // pieces)
    for at in range(0, len(data), step):
        lines.feed_data(data[at : at + step])
    assert await lines.next() == b"next"
    assert taken.overlong == [size + 1]


async def test_one_without_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SKIP_LIMIT", 2 * LINE_LIMIT)
    lines = Taken().reader()
    for _ in range(3):
        lines.feed_data(b"x" * (LINE_LIMIT + 1))
    with pytest.raises(Refused, match="without an end of line"):
        await lines.next()
