"""Progress of the scripts, on stderr: stdout belongs to the answer (`scripts/demo --json`)."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager


def say(message: str) -> None:
    """Print one line on stderr at once."""
    print(message, file=sys.stderr, flush=True)


@contextmanager
def step(what: str) -> Iterator[None]:
    """Announce a step, and say how long it took once it is over. Failure is reported by whoever catches the exception."""
    say(f"==> {what}")
    began = time.monotonic()
    yield
    say(f"    done in {time.monotonic() - began:.1f} s")
