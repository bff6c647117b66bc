"""A machine's TPM moves along: with the guest's state where it runs, as a file where it does not; and it stays where QEMU is replaced."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from pathlib import Path

import pytest

from qmpd import tpm
from qmpd.failpoint import arm
from qmpd.hostprocess import is_alive
from qmpd.lifecycle import State
from qmpd.migrationviews import MigrateRequest, UpgradeRequest
from qmpd.process import Identity
from qmpd.record import read_record
from qmpd.service import Service
from qmpd.settings import Settings
from qmpd.spec import MachineSpec, Tpm
from qmpd.views import StartRequest
from tests.golden.worlds import CATALOGUE
from tests.guests.build import Guest
from tests.guests.tpmtrace import LINE, MEASURED, WORKS, Said, said, tpms_below
from tests.machines import copy_of, spec_of
from tests.migration.test_moves import ended, known, moved, pair, printed
from tests.migration.test_moving_logs import gone
from tests.migration.test_succession import ended as replaced
from tests.migration.test_succession import killed_at, upgraded
from tests.newer_qemu import GUESTS, skip_where_it_differs
from tests.unavailable import tool

pytestmark = pytest.mark.qemu

NAME = "one"
HUNG_S = 60.0
LOOK_S = 0.02


@pytest.fixture
def machine(guests: dict[str, Guest]) -> MachineSpec:
    """A machine whose guest reads its TPM again and again."""
    tool("swtpm", "swtpm")
    return spec_of(guests["x86_64-q35-tpm"], NAME, tpm=Tpm())


def state_of(directory: Path, host: str) -> Path:
    return directory / host / "s/machines" / NAME / "tpm"


def swtpm_of(run_dir: str) -> Identity:
    found = read_record(f"{run_dir}/m/{NAME}").tpm
    assert found is not None
    return found


async def test_a_tpm_goes_on_where_its_guest_goes_on(short_directory: Path, machine: MachineSpec) -> None:
    async with pair(short_directory) as (a, b):
        await a.service.create(machine, start=True)
        first = await said(a.service, NAME)
        await moved(a, NAME, "b")
        second = await said(b.service, NAME)
        assert (second.code, second.register) == (WORKS, MEASURED)
        assert second == first
        assert not state_of(short_directory, "a").exists()
        await b.service.stop(NAME)
        await b.service.start(NAME, StartRequest())
        third = await said(b.service, NAME)
        assert (third.code, third.register) == (WORKS, MEASURED)
        assert third.resets > first.resets
        await moved(b, NAME, "a")
        assert await said(a.service, NAME) == third
        await a.service.kill(NAME)


async def test_an_answer_that_is_late_is_not_lost_on_the_way(short_directory: Path, machine: MachineSpec) -> None:
    """The guest is halted while its TPM has a command: QEMU sends the buffer for the answer with the memory, and must have it by then."""
    async with pair(short_directory) as (a, b):
        await a.service.create(machine, start=True)
        first = await said(a.service, NAME)
        swtpm = swtpm_of(str(short_directory / "a" / "r")).pid
        os.kill(swtpm, signal.SIGSTOP)
        try:
            job = await a.service.migration.migrate(NAME, MigrateRequest(peer="b"))
            async with asyncio.timeout(HUNG_S):
                while a.service.machine(NAME).status in {"running", None}:
                    await asyncio.sleep(LOOK_S)
        finally:
            os.kill(swtpm, signal.SIGCONT)
        assert (await ended(a, job)).state == "succeeded"
        for _ in range(5):
            assert await said(b.service, NAME) == first
        output = b"".join(path.read_bytes() for path in sorted((state_of(short_directory, "b").parent).glob("serial0.log*")))
        answers = {Said(found[1], found[2], int(found[3], 16)) for found in re.finditer(LINE, output.decode("ascii", "replace"))}
        assert answers == {first}
        await b.service.kill(NAME)


async def test_a_tpm_of_a_machine_at_rest_moves_as_a_file(short_directory: Path, machine: MachineSpec) -> None:
    async with pair(short_directory) as (a, b):
        await a.service.create(machine)
        await moved(a, NAME, "b")  # there is no state yet
        await b.service.start(NAME, StartRequest())
        first = await said(b.service, NAME)
        await b.service.stop(NAME)
        kept = (state_of(short_directory, "b") / "tpm2-00.permall").read_bytes()
        await moved(b, NAME, "a")
        assert known(b, NAME) is None
        assert (state_of(short_directory, "a") / "tpm2-00.permall").read_bytes() == kept
        assert not state_of(short_directory, "b").exists()
        await a.service.start(NAME, StartRequest())
        second = await said(a.service, NAME)
        assert (second.code, second.register) == (WORKS, MEASURED)
        assert second.resets > first.resets
        await a.service.kill(NAME)


async def test_a_migration_that_fails_leaves_the_guest_with_its_tpm(short_directory: Path, machine: MachineSpec) -> None:
    async with pair(short_directory) as (a, b):
        await a.service.create(machine, start=True)
        first = await said(a.service, NAME)
        try:
            arm("ownership-give:error")
            job = await ended(a, await a.service.migration.migrate(NAME, MigrateRequest(peer="b")))
        finally:
            arm("")
        assert job.state == "failed", job
        assert await said(a.service, NAME) == first
        await gone(b, NAME)
        assert not state_of(short_directory, "b").exists()
        await a.service.kill(NAME)


@pytest.mark.parametrize("runs", [True, False], ids=["runs", "at rest"])
async def test_a_host_without_swtpm_is_no_place_for_it(
    short_directory: Path, machine: MachineSpec, monkeypatch: pytest.MonkeyPatch, runs: bool
) -> None:
    async with pair(short_directory) as (a, b):
        await a.service.create(machine, start=runs)
        monkeypatch.setattr(tpm, "ENVIRONMENT", {"PATH": "/nowhere"})
        job = await ended(a, await a.service.migration.migrate(NAME, MigrateRequest(peer="b", dry_run=True)))
        assert "package swtpm" in str(job.result)
        job = await ended(a, await a.service.migration.migrate(NAME, MigrateRequest(peer="b")))
        assert job.state == "failed"
        assert "swtpm" in str(job.error)
        assert known(b, NAME) is None
        if runs:
            await a.service.kill(NAME)


async def test_a_dry_run_tries_it_with_a_tpm_and_leaves_none(short_directory: Path, machine: MachineSpec) -> None:
    async with pair(short_directory) as (a, b):
        await a.service.create(machine, start=True)
        first = await said(a.service, NAME)
        job = await ended(a, await a.service.migration.migrate(NAME, MigrateRequest(peer="b", dry_run=True)))
        assert job.state == "succeeded", job.error
        assert job.result is not None
        assert job.result["possible"] is True, job.result
        assert known(b, NAME) is None
        assert await said(a.service, NAME) == first
        await a.service.kill(NAME)


async def test_a_tpm_stays_when_another_qemu_takes_the_place(service: Service, settings: Settings, machine: MachineSpec) -> None:
    await service.create(machine, start=True)
    first, before = await said(service, NAME), swtpm_of(settings.run_dir)
    for _ in range(2):
        await upgraded(service)
        assert await said(service, NAME) == first
        now = swtpm_of(settings.run_dir)
        assert now != before
        assert not is_alive(before)
        before = now
    state = Path(settings.state_dir) / "machines" / NAME
    assert [path.name for path in state.glob("tpm*") if path.is_dir()] == ["tpm"]
    assert "machine.tpm-lost" not in {event.kind for event in (await service.events_page(0, 1000, NAME)).events}
    os.kill(before.pid, signal.SIGKILL)
    async with asyncio.timeout(HUNG_S):
        while "machine.tpm-lost" not in {event.kind for event in (await service.events_page(0, 1000, NAME)).events}:
            await asyncio.sleep(0.02)
    await service.stop(NAME)
    await service.start(NAME, StartRequest())
    second = await said(service, NAME)
    assert (second.code, second.register) == (WORKS, MEASURED)
    assert second.resets > first.resets
    assert service.machine(NAME).state is State.RUNNING


async def test_a_replacement_that_fails_leaves_the_guest_with_its_tpm(service: Service, settings: Settings, machine: MachineSpec) -> None:
    await service.create(machine, start=True)
    first, before = await said(service, NAME), swtpm_of(settings.run_dir)
    try:
        arm("succession-commit:error")
        job = await replaced(service, await service.successions.upgrade(NAME, UpgradeRequest()))
    finally:
        arm("")
    assert job.state == "failed"
    assert await said(service, NAME) == first
    assert swtpm_of(settings.run_dir) == before
    assert not (Path(settings.state_dir) / "machines" / NAME / "tpm-next").exists()


@pytest.mark.parametrize(
    ("failpoint", "stays"),
    [
        ("gate-spawn:kill@3", True),
        ("gate-spawn:kill@4", True),
        ("record-named:kill@2", True),
        ("tpm-go:kill@2", True),
        ("gate-gone:kill@2", True),
        ("succession-commit:kill", True),
        ("record-named:kill@3", False),
        ("succession-committed:kill", False),
        ("succession-log:kill", False),
        ("succession-cont:kill", False),
        ("succession-settle:kill", False),
    ],
)
async def test_a_daemon_that_is_killed_while_it_replaces_a_qemu_leaves_one_tpm(machine: MachineSpec, failpoint: str, stays: bool) -> None:
    async with killed_at(machine, MEASURED, failpoint) as (daemon, client, pid):
        async with asyncio.timeout(HUNG_S):
            while (view := await client.machine(NAME)).state is not State.RUNNING or view.operation is not None:
                await asyncio.sleep(LOOK_S)
        assert (view.pid == pid) is stays
        first, swtpm = await said(client, NAME), swtpm_of(str(daemon.run_dir))
        assert (first.code, first.register) == (WORKS, MEASURED)
        state = daemon.state_dir / "machines" / NAME
        assert await asyncio.to_thread(tpms_below, state) == [swtpm.pid]
        assert [path.name for path in state.glob("tpm*") if path.is_dir()] == ["tpm"]
        await client.stop(NAME)
        await client.start(NAME)
        second = await said(client, NAME)
        assert (second.code, second.register) == (WORKS, MEASURED)
        assert second.resets > first.resets
        await client.kill(NAME)
        assert await asyncio.to_thread(tpms_below, state) == []


@pytest.mark.parametrize("board", ["x86_64-pc", "aarch64-virt", "arm-virt", "riscv64-virt", "ppc64-pseries"])
async def test_a_tpm_of_every_kind_moves(short_directory: Path, guests: dict[str, Guest], board: str) -> None:
    """The guests do not use it: what is proven is that QEMU sends and takes it."""
    tool("swtpm", "swtpm")
    skip_where_it_differs(board, GUESTS)
    guest = guests[board]
    guest = copy_of(guest, short_directory) if guest.how == "disk" else guest
    async with pair(short_directory) as (a, b):
        for model in CATALOGUE.get(board).board.tpms:
            name = f"has-{model}"
            await a.service.create(spec_of(guest, name, tpm=Tpm(model=model)), start=True)
            await printed(a, name, 100)
            await moved(a, name, "b")
            await printed(b, name, 100)
            assert b.service.machine(name).state is State.RUNNING
            await b.service.kill(name)
            await b.service.delete(name, None)
