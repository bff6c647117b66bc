"""The checker of the guests' output sees what happened to it."""

from __future__ import annotations

import pytest

from tests.guests.trace import LINE_BYTES, Break, check_trace, stream

BANNER = b"BM-OK some-board\r\n"


def test_the_stream_is_numbered_lines_of_the_alphabet() -> None:
    assert stream(0, 2 * LINE_BYTES) == b"abcdefghijklmnopqrstuvwxyz 00000001\r\nabcdefghijklmnopqrstuvwxyz 00000002\r\n"
    assert stream(LINE_BYTES - 3, 5) == b"1\r\nab"


def test_an_undamaged_boot_is_whole() -> None:
    trace = check_trace(b"firmware 12345678\r\nsays hello\r\n" + BANNER + stream(0, 1000))
    assert trace.whole
    assert (trace.guest, trace.boots, trace.characters, trace.line) == ("some-board", 1, 1000, 1000 // LINE_BYTES)
    assert (trace.start, trace.end) == (0, 1000)


@pytest.mark.parametrize("begin", range(0, 2 * LINE_BYTES, 5))
def test_a_piece_from_anywhere_is_located(begin: int) -> None:
    trace = check_trace(stream(begin, 3 * LINE_BYTES))
    assert trace.whole
    assert (trace.start, trace.end, trace.boots) == (begin, begin + 3 * LINE_BYTES, 0)


@pytest.mark.parametrize("lost", [1, 2, LINE_BYTES, 26 * LINE_BYTES, 4096, 65536])
@pytest.mark.parametrize("at", [5, 26, 30, 36, 37, 500])
def test_lost_bytes_are_counted_wherever_they_are(at: int, lost: int) -> None:
    sent = stream(0, at) + stream(at + lost, 3 * LINE_BYTES)
    trace = check_trace(BANNER + sent)
    assert sum(found.lost or 0 for found in trace.breaks) == lost
    assert trace.end == at + lost + 3 * LINE_BYTES


def test_bytes_that_came_twice_are_counted() -> None:
    trace = check_trace(BANNER + stream(0, 200) + stream(190, 200))
    assert [found.lost for found in trace.breaks] == [-10]


def test_damage_is_a_break_without_loss() -> None:
    data = bytearray(BANNER + stream(0, 300))
    data[len(BANNER) + 100] ^= 1
    assert check_trace(bytes(data)).breaks == (Break(offset=len(BANNER) + 100, expected=100, found=101, skipped=1),)


def test_a_stream_that_is_not_found_again_is_a_break() -> None:
    trace = check_trace(BANNER + stream(0, 100) + b"panic")
    assert trace.breaks == (Break(offset=len(BANNER) + 100, expected=100, found=None, skipped=5),)
    assert trace.breaks[0].lost is None


def test_a_reset_in_the_middle_of_a_line_is_another_boot() -> None:
    trace = check_trace(BANNER + stream(0, 100) + b"firmware\r\n" + BANNER + stream(0, 50) + BANNER + stream(0, 20))
    assert trace.whole
    assert (trace.boots, trace.characters, trace.end) == (3, 170, 20)


def test_output_without_a_stream_has_no_position() -> None:
    trace = check_trace(b"nothing of the kind\r\n")
    assert (trace.guest, trace.boots, trace.start, trace.end, trace.whole) == (None, 0, None, None, True)
