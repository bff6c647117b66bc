"""Waiting for a pattern on a console. Patterns are RE2: whatever a client sends, matching is linear in the output."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Final, Protocol

import re2

from qmpd.console import Console
from qmpd.errors import Problem, invalid
from qmpd.views import ExpectRequest, ExpectResult

#: Output a match may span, and the most that is searched again when more comes.
WINDOW_BYTES: Final = 64 * 1024
#: How much of the output an answer repeats.
TAIL_BYTES: Final = 2048
#: Memory one compiled pattern may take (RE2's own default is the same).
PATTERN_MEMORY: Final = 8 * 1024 * 1024
#: Steps of RE2's program, each of which may be tried at each byte: with ten times as many one window can take a minute.
PATTERN_STEPS: Final = 2000


class Match(Protocol):
    """What is used of a match of RE2."""

    def group(self, number: int, /) -> bytes:
        """The bytes of a group; 0 is the whole match."""

    def groups(self) -> tuple[bytes | None, ...]:
        """All groups."""

    def start(self) -> int:
        """Where the match begins."""

    def end(self) -> int:
        """Where it ends."""


class Pattern(Protocol):
    """What is used of a compiled pattern of RE2, whose Python module has no types."""

    @property
    def programsize(self) -> int:
        """How many steps it has."""

    def search(self, text: bytes, /) -> Match | None:
        """The first match."""


async def expect(console: Console, request: ExpectRequest) -> ExpectResult:
    """Types `send`, then reads from `since` on until the pattern matches, the time is over, or the machine ends.

    What the log has at the beginning is looked at in any case, so that a request without time asks what was printed already.

    Raises:
        Invalid: the pattern is not RE2, or too large.
        MonitorUnavailable, Busy: `send` could not be typed.
    """
    pattern = await asyncio.to_thread(_compile, request.pattern)
    await console.load()
    offset = console.end
    if request.since is not None:
        offset = request.since
    elif request.from_start:
        offset = 0
    if request.send is not None:
        await console.write(request.send.encode())
    search = _Search(pattern, offset)
    deadline = asyncio.get_running_loop().time() + request.timeout_s
    found = await search.through(_printed(console, offset, console.end))
    if found is not None:
        return found
    try:
        async with asyncio.timeout_at(deadline):
            found = await search.through(console.follow(search.offset))
    except TimeoutError:
        return ExpectResult(matched=False, reason="timeout", tail=search.tail())
    return found or ExpectResult(matched=False, reason="ended", tail=search.tail())


async def _printed(console: Console, offset: int, end: int) -> AsyncIterator[tuple[int, bytes]]:
    """What the log has from `offset` up to about `end`, in pieces with their offsets."""
    while offset < end:
        begin, data = await console.read(offset, WINDOW_BYTES)
        if not data:
            return
        yield begin, data
        offset = begin + len(data)


def _compile(pattern: str) -> Pattern:
    options = re2.Options()
    options.max_mem = PATTERN_MEMORY
    options.log_errors = False
    try:
        compiled: Pattern = re2.compile(pattern.encode(), options)
    except re2.error as error:
        reason = error.args[0] if error.args else error
        text = reason.decode("utf-8", "replace") if isinstance(reason, bytes) else str(reason)
        raise invalid([Problem(path="$.pattern", message=f"not a regular expression: {text}")]) from error
    if compiled.programsize > PATTERN_STEPS:
        message = f"too large: it compiles to {compiled.programsize} steps, at most {PATTERN_STEPS} are taken; repeat less"
        raise invalid([Problem(path="$.pattern", message=message)])
    return compiled


class _Search:
    """The output so far, as far as a match can reach back."""

    def __init__(self, pattern: Pattern, offset: int) -> None:
        self._pattern = pattern
        self._begin = offset
        self._window = b""

    @property
    def offset(self) -> int:
        """Where the output goes on that was not searched yet."""
        return self._begin + len(self._window)

    async def through(self, pieces: AsyncIterator[tuple[int, bytes]]) -> ExpectResult | None:
        """Searches piece by piece; None when they end without a match."""
        async for begin, data in pieces:
            found = await self._add(begin, data)
            if found is not None:
                return found
        return None

    async def _add(self, begin: int, data: bytes) -> ExpectResult | None:
        if begin != self.offset:
            self._begin, self._window = begin, b""  # what was in between is no longer kept
        self._window += data
        # Linear is not fast: a pattern with many repetitions takes seconds for a window. RE2 lets go of the interpreter meanwhile.
        match = await asyncio.to_thread(self._pattern.search, self._window)
        if match is not None:
            return ExpectResult(
                matched=True,
                reason="matched",
                text=_text(match.group(0)),
                groups=tuple(None if group is None else _text(group) for group in match.groups()),
                start=self._begin + match.start(),
                end=self._begin + match.end(),
                tail=self.tail(),
            )
        surplus = len(self._window) - WINDOW_BYTES
        if surplus > 0:
            self._begin, self._window = self._begin + surplus, self._window[surplus:]
        return None

    def tail(self) -> str:
        """The last of what was searched."""
        return _text(self._window[-TAIL_BYTES:])


def _text(data: bytes) -> str:
    return data.decode("utf-8", "replace")
