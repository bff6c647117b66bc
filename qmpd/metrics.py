"""What a monitoring system may know of this daemon, in Prometheus' text format."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from prometheus_client import PlatformCollector, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily
from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector, CollectorRegistry

from qmpd import __version__
from qmpd.bus import Bus
from qmpd.lifecycle import State
from qmpd.registry import Registry


class _Daemon(Collector):
    """Reads what the machines' tasks know; never asks QEMU."""

    def __init__(self, registry: Registry, bus: Bus) -> None:
        self._registry = registry
        self._bus = bus

    def collect(self) -> Iterator[Metric]:
        """The metric families, as prometheus_client wants them."""
        info = InfoMetricFamily("qmpd_build", "The version of this daemon")
        info.add_metric([], {"version": __version__})
        yield info
        states = Counter(machine.state for machine in self._registry)
        gauge = GaugeMetricFamily("qmpd_machines", "Machines by state", labels=["state"])
        for state in State:
            gauge.add_metric([str(state)], states[state])
        yield gauge
        yield CounterMetricFamily("qmpd_events", "Events recorded since the database was made", value=self._bus.last)
        resets = CounterMetricFamily("qmpd_machine_resets", "Resets of the guest since its QEMU was launched", labels=["machine"])
        output = CounterMetricFamily("qmpd_machine_console_bytes", "Bytes the console has printed", labels=["machine"])
        for machine in self._registry:
            view = machine.view()
            resets.add_metric([machine.name], view.resets)
            output.add_metric([machine.name], view.console_bytes)
        yield resets
        yield output


class Metrics:
    """The registry of one daemon."""

    def __init__(self, registry: Registry, bus: Bus) -> None:
        self._collectors = CollectorRegistry()
        self._collectors.register(_Daemon(registry, bus))
        ProcessCollector(registry=self._collectors)
        PlatformCollector(registry=self._collectors)

    def text(self) -> bytes:
        """All metrics now."""
        return generate_latest(self._collectors)
