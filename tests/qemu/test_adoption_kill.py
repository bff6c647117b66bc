"""What was adopted stays adopted when the daemon is killed."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from qmpd.lifecycle import State
from qmpd.processviews import AdoptRequest
from qmpd.settings import Settings
from qmpd_api.client import Client, DaemonUnavailable
from tests.guests.build import Guest
from tests.qemu.byhand import PATIENCE_S, listening, started

pytestmark = pytest.mark.qemu
ROOT = Path(__file__).parents[2]


@asynccontextmanager
async def daemon(settings: Settings, directory: Path) -> AsyncIterator[Client]:
    """A daemon in a process of its own, killed with SIGKILL at the end of the block."""
    config = directory / "qmpd.toml"
    kept = {name: getattr(settings, name) for name in ("socket", "state_dir", "run_dir", "cache_dir")}
    config.write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in kept.items()))
    environ = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'api'}"}
    process = await asyncio.create_subprocess_exec(sys.executable, "-m", "qmpd", "serve", "--config", str(config), env=environ)
    try:
        async with Client(settings.socket) as client:
            await answering(client)
            yield client
    finally:
        process.kill()
        await process.wait()


async def answering(client: Client) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while True:
            try:
                await client.version()
            except DaemonUnavailable:
                await asyncio.sleep(0.05)
            else:
                return


async def test_a_killed_daemon_s_successor_has_the_adopted_machine(
    settings: Settings, guests: dict[str, Guest], short_directory: Path
) -> None:
    path = short_directory / "q"
    with started(short_directory, guests["x86_64-q35-quiet"], "-qmp", f"unix:{path},server=on,wait=off") as hand:
        await listening(path, hand)
        async with daemon(settings, short_directory) as client:
            first = await client.adopt(AdoptRequest(pid=hand.pid, name="lab"))
            assert (first.state, first.pid) == (State.RUNNING, hand.pid)
            assert {view.pid: view.machine for view in await client.processes()}[hand.pid] == "lab"
        assert hand.poll() is None
        async with daemon(settings, short_directory) as client:
            view = await client.wait("lab", [State.RUNNING], PATIENCE_S)
            assert (view.pid, view.uuid, view.adopted, view.revision) == (hand.pid, first.uuid, first.adopted, first.revision)
            assert (await client.power_off("lab")).method == "sigterm"
        assert hand.wait() == 0
