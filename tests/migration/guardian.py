"""Who clears away what a test made outside of itself, when the test cannot: it was killed.

A shell of its own session reads what there is to be cleared from a pipe. The end of the pipe is the end of the test, whatever that was.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

#: Processes that are killed are gone within moments; files and namespaces too.
CLEAR_LIMIT_S: Final = 60.0

SCRIPT: Final = """\
trap '' INT TERM HUP
networks= files=
while read -r kind what; do
    case $kind in
        network) networks="$networks $what" ;;
        files) files="$files $what" ;;
    esac
done
for network in $networks; do
    for pid in $(ip netns pids "$network" 2>/dev/null); do kill -KILL "$pid"; done
done
for network in $networks; do ip netns del "$network" 2>/dev/null; done
rm -rf $files
"""


class Guardian:
    """Clears away networks, with every process in them, and directories."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def network(self, name: str) -> None:
        """A network namespace that is about to be made."""
        self._note("network", name)

    def files(self, directory: Path) -> None:
        """A directory that was made, of a name without blanks."""
        self._note("files", str(directory))

    def _note(self, kind: str, what: str) -> None:
        if self._process.stdin is None:
            raise ValueError("the guardian was started without a pipe")
        self._process.stdin.write(f"{kind} {what}\n")
        self._process.stdin.flush()


@contextmanager
def guarding() -> Iterator[Guardian]:
    """A guardian that clears away everything when the block is left, or this process ends within it."""
    command = ["sh", "-c", SCRIPT]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, start_new_session=True) as process:
        try:
            yield Guardian(process)
        finally:
            if process.stdin is not None:
                process.stdin.close()
            process.wait(CLEAR_LIMIT_S)
