"""Files of a machine on their way here: under a name of their own until the machine is this host's. All of this blocks.

A file is as far as it is long, so what was received is known after any restart. Pieces come in their order; what lies between two of
them is a hole. A crash of the host may leave less than the length says: the digest at the end tells.
"""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path
from typing import Final, Protocol

from qmpd.errors import AlreadyExists, HostError, NoSpace, Problem, QmpdError, WrongState, invalid
from qmpd.failpoint import failpoint

_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
#: File systems without hard links.
_NO_LINKS: Final = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK})


class Arriving(Protocol):
    """Something that is being received, piece by piece."""

    def received(self) -> int:
        """Everything before this offset is here."""

    def write(self, offset: int, data: bytes) -> int:
        """Takes a piece; returns `received`."""


class ArrivingFile:
    """A file that will be `target` once the machine is here. `migration` makes its name until then nobody else's."""

    def __init__(self, target: str, migration: str, size: int) -> None:
        self.target = Path(target)
        self.path = self.target.with_name(f".{self.target.name}.{migration}.arriving")
        self._size = size

    def received(self) -> int:
        """How much is here; all of it once it has its name."""
        with contextlib.suppress(FileNotFoundError):
            return self.path.stat().st_size
        with contextlib.suppress(FileNotFoundError):
            return self.target.stat().st_size
        return 0

    def write(self, offset: int, data: bytes) -> int:
        """Writes what is not here yet of a piece, and returns what is here then. A piece of no bytes makes it so long.

        Raises:
            Invalid: it goes beyond the size that was announced.
            NoSpace: there is no space; what was written counts as received.
            HostError: it cannot be written.
        """
        check_within(offset, data, self._size)
        if self._is_named():
            return self.received()  # an answer was lost, and it is asked for again
        try:
            with open(self.path, "r+b" if self.path.exists() else "x+b", buffering=0, opener=private) as file:
                received = os.fstat(file.fileno()).st_size
                end = offset + len(data)
                if end <= received:
                    return received
                failpoint("migration-file-write")
                write_all(file.fileno(), data[max(0, received - offset) :], max(offset, received))
                if not data:
                    os.truncate(file.fileno(), end)
                return end
        except OSError as error:
            raise trouble(error, self.path) from error

    def place(self) -> None:
        """Gives the whole file its name, on disk for good. Killed at any point and called again, it ends in the same state.

        Raises:
            WrongState: it is not whole.
            AlreadyExists: somebody else has taken the name.
            HostError, NoSpace: it cannot be done now.
        """
        try:
            if self._is_named():
                return
            if self.received() != self._size or not self.path.exists():
                message = f"{self.target} is not whole: {self.received()} of {self._size} bytes are here"
                raise WrongState(message, state="receiving", allowed=["received"])
            sync(self.path)
            failpoint("migration-file-place")
            self._name()
            failpoint("migration-file-placed")
            self.path.unlink(missing_ok=True)
            sync(self.target.parent)
        except OSError as error:
            raise trouble(error, self.target) from error

    def secure(self) -> None:
        """Returns when what is here outlives a crash of the host. Raises HostError, NoSpace."""
        try:
            sync(self.whole)
            sync(self.target.parent)
        except OSError as error:
            raise trouble(error, self.whole) from error

    @property
    def whole(self) -> Path:
        """Where it lies: under the one name or the other."""
        return self.target if self._is_named() else self.path

    def _is_named(self) -> bool:
        return not self.path.exists() and self.target.exists()

    def _name(self) -> None:
        """Never in place of another file."""
        try:
            os.link(self.path, self.target, follow_symlinks=False)
        except FileExistsError as error:
            if not self.target.samefile(self.path):
                raise AlreadyExists(f"{self.target} exists already", path=str(self.target)) from error
        except OSError as error:
            if error.errno not in _NO_LINKS or self.target.exists():
                raise
            self.path.rename(self.target)

    def discard(self) -> None:
        """Removes what is here of it, unless it has got its name. Raises HostError."""
        try:
            self.path.unlink(missing_ok=True)
        except OSError as error:
            raise trouble(error, self.path) from error


class ArrivingVariables:
    """The firmware variables of a machine that comes while it runs: a file that its QEMU has open already.

    QEMU writes all of it when the guest goes on, from the memory that came; but a guest that is halted never does, and then what is in
    the file is all there is. So the content is sent as well, into the very file, as often as it changes at the source.
    """

    def __init__(self, target: str, size: int) -> None:
        self.path = Path(target)
        self._size = size
        self._received = 0

    def make(self) -> None:
        """The file, as long as it must be for QEMU to start. One of another length is somebody's mistake.

        Raises:
            AlreadyExists, HostError, NoSpace: it cannot be made.
        """
        try:
            with contextlib.suppress(FileExistsError), open(self.path, "xb", opener=private) as file:
                file.truncate(self._size)
            if self.path.stat().st_size != self._size:
                raise AlreadyExists(f"{self.path} exists, and has not {self._size} bytes", path=str(self.path))
        except OSError as error:
            raise trouble(error, self.path) from error

    def received(self) -> int:
        """What was written since this object was made: the source sends everything anew to one that knows nothing."""
        return self._received

    def write(self, offset: int, data: bytes) -> int:
        """Writes a piece over what is there.

        Raises:
            Invalid: it goes beyond the size that was announced.
            NoSpace, HostError: it cannot be written.
        """
        check_within(offset, data, self._size)
        try:
            failpoint("migration-variables-write")
            with open(self.path, "r+b", buffering=0, opener=private) as file:
                write_all(file.fileno(), data, offset)
        except OSError as error:
            raise trouble(error, self.path) from error
        self._received = max(self._received, offset + len(data))
        return self._received

    def secure(self) -> None:
        """Returns when it outlives a crash of the host. Raises HostError, NoSpace."""
        try:
            sync(self.path)
            sync(self.path.parent)
        except OSError as error:
            raise trouble(error, self.path) from error


def check_within(offset: int, data: bytes, size: int) -> None:
    """Raises Invalid for a piece of more than was announced."""
    if offset + len(data) > size:
        raise invalid([Problem(path="?offset", message=f"{len(data)} bytes at {offset} go beyond the announced size, {size}")])


def write_all(descriptor: int, data: bytes, position: int) -> None:
    """Writes all of it, or raises OSError: a single pwrite(2) may take less."""
    left = memoryview(data)
    while left:
        written = os.pwrite(descriptor, left, position)
        left, position = left[written:], position + written


def private(path: str, flags: int) -> int:
    """Opens a file that nobody else may read, and no link."""
    return os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


def sync(path: Path) -> None:
    """Returns when a file or directory outlives a crash of the host."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def trouble(error: OSError | ValueError, path: Path) -> QmpdError:
    """What an operation on a file failed with."""
    if isinstance(error, OSError) and error.errno in _FULL:
        return NoSpace(f"{path}: {error.strerror}")
    return HostError(f"{path}: {error}", path=str(path))
