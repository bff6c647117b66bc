"""Listening sockets that the daemon binds and QEMU inherits: nobody ever waits for a path to appear.

A client that connects before QEMU runs waits in the backlog, and is reset if QEMU dies, provided that no one else keeps the
listening socket open: leave `bound_listeners` as soon as QEMU has its copies.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import ExitStack, asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Final

from qmpd.errors import AlreadyExists, LaunchFailed, Problem, invalid
from qmpd.failpoint import failpoint
from qmpd.offload import off_loop
from qmpd.shortage import shortage

#: Longest path of a Unix socket: `sun_path` has 108 bytes and ends with a NUL (unix(7)).
PATH_LIMIT: Final = 107
#: Descriptors passed by systemd begin here (sd_listen_fds(3)).
FIRST_PASSED: Final = 3
#: What a unit calls those at which machines of peers are awaited (`FileDescriptorName=`); all others are for the API.
MIGRATION: Final = "migration"
#: Clients that may wait before QEMU runs. QEMU sets its own backlog when it takes over.
_BACKLOG: Final = 8


@asynccontextmanager
async def bound_listeners(paths: Mapping[str, str]) -> AsyncIterator[dict[str, socket.socket]]:
    """Listening Unix sockets at `paths`, by the same names, mode 0600 from their first moment; closed on leaving.

    The paths stay: the process that inherited the sockets serves them. What a dead owner left there is replaced.

    Raises (and has bound nothing then):
        Invalid: a path is longer than PATH_LIMIT bytes.
        AlreadyExists: somebody listens at a path, or something that is not a socket is there.
        Busy, NoSpace: the host is out of something.
        LaunchFailed: any other refusal of the kernel, with its words.
    """
    bound = await off_loop(partial(_bind_all, dict(paths)), undo=_release, name="qmpd-bind")
    with _closed_at_the_end(bound):
        yield {name: bound[path] for name, path in paths.items()}


@contextmanager
def listening(paths: Mapping[str, str]) -> Iterator[dict[str, socket.socket]]:
    """The same as `bound_listeners`, for a thread: blocks. When the block raises, the paths are removed too."""
    bound = _bind_all(paths)
    with _closed_at_the_end(bound):
        try:
            yield {name: bound[path] for name, path in paths.items()}
        except BaseException:
            _release(bound)
            raise


def passed(environ: Mapping[str, str], pid: int, first: int = FIRST_PASSED) -> dict[int, str]:
    """The descriptors that systemd passed to this very process, and what it calls each. None of them is inherited any further."""
    if environ.get("LISTEN_PID") != str(pid):
        return {}
    count = int(environ.get("LISTEN_FDS", "0"))
    names = [*environ.get("LISTEN_FDNAMES", "").split(":"), *("" for _ in range(count))]
    descriptors = range(first, first + count)
    for descriptor in descriptors:
        os.set_inheritable(descriptor, False)
    return dict(zip(descriptors, names, strict=False))


@contextmanager
def _closed_at_the_end(bound: Mapping[str, socket.socket]) -> Iterator[None]:
    with ExitStack() as opened:
        for sock in bound.values():
            opened.enter_context(sock)
        yield


def _bind_all(paths: Mapping[str, str]) -> dict[str, socket.socket]:
    problems = [_too_long(name, path) for name, path in paths.items() if len(os.fsencode(path)) > PATH_LIMIT]
    if problems:
        raise invalid(problems)
    bound: dict[str, socket.socket] = {}
    try:
        for path in paths.values():
            bound[path] = _listening(path)
    except BaseException:
        _release(bound)
        raise
    return bound


def _release(bound: Mapping[str, socket.socket]) -> None:
    for path, sock in bound.items():
        sock.close()
        Path(path).unlink(missing_ok=True)


def _listening(path: str) -> socket.socket:
    with ExitStack() as undo:
        try:
            sock = undo.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            os.fchmod(sock.fileno(), 0o600)  # bind(2) gives the path the mode of the socket itself
            failpoint("socket-bind")
            _bind(sock, path)
            sock.listen(_BACKLOG)
        except OSError as error:
            raise shortage(error) or LaunchFailed(f"cannot listen at {path}: {error.strerror}") from error
        undo.pop_all()
        return sock


def _bind(sock: socket.socket, path: str) -> None:
    try:
        sock.bind(path)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        _remove_dead(path)
        sock.bind(path)


def _remove_dead(path: str) -> None:
    if not stat.S_ISSOCK(os.lstat(path).st_mode):
        raise AlreadyExists(f"{path} exists and is not a socket", path=path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            Path(path).unlink()
            return
        except BlockingIOError:
            pass  # its backlog is full: somebody owns it
    raise AlreadyExists(f"somebody listens at {path}", path=path)


def _too_long(name: str, path: str) -> Problem:
    size = len(os.fsencode(path))
    return Problem(path=f"$.{name}", message=f"the socket path {path} has {size} bytes, the kernel's limit is {PATH_LIMIT}")
