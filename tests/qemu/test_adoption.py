"""A QEMU that somebody started by hand is taken over: asked what it is, looked after, and kept over restarts of the daemon."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from pathlib import Path

import msgspec
import pytest

from qmpd.access import Caller
from qmpd.daemon import running
from qmpd.errors import AlreadyExists, Held, Invalid, NotAdoptable, NotFound, QemuDied, QemuSilent, WrongState
from qmpd.lifecycle import State
from qmpd.plan import BlankImage
from qmpd.processviews import AdoptRequest
from qmpd.service import Service
from qmpd.settings import Settings
from qmpd.spec import ImageDisk, SerialNone, UserNic
from qmpd.storage import make
from qmpd.views import MachineView, QmpRequest, StartRequest
from tests.guests.build import Guest
from tests.machines import spec_of
from tests.newer_qemu import given, skip_with_start_script
from tests.qemu.byhand import PATIENCE_S, client, listening, started, there
from tests.qmp.peer import GREETING, Peer, line

MIB = 1024 * 1024

pytestmark = pytest.mark.qemu

UUID = "0d9d3b6c-35d5-4f49-9d0c-3a2f2b1f6a11"


@pytest.fixture
def guest(guests: dict[str, Guest]) -> Guest:
    return guests["x86_64-q35-quiet"]


@pytest.fixture
def place(short_directory: Path) -> Path:
    """Where the QEMU is that is started by hand."""
    path = short_directory / "h"
    path.mkdir()
    return path


async def test_an_adopted_machine_is_looked_after_like_any_other(service: Service, guest: Guest, place: Path) -> None:
    name = f"q{os.getpid()}"  # the kernel's table has it as it was given, and those of all others as well
    path = place / name
    with started(place, guest, "-qmp", f"unix:{name},server=on,wait=off", "-name", "My Lab", "-uuid", UUID) as hand:
        await listening(Path(name), hand)
        view = await service.rescue.adopt(AdoptRequest(pid=hand.pid))
        assert (view.name, view.state, view.pid, view.uuid) == ("my-lab", State.RUNNING, hand.pid, UUID)
        assert (view.board, view.arch, view.memory_mib, view.accel) == ("x86_64-q35", "x86_64", 64, "tcg")
        assert view.adopted is not None
        assert view.adopted.qmp == str(path)
        assert any("serial0" in line for line in view.adopted.fixed)
        assert (await service.pause("my-lab")).state is State.PAUSED
        assert (await service.resume("my-lab")).state is State.RUNNING
        assert (await service.reset("my-lab")).state is State.RUNNING
        answer = await service.qmp("my-lab", QmpRequest(execute="query-name"), Caller(user="somebody"))
        assert answer.result == {"name": "My Lab"}
        assert {view.pid: view.machine for view in await service.rescue.processes()}[hand.pid] == "my-lab"
        ended = await service.stop("my-lab")
        assert (ended.method, ended.clean, ended.machine.state) == ("quit", True, State.STOPPED)
        assert hand.wait() == 0


async def test_what_it_is_becomes_a_definition(service: Service, guest: Guest, place: Path) -> None:
    path, disk = place / "q", place / "d.qcow2"
    await make((BlankImage(path=str(disk), format="qcow2", size_bytes=MIB),), ())
    argv = [
        "-nodefaults", "-machine", "q35", "-accel", "tcg", "-m", "96", "-smp", "2", "-cpu", "qemu64", "-display", "none",
        "-kernel", str(guest.file), "-append", "one two", "-drive", "file=d.qcow2,format=qcow2,if=none,id=d0",
        "-device", "virtio-blk-pci,drive=d0", "-netdev", "user,id=n0", "-device", "e1000,netdev=n0,mac=52:54:00:AA:00:01",
        "-device", "virtio-rng-pci", "-S", "-qmp", f"unix:{path},server=on,wait=off",
    ]  # fmt: skip
    with started(place, guest, argv=argv) as hand:
        await listening(path, hand)
        view = await service.rescue.adopt(AdoptRequest(qmp=str(path), name="lab"))
        assert (view.state, view.status, view.pid) == (State.PAUSED, "prelaunch", hand.pid)
        assert view.adopted is not None
        assert given(view.adopted.unknown) == set()
        spec = service.definition("lab").spec
        assert (spec.board, spec.memory_mib, spec.cpu.count, spec.cpu.model, spec.rng) == ("x86_64-q35", 96, 2, "qemu64", True)
        assert spec.kernel is not None
        assert (spec.kernel.image, spec.kernel.append, spec.kernel.console) == (str(guest.file), "one two", False)
        assert spec.disks == (ImageDisk(path=str(disk), format="qcow2", bus="virtio"),)
        assert spec.nics == (UserNic(model="e1000", mac="52:54:00:aa:00:01"),)
        assert spec.serial_ports == ()


async def test_an_adopted_machine_survives_the_daemon(settings: Settings, guest: Guest, place: Path) -> None:
    path = place / "q"
    with started(place, guest, "-qmp", f"unix:{path},server=on,wait=off") as hand:
        await listening(path, hand)
        async with running(settings, {}) as service:
            first = await service.rescue.adopt(AdoptRequest(pid=hand.pid, name="lab"))
        async with running(settings, {}) as service:
            view = await service.wait("lab", frozenset({State.RUNNING}), PATIENCE_S)
            assert (view.pid, view.uuid, view.adopted) == (hand.pid, first.uuid, first.adopted)
        shutil.rmtree(settings.run_dir)  # the definition says who it is, too
        async with running(settings, {}) as service:
            assert (await service.wait("lab", frozenset({State.RUNNING}), PATIENCE_S)).pid == hand.pid
            hand.kill()
            view = await service.wait("lab", frozenset({State.CRASHED}), PATIENCE_S)
            assert view.pid is None
        async with running(settings, {}) as service:
            assert service.machine("lab").state is State.STOPPED
            await service.delete("lab", None)


async def test_a_machine_that_is_fully_understood_is_started_again(service: Service, guest: Guest, place: Path) -> None:
    skip_with_start_script()
    path = place / "q"
    with started(place, guest, "-qmp", f"unix:{path},server=on,wait=off") as hand:
        await listening(path, hand)
        view = await service.rescue.adopt(AdoptRequest(pid=hand.pid, name="lab"))
        assert view.adopted is not None
        assert view.adopted.unknown == ()
        await service.stop("lab")
    again = await service.start("lab", StartRequest())
    assert (again.state, again.adopted, again.uuid) == (State.RUNNING, None, view.uuid)
    assert again.pid != hand.pid
    assert service.definition("lab").spec.serial_ports == (SerialNone(),)
    assert (await service.stop("lab")).clean


async def test_a_machine_that_is_not_fully_understood_is_not_started_again(service: Service, guest: Guest, place: Path) -> None:
    path = place / "q"
    odd = ["-rtc", "base=localtime", "-device", "ich9-intel-hda", "-qmp", f"unix:{path},server=on,wait=off"]
    with started(place, guest, *odd) as hand:
        await listening(path, hand)
        view = await service.rescue.adopt(AdoptRequest(pid=hand.pid, name="lab"))
        assert view.adopted is not None
        assert given(view.adopted.unknown) == {"option -rtc base=localtime", "device ich9-intel-hda"}
        unknown = view.adopted.unknown
        await service.kill("lab")
    with pytest.raises(Invalid, match="ich9-intel-hda") as refused:
        await service.start("lab", StartRequest())
    assert len(refused.value.problems) == len(unknown)
    view = service.machine("lab")
    spec = msgspec.structs.replace(service.definition("lab").spec, serial_ports=())
    assert (await service.replace("lab", spec, view.revision)).adopted is None
    assert (await service.start("lab", StartRequest())).state is State.RUNNING


async def test_a_monitor_that_somebody_uses_is_not_taken_from_them(service: Service, guest: Guest, place: Path) -> None:
    path = place / "q"
    with started(place, guest, "-qmp", f"unix:{path},server=on,wait=off") as hand:
        await listening(path, hand)
        with client(path) as other:
            with pytest.raises(Held, match="has a client already"):
                await service.rescue.adopt(AdoptRequest(pid=hand.pid))
            other.sendall(b'{"execute": "qmp_capabilities"}')
            assert other.recv(4096).startswith(b'{"return"')
        with pytest.raises(NotFound):
            service.machine(f"adopted-{hand.pid}")


async def test_a_stopped_process_is_not_adopted_and_the_answer_says_why(service: Service, guest: Guest, place: Path) -> None:
    path = place / "q"
    with started(place, guest, "-qmp", f"unix:{path},server=on,wait=off") as hand:
        await listening(path, hand)
        hand.send_signal(signal.SIGSTOP)
        with pytest.raises(QemuSilent, match="its process is stopped"):
            await service.rescue.adopt(AdoptRequest(pid=hand.pid))


@pytest.mark.parametrize(
    ("monitor", "message"),
    [
        ((), "no QMP monitor"),
        (("-monitor", "unix:q,server=on,wait=off"), "no QMP monitor"),
        (("-qmp", "tcp:127.0.0.1:0,server=on,wait=off"), "needs one on a Unix socket"),
    ],
    ids=["none", "human", "tcp"],
)
async def test_a_qemu_without_a_usable_monitor_is_left_alone(
    service: Service, guest: Guest, place: Path, monitor: tuple[str, ...], message: str
) -> None:
    with started(place, guest, *monitor) as hand:
        await there(place / "serial.txt")  # an emulator may be a script at first
        with pytest.raises(NotAdoptable, match=message):
            await service.rescue.adopt(AdoptRequest(pid=hand.pid))
        assert hand.poll() is None


async def test_a_human_monitor_is_not_qmp(service: Service, guest: Guest, place: Path) -> None:
    path = place / "q"
    with started(place, guest, "-monitor", f"unix:{path},server=on,wait=off") as hand:
        await listening(path, hand)
        with pytest.raises(QemuDied, match="not JSON"):
            await service.rescue.adopt(AdoptRequest(qmp=str(path)))
        assert hand.poll() is None


async def test_a_monitor_that_answers_nonsense_is_said_to(service: Service, place: Path) -> None:
    path = str(place / "q")
    async with Peer.listening(path, greeting=line(GREETING) + line({"error": {"class": "GenericError", "desc": "no"}})):
        with pytest.raises(QemuSilent, match="does not consent to a session"):
            await service.rescue.adopt(AdoptRequest(qmp=path))


async def test_only_a_qemu_that_is_there_is_adopted(service: Service, place: Path) -> None:
    with pytest.raises(NotAdoptable, match="no qemu-system emulator"):
        await service.rescue.adopt(AdoptRequest(pid=os.getpid()))
    gone = await asyncio.create_subprocess_exec("true")
    await gone.wait()
    with pytest.raises(NotFound):
        await service.rescue.adopt(AdoptRequest(pid=gone.pid))
    with pytest.raises(Invalid):
        await service.rescue.adopt(AdoptRequest())


async def test_our_own_machines_and_names_and_uuids_are_not_adopted_twice(service: Service, guest: Guest, place: Path) -> None:
    view = await service.create(spec_of(guest, "one"), start=True)
    assert view.pid is not None
    with pytest.raises(AlreadyExists, match="is machine 'one'"):
        await service.rescue.adopt(AdoptRequest(pid=view.pid))
    path = place / "q"
    with started(place, guest, "-qmp", f"unix:{path},server=on,wait=off", "-uuid", view.uuid) as hand:
        await listening(path, hand)
        for name in ("one", "two"):
            with pytest.raises(AlreadyExists):
                await service.rescue.adopt(AdoptRequest(pid=hand.pid, name=name))
        with pytest.raises(NotFound):
            service.machine("two")
        assert hand.poll() is None


async def test_two_who_adopt_the_same_qemu_get_one_machine(service: Service, guest: Guest, place: Path) -> None:
    path = place / "q"
    with started(place, guest, "-qmp", f"unix:{path},server=on,wait=off") as hand:
        await listening(path, hand)
        asked = [service.rescue.adopt(AdoptRequest(pid=hand.pid, name=name)) for name in ("one", "two")]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        assert sum(isinstance(answer, AlreadyExists) for answer in answers) == 1
        assert sum(isinstance(answer, MachineView) for answer in answers) == 1


async def test_an_adopted_machine_s_definition_is_not_deleted_while_it_lives(service: Service, guest: Guest, place: Path) -> None:
    path = place / "q"
    with started(place, guest, "-qmp", f"unix:{path},server=on,wait=off") as hand:
        await listening(path, hand)
        await service.rescue.adopt(AdoptRequest(pid=hand.pid, name="lab"))
        with pytest.raises(WrongState):
            await service.delete("lab", None)
        with pytest.raises(WrongState):
            await service.start("lab", StartRequest())
        hand.terminate()
        view = await service.wait("lab", frozenset({State.STOPPED}), PATIENCE_S)
        assert view.exit is not None
        assert view.exit.reason == "host-signal"
    await service.delete("lab", None)
    assert guest.file.exists()
