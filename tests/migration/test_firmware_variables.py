"""The firmware variables of a UEFI machine are at its new host, whether its guest goes on there or stays halted."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import pytest

from qmpd.access import Caller
from qmpd.facts import MachinePaths
from qmpd.migration.fileitems import VariablesSender
from qmpd.migration.itemdesk import Delivery, ItemDesk
from qmpd.migration.parcels import ItemStanding, Parcel
from qmpd.monitor import Monitor
from qmpd.spec import MachineSpec, PflashFirmware
from qmpd.tasks import background
from tests.process.emulator import Emulator, Emulators, emulators_in
from tests.unavailable import unavailable

pytestmark = pytest.mark.qemu

CODE, TEMPLATE = (Path(f"/usr/share/OVMF/OVMF_{part}_4M.fd") for part in ("CODE", "VARS"))
PATIENCE_S = 120.0


async def launched(emulators: Emulators, variables: Path, *further: str) -> Emulator:
    """A UEFI machine."""
    return await emulators.start(
        *("-m", "128", "-machine", "pflash0=code,pflash1=vars"),
        *("-blockdev", f'{{"driver":"raw","node-name":"code","read-only":true,"file":{{"driver":"file","filename":"{CODE}"}}}}'),
        *("-blockdev", f'{{"driver":"raw","node-name":"vars","read-only":false,"file":{{"driver":"file","filename":"{variables}"}}}}'),
        *further,
        machine="q35",
    )


async def written(path: Path, before: bytes) -> None:
    """Returns when the firmware has changed its variables, and changes them no more."""
    async with asyncio.timeout(PATIENCE_S):
        template = await asyncio.to_thread(TEMPLATE.read_bytes)
        while (now := await asyncio.to_thread(path.read_bytes)) == template or now != before:
            before = now
            await asyncio.sleep(2)


async def migrated(source: Monitor, destination: Monitor, socket: Path) -> None:
    await destination.execute("migrate-incoming", {"uri": f"unix:{socket}"})
    await source.execute("migrate", {"uri": f"unix:{socket}"})
    async with asyncio.timeout(PATIENCE_S):
        while True:
            answer = await source.execute("query-migrate")
            assert isinstance(answer, dict)
            if answer.get("status") == "completed":
                break
            await asyncio.sleep(0.05)
        while True:
            answer = await destination.execute("query-status")
            assert isinstance(answer, dict)
            if answer["status"] != "inmigrate":
                return
            await asyncio.sleep(0.05)


@pytest.mark.parametrize("runs", [True, False], ids=["goes on", "stays halted"])
async def test_variables_are_there_whether_the_guest_runs_or_not(directory: Path, runs: bool) -> None:
    if not CODE.exists():
        unavailable("OVMF is not installed (Debian: the package ovmf)")
    here = directory / "here.fd"
    shutil.copyfile(TEMPLATE, here)
    (directory / "own").mkdir()
    delivery = Delivery(
        migration="0123456789abcdef",
        spec=MachineSpec(name="one", board="x86_64-q35", firmware=PflashFirmware(code=str(CODE), vars=str(TEMPLATE))),
        paths=MachinePaths(run=str(directory / "run"), state=str(directory / "own")),
        parcels=(Parcel(item="vars", size=TEMPLATE.stat().st_size),),
        log_cap_bytes=1 << 20,
        live=True,
    )
    there = directory / "own" / "firmware-vars.fd"
    async with background() as tasks, emulators_in(directory) as emulators:
        desk = ItemDesk(tasks, lambda _caller, _migration: delivery)

        class Direct:
            async def put_item(self, migration: str, item: str, offset: int, data: bytes) -> ItemStanding:
                return await desk.put(Caller(role="peer", peer="a"), migration, item, offset, data)

            async def item(self, migration: str, item: str) -> ItemStanding:
                return await desk.item(Caller(role="peer", peer="a"), migration, item)

        sender = VariablesSender(Direct(), delivery.migration, str(here))
        await desk.prepare(delivery, ["/"])
        source, destination = await launched(emulators, here), await launched(emulators, there, "-incoming", "defer")
        async with source.session() as first, destination.session() as second:
            assert await sender.send() == 1
            assert there.read_bytes() == TEMPLATE.read_bytes()
            await first.execute("cont")
            await written(here, b"")
            if not runs:
                await first.execute("stop")
            await migrated(first, second, directory / "migration")
            final = here.read_bytes()
            assert there.read_bytes() != final
            assert await sender.send() == 1
            assert there.read_bytes() == final
            if runs:
                await second.execute("cont")
            await second.execute("quit")
            async with asyncio.timeout(PATIENCE_S):
                await destination.process.wait()
            if runs:
                assert there.stat().st_size == len(final)
                assert there.read_bytes() != TEMPLATE.read_bytes()
            else:
                assert there.read_bytes() == final
        await desk.place(delivery)
