"""A host is emptied: what runs there runs on elsewhere, and what does not comes along as it is."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys

import pytest

from qmpctl.exits import Exit
from qmpd.lifecycle import State
from qmpd.spec import BlankDisk
from qmpd.views import ExitView
from tests.guests.build import Guest
from tests.machines import spec_of
from tests.migration.hosts import Host, hosts
from tests.migration.network import NoNetworks
from tests.migration.traveller import PATIENCE_S
from tests.unavailable import unavailable

pytestmark = pytest.mark.qemu

GUEST = "x86_64-microvm"


def drained(host: Host, *words: str) -> subprocess.CompletedProcess[str]:
    """What `qmpctl drain` says at a host. Blocks."""
    command = [sys.executable, "-m", "qmpctl", "drain", *words]
    environ = {**os.environ, "QMPD_SOCKET": host.daemon.socket}
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=PATIENCE_S, check=False)


async def states(host: Host) -> dict[str, State]:
    async with host.client() as client:
        return {view.name: view.state for view in (await client.machines()).machines}


async def exits(host: Host) -> dict[str, ExitView | None]:
    async with host.client() as client:
        return {view.name: view.exit for view in (await client.machines()).machines}


@pytest.mark.timeout(600)
async def test_a_host_is_drained_of_what_runs_and_of_what_does_not(guests: dict[str, Guest]) -> None:
    disks = (BlankDisk(size_mib=4),)
    try:
        async with hosts() as world:
            await world.start()
            here, there = world[0], world[1]
            async with here.client() as client:
                for name in ("runs", "stopped", "crashed", "defined"):
                    await client.create(spec_of(guests[GUEST], name, disks=disks), start=name != "defined")
                await client.kill("stopped")
            await asyncio.to_thread(here.kill_qemu, "crashed")
            async with asyncio.timeout(PATIENCE_S):
                while (before := await states(here))["crashed"] is not State.CRASHED:
                    await asyncio.sleep(0.05)
            endings = await exits(here)
            assert endings["defined"] is None
            assert endings["crashed"] is not None
            tried = await asyncio.to_thread(drained, here, there.name, "--all", "--dry-run")
            assert tried.returncode == Exit.OK, tried.stderr
            said = sorted(line.partition(":")[0] for line in tried.stdout.splitlines() if "can be moved" in line)
            assert said == sorted(before)
            assert await states(here) == before
            some = await asyncio.to_thread(drained, here, there.name)
            assert some.returncode == Exit.OK, some.stderr
            assert await states(there) == {"runs": State.RUNNING}
            rest = await asyncio.to_thread(drained, here, there.name, "--all")
            assert rest.returncode == Exit.OK, rest.stderr
            assert (await states(here), await states(there)) == ({}, before | {"crashed": State.STOPPED})
            assert await exits(there) == endings
            async with there.client() as client:
                for name in ("stopped", "crashed", "defined"):
                    assert (await client.start(name)).state is State.RUNNING
    except NoNetworks as reason:
        unavailable(reason)
