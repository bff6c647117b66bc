"""The crash matrix sees what is wrong with a disk upon a base, or with a TPM, and finds nothing where nothing is."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from qmpd.record import read_record
from qmpd.spec import ImageDisk
from scripts.lib.migrations import BAGGAGE, main
from tests.guests.build import Guest
from tests.migration.baggage import Baggage, Ending, UponBase, WithTpm
from tests.migration.crashes import removed
from tests.migration.hosts import Hosts, hosts
from tests.migration.network import NoNetworks
from tests.migration.overlays import RING, qemu_io
from tests.migration.traveller import Traveller
from tests.unavailable import tool, unavailable

pytestmark = pytest.mark.qemu

LIMIT_S = 600


@pytest.fixture
async def world() -> AsyncIterator[Hosts]:
    try:
        async with hosts() as made:
            await made.start()
            yield made
    except NoNetworks as reason:
        unavailable(reason)


async def begun(world: Hosts, baggage: Baggage) -> Traveller:
    machine = Traveller(world, baggage.spec, copied=baggage.copied)
    await machine.begin(world[0])
    await baggage.begun(machine, world[0])
    return machine


async def killed(world: Hosts, machine: Traveller) -> None:
    async with world[0].client() as client:
        await client.kill(machine.name)


async def nothing(_image: Path, _base: Path) -> None:
    """Leaves it as it is."""


async def elsewhere(image: Path, _base: Path) -> None:
    await qemu_io(image, "write -P 9 20M 64k")


async def ring_lost(image: Path, _base: Path) -> None:
    await qemu_io(image, f"write -z {RING.start} {RING.stop - RING.start}")


async def of_base(_image: Path, base: Path) -> None:
    with base.open("r+b") as file:
        file.seek(23 * 1024 * 1024)
        file.write(b"somebody was here")


async def shines_through(image: Path, _base: Path) -> None:
    await qemu_io(image, "write -z 14M 64k")


@pytest.mark.timeout(LIMIT_S)
async def test_a_disk_that_is_not_what_it_was_is_seen(world: Hosts, guests: dict[str, Guest]) -> None:
    wrong: list[tuple[Callable[[Path, Path], Awaitable[None]], list[str]]] = [
        (nothing, []),
        (elsewhere, ["what the guest does not write to"]),
        (shines_through, ["what the guest does not write to"]),
        (ring_lost, ["is not on the disk", "is the newest there is"]),
        (of_base, ["a base was changed", "what the guest does not write to"]),
    ]
    for number, (harm, words) in enumerate(wrong):
        baggage = await UponBase.packed(world, guests["x86_64-pc-blocks"], f"m{number}")
        machine = await begun(world, baggage)
        await killed(world, machine)
        (disk,) = baggage.spec.disks
        assert isinstance(disk, ImageDisk)
        assert disk.base is not None
        await harm(Path(disk.path), Path([layer.path for layer in disk.base.layers()][-1]))
        found = await baggage.lost(Ending(machine=machine, host=world[0], runs=False))
        assert bool(found) is bool(words), found
        assert all(any(word in each for each in found) for word in words), found
        await removed(machine)


@pytest.mark.timeout(LIMIT_S)
async def test_a_tpm_that_is_not_what_it_was_is_seen(world: Hosts, guests: dict[str, Guest]) -> None:
    tool("swtpm", "swtpm")
    fine, without, other = [await WithTpm.packed(world, guests["x86_64-q35-tpm"], name) for name in ("fine", "without", "other")]
    assert await fine.lost(Ending(machine=await begun(world, fine), host=world[0], runs=True)) == []
    machine = await begun(world, without)
    swtpm = read_record(str(world[0].running_dir(machine.name))).tpm
    assert swtpm is not None
    os.kill(swtpm.pid, signal.SIGKILL)
    await machine.grown(world[0], 200)
    found = await without.lost(Ending(machine=machine, host=world[0], runs=True))
    assert any("TPMs at host0" in each for each in found), found
    assert any("its TPM said" in each for each in found), found
    machine = await begun(world, other)
    await killed(world, machine)
    for path in await asyncio.to_thread(lambda: list((world[0].own(machine.name) / "tpm").iterdir())):
        path.unlink()
    found = await other.lost(Ending(machine=machine, host=world[0], runs=False))
    assert any("another one" in each for each in found), found


def test_a_matrix_is_of_one_kind_of_machine(capsys: pytest.CaptureFixture[str]) -> None:
    for kind in BAGGAGE:
        with pytest.raises(SystemExit):
            main(["matrix", "--with", kind, "--at-rest"])
        assert "not allowed with" in capsys.readouterr().err
