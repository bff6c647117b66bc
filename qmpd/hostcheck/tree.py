"""The files through which a host describes itself (/proc, /sys, /dev, /etc), below a root that tests can build."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

#: /proc/cpuinfo of a host with 1,000 processors is about 1.5 MB; its first part says all there is to say.
TEXT_LIMIT_BYTES: Final = 64 * 1024


class HostTree:
    """Reads that answer "nothing" instead of failing: absence is a finding here. They block; call them in a thread."""

    def __init__(self, root: str | Path = "/") -> None:
        self._root = Path(root)

    def path(self, name: str) -> Path:
        """Where an absolute path is below the root."""
        return self._root / name.lstrip("/")

    def text(self, name: str) -> str:
        """The beginning of a file without blanks at its ends, or the empty string."""
        try:
            with self.path(name).open("rb") as file:
                return file.read(TEXT_LIMIT_BYTES).decode(errors="replace").strip()
        except OSError:
            return ""

    def names(self, name: str) -> tuple[str, ...]:
        """The names in a directory, sorted."""
        try:
            return tuple(sorted(os.listdir(self.path(name))))  # noqa: PTH208 (names are wanted, not paths)
        except OSError:
            return ()

    def exists(self, name: str) -> bool:
        """Whether there is something of this name."""
        return self.path(name).exists()

    def permits(self, name: str) -> bool:
        """Whether this process may read and write it."""
        return os.access(self.path(name), os.R_OK | os.W_OK)
