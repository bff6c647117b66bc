"""Definitions are stored entirely or not at all, and files follow them."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from qmpd.daemon import running
from qmpd.database import open_database
from qmpd.errors import AlreadyExists, Held, HostError, Invalid, NoSpace, NotFound, QmpdError, StaleRevision
from qmpd.lifecycle import State
from qmpd.runlock import taken
from qmpd.service import Service
from qmpd.settings import Settings
from qmpd.spec import BlankDisk, DisconnectedNic, PflashFirmware
from qmpd.sqlite import open_store
from qmpd.storage import mark_unfinished
from qmpd.views import StartRequest
from tests.process.emulator import names
from tests.process.standin_qemu import BOARD, toy, toy_settings, toys
from tests.unavailable import need_root, tool

PATIENCE_S = 60.0
UUID = "00000000-1111-4222-8333-444444444444"
RAW, QCOW2 = BlankDisk(size_mib=1, format="raw"), BlankDisk(size_mib=1)


@pytest.fixture
def roomy(settings: Settings, short_directory: Path) -> Settings:
    """Settings with a board that takes disks, NICs and flash."""
    made = toy_settings(settings, short_directory)
    (short_directory / "boards" / "toy.toml").write_text(
        'default_disk = "pci"\ndefault_nic = "net"\n'
        + BOARD
        + '[firmware]\npflash = true\n[disks.pci]\ndevice = "blk"\n[nics.net]\ndevice = "net"\n'
    )
    return made


def state_of(settings: Settings, name: str = "one") -> Path:
    return Path(settings.state_dir) / "machines" / name


def own_directory(settings: Settings) -> Path:
    """The machine's directory, made by somebody before the daemon."""
    Path(settings.state_dir).mkdir(mode=0o700)
    own = state_of(settings)
    own.mkdir(parents=True)
    return own


async def kinds(service: Service) -> list[str]:
    return [event.kind for event in (await service.events_page(0, 1000, None)).events]


async def test_a_definition_is_the_same_for_the_next_daemon(roomy: Settings) -> None:
    async with running(roomy, {}) as service:
        await service.create(toy(disks=(RAW,), nics=(DisconnectedNic(),), labels={"a": "b"}))
        before = service.definition("one")
    async with running(roomy, {}) as service:
        assert service.definition("one") == before
        assert service.machine("one").state is State.STOPPED


async def test_what_is_decided_at_creation_stays(roomy: Settings) -> None:
    async with running(roomy, {}) as service:
        first = await service.create(toy(nics=(DisconnectedNic(), DisconnectedNic()), disks=(RAW,)))
        before = service.definition("one")
        assert before.spec.machine == "board-1.0"
        macs = [nic.mac for nic in before.spec.nics]
        assert len(set(macs)) == 2
        assert None not in macs
        second = await service.replace("one", toy(title="two", nics=(DisconnectedNic(),) * 3, disks=(RAW, QCOW2)), first.revision)
        after = service.definition("one")
        assert (second.uuid, after.created_at, after.spec.title) == (first.uuid, before.created_at, "two")
        assert [nic.mac for nic in after.spec.nics][:2] == macs
        assert {"disk0.raw", "disk1.qcow2"} <= names(state_of(roomy))
        with pytest.raises(Invalid, match=r"\$\.uuid"):
            await service.replace("one", toy(uuid=UUID, disks=(RAW, QCOW2)), second.revision)
        with pytest.raises(Invalid, match=r"\$\.disks\[0\]"):
            await service.replace("one", toy(), second.revision)
        with pytest.raises(StaleRevision):
            await service.delete("one", first.revision)
        assert service.definition("one") == after


async def test_a_replacement_that_is_refused_leaves_no_disk_to_the_next(roomy: Settings) -> None:
    async with running(roomy, {}) as service:
        first = await service.create(toy(disks=(RAW,)))
        with pytest.raises(Invalid, match=r"\$\.uuid"):
            await service.replace("one", toy(uuid=UUID, disks=(RAW, BlankDisk(size_mib=9, format="raw"))), first.revision)
        await service.replace("one", toy(disks=(RAW, BlankDisk(size_mib=5, format="raw"))), first.revision)
        assert (state_of(roomy) / "disk1.raw").stat().st_size == 5 << 20


async def test_a_name_is_given_once(roomy: Settings) -> None:
    async with running(roomy, {}) as service:
        outcomes = await asyncio.gather(*(service.create(toy(disks=(QCOW2,))) for _ in range(4)), return_exceptions=True)
        assert sum(isinstance(outcome, AlreadyExists) for outcome in outcomes) == 3
        assert names(state_of(roomy)) >= {"disk0.qcow2"}
        with pytest.raises(AlreadyExists):
            await service.create(toy())
        assert names(state_of(roomy)) >= {"disk0.qcow2"}


async def test_a_uuid_is_given_once(roomy: Settings) -> None:
    async with running(roomy, {}) as service:
        outcomes = await asyncio.gather(
            *(service.create(toy(name, uuid=UUID, disks=(QCOW2,))) for name in ("one", "two", "three")), return_exceptions=True
        )
        assert sum(isinstance(outcome, AlreadyExists) for outcome in outcomes) == 2
        (view,) = service.machines({}, None).machines
        assert view.uuid == UUID
        with pytest.raises(AlreadyExists, match="has the UUID"):
            await service.create(toy("four", uuid=UUID))
        await service.delete(view.name, None)
        await service.create(toy("four", uuid=UUID))


async def test_a_creation_that_fails_half_way_leaves_nothing(roomy: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(roomy, {}) as service:
        with monkeypatch.context() as nowhere:
            nowhere.setenv("PATH", "/nonexistent")
            with pytest.raises(HostError, match="qemu-img is not installed"):
                await service.create(toy(disks=(RAW, QCOW2)))
        assert not names(state_of(roomy).parent)
        assert service.machines({}, None).machines == ()
        assert (await service.create(toy(disks=(RAW, QCOW2)))).name == "one"
        assert "machine.created" in await kinds(service)


async def test_what_an_unfinished_creation_left_is_not_used(roomy: Settings) -> None:
    own = own_directory(roomy)
    async with running(roomy, {}) as service:
        mark_unfinished(str(own))
        (own / "disk0.raw").write_bytes(b"somebody's secret")
        await service.create(toy(disks=(RAW,)))
        assert (own / "disk0.raw").read_bytes() == bytes(1 << 20)


async def test_the_disks_of_a_lost_definition_are_neither_used_nor_removed(roomy: Settings) -> None:
    own = own_directory(roomy)
    (own / "disk0.raw").write_bytes(b"data")
    async with running(roomy, {}) as service:
        with pytest.raises(AlreadyExists, match="move them away first"):
            await service.create(toy(disks=(RAW,)))
        assert service.machines({}, None).machines == ()
    assert (own / "disk0.raw").read_bytes() == b"data"


async def test_files_that_a_living_qemu_uses_are_never_removed(roomy: Settings) -> None:
    own = own_directory(roomy)
    (own / "disk0.raw").write_bytes(b"data")
    with taken(str(own)):
        async with running(roomy, {}) as service:
            with pytest.raises(Held):
                await service.create(toy(disks=(RAW,)))
            assert (own / "disk0.raw").read_bytes() == b"data"
            assert service.machines({}, None).machines == ()


async def test_a_creation_that_is_cancelled_at_any_moment_happened_or_did_not(roomy: Settings) -> None:
    happened = set()
    async with running(roomy, {}) as service:
        for turns in [*range(0, 30, 3), *range(30, 400, 40)]:
            creating = asyncio.create_task(service.create(toy(disks=(RAW,), uuid=UUID)), name="creating")
            for _ in range(turns):
                await asyncio.sleep(0)
            creating.cancel()
            await asyncio.wait([creating], timeout=PATIENCE_S)
            exists = bool(service.machines({}, None).machines)
            happened.add(exists)
            if not exists:
                await service.create(toy(disks=(RAW,), uuid=UUID))
            await service.delete("one", None)
            assert not state_of(roomy).exists()
    assert False in happened


async def test_a_deletion_that_is_cancelled_at_any_moment_happened_or_did_not(roomy: Settings) -> None:
    async with running(roomy, {}) as service:
        for turns in range(0, 40, 4):
            await service.create(toy(disks=(RAW,)))
            deleting = asyncio.create_task(service.delete("one", None), name="deleting")
            for _ in range(turns):
                await asyncio.sleep(0)
            deleting.cancel()
            await asyncio.wait([deleting], timeout=PATIENCE_S)
            if service.machines({}, None).machines:
                assert (state_of(roomy) / "disk0.raw").exists()
                await service.delete("one", None)
            assert not state_of(roomy).exists()
        await service.bus.publish("test", "one", {})
        told = await kinds(service)
        assert told.count("machine.deleted") == told.count("machine.created") == 10


async def test_a_deletion_that_cannot_remove_all_files_says_so(roomy: Settings) -> None:
    need_root("make a file that cannot be removed")
    tool("chattr", "e2fsprogs")
    async with running(roomy, {}) as service:
        await service.create(toy(disks=(RAW,)))
        stuck = state_of(roomy) / "disk0.raw"
        done = await asyncio.to_thread(subprocess.run, ["chattr", "+i", str(stuck)])
        if done.returncode != 0:
            pytest.skip("needs a file system with immutable files")
        try:
            with pytest.raises(HostError, match="is deleted, but not all its files"):
                await service.delete("one", None)
            with pytest.raises(NotFound):
                service.machine("one")
        finally:
            await asyncio.to_thread(subprocess.run, ["chattr", "-i", str(stuck)], check=True)
        await service.create(toy(disks=(RAW,)))


async def test_a_damaged_definition_is_left_alone_and_the_others_work(roomy: Settings) -> None:
    async with running(roomy, {}) as service:
        for name in ("one", "two"):
            await service.create(toy(name, disks=(RAW,)))
    async with open_database(Path(roomy.state_dir)) as database, open_store(database) as store:
        revision = await store.commit({}, {"machine/one": b"\xc1 damaged"})
    async with running(roomy, {}) as service:
        assert [view.name for view in service.machines({}, None).machines] == ["two"]
        assert (await service.start("two", StartRequest())).state is State.RUNNING
        await service.kill("two")
        with pytest.raises(AlreadyExists, match="whose definition cannot be read"):
            await service.create(toy(disks=(QCOW2,)))
        for verb in (service.start("one", StartRequest()), service.delete("one", None)):
            with pytest.raises(NotFound):
                await verb
        assert names(state_of(roomy)) == {"disk0.raw"}
    async with open_database(Path(roomy.state_dir)) as database, open_store(database) as store:
        record = (await store.read("machine/one")).records["machine/one"]
        assert (record.value, record.revision) == (b"\xc1 damaged", revision)


async def test_what_somebody_else_wrote_meanwhile_is_not_overwritten(roomy: Settings) -> None:
    async with running(roomy, {}) as service:
        first = await service.create(toy(disks=(RAW,)))
        store = service._registry._store
        revision = await store.commit({}, {"machine/one": b"theirs", "machine/two": b"theirs"})
        with pytest.raises(StaleRevision, match="was changed meanwhile") as stale:
            await service.replace("one", toy(title="mine", disks=(RAW,)), first.revision)
        assert stale.value.details["revision"] == revision
        with pytest.raises(StaleRevision, match="was changed meanwhile"):
            await service.delete("one", None)
        with pytest.raises(AlreadyExists):
            await service.create(toy("two"))
        assert {record.value for record in (await store.read("machine/")).records.values()} == {b"theirs"}
        assert (state_of(roomy) / "disk0.raw").exists()


async def test_a_machine_whose_board_is_gone_is_shown_and_cannot_start(roomy: Settings) -> None:
    async with running(roomy, {}) as service:
        await service.create(toy())
    async with running(msgspec.structs.replace(roomy, boards=()), {}) as service:
        view = service.machine("one")
        assert (view.arch, view.machine, view.cpus, view.memory_mib, view.console_bytes) == ("unknown", "board-1.0", 1, 0, 0)
        with pytest.raises(Invalid, match=r"\$\.board"):
            await service.start("one", StartRequest())
        with pytest.raises(NotFound):
            service.console("one", None)
        assert await service.upkeep.metrics()
        await service.delete("one", None)


async def test_machines_that_shall_start_with_the_daemon_do(roomy: Settings) -> None:
    async with running(roomy, {}) as service:
        for name in ("one", "two"):
            await service.create(toy(name, autostart=name == "one"))
        assert service.machine("one").state is State.STOPPED
    async with running(roomy, {}) as service:
        view = await service.wait("one", frozenset({State.RUNNING}), PATIENCE_S)
        assert service.machine("two").state is State.STOPPED
    async with running(roomy, {}) as service:
        again = await service.wait("one", frozenset({State.RUNNING}), PATIENCE_S)
        assert again.pid == view.pid
        assert service.version().machines_running == 1
        await service.kill("one")


async def test_a_machine_that_cannot_start_with_the_daemon_is_told_in_the_log(roomy: Settings, caplog: pytest.LogCaptureFixture) -> None:
    async with running(roomy, {}) as service:
        await service.create(toy(autostart=True))
    async with running(msgspec.structs.replace(roomy, boards=()), {}):
        async with asyncio.timeout(PATIENCE_S):
            while "machine was not started" not in caplog.text:
                await asyncio.sleep(0.01)


async def test_a_start_whose_caller_goes_away_at_any_moment_goes_on_or_never_began(settings: Settings, short_directory: Path) -> None:
    async with toys(settings, short_directory) as service:
        await service.create(toy())
        for turns in [*range(0, 40, 4), *range(40, 2000, 250)]:
            starting = asyncio.create_task(service.start("one", StartRequest()), name="starting")
            for _ in range(turns):
                await asyncio.sleep(0)
            starting.cancel()
            await asyncio.wait([starting], timeout=PATIENCE_S)
            view = await service.wait("one", frozenset({State.RUNNING, State.STOPPED}), PATIENCE_S)
            assert view.operation is None
            if view.state is State.RUNNING:
                assert (await service.stop("one")).method == "quit"


async def test_uefi_variables_are_copied_once_and_lost_ones_are_not_made_up(roomy: Settings, short_directory: Path) -> None:
    template = short_directory / "VARS.fd"
    template.write_bytes(b"variables")
    firmware = PflashFirmware(code=str(template), vars=str(template))
    async with running(roomy, {}) as service:
        await service.create(toy(firmware=firmware))
        own = state_of(roomy) / "firmware-vars.fd"
        own.write_bytes(b"changed")
        await service.start("one", StartRequest())
        await service.kill("one")
        assert own.read_bytes() == b"changed"
        own.unlink()
        with pytest.raises(HostError, match="is gone: restore it"):
            await service.start("one", StartRequest())
        assert service.machine("one").state is State.STOPPED


@pytest.fixture
def small_disk(short_directory: Path) -> Iterator[Path]:
    """A file system of its own."""
    need_root("mount a small file system")
    path = short_directory / "small"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(path)], check=True, timeout=PATIENCE_S)
    yield path
    subprocess.run(["umount", str(path)], check=True, timeout=PATIENCE_S)


def fill(disk: Path) -> Path:
    """Leaves no byte of it; the file to remove."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        for piece in (65536, 4096, 1):
            try:
                while True:
                    file.write(bytes(piece))
            except OSError:
                continue
    return ballast


async def test_a_full_disk_refuses_what_needs_it_and_everything_works_again_with_space(roomy: Settings, small_disk: Path) -> None:
    on_it = msgspec.structs.replace(roomy, state_dir=f"{small_disk}/s", run_dir=f"{small_disk}/r")
    async with running(on_it, {}) as service:
        await service.create(toy())
        ballast = await asyncio.to_thread(fill, small_disk)
        with pytest.raises(NoSpace):
            await service.start("one", StartRequest())
        assert service.machine("one").state is State.STOPPED
        with pytest.raises(QmpdError) as refused:
            await service.create(toy("two", disks=(QCOW2,)))
        assert refused.value.code == "no_space"
        assert "two" not in names(state_of(on_it).parent)
        ballast.unlink()
        assert (await service.start("one", StartRequest())).state is State.RUNNING
        await service.create(toy("two", disks=(QCOW2,)))
        await service.kill("one")
