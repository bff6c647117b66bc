"""Who looks on from outside, and believes no daemon: at every instant, which QEMUs of a machine ran its guest.

There are two kinds of evidence, and each is enough to convict. A QEMU's *diary* (`emulators`) has the time of every STOP and RESUME:
RESUME is said before the processors go on, STOP after they stand, so the guest ran at no other time. A QEMU's *pulse* is the time its
processors' threads have used, from /proc, looked at every few milliseconds: it needs no word of QEMU's.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import select
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import msgspec

from tests.migration.emulators import Emulators, emulators

#: Between two looks at the processes.
LOOK_S: Final = 0.02
#: So many looks in a row at which two QEMUs both computed: a hand-over lies within one, what else a stopped QEMU does within two.
TOGETHER_LOOKS: Final = 5
#: A processor that runs a guest used at least this between two looks, unless the host gives it nothing.
BUSY_NS: Final = 200_000
#: The onlooker ends after its current look.
END_LIMIT_S: Final = 30.0
MICRO: Final = 1e-6

Interval = tuple[float, float]


class Overlap(msgspec.Struct, frozen=True, kw_only=True):
    """Two QEMUs of one machine ran its guest at the same time. Seconds since the epoch."""

    pids: tuple[int, int]
    since: float
    until: float
    evidence: str

    def __str__(self) -> str:
        return f"pids {self.pids[0]} and {self.pids[1]} both ran for {(self.until - self.since) * 1e3:.1f} ms ({self.evidence})"


class Life:
    """One QEMU of a machine, as its diary tells it. `ended` is when it was seen to be gone; None while it lives."""

    def __init__(self, uuid: str, pid: int, diary: Path) -> None:
        self.uuid = uuid
        self.pid = pid
        self.ended: float | None = None
        # Of the FIFO, which is written to once, before QEMU is there.
        self.born = diary.with_suffix(".in").stat().st_mtime
        self.threads: tuple[int, ...] = ()
        self._diary = diary
        self._read = 0
        self._rest = b""
        self._known: list[Interval] = []
        self._since: float | None = None
        self.events: list[tuple[float, str, dict[str, object]]] = []

    def update(self) -> None:
        """Reads on in the diary."""
        with self._diary.open("rb") as file:
            file.seek(self._read)
            new = file.read()
        self._read += len(new)
        *lines, self._rest = (self._rest + new).split(b"\n")
        for line in filter(bytes.strip, lines):
            self._take(json.loads(line))

    def ran(self) -> list[Interval]:
        """When it ran the guest; a time that has not ended yet ends now."""
        now = time.time() if self.ended is None else self.ended
        return [*self._known, (self._since, max(now, self._since))] if self._since is not None else list(self._known)

    @property
    def runs(self) -> bool:
        """Whether it does so now."""
        return self._since is not None and self.ended is None

    def moments(self, event: str) -> list[float]:
        """The times of all events of a name."""
        return [at for at, name, _ in self.events if name == event]

    def _take(self, said: dict[str, object]) -> None:
        match said:
            case {"event": str(event), "timestamp": {"seconds": int(seconds), "microseconds": int(micro)}}:
                data = said.get("data", {})
                self._happened(event, seconds + micro * MICRO, data if isinstance(data, dict) else {})
            case {"return": {"running": True}} if self._since is None and not self._known:
                self._since = self.born  # it ran before it could say so
            case {"return": [*processors]}:
                self.threads = tuple(entry["thread-id"] for entry in processors if isinstance(entry, dict))

    def _happened(self, event: str, at: float, data: dict[str, object]) -> None:
        self.events.append((at, event, data))
        if event == "RESUME" and self._since is None:
            self._since = at
        elif event == "STOP" and self._since is not None:
            self._known.append((self._since, at))
            self._since = None


class Onlooker:
    """The QEMUs of the machines it minds. Everything here may be asked while it looks."""

    def __init__(self, found: Emulators) -> None:
        self._found = found
        self._minded: set[str] = set()
        self._lives: dict[Path, Life] = {}
        self._descriptors: dict[int, Life] = {}
        self._ends = select.epoll()
        self._pulses: dict[int, int] = {}
        self._busy: list[frozenset[int]] = []
        self._times: list[float] = []
        self._lock = threading.Lock()

    def mind(self, uuid: str) -> None:
        """From now on this machine is looked at, and what its QEMUs wrote before too."""
        self._minded.add(uuid)

    def lives(self, uuid: str) -> list[Life]:
        """Every QEMU that a machine ever had, oldest first."""
        self.look()
        with self._lock:
            return sorted((life for life in self._lives.values() if life.uuid == uuid), key=lambda life: life.born)

    def running(self, uuid: str) -> list[Life]:
        """Those that run the guest now."""
        return [life for life in self.lives(uuid) if life.runs]

    def alive(self, uuid: str) -> list[Life]:
        """Those that are there, running or not."""
        return [life for life in self.lives(uuid) if life.ended is None]

    def overlaps(self, uuid: str) -> list[Overlap]:
        """Every time at which more than one ran, by both kinds of evidence: there must be none."""
        lives = self.lives(uuid)
        found = []
        for one, other in itertools.combinations(lives, 2):
            for (begin, end), (first, last) in itertools.product(one.ran(), other.ran()):
                if (since := max(begin, first)) < (until := min(end, last)):
                    found.append(Overlap(pids=(one.pid, other.pid), since=since, until=until, evidence="what they said"))
        return found + self._together(lives)

    def gap(self, uuid: str) -> float:
        """Seconds from the last STOP of the QEMU that ran before to the RESUME of the one that runs now: the downtime of a move."""
        (now,) = self.running(uuid)
        since = now.ran()[-1][0]
        return since - max(end for life in self.lives(uuid) for _, end in life.ran() if end <= since)

    def look(self) -> None:
        """Looks now."""
        with self._lock:
            self._look_for_new()
            for life in self._lives.values():
                life.update()
            self._look_for_dead(0)
            self._feel()

    def wait(self, seconds: float) -> None:
        """Looks for deaths, so long: their times are what the kernel says at once."""
        self._look_for_dead(seconds)

    def close(self) -> None:
        """Removes the diaries of the machines it minded."""
        self._ends.close()
        for descriptor in self._descriptors:
            os.close(descriptor)
        for path in self._found.pages.iterdir():
            if path.name.partition(".")[0] in self._minded:
                path.unlink(missing_ok=True)

    def _look_for_new(self) -> None:
        for entry in os.scandir(self._found.pages):
            uuid, pid, kind = entry.name.split(".")
            path = Path(entry.path)
            if kind != "out" or uuid not in self._minded or path in self._lives:
                continue
            life = self._lives[path] = Life(uuid, int(pid), path)
            try:
                descriptor = os.pidfd_open(life.pid)
            except ProcessLookupError:
                life.ended = time.time()
                continue
            self._descriptors[descriptor] = life
            self._ends.register(descriptor, select.EPOLLIN)

    def _look_for_dead(self, seconds: float) -> None:
        for descriptor, _ in self._ends.poll(seconds):
            life = self._descriptors[descriptor]
            if life.ended is None:
                life.ended = time.time()
            with contextlib.suppress(FileNotFoundError):  # another look was first
                self._ends.unregister(descriptor)

    def _feel(self) -> None:
        busy = set()
        for life in self._lives.values():
            for thread in life.threads if life.ended is None else ():
                used = _used_ns(life.pid, thread)
                if used - self._pulses.get(thread, used) >= BUSY_NS:
                    busy.add(life.pid)
                self._pulses[thread] = used
        self._busy.append(frozenset(busy))
        self._times.append(time.time())

    def _together(self, lives: Sequence[Life]) -> list[Overlap]:
        """Pairs that both computed at enough looks in a row."""
        found = []
        for one, other in itertools.combinations(lives, 2):
            pair = {one.pid, other.pid}
            for begin, end in _stretches([pair <= looked for looked in self._busy]):
                if end - begin >= TOGETHER_LOOKS:
                    since, until = self._times[begin], self._times[end - 1]
                    found.append(Overlap(pids=(one.pid, other.pid), since=since, until=until, evidence="processors' time"))
        return found


def _stretches(flags: Sequence[bool]) -> list[tuple[int, int]]:
    """Where a row of flags is set: each stretch by its first place and the one behind its last."""
    places = [(value, list(group)) for value, group in itertools.groupby(range(len(flags)), lambda at: flags[at])]
    return [(group[0], group[-1] + 1) for value, group in places if value]


def _used_ns(pid: int, thread: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/task/{thread}/schedstat").read_bytes().split()[0])
    except (FileNotFoundError, ProcessLookupError):
        return 0


@contextmanager
def onlooking() -> Iterator[Onlooker]:
    """An onlooker that looks for as long as the block lasts."""
    onlooker = Onlooker(emulators())
    ended = threading.Event()

    def look() -> None:
        while not ended.is_set():
            onlooker.look()
            onlooker.wait(LOOK_S)

    thread = threading.Thread(target=look, name="onlooker")
    thread.start()
    try:
        yield onlooker
    finally:
        ended.set()
        thread.join(END_LIMIT_S)
        onlooker.close()
