"""The lines that come over a connection, each handed on in the very turn of the loop in which it arrives, and none longer than a limit.

asyncio's own reader wakes a task for every line. Here whoever takes the lines is called instead: an answer of QEMU is one turn of the
loop nearer to the caller who waits for it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable
from typing import Final, NoReturn, SupportsIndex

#: Longest line that is read. The longest answer of use, the schema, has 0.2 MB; other clients draw the line here too.
LINE_LIMIT: Final = 10 * 1024 * 1024
#: Bytes of an overlong line that are skipped to keep the connection; who sends more is not speaking QMP.
SKIP_LIMIT: Final = 256 * 1024 * 1024


class Refused(Exception):
    """Who takes the lines can do nothing with one: no more are read, and reading raises this."""


class Lines(asyncio.StreamReader):
    """Lines without their ends. They wait for `next`, until `hand_to` names somebody who takes them as they come.

    Nothing but lines can be read here: of asyncio's reader only what a transport calls is of use. A line that is longer than LINE_LIMIT
    is skipped, and its size given to `overlong`; one that is longer than SKIP_LIMIT is refused with the error that `refusal` makes.
    """

    def __init__(self, overlong: Callable[[int], None], refusal: Callable[[str], Refused]) -> None:
        super().__init__(loop=asyncio.get_running_loop())
        self._overlong = overlong
        self._refusal = refusal
        self._sink: Callable[[bytes], None] | None = None
        self._waiting: deque[bytes] = deque()
        self._rest = bytearray()
        self._skipped = 0
        self._news = asyncio.Event()

    async def next(self) -> bytes:
        """The next line. Raises EOFError at the end, Refused, or what broke the connection."""
        while not self._waiting:
            self._check()
            self._news.clear()
            await self._news.wait()
        return self._waiting.popleft()

    async def hand_to(self, sink: Callable[[bytes], None]) -> NoReturn:
        """Give every further line to `sink`, at once. Stays until the end; raises what `next` raises, and what `sink` refuses with."""
        while self._waiting:
            sink(self._waiting.popleft())
        self._sink = sink
        try:
            while True:
                self._check()
                self._news.clear()
                await self._news.wait()
        finally:
            self._sink = None

    def feed_data(self, data: Iterable[SupportsIndex]) -> None:
        """Take what arrived; the transport's side."""
        if self.exception() is not None:
            return
        try:
            self._split(bytes(data))  # bytes already, and so not copied
        except Refused as error:
            self.set_exception(error)

    def feed_eof(self) -> None:
        """Nothing more will arrive; the transport's side."""
        super().feed_eof()
        self._news.set()

    def set_exception(self, exc: BaseException) -> None:
        """The connection broke, or is of no use any more."""
        super().set_exception(exc)  # type: ignore[arg-type]  # typeshed says Exception, the transport gives what it has
        self._news.set()

    def _check(self) -> None:
        error = self.exception()
        if error is not None:
            raise error
        if self.at_eof():
            raise EOFError

    def _split(self, data: bytes) -> None:
        *whole, rest = data.split(b"\n")
        for piece in whole:
            self._whole(piece)
        self._rest += rest
        if len(self._rest) > LINE_LIMIT:
            self._skipped += len(self._rest)
            self._rest.clear()
            if self._skipped > SKIP_LIMIT:
                raise self._refusal(f"more than {SKIP_LIMIT} bytes without an end of line")

    def _whole(self, piece: bytes) -> None:
        if self._rest:
            piece = bytes(self._rest) + piece
            self._rest.clear()
        if self._skipped or len(piece) > LINE_LIMIT:
            size, self._skipped = self._skipped + len(piece) + 1, 0
            self._overlong(size)
        elif self._sink is not None:
            self._sink(piece)
        else:
            self._waiting.append(piece)
            self._news.set()
