"""The user's terminal: raw mode that is always undone, and reading and writing that never block the event loop."""

from __future__ import annotations

import asyncio
import errno
import os
import select
import termios
import tty
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

#: Read at once; typing comes by the byte, pipes by the page.
CHUNK: Final = 4096
#: What a guest may have switched on that a shell does not want: colours, a hidden cursor, the alternate screen, application keys,
#: mouse reports, bracketed paste. Harmless where it is off already.
RESET: Final = b"\x1b[0m\x1b[?25h\x1b[?1047l\x1b[?1l\x1b>\x1b[?1000l\x1b[?1002l\x1b[?1003l\x1b[?1006l\x1b[?2004l"
_OFLAG: Final = 1


@contextmanager
def raw(descriptor: int) -> Iterator[bool]:
    """Every key reaches the reader as it is, until the block is left, in whatever way. False if `descriptor` is no terminal."""
    if not os.isatty(descriptor):
        yield False
        return
    saved = termios.tcgetattr(descriptor)
    try:
        tty.setraw(descriptor, termios.TCSANOW)
        changed = termios.tcgetattr(descriptor)
        # As QEMU's own stdio console does: bare-metal programs print line feeds without carriage returns.
        changed[_OFLAG] |= termios.OPOST
        termios.tcsetattr(descriptor, termios.TCSANOW, changed)
        yield True
    finally:
        # Not TCSADRAIN: a terminal whose output is stuck must not keep us. What was typed too late is not meant for the shell.
        termios.tcsetattr(descriptor, termios.TCSANOW, saved)
        termios.tcflush(descriptor, termios.TCIFLUSH)


def control_key(text: str) -> bytes | None:
    """The byte of a key written as `^]` or as one character; None for `none`. Raises ValueError for anything else."""
    if text == "none":
        return None
    if len(text) == 2 and text[0] == "^" and "@" <= text[1].upper() <= "_":
        return bytes([ord(text[1].upper()) & 0x1F])
    if text == "^?":
        return b"\x7f"
    if len(text) == 1 and text.isascii():
        return text.encode()
    raise ValueError(f"{text!r} is not a key: write ^] for Ctrl and ], a single character, or none")


def key_name(key: bytes) -> str:
    """A key as people call it."""
    code = key[0]
    return f"Ctrl-{chr(code + 0x40)}" if code < 0x20 else "Delete" if code == 0x7F else chr(code)


async def read(descriptor: int) -> bytes:
    """What can be read now, as soon as there is something; nothing at the end of the file."""
    loop = asyncio.get_running_loop()
    while True:
        await _ready(loop.add_reader, loop.remove_reader, descriptor)
        try:
            return os.read(descriptor, CHUNK)
        except BlockingIOError:
            continue
        except OSError as error:
            if error.errno == errno.EIO:  # the terminal was closed
                return b""
            raise


async def write(descriptor: int, data: bytes) -> None:
    """Write all of `data`, waiting for a slow reader outside of the system call."""
    loop = asyncio.get_running_loop()
    rest = memoryview(data)
    while rest:
        await _ready(loop.add_writer, loop.remove_writer, descriptor)
        try:
            # A pipe that is ready takes this much without blocking.
            rest = rest[os.write(descriptor, rest[: select.PIPE_BUF]) :]
        except BlockingIOError:
            continue


async def _ready(add: Callable[..., object], remove: Callable[[int], object], descriptor: int) -> None:
    happened: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def happen() -> None:
        if not happened.done():
            happened.set_result(None)

    try:
        add(descriptor, happen)
    except PermissionError:  # epoll refuses regular files and /dev/null: they are always ready
        return
    try:
        await happened
    finally:
        remove(descriptor)
