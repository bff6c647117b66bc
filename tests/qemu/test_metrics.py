"""Metrics of real machines: what Prometheus' own tool says of them, and a dashboard whose every expression finds something."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from qmpd.daemon import running
from qmpd.lifecycle import State
from qmpd.service import Service
from qmpd.settings import Settings
from qmpd.spec import BlankDisk
from tests.conftest import end_machines
from tests.guests.build import Guest
from tests.machines import copy_of, spec_of
from tests.unavailable import tool

pytestmark = pytest.mark.qemu

ROOT = Path(__file__).parents[2]
DASHBOARD = ROOT / "docs" / "grafana" / "qmpd.json"
#: Generous: the hosts that run this are shared and slow, and only a hang may fail.
PATIENCE_S = 120.0

Families = dict[str, Metric]


@pytest.fixture
async def service(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Service]:
    """A daemon that asks its machines all the time."""
    monkeypatch.setattr("qmpd.sampling.ROUND_S", 0.05)
    async with running(settings, {}) as made:
        yield made
        await end_machines(made)


async def families(service: Service) -> Families:
    text = (await service.upkeep.metrics()).decode()
    return {family.name: family for family in text_string_to_metric_families(text)}


async def until(service: Service, condition: Callable[[Families], bool]) -> Families:
    """The metrics, once they are as wanted."""
    async with asyncio.timeout(PATIENCE_S):
        while not condition(found := await families(service)):
            await asyncio.sleep(0.05)
    return found


def value(found: Families, name: str, **labels: str) -> float:
    """The value of the one sample with these labels, 0 where there is none."""
    samples = [sample for sample in found[name].samples if labels.items() <= sample.labels.items()]
    assert len(samples) < 2
    return samples[0].value if samples else 0.0


async def test_a_machine_that_works_is_seen_to(service: Service, guests: dict[str, Guest], tmp_path: Path) -> None:
    writer = copy_of(guests["x86_64-pc-blocks"], tmp_path)
    await service.create(spec_of(writer, "writer"), start=True)
    found = await until(service, lambda now: value(now, "qmpd_machine_disk_written_bytes", machine="writer", disk="disk0") > 0)
    assert value(found, "qmpd_machine_disk_writes", machine="writer", disk="disk0") > 0
    assert value(found, "qmpd_machine_disk_reads", machine="writer", disk="disk0") > 0
    assert value(found, "qmpd_machine_disk_failures", machine="writer", disk="disk0") == 0
    assert value(found, "qmpd_machine_process_cpu_seconds", machine="writer") > 0
    assert value(found, "qmpd_machine_process_resident_memory_bytes", machine="writer") > 2**20
    assert value(found, "qmpd_machine_state", machine="writer", state="running") == 1
    assert value(found, "qmpd_machine_state", machine="writer", state="stopped") == 0
    trips = {sample.name: sample.value for sample in found["qmpd_qmp_round_trip_seconds"].samples}
    assert trips["qmpd_qmp_round_trip_seconds_count"] >= 1
    assert 0 < value(found, "qmpd_machine_qmp_round_trip_seconds", machine="writer") < PATIENCE_S


async def test_a_machine_at_rest_has_no_figures_of_a_process(service: Service, guests: dict[str, Guest]) -> None:
    await service.create(spec_of(guests["x86_64-q35-quiet"], "one", disks=(BlankDisk(size_mib=1),)), start=True)
    await until(service, lambda now: bool(now["qmpd_machine_disk_reads"].samples))
    await service.stop("one")
    found = await families(service)
    figures = [name for name in found if name.startswith(("qmpd_machine_disk", "qmpd_machine_process", "qmpd_machine_qmp"))]
    assert figures
    assert not [sample for name in figures for sample in found[name].samples]
    assert value(found, "qmpd_machine_memory_bytes", machine="one") > 0


async def test_a_silent_machine_keeps_nobody_waiting_and_is_noticed(service: Service, guests: dict[str, Guest]) -> None:
    for name in ("silent", "other"):
        await service.create(spec_of(guests["x86_64-q35-quiet"], name), start=True)
    pid = service.machine("silent").pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    try:
        silent = {"machine": "silent", "state": "unresponsive"}
        noticed = await until(
            service, lambda now: value(now, "qmpd_machine_state", **silent) == 1 and value(now, "qmpd_qmp_unanswered") >= 1
        )
        assert value(noticed, "qmpd_machine_process_cpu_seconds", machine="silent") > 0
        answered = value(noticed, "qmpd_qmp_round_trip_seconds", le="+Inf")
        await until(service, lambda now: value(now, "qmpd_qmp_round_trip_seconds", le="+Inf") > answered)
    finally:
        os.kill(pid, signal.SIGCONT)
    assert (await service.wait("silent", frozenset({State.RUNNING}), PATIENCE_S)).state is State.RUNNING


def promtool(*words: str, text: bytes) -> None:
    """Has Prometheus' own tool look at something."""
    done = subprocess.run([tool("promtool", "prometheus"), "check", *words], input=text, capture_output=True)
    assert done.returncode == 0, (done.stdout + done.stderr).decode()
    assert done.stderr == b""


async def test_promtool_finds_nothing_to_say(service: Service, guests: dict[str, Guest]) -> None:
    await service.create(spec_of(guests["x86_64-q35-quiet"], "one", disks=(BlankDisk(size_mib=1),)), start=True)
    await until(service, lambda now: bool(now["qmpd_machine_disk_reads"].samples))
    await asyncio.to_thread(promtool, "metrics", text=await service.upkeep.metrics())


def expressions() -> Iterator[str]:
    """Every expression of the dashboard, with Grafana's own variables filled in."""
    document = json.loads(DASHBOARD.read_text())
    queries = [variable["query"]["query"] for variable in document["templating"]["list"] if variable["type"] == "query"]
    found = [target["expr"] for panel in document["panels"] for target in panel.get("targets", ())]
    for text in [re.sub(r"label_values\((.*), \w+\)", r"\1", query) for query in queries] + found:
        yield text.replace("$__rate_interval", "5m").replace("$machine", ".*").replace("$job", ".*")


def test_prometheus_understands_every_expression_of_the_dashboard(tmp_path: Path) -> None:
    texts = list(expressions())
    assert len(texts) > 20
    rules = tmp_path / "rules.json"
    document = {"groups": [{"name": "dashboard", "rules": [{"record": f"r{index}", "expr": text} for index, text in enumerate(texts)]}]}
    rules.write_text(json.dumps(document))
    promtool("rules", str(rules), text=b"")


#: What is added by whoever scrapes.
SCRAPED = frozenset({"job", "instance"})


async def test_the_dashboard_shows_what_there_is(service: Service, guests: dict[str, Guest]) -> None:
    await service.create(spec_of(guests["x86_64-q35-quiet"], "one", disks=(BlankDisk(size_mib=1),)), start=True)
    found = await until(service, lambda now: bool(now["qmpd_machine_disk_reads"].samples))
    known = {sample.name: set(sample.labels) for family in found.values() for sample in family.samples}
    used: set[str] = set()
    for text in expressions():
        names = re.findall(r"\b((?:qmpd|process)_\w+)(?:\{([^}]*)\})?", text)
        assert names, text
        for name, selectors in names:
            assert name in known, text
            used.add(name)
            labels = set(re.findall(r"(\w+)\s*[=!]~?\"", selectors))
            assert labels - SCRAPED <= known[name], text
    own = {name for name in known if name.startswith("qmpd_") and not name.endswith(("_sum", "_count"))}
    assert own <= used, "a metric nobody sees"
