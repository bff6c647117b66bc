"""How often machines crashed and were started again, counted since this daemon began."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Mapping

from qmpd.lifecycle import State
from qmpd.machine import Publish


class Tally:
    """Counts by name of the machine."""

    def __init__(self) -> None:
        self.crashes: Counter[str] = Counter()
        self.restarts: Counter[str] = Counter()

    def counting(self, publish: Publish) -> Publish:
        """The same `publish`, with an eye on what goes by."""

        def seen(kind: str, machine: str, data: Mapping[str, object]) -> object:
            if kind == "machine.state" and data.get("state") == State.CRASHED:
                self.crashes[machine] += 1
            elif kind == "machine.deleted":
                del self.crashes[machine], self.restarts[machine]
            return publish(kind, machine, data)

        return seen

    def restarting(self, start: Callable[[str], Awaitable[bool]]) -> Callable[[str], Awaitable[bool]]:
        """The same `start`; those that worked are counted."""

        async def counted(name: str) -> bool:
            worked = await start(name)
            self.restarts[name] += worked
            return worked

        return counted
