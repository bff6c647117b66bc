"""A pattern is found in what a console prints, wherever the pieces are cut, and never later than promised."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from qmpd.capture import trim
from qmpd.console import Console
from qmpd.errors import Invalid, MonitorUnavailable
from qmpd.expecting import TAIL_BYTES, WINDOW_BYTES, expect
from qmpd.filewatch import watching
from qmpd.views import ExpectRequest, ExpectResult
from tests.unit.serialport import Port, ready

PATIENCE_S = 20.0


class World:
    """A machine that runs, as far as its serial port goes."""

    def __init__(self, console: Console, port: Port) -> None:
        self.console = console
        self.port = port

    async def expect(self, pattern: str, **changes: object) -> ExpectResult:
        """What becomes of a request; the time is long enough, unless one says."""
        request = ExpectRequest(**{"pattern": pattern, "timeout_s": PATIENCE_S, **changes})  # type: ignore[arg-type]  # as a test says
        return await expect(self.console, request)

    def waiting(self, pattern: str, **changes: object) -> asyncio.Task[ExpectResult]:
        """A request in a task of its own."""
        return asyncio.create_task(self.expect(pattern, **changes), name="waiting")

    async def looking(self) -> None:
        """Returns when everybody who waits has read all there is: who reads next is woken by what is printed next."""
        for _ in range(50):
            await asyncio.sleep(0.001)


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    with ready(tmp_path) as port, watching() as watch:
        console = Console(port.stem, watch)
        async with console.connected(port.pipe):
            yield World(console, port)


async def test_what_is_printed_later_is_found(world: World) -> None:
    world.port.prints(b"login: ")
    found = world.waiting(r"(\w+)@(\w+)(#?)(nothing)?")
    await world.looking()
    world.port.prints(b"ada@")
    await world.looking()
    world.port.prints(b"host#")
    result = await found
    assert (result.matched, result.reason, result.text, result.groups) == (True, "matched", "ada@host#", ("ada", "host", "#", None))
    assert (result.start, result.end, result.tail) == (7, 16, "ada@host#")


async def test_what_was_printed_is_found_only_by_those_who_ask_for_it(world: World) -> None:
    world.port.prints(b"one two one")
    assert (await world.expect("one", from_start=True)).start == 0
    assert (await world.expect("one", since=1)).start == 8
    assert (await world.expect("one", timeout_s=0.05)).reason == "timeout"


async def test_who_has_no_time_is_told_what_is_there(world: World) -> None:
    world.port.prints(b"x" * (3 * WINDOW_BYTES) + b"ready")
    assert (await world.expect("ready", from_start=True, timeout_s=0)).matched
    missed = await world.expect("never", from_start=True, timeout_s=0)
    assert (missed.matched, missed.reason, missed.start, missed.end) == (False, "timeout", None, None)
    assert missed.tail == "x" * (TAIL_BYTES - 5) + "ready"


async def test_a_machine_that_ends_is_told(world: World) -> None:
    waiting = world.waiting("never")
    await world.looking()
    world.port.prints(b"panic")
    world.console._input, keep = None, world.console._input
    world.console._announce()
    result = await waiting
    assert (result.matched, result.reason, result.tail) == (False, "ended", "panic")
    world.console._input = keep


async def test_an_answer_to_what_is_typed_is_found_even_if_it_comes_at_once(world: World) -> None:
    found = world.waiting("HELLO", send="hello\n")
    async with asyncio.timeout(PATIENCE_S):
        while world.port.reads() != b"hello\n":
            await asyncio.sleep(0)
    world.port.prints(b"HELLO")
    assert (await found).matched


async def test_what_cannot_be_typed_is_no_question(tmp_path: Path) -> None:
    with ready(tmp_path) as port, watching() as watch:
        port.prints(b"there")
        console = Console(port.stem, watch)
        with pytest.raises(MonitorUnavailable):
            await expect(console, ExpectRequest(pattern="x", send="y"))
        assert (await expect(console, ExpectRequest(pattern="there", from_start=True))).matched
        assert (await expect(console, ExpectRequest(pattern="gone", from_start=True))).reason == "ended"


@pytest.mark.parametrize("cut", [1, 7, 4096, WINDOW_BYTES - 1, WINDOW_BYTES])
async def test_a_match_is_found_across_any_cut(world: World, cut: int) -> None:
    text = b"-" * (WINDOW_BYTES - 4) + b"needle" + b"-" * 100
    found = world.waiting("needle", from_start=True)
    for at in range(len(text) - 600 if cut < 100 else 0, len(text), cut):
        world.port.prints(text[at : at + cut] if at else text[:cut])
        if at % 5 == 0:
            await asyncio.sleep(0)
    assert (await found).text == "needle"


async def test_a_match_may_span_the_window_and_no_more(world: World) -> None:
    world.port.prints(b"A" + b"-" * (WINDOW_BYTES - 2))
    spanning, beyond = (world.waiting("(?s)A.*Z", since=since, timeout_s=PATIENCE_S) for since in (0, 0))
    await world.looking()
    world.port.prints(b"Z")
    assert (await spanning).end == (await beyond).end == WINDOW_BYTES
    later = world.waiting("(?s)A.*Y", since=0, timeout_s=0.3)
    await world.looking()
    world.port.prints(b"-" * 3 * WINDOW_BYTES + b"Y")
    assert (await later).reason == "timeout"


async def test_offsets_are_those_of_the_log_also_behind_the_window_and_behind_a_hole(world: World) -> None:
    world.port.prints(b"needle" + b"-" * (3 * WINDOW_BYTES) + b"needle")
    assert (await world.expect("needle$", since=6)).start == 3 * WINDOW_BYTES + 6
    assert world.console.piece is not None
    assert await trim(world.console.piece, 4096) > 0
    result = await world.expect("needle", from_start=True)
    assert (result.start, result.end) == (3 * WINDOW_BYTES + 6, 3 * WINDOW_BYTES + 12)


async def test_bytes_that_are_no_text_are_searched_all_the_same(world: World) -> None:
    world.port.prints(b"\xff\xfe\x00ok\xff")
    result = await world.expect("ok", from_start=True)
    assert (result.text, result.start, result.tail) == ("ok", 3, "\ufffd\ufffd\x00ok\ufffd")
    assert (await world.expect("é", since=10**12, timeout_s=0)).reason == "timeout"


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(unclosed", r"^\$\.pattern: not a regular expression: "),
        ("(?=lookahead)", "not a regular expression"),
        (r"(a)\1", "not a regular expression"),
        ("x{1001}", "not a regular expression"),
        (".{0,1000}a.{0,1000}b", "too large"),
    ],
)
async def test_a_pattern_that_cannot_be_searched_for_quickly_is_refused(world: World, pattern: str, message: str) -> None:
    with pytest.raises(Invalid, match=message):
        await world.expect(pattern)


async def test_a_pattern_that_is_slow_holds_nobody_up(world: World) -> None:
    world.port.prints(b"a" * WINDOW_BYTES)
    loop = asyncio.get_running_loop()
    searching = world.waiting("(?s)(a{0,120}b|a{0,120}c){4}d", from_start=True, timeout_s=0)
    longest = 0.0
    while not searching.done():
        before = loop.time()
        await asyncio.sleep(0)
        longest = max(longest, loop.time() - before)
    assert not (await searching).matched
    assert longest < PATIENCE_S / 4
