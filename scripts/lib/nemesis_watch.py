"""Looks at every QEMU of a run, from outside of the daemon and all the time: what it saw is the truth the daemon is held against."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from scripts.lib.nemesis_history import History, Life
from scripts.lib.restartable import Running, qemus_of

#: Between two looks. A QEMU that comes and goes in less was not worth starting; a look costs a few milliseconds.
LOOK_S: Final = 0.1
#: The watcher ends after its current look; on a host that swaps that takes a while.
END_LIMIT_S: Final = 30.0


class Watcher:
    """The QEMUs of a run directory over time. `lives` may be read while it looks."""

    def __init__(self, run_dir: Path, history: History) -> None:
        self.lives: list[Life] = []
        self._run_dir = run_dir
        self._history = history
        self._now: dict[tuple[int, int], Life] = {}
        self._looked = 0.0
        self._lock = threading.Lock()

    def look(self) -> list[Life]:
        """Looks now; the lives of what is alive."""
        with self._lock:
            began = self._history.now()
            found = {(one.pid, one.started): one for one in qemus_of(self._run_dir)}
            ended = self._history.now()
            for key in [key for key in self._now if key not in found]:
                self._now.pop(key).gone = ended
            for key, one in found.items():
                if key not in self._now:
                    life = Life(machine=one.machine, pid=one.pid, started=one.started, first=ended, last=began, absent=self._looked)
                    self._now[key] = life
                    self.lives.append(life)
                self._now[key].last = began
            self._looked = began
            self._check_twice(found)
            return list(self._now.values())

    def alive(self, machine: str) -> list[Life]:
        """The QEMUs of one machine, as they are now."""
        return [life for life in self.look() if life.machine == machine]

    def _check_twice(self, found: dict[tuple[int, int], Running]) -> None:
        """Two of one machine in one look may have followed one another; two that are there in the next look as well did not."""
        machines = [one.machine for one in found.values()]
        for machine in {name for name in machines if machines.count(name) > 1}:
            still = {(one.pid, one.started) for one in qemus_of(self._run_dir) if one.machine == machine} & set(found)
            if len(still) > 1:
                self._history.broken("I1", f"{len(still)} QEMUs of machine {machine} are alive: {sorted(pid for pid, _ in still)}", machine)


@contextmanager
def watching(run_dir: Path, history: History) -> Iterator[Watcher]:
    """A watcher that looks for as long as the block lasts."""
    watcher = Watcher(run_dir, history)
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(LOOK_S):
            watcher.look()

    thread = threading.Thread(target=look, name="watcher")
    thread.start()
    try:
        yield watcher
    finally:
        ended.set()
        thread.join(END_LIMIT_S)
