"""The files of a serial port, with a test in the place of QEMU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qmpd import segments

CAP = 1 << 20


class Port:
    """The files of a serial port, with a test in the place of QEMU."""

    def __init__(self, directory: Path) -> None:
        self.stem = str(directory / "serial0.log")
        self.pipe = str(directory / "serial0")
        self.typed = -1

    def begin(self) -> None:
        """What is done before a QEMU is launched."""
        for end in ("out", "in"):
            Path(f"{self.pipe}.{end}").unlink(missing_ok=True)
        Path(f"{self.pipe}.out").symlink_to(segments.begin(self.stem, CAP))
        os.mkfifo(f"{self.pipe}.in")

    def breaks(self) -> None:
        """Somebody cleans up where he should not."""
        Path(f"{self.pipe}.in").unlink()

    def prints(self, data: bytes) -> None:
        """The guest prints."""
        with Path(f"{self.pipe}.out").open("ab") as log:
            log.write(data)

    def reads(self, limit: int = 65_536) -> bytes:
        """The guest reads what was typed; nothing if nothing is there."""
        if self.typed < 0:
            self.typed = os.open(f"{self.pipe}.in", os.O_RDONLY | os.O_NONBLOCK)
        try:
            return os.read(self.typed, limit)
        except BlockingIOError:
            return b""


@contextmanager
def ready(directory: Path) -> Iterator[Port]:
    """A port whose machine was just launched."""
    port = Port(directory)
    port.begin()
    try:
        yield port
    finally:
        if port.typed >= 0:
            os.close(port.typed)
