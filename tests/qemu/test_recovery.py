"""What can be done with a machine whose QEMU lives and cannot be reached, and what is never done to it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import msgspec
import pytest

from qmpd.daemon import running
from qmpd.errors import Held, Invalid, MonitorUnavailable, NotFound, NotProven, QemuSilent, WrongState
from qmpd.hostprocess import process
from qmpd.lifecycle import State
from qmpd.processviews import ForgetRequest, TroubleView
from qmpd.record import read_record, write_record
from qmpd.runlock import taken
from qmpd.service import Service
from qmpd.settings import Settings
from qmpd.spec import MachineSpec
from tests.guests.build import Guest
from tests.machines import spec_of
from tests.qemu.byhand import LOOK_S, PATIENCE_S, listening, started, there

pytestmark = pytest.mark.qemu

#: Listens like a monitor would, in a process that is none.
#: It has its path only when it listens.
LISTENER = (
    "import os, socket, sys; path = sys.argv[1]; s = socket.socket(socket.AF_UNIX); s.bind(path + '.new'); s.listen(); "
    "os.rename(path + '.new', path); sys.stdin.read()"
)
#: Holds what it inherited.
HOLDER = "import sys; sys.stdin.read()"


def quiet(guests: dict[str, Guest], **changes: object) -> MachineSpec:
    return spec_of(guests["x86_64-q35-quiet"], "one", **changes)


def socket_of(settings: Settings) -> Path:
    return Path(settings.run_dir) / "m" / "one" / "qmp.sock"


async def left_alone(settings: Settings, guests: dict[str, Guest]) -> int:
    """The pid of a machine whose daemon has ended."""
    async with running(settings, {}) as service:
        view = await service.create(quiet(guests), start=True)
        assert view.pid is not None
        return view.pid


@asynccontextmanager
async def unreachable(settings: Settings, guests: dict[str, Guest]) -> AsyncIterator[tuple[Service, int]]:
    """A daemon whose machine lost its whole run directory."""
    pid = await left_alone(settings, guests)
    shutil.rmtree(settings.run_dir)
    try:
        async with running(settings, {}) as service:
            assert service.machine("one").state is State.UNREACHABLE
            yield service, pid
    finally:
        end(pid)


async def troubled(service: Service) -> TroubleView:
    """What is the matter with the machine, once that was found out: the daemon answers before it has asked every QEMU."""
    async with asyncio.timeout(PATIENCE_S):
        while (found := service.machine("one").trouble) is None:
            await asyncio.sleep(LOOK_S)
    return found


def end(pid: int) -> None:
    found = process(pid)
    if found is not None and found.is_qemu:
        os.kill(pid, signal.SIGKILL)


@contextmanager
def python(program: str, *arguments: str, **options: object) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", program, *arguments], stdin=subprocess.PIPE, **options) as made:  # type: ignore[call-overload]
        yield made


async def test_an_unreachable_machine_says_what_was_tried_and_since_when(settings: Settings, guests: dict[str, Guest]) -> None:
    async with unreachable(settings, guests) as (service, _):
        first = await troubled(service)
        assert str(socket_of(settings)) in first.reason
        with pytest.raises(MonitorUnavailable, match="no monitor at"):
            await service.rescue.reattach("one")
        later = service.machine("one").trouble
        assert later is not None
        assert (later.since, later.attempts > first.attempts) == (first.since, True)
        page = await service.events_page(0, 1000, "one")
        assert [event.data["reason"] for event in page.events if event.kind == "machine.trouble"] == [first.reason]


async def test_power_off_needs_no_monitor(settings: Settings, guests: dict[str, Guest]) -> None:
    async with unreachable(settings, guests) as (service, _):
        ended = await service.rescue.power_off("one")
        assert (ended.method, ended.machine.state) == ("sigterm", State.STOPPED)
        assert (await service.rescue.power_off("one")).method == "already-stopped"


async def test_kill_needs_no_monitor(settings: Settings, guests: dict[str, Guest]) -> None:
    async with unreachable(settings, guests) as (service, _):
        ended = await service.kill("one")
        assert (ended.method, ended.machine.state) == ("sigkill", State.STOPPED)


async def test_a_monitor_that_comes_back_is_attached_again(settings: Settings, guests: dict[str, Guest]) -> None:
    pid = await left_alone(settings, guests)
    path = socket_of(settings)
    path.rename(f"{path}.away")
    async with running(settings, {}) as service:
        assert service.machine("one").state is State.UNREACHABLE
        with pytest.raises(MonitorUnavailable, match=r"qmp\.sock"):
            await service.rescue.reattach("one")
        os.rename(f"{path}.away", path)  # noqa: PTH104  not blocking
        with contextlib.suppress(WrongState):  # it is tried every second anyway
            await service.rescue.reattach("one")
        view = service.machine("one")
        assert (view.state, view.pid, view.trouble) == (State.RUNNING, pid, None)
        with pytest.raises(WrongState):
            await service.rescue.reattach("one")
        await service.kill("one")


async def test_a_stranger_at_the_monitor_s_socket_is_not_talked_to(settings: Settings, guests: dict[str, Guest]) -> None:
    await left_alone(settings, guests)
    path = socket_of(settings)
    path.unlink()
    with python(LISTENER, str(path)) as stranger:
        await there(path)
        async with running(settings, {}) as service:
            with pytest.raises(MonitorUnavailable, match=f"belongs to process {stranger.pid}"):
                await service.rescue.reattach("one")
            assert service.machine("one").state is State.UNREACHABLE
            assert (await service.kill("one")).method == "sigkill"
        assert stranger.poll() is None


async def test_a_stopped_qemu_is_unresponsive_until_it_goes_on(settings: Settings, guests: dict[str, Guest]) -> None:
    pid = await left_alone(settings, guests)
    os.kill(pid, signal.SIGSTOP)
    async with running(settings, {}) as service:
        await service.wait("one", frozenset({State.UNRESPONSIVE}), PATIENCE_S)
        with pytest.raises(QemuSilent):
            await service.rescue.reattach("one")
        trouble = service.machine("one").trouble
        assert trouble is not None
        assert "not ready" in trouble.reason
        os.kill(pid, signal.SIGCONT)
        with contextlib.suppress(QemuSilent, WrongState):  # first it turns away those who gave up waiting
            await service.rescue.reattach("one")
        await service.wait("one", frozenset({State.RUNNING}), PATIENCE_S)
        os.kill(pid, signal.SIGSTOP)
        with pytest.raises(QemuSilent, match="only kill is left"):
            await service.rescue.power_off("one")
        assert (await service.kill("one")).machine.state is State.STOPPED


async def test_a_qemu_with_another_uuid_is_never_touched(settings: Settings, guests: dict[str, Guest], tmp_path: Path) -> None:
    end(await left_alone(settings, guests))
    path = tmp_path / "q"
    directory = f"{settings.run_dir}/m/one"
    with started(tmp_path, guests["x86_64-q35-quiet"], "-qmp", f"unix:{path},server=on,wait=off") as stranger:
        await listening(path, stranger)
        found = process(stranger.pid)
        assert found is not None
        record = msgspec.structs.replace(read_record(directory), identity=found.identity, sockets={"qmp": str(path)})
        write_record(directory, record)
        async with running(settings, {}) as service:
            assert "another QEMU: it says that its UUID is 00000000-" in (await troubled(service)).reason
            assert service.machine("one").state is State.UNREACHABLE
            for verb in (service.kill, service.rescue.power_off, service.stop, service.rescue.reattach):
                with pytest.raises(NotProven):
                    await verb("one")
            assert service.machine("one").state is State.UNREACHABLE
            await service.rescue.forget("one", ForgetRequest(confirm="one"))
        assert stranger.poll() is None


async def test_a_lock_that_a_stranger_holds_is_named_and_respected(settings: Settings, guests: dict[str, Guest]) -> None:
    async with running(settings, {}) as service:
        await service.create(quiet(guests))
    with taken(str(Path(settings.state_dir) / "machines" / "one")) as lock:
        holder = python(HOLDER, pass_fds=[lock])
        stranger = holder.__enter__()
    try:
        async with running(settings, {}) as service:
            with pytest.raises(MonitorUnavailable, match=f"held by process {stranger.pid}"):
                await service.rescue.reattach("one")
            with pytest.raises(MonitorUnavailable):
                await service.kill("one")
            assert stranger.poll() is None
            assert [view.machine for view in await service.rescue.processes() if view.pid == stranger.pid] == []
            stranger.kill()
            stranger.wait()
            assert (await service.rescue.reattach("one")).state is State.CRASHED
    finally:
        holder.__exit__(None, None, None)


async def test_a_forgotten_machine_lives_on_and_nobody_takes_its_place(settings: Settings, guests: dict[str, Guest]) -> None:
    async with unreachable(settings, guests) as (service, pid):
        kept = Path(settings.state_dir) / "machines" / "one"
        before = {path.name for path in kept.iterdir()}
        with pytest.raises(Invalid):
            await service.rescue.forget("one", ForgetRequest(confirm="two"))
        await service.rescue.forget("one", ForgetRequest(confirm="one"))
        with pytest.raises(NotFound):
            service.machine("one")
        assert process(pid) is not None
        assert {path.name for path in kept.iterdir()} == before | {"forgotten.json"}
        with pytest.raises(Held, match="forgotten"):
            await service.create(quiet(guests))
        page = await service.events_page(0, 1000, "one")
        assert [event.data["pid"] for event in page.events if event.kind == "machine.forgotten"] == [pid]
    async with running(settings, {}) as service:
        with pytest.raises(NotFound):
            service.machine("one")


async def test_a_forgotten_machine_stays_forgotten_by_the_next_daemon(settings: Settings, guests: dict[str, Guest]) -> None:
    pid = await left_alone(settings, guests)
    path = socket_of(settings)
    path.unlink()
    record = read_record(str(path.parent))
    try:
        async with running(settings, {}) as service:
            await service.rescue.forget("one", ForgetRequest(confirm="one"))
        write_record(str(path.parent), record)  # a daemon may be killed before the record is gone
        async with running(settings, {}) as service:
            with pytest.raises(NotFound):
                service.machine("one")
        assert process(pid) is not None
    finally:
        end(pid)


async def test_a_machine_that_answers_or_has_ended_is_not_forgotten(service: Service, guests: dict[str, Guest]) -> None:
    await service.create(quiet(guests), start=True)
    for verb in (service.kill("one"), None):
        with pytest.raises(WrongState):
            await service.rescue.forget("one", ForgetRequest(confirm="one"))
        if verb is not None:
            await verb
    assert service.machine("one").state is State.STOPPED


async def test_the_processes_of_the_host_are_listed_by_whose_they_are(service: Service, guests: dict[str, Guest], tmp_path: Path) -> None:
    ours = await service.create(quiet(guests), start=True)
    path = tmp_path / "q"
    word = "secret,id=s,data=hunter2"
    with started(tmp_path, guests["x86_64-q35-quiet"], "-qmp", f"unix:{path},server=on,wait=off", "-object", word) as stranger:
        await listening(path, stranger)
        found = {view.pid: view for view in await service.rescue.processes()}
        assert ours.pid is not None
        assert (found[ours.pid].kind, found[ours.pid].machine) == ("machine", "one")
        theirs = found[stranger.pid]
        assert (theirs.kind, theirs.machine, theirs.qmp) == ("foreign", None, (str(path),))
        assert "secret,id=s,data=***" in theirs.command
        assert not any("hunter2" in word for word in theirs.command)
        assert found.keys() >= {ours.pid, stranger.pid}


async def test_a_process_belongs_to_the_daemon_that_looks_after_it(settings: Settings, guests: dict[str, Guest]) -> None:
    async with unreachable(settings, guests) as (service, pid):
        other = msgspec.structs.replace(settings, state_dir=f"{settings.state_dir}2", run_dir=f"{settings.run_dir}3")
        async with running(other, {}) as stranger:
            assert {view.pid: view.kind for view in await stranger.rescue.processes()}[pid] == "foreign"
        assert {view.pid: (view.kind, view.machine) for view in await service.rescue.processes()}[pid] == ("machine", "one")
