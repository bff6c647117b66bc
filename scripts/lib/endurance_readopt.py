"""Kills the daemon over and over, and measures how soon the next one has every machine again."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import msgspec

from qmpd.errors import QmpdError
from qmpd.views import MachineView
from qmpd_api.client import Client
from scripts.lib.bench_figures import Row, limited, percentile
from scripts.lib.progress import say
from scripts.lib.quiet_machines import create_running, quiet_guest, quiet_specs
from scripts.lib.restartable import Restartable, restartable

API_BAR_MS: Final = 500.0
USABLE_BAR_MS: Final = 2000.0
#: Far beyond the bar: a machine that is not there by then was lost.
USABLE_LIMIT_S: Final = 120.0
#: How often the list is read while machines are taken over.
LOOK_S: Final = 0.01
#: Enough for every event of a round to be in one page after another.
PAGE: Final = 1000


class Round(msgspec.Struct, frozen=True, kw_only=True):
    """Milliseconds after exec: the first answer, the list with all machines running, the last machine's answer to a QMP command."""

    answered_ms: float
    listed_ms: float
    usable_ms: float


async def measure(root: Path, *, machines: int, rounds: int) -> tuple[list[Row], list[str]]:
    """The figures of so many rounds, and every promise that was broken."""
    guest = await asyncio.to_thread(quiet_guest, root)
    results: list[Round] = []
    broken: list[str] = []
    async with restartable(root / ".cache", {"events_kept": 1_000_000}, prefix="qe-") as daemon:
        daemon.start()
        await asyncio.to_thread(daemon.wait_answer)
        async with Client(daemon.socket) as client:
            await create_running(client, quiet_specs(guest, machines))
        say(f"  {machines} machines run")
        for number in range(rounds):
            done, wrong = await _round(daemon)
            results.append(done)
            broken += [f"round {number + 1}: {what}" for what in wrong]
            say(f"  round {number + 1}: answer {done.answered_ms:.0f} ms, list {done.listed_ms:.0f} ms, usable {done.usable_ms:.0f} ms")
    return _rows(machines, results), broken


def _rows(machines: int, results: list[Round]) -> list[Row]:
    figures = {
        "exec until the API answers": ([one.answered_ms for one in results], API_BAR_MS),
        "exec until the list has all running": ([one.listed_ms for one in results], USABLE_BAR_MS),
        "exec until every machine answered QMP": ([one.usable_ms for one in results], USABLE_BAR_MS),
    }
    rows = []
    for what, (samples, bar) in figures.items():
        for word, percent in (("median", 50), ("worst", 100)):
            value = percentile(samples, percent)
            rows.append(
                limited(
                    "readopt", f"{what}, {machines} machines, {word}", measured=value, limit=bar, unit="ms", samples=len(samples),
                )
            )  # fmt: skip
    return rows


async def _round(daemon: Restartable) -> tuple[Round, list[str]]:
    async with Client(daemon.socket) as client:
        before = await client.machines()
    processes = {(one.machine, one.pid, one.started) for one in await asyncio.to_thread(daemon.qemus)}
    await asyncio.to_thread(daemon.end, signal.SIGKILL)
    began = daemon.start()
    answered = await asyncio.to_thread(daemon.wait_answer)
    async with Client(daemon.socket) as client:
        listed = await _all_running(client, len(before.machines))
        wrong = await _usable(client, [view.name for view in before.machines])
        usable = time.perf_counter()
        after = await client.machines()
        wrong += _changed({view.name: view for view in before.machines}, {view.name: view for view in after.machines})
        wrong += await _numbers(client, before.event)
    if processes != {(one.machine, one.pid, one.started) for one in await asyncio.to_thread(daemon.qemus)}:
        wrong.append("other processes run than before")
    figures = Round(answered_ms=(answered - began) * 1e3, listed_ms=(listed - began) * 1e3, usable_ms=(usable - began) * 1e3)
    return figures, wrong


async def _all_running(client: Client, count: int) -> float:
    limit = time.monotonic() + USABLE_LIMIT_S
    while sum(view.state == "running" for view in (await client.machines()).machines) < count:
        if time.monotonic() > limit:
            break
        await asyncio.sleep(LOOK_S)
    return time.perf_counter()


async def _usable(client: Client, names: list[str]) -> list[str]:
    """Asks every machine's QEMU something, all at the same time; who does not answer that it runs."""

    async def one(name: str) -> str | None:
        try:
            answer = await client.qmp(name, "query-status")
        except QmpdError as error:
            return f"{name} is not usable: {error.message}"
        return None if isinstance(answer, dict) and answer.get("running") is True else f"{name} does not run: {answer}"

    return [what for what in await asyncio.gather(*map(one, names)) if what is not None]


def _changed(before: Mapping[str, MachineView], after: Mapping[str, MachineView]) -> list[str]:
    """What the daemon knows otherwise than before."""
    fields = ("uuid", "revision", "state", "pid", "started_at")
    wrong = []
    for name, view in before.items():
        now = after.get(name)
        wrong += [f"{name}: {field} was {getattr(view, field)}" for field in fields if getattr(view, field) != getattr(now, field, None)]
        if now is not None and now.console_bytes < view.console_bytes:
            wrong.append(f"{name}: the console had {view.console_bytes} bytes and has {now.console_bytes}")
    return wrong


async def _numbers(client: Client, last: int) -> list[str]:
    """Whether the events go on with the next number, one by one, and none of them says that a machine was started or ended."""
    wrong = []
    expected = last + 1
    while (page := await client.events_page(expected - 1, PAGE)).events:
        for event in page.events:
            if event.number != expected:
                wrong.append(f"event {expected} is missing: {event.number} follows {expected - 1}")
            if event.kind == "machine.state" and event.data.get("state") in {"starting", "stopped", "crashed"}:
                wrong.append(f"event {event.number}: {event.machine} is {event.data.get('state')}")
            expected = event.number + 1
    return wrong
