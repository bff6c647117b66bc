"""What a monitoring system may know of this daemon and its machines, in Prometheus' text format.

A scrape waits for no machine: what QEMU has to be asked was asked in the background (`sampling`), the rest is in memory or in /proc.
Names and units follow Prometheus' conventions, which `promtool check metrics` knows.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Final

import msgspec
from prometheus_client import PlatformCollector, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, InfoMetricFamily
from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector, CollectorRegistry

from qmpd import __version__
from qmpd.bus import Bus
from qmpd.lifecycle import State
from qmpd.procfigures import ProcessFigures, figures_of
from qmpd.registry import Registry
from qmpd.sampling import BOUNDS_S, Sample, Sampler
from qmpd.tally import Tally
from qmpd.views import MachineView


class _Seen(msgspec.Struct, frozen=True, kw_only=True):
    """One machine at the moment of a scrape."""

    view: MachineView
    crashes: int
    restarts: int
    sample: Sample | None
    figures: ProcessFigures | None


class _Events(msgspec.Struct, frozen=True, kw_only=True):
    last: int
    lost: int
    pending: int
    subscribers: int


class _Latency(msgspec.Struct, frozen=True, kw_only=True):
    counts: tuple[int, ...]
    sum_s: float
    unanswered: int


#: Of a disk: the metric's name behind `qmpd_machine_disk_`, its field, what it is.
_DISK_COUNTERS: Final = (
    ("read_bytes", "read_bytes", "Bytes the guest read from the disk"),
    ("written_bytes", "written_bytes", "Bytes the guest wrote to the disk"),
    ("reads", "reads", "Reads of the disk that were completed"),
    ("writes", "writes", "Writes to the disk that were completed"),
    ("flushes", "flushes", "Flushes of the disk that were completed"),
    ("failures", "failures", "Operations of the disk that failed"),
)


class _Scrape(Collector):
    """Plain values in, metric families out."""

    def __init__(self, machines: Sequence[_Seen], events: _Events, latency: _Latency) -> None:
        self._machines = machines
        self._events = events
        self._latency = latency

    def collect(self) -> Iterator[Metric]:
        """The metric families, as prometheus_client wants them."""
        info = InfoMetricFamily("qmpd_build", "The version of this daemon")
        info.add_metric([], {"version": __version__})
        yield info
        yield from self._daemon()
        yield from self._of_each()
        yield from self._processes()
        yield from self._disks()

    def _daemon(self) -> Iterator[Metric]:
        states = Counter(machine.view.state for machine in self._machines)
        gauge = GaugeMetricFamily("qmpd_machines", "Machines by state", labels=["state"])
        for state in State:
            gauge.add_metric([str(state)], states[state])
        yield gauge
        events = self._events
        yield CounterMetricFamily("qmpd_events", "Events recorded since the database was made", value=events.last)
        yield CounterMetricFamily("qmpd_events_lost", "Events that could not be recorded since the daemon began", value=events.lost)
        yield GaugeMetricFamily("qmpd_events_pending", "Events that wait for the database", value=events.pending)
        yield GaugeMetricFamily("qmpd_event_subscribers", "Clients that follow the events", value=events.subscribers)
        latency = HistogramMetricFamily(
            "qmpd_qmp_round_trip_seconds", "How long QEMUs took to answer the question that each is asked every ten seconds"
        )
        bounds = [*map(str, BOUNDS_S), "+Inf"]
        latency.add_metric([], list(zip(bounds, accumulate(self._latency.counts), strict=True)), self._latency.sum_s)
        yield latency
        yield CounterMetricFamily("qmpd_qmp_unanswered", "Those questions that got no answer in time", value=self._latency.unanswered)

    def _of_each(self) -> Iterator[Metric]:
        info = InfoMetricFamily("qmpd_machine", "What a machine is", labels=["machine"])
        state = GaugeMetricFamily("qmpd_machine_state", "1 for the state a machine is in, 0 for the others", labels=["machine", "state"])
        memory = GaugeMetricFamily("qmpd_machine_memory_bytes", "Memory the guest has", labels=["machine"])
        cpus = GaugeMetricFamily("qmpd_machine_cpus", "Processors the guest has", labels=["machine"])
        resets = CounterMetricFamily("qmpd_machine_resets", "Resets of the guest since its QEMU was launched", labels=["machine"])
        output = CounterMetricFamily("qmpd_machine_console_bytes", "Bytes the console has printed", labels=["machine"])
        crashes = CounterMetricFamily("qmpd_machine_crashes", "Crashes of the machine since the daemon began", labels=["machine"])
        restarts = CounterMetricFamily(
            "qmpd_machine_restarts", "Starts by the machine's restart policy since the daemon began", labels=["machine"]
        )
        for machine in self._machines:
            view, name = machine.view, [machine.view.name]
            info.add_metric(name, _shown({"board": view.board, "arch": view.arch, "accel": view.accel, "emulator": view.emulator_version}))
            for each in State:
                state.add_metric([*name, str(each)], each is view.state)
            memory.add_metric(name, view.memory_mib * 2**20)
            cpus.add_metric(name, view.cpus)
            resets.add_metric(name, view.resets)
            output.add_metric(name, view.console_bytes)
            crashes.add_metric(name, machine.crashes)
            restarts.add_metric(name, machine.restarts)
        yield from (info, state, memory, cpus, resets, output, crashes, restarts)

    def _processes(self) -> Iterator[Metric]:
        prefix, labels = "qmpd_machine_process", ["machine"]
        cpu = CounterMetricFamily(f"{prefix}_cpu_seconds", "Processor time of the machine's QEMU", labels=labels)
        memory = GaugeMetricFamily(f"{prefix}_resident_memory_bytes", "Memory that the machine's QEMU occupies", labels=labels)
        read = CounterMetricFamily(f"{prefix}_read_bytes", "Bytes that storage read for the machine's QEMU", labels=labels)
        written = CounterMetricFamily(f"{prefix}_written_bytes", "Bytes that storage wrote for the machine's QEMU", labels=labels)
        for machine in self._machines:
            name, figures = [machine.view.name], machine.figures
            if figures is None:
                continue
            cpu.add_metric(name, figures.cpu_seconds)
            memory.add_metric(name, figures.resident_bytes)
            if figures.read_bytes is not None and figures.written_bytes is not None:
                read.add_metric(name, figures.read_bytes)
                written.add_metric(name, figures.written_bytes)
        yield from (cpu, memory, read, written)

    def _disks(self) -> Iterator[Metric]:
        answered = GaugeMetricFamily(
            "qmpd_machine_qmp_round_trip_seconds", "How long the machine's QEMU took to answer the last time", labels=["machine"]
        )
        sampled = [(machine.view.name, machine.sample) for machine in self._machines if machine.sample is not None]
        for name, sample in sampled:
            answered.add_metric([name], sample.round_trip_s)
        yield answered
        for metric, field, meaning in _DISK_COUNTERS:
            family = CounterMetricFamily(f"qmpd_machine_disk_{metric}", meaning, labels=["machine", "disk"])
            for name, sample in sampled:
                for disk, figures in sample.disks.items():
                    family.add_metric([name, disk], getattr(figures, field))
            yield family


def _shown(labels: dict[str, str | None]) -> dict[str, str]:
    return {name: value or "" for name, value in labels.items()}


class Metrics:
    """The metrics of one daemon."""

    def __init__(self, registry: Registry, bus: Bus, sampler: Sampler, tally: Tally) -> None:
        self._registry = registry
        self._bus = bus
        self._sampler = sampler
        self._tally = tally
        self._own = (ProcessCollector(registry=None), PlatformCollector(registry=None))

    async def text(self) -> bytes:
        """All metrics now."""
        machines = list(self._registry)
        identities = {machine.name: machine.launch.identity for machine in machines if machine.alive and machine.launch is not None}
        figures = await asyncio.to_thread(figures_of, identities)
        seen = [
            _Seen(
                view=(view := machine.view()),
                crashes=self._tally.crashes[machine.name],
                restarts=self._tally.restarts[machine.name],
                sample=self._sampler.of(machine.name, view.pid) if view.pid is not None else None,
                figures=figures.get(machine.name),
            )
            for machine in machines
        ]
        bus, trips = self._bus, self._sampler.round_trips
        events = _Events(last=bus.last, lost=bus.lost, pending=bus.pending, subscribers=bus.subscribers)
        latency = _Latency(counts=tuple(trips.counts), sum_s=trips.sum_s, unanswered=trips.unanswered)
        return await asyncio.to_thread(self._written, _Scrape(seen, events, latency))

    def _written(self, scrape: Collector) -> bytes:
        collectors = CollectorRegistry()
        for collector in (scrape, *self._own):
            collectors.register(collector)
        return generate_latest(collectors)
