"""Who holds a machine: one verb at a time, unless one replaces another."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from qmpd.errors import Held


class Hold:
    """The verbs that hold one machine, the last of which is the one that counts."""

    def __init__(self) -> None:
        self._holders: list[str] = []

    @property
    def holder(self) -> str | None:
        """The verb that holds the machine."""
        return self._holders[-1] if self._holders else None

    @contextmanager
    def taken(self, verb: str, instead_of: frozenset[str], machine: str, state: str) -> Iterator[None]:
        """Holds for the block. Raises Held when another verb does that is none of `instead_of`."""
        if self.holder is not None and self.holder not in instead_of:
            raise Held(f"machine {machine!r} is held by {self.holder!r}", holder=self.holder, state=state)
        self._holders.append(verb)
        try:
            yield
        finally:
            # Not always the last one: a verb that was replaced may end before the one that replaced it.
            self._holders.remove(verb)
