"""Figures that only QEMU has, asked for in the background: who reads them never waits for a machine.

Every machine that answers is asked once per round, a bounded number of them per second, and none while a verb holds it or an earlier
question is still open. So a silent machine costs one open question, and a thousand machines a longer round, not a busier daemon.
The same question measures how long QEMU takes to answer, and finds out that one does not answer at all.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from typing import Final

import msgspec

from qmpd.errors import QmpdError
from qmpd.lifecycle import ANSWERING
from qmpd.machine import Machine
from qmpd.tasks import background

#: How old a figure may become: finer than monitoring systems ask, and a thousandth of a processor for a hundred machines.
ROUND_S: Final = 10.0
#: Questions are spread, so that the round of many machines delays nobody's commands.
BETWEEN_S: Final = 0.02
#: Boards and QEMU's own devices have a few drives beside those of the definition; more than this is not exported.
DISKS_LIMIT: Final = 64
#: Upper bounds of the round trip's histogram in seconds: an idle QEMU takes a millisecond, the deadline is five seconds.
BOUNDS_S: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
QUESTION: Final = "query-blockstats"


class DiskFigures(msgspec.Struct, frozen=True, kw_only=True):
    """What the guest did with one drive since its QEMU was launched."""

    read_bytes: int = 0
    written_bytes: int = 0
    reads: int = 0
    writes: int = 0
    flushes: int = 0
    failures: int = 0


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """The newest answer of one QEMU, which had this process id."""

    pid: int | None
    round_trip_s: float
    disks: dict[str, DiskFigures]


class RoundTrips:
    """A histogram of how long QEMUs took to answer. `unanswered` are questions that got no answer in time, or an error."""

    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS_S) + 1)
        self.sum_s = 0.0
        self.unanswered = 0

    def add(self, seconds: float) -> None:
        """Count one."""
        self.counts[bisect_left(BOUNDS_S, seconds)] += 1
        self.sum_s += seconds


class Sampler:
    """The newest sample of every machine by name; `run` keeps them new."""

    def __init__(self, machines: Iterable[Machine]) -> None:
        self.samples: dict[str, Sample] = {}
        self.round_trips = RoundTrips()
        self._machines = machines
        self._asked: set[str] = set()

    async def run(self) -> None:
        """For ever: ask everybody, round by round."""
        async with background() as tasks:
            while True:
                await asyncio.sleep(ROUND_S)  # the first round comes late too: a daemon that starts has better things to do
                for machine in tuple(self._machines):
                    if self._askable(machine):
                        tasks.start(self.ask(machine), f"figures:{machine.name}")
                        await asyncio.sleep(BETWEEN_S)
                self._forget()

    async def ask(self, machine: Machine) -> None:
        """Ask one machine. Its answer becomes its sample; without one the last sample stays."""
        loop = asyncio.get_running_loop()
        pid = machine.view().pid
        self._asked.add(machine.name)
        begun = loop.time()
        try:
            answer = await machine.session.monitor.execute(QUESTION)
        except QmpdError:
            self.round_trips.unanswered += 1
            return
        finally:
            self._asked.discard(machine.name)
        took = loop.time() - begun
        self.round_trips.add(took)
        self.samples[machine.name] = Sample(pid=pid, round_trip_s=took, disks=disks_of(answer))

    def of(self, name: str, pid: int | None) -> Sample | None:
        """The sample of a machine whose process has this id; an earlier process's figures are nobody's."""
        sample = self.samples.get(name)
        return sample if sample is not None and sample.pid == pid else None

    def _askable(self, machine: Machine) -> bool:
        return machine.state in ANSWERING and machine.operation is None and machine.name not in self._asked

    def _forget(self) -> None:
        alive = {machine.name for machine in self._machines if machine.alive}
        self.samples = {name: sample for name, sample in self.samples.items() if name in alive}


def disks_of(answer: object) -> dict[str, DiskFigures]:
    """The drives in QEMU's answer to query-blockstats by their names; what is not as QEMU documents it is left out."""
    found: dict[str, DiskFigures] = {}
    for entry in answer if isinstance(answer, list) else []:
        name, stats = _name(entry), entry.get("stats") if isinstance(entry, dict) else None
        if not name or not isinstance(stats, dict) or len(found) == DISKS_LIMIT:
            continue
        found[name] = DiskFigures(
            read_bytes=_count(stats, "rd_bytes"),
            written_bytes=_count(stats, "wr_bytes"),
            reads=_count(stats, "rd_operations"),
            writes=_count(stats, "wr_operations"),
            flushes=_count(stats, "flush_operations"),
            failures=sum(_count(stats, f"failed_{what}_operations") for what in ("rd", "wr", "flush")),
        )
    return found


def _name(entry: object) -> str:
    """What a drive is called: by its device's id, for `/machine/peripheral/disk0/virtio-backend` that is disk0."""
    if not isinstance(entry, dict):
        return ""
    device = str(entry.get("qdev") or "")
    if device.startswith("/machine/peripheral/"):
        return device.split("/")[3]
    return str(device or entry.get("device") or entry.get("node-name") or "")


def _count(stats: Mapping[object, object], name: str) -> int:
    value = stats.get(name)
    return value if isinstance(value, int) else 0
