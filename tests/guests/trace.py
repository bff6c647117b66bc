r"""Checks what the guests print: that no byte of it was lost, doubled or damaged.

After its banner a counting guest prints an endless stream of lines, `abcdefghijklmnopqrstuvwxyz <number>\r\n`, the number in eight decimal
digits from 00000001 on. Every byte of that stream is known from its position, so a piece of it, wherever it begins, can be located by the
first number in it, and every gap measured. The number lives in the guest's memory: a guest that was restored or moved goes on from where
its memory was.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

LETTERS = b"abcdefghijklmnopqrstuvwxyz "
LINE_END = b"\r\n"
DIGITS = 8
LINE_BYTES = len(LETTERS) + DIGITS + len(LINE_END)

_BANNER = re.compile(rb"BM-OK ([a-z0-9_-]+)\r\n")
_NUMBER = re.compile(rb"([0-9]{%d})\r\n" % DIGITS)
_COMPARED_BYTES = 1 << 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Break:
    """A place where the stream does not go on as it must.

    `offset` is in the data; `expected` and `found` are positions in the guest's stream. `skipped` counts the bytes of data between the last
    good byte and the place where the stream could be followed again, which is after `skipped` bytes at `found`.
    """

    offset: int
    expected: int
    found: int | None
    skipped: int

    @property
    def lost(self) -> int | None:
        """How many bytes of the stream are missing; negative if there are too many, None if the stream was not found again."""
        return None if self.found is None else self.found - self.expected - self.skipped


@dataclass(frozen=True, kw_only=True, slots=True)
class Trace:
    """What a piece of serial output says.

    `guest` is the name in the last banner, `boots` the number of banners. `characters` counts the bytes that belong to the stream.
    `line` is the last number printed in full. `start` and `end` are the first and last-plus-one positions in the stream of the last boot
    (or of the whole piece, if no banner is in it); None if it was never found.
    """

    guest: str | None
    boots: int
    characters: int
    line: int
    start: int | None
    end: int | None
    breaks: tuple[Break, ...]

    @property
    def whole(self) -> bool:
        """Nothing is lost, doubled or damaged."""
        return not self.breaks


def stream(position: int, length: int) -> bytes:
    """`length` bytes of the stream every counting guest prints, from `position` on."""
    first, skip = divmod(position, LINE_BYTES)
    lines = range(first + 1, first + (skip + length) // LINE_BYTES + 2)
    return b"".join(LETTERS + b"%0*d" % (DIGITS, number) + LINE_END for number in lines)[skip : skip + length]


def check_trace(data: bytes) -> Trace:
    """Follow the stream through `data`, which may begin and end anywhere in it.

    What comes before the first banner, and between the last byte of one boot and the next banner, is the firmware's and not looked at. Data
    that ends after a reset but before the next banner therefore ends in a break.
    """
    follower = _Follower(data)
    while follower.offset < len(data):
        follower.step()
    return follower.trace()


class _Follower:
    """Reads through the data; knows where in the guest's stream the next byte should be, once it has found the stream."""

    def __init__(self, data: bytes) -> None:
        self.offset = 0
        self._data = data
        self._position: int | None = None
        self._start: int | None = None
        self._guest: str | None = None
        self._boots = 0
        self._characters = 0
        self._breaks: list[Break] = []

    def step(self) -> None:
        """Take a banner, or a stretch of the stream, or a break."""
        if banner := _BANNER.match(self._data, self.offset):
            self._guest = banner[1].decode()
            self._boots += 1
            self._position = self._start = 0
            self.offset = banner.end()
        elif self._position is None or not self._follow(self._position):
            self._resume()

    def trace(self) -> Trace:
        return Trace(
            guest=self._guest,
            boots=self._boots,
            characters=self._characters,
            line=_last_line(self._position),
            start=self._start,
            end=self._position,
            breaks=tuple(self._breaks),
        )

    def _follow(self, position: int) -> bool:
        piece = self._data[self.offset : self.offset + _COMPARED_BYTES]
        good = _agreeing(piece, stream(position, len(piece)))
        self.offset += good
        self._position = position + good
        self._characters += good
        return good > 0

    def _resume(self) -> None:
        """The stream goes on differently: find the next banner, or the place from which the next number can be traced back."""
        banner = _BANNER.search(self._data, self.offset)
        number = _NUMBER.search(self._data, self.offset)
        if banner and (self._position is None or number is None or banner.start() < number.start()):
            self.offset = banner.start()
            return
        place = None if number is None else self._trace_back(number)
        begin, found = (len(self._data), None) if place is None else place
        if self._position is not None:
            broken = Break(offset=self.offset, expected=self._position, found=found, skipped=begin - self.offset)
            self._breaks.append(broken)
        else:
            self._start = found
        self.offset = begin
        self._position = found

    def _trace_back(self, number: re.Match[bytes]) -> tuple[int, int]:
        """How far back from the end of a number the data is the stream's: that offset in the data, and its position."""
        end = int(number[1]) * LINE_BYTES
        window = min(number.end() - self.offset, end)
        before = self._data[number.end() - window : number.end()]
        good = _agreeing(before[::-1], stream(end - window, window)[::-1])
        return number.end() - good, end - good


def _agreeing(one: bytes, other: bytes) -> int:
    """How many bytes two texts have in common at their beginning."""
    if one == other:
        return len(one)
    shorter = min(len(one), len(other))
    return next((at for at in range(shorter) if one[at] != other[at]), shorter)


def _last_line(position: int | None) -> int:
    return 0 if position is None else position // LINE_BYTES
