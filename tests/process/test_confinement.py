"""Programs behind the gate in places of their own: real cgroups, and scopes of a real systemd."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from functools import partial
from pathlib import Path

import msgspec
import pytest

from qmpd import cgroups
from qmpd.confinement import Admit, Confiner, properties, scope_of
from qmpd.daemon import running as daemon
from qmpd.errors import HostError
from qmpd.facts import Confinement
from qmpd.hostcheck.resources import mounts
from qmpd.lifecycle import State
from qmpd.process import Identity, QemuProcess, gate, launch
from qmpd.record import RECORD_NAME, read_record
from qmpd.settings import Settings
from qmpd.spec import Limits, MachineSpec, Tpm
from qmpd.systemd import Property, Systemd, systemd
from qmpd.views import StartRequest
from tests.process.emulator import PATIENCE_S
from tests.unavailable import tool

#: Longer than any test; what runs in a place is killed by its test.
PROGRAM = ("/bin/sleep", "3600")
SYSTEMD = Path("/lib/systemd/systemd")
#: A systemd of a user, in a world where it is the only one: its own cgroups (`$1`), its own /run/systemd, its own bus.
WORLD = """
set -e
echo $$ > "$1/cgroup.procs"
exec unshare --mount --cgroup --propagation private sh -c '
    mkdir -p /run/systemd
    mount -t tmpfs none /run/systemd
    mkdir /run/systemd/system
    mount -t cgroup2 none /sys/fs/cgroup
    exec "$0" --user --unit=dbus.socket' "$2"
"""


@pytest.fixture
def place() -> Iterator[Path]:
    """A cgroup of the test's own, without any controller; whatever is left in it at the end is killed."""
    points = [Path(point) for point, kind in mounts(Path("/proc/self/mountinfo").read_text()) if kind == "cgroup2"]
    if not points or not os.access(points[0], os.W_OK) or os.geteuid() != 0:
        pytest.skip("no hierarchy of cgroup v2 that this user may write to")
    directory = points[0] / f"qmpd-test-{os.getpid()}"
    try:
        directory.mkdir()
    except OSError as error:
        pytest.skip(f"no cgroup can be made here: {error}")
    yield directory
    (directory / "cgroup.kill").write_text("1")
    for path in sorted(directory.rglob("*/"), reverse=True):
        _remove(path)
    _remove(directory)


def _remove(directory: Path) -> None:
    """What was killed is gone when its parent, or the first process of the host, has seen it."""
    deadline = time.monotonic() + PATIENCE_S
    while "populated 1" in (directory / "cgroup.events").read_text():
        assert time.monotonic() < deadline, f"{directory} is not left"
        time.sleep(0.01)
    directory.rmdir()


@pytest.fixture
def confiner(settings: Settings, place: Path) -> Confiner:
    """Of a daemon that was given the place."""
    return Confiner(msgspec.structs.replace(settings, machines_cgroup=str(place)), {})


@contextlib.asynccontextmanager
async def running(directory: Path, admit: Admit) -> AsyncIterator[QemuProcess]:
    def record(identity: Identity) -> None:
        admit([identity.pid])

    process = await launch(partial(gate, PROGRAM, inherited=(), cwd="/", stderr=str(directory / "stderr"), record=record))
    try:
        yield process
    finally:
        await end(process)


async def end(process: QemuProcess) -> None:
    process.signal(signal.SIGKILL)
    async with asyncio.timeout(PATIENCE_S):
        await process.wait()


async def test_a_program_runs_in_a_cgroup_of_its_own_which_is_removed_with_its_end(confiner: Confiner, place: Path, tmp_path: Path) -> None:
    for _ in range(2):
        async with confiner.admission("web", Limits()) as admit, running(tmp_path, admit) as process:
            directory = cgroups.directory_of(process.identity.pid)
            assert directory == str(place / "web")
            assert (place / "web" / "cgroup.procs").read_text() == f"{process.identity.pid}\n"
            cgroups.leave(directory)
            confiner.sweep()
            assert (place / "web").exists(), "it is not removed under a process"
            await end(process)
            cgroups.leave(directory)
            assert not (place / "web").exists()


async def test_a_cgroup_that_was_left_behind_is_swept_away_or_used_again(confiner: Confiner, place: Path, tmp_path: Path) -> None:
    (place / "web").mkdir()
    async with confiner.admission("web", Limits()) as admit, running(tmp_path, admit) as process:
        assert cgroups.directory_of(process.identity.pid) == str(place / "web")
    confiner.sweep()
    assert not (place / "web").exists()


async def test_a_limit_that_the_kernel_does_not_take_keeps_the_program_from_running(
    confiner: Confiner, place: Path, tmp_path: Path
) -> None:
    if "memory" in (place / "cgroup.controllers").read_text():
        pytest.skip("the memory controller is there")
    with pytest.raises(HostError, match=f"limits cannot be set below {place}"):
        async with confiner.admission("web", Limits(memory_max_mib=64)) as admit, running(tmp_path, admit):
            pytest.fail("it runs")
    assert not (place / "web").exists()


def listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


@pytest.fixture
def bus(place: Path) -> Iterator[str]:
    """The address of the bus of a real systemd that manages the place."""
    if not SYSTEMD.exists() or shutil.which("dbus-daemon") is None or shutil.which("unshare") is None:
        pytest.skip("systemd, dbus-daemon and unshare are needed")
    runtime = Path(tempfile.mkdtemp(prefix="q"))
    environ = {"PATH": os.environ["PATH"], "XDG_RUNTIME_DIR": str(runtime), "HOME": str(runtime), "SYSTEMD_LOG_LEVEL": "warning"}
    output = runtime / "output"
    with output.open("wb") as log:
        manager = subprocess.Popen(
            ["/bin/sh", "-c", WORLD, "world", place, SYSTEMD], env=environ, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
    try:
        deadline = time.monotonic() + PATIENCE_S
        while not listens(runtime / "bus"):
            if manager.poll() is not None:
                pytest.skip(f"no systemd can run here: {output.read_text(errors='replace')[-500:]}")
            assert time.monotonic() < deadline, output.read_text(errors="replace")
            time.sleep(0.02)
        yield f"unix:path={runtime}/bus"
    finally:
        manager.kill()
        manager.wait()
        (place / "cgroup.kill").write_text("1")
        shutil.rmtree(runtime, ignore_errors=True)


async def shown(bus: str, unit: str, *names: str) -> list[str]:
    """Properties of a unit, as systemd's own tool has them."""
    process = await asyncio.create_subprocess_exec(
        *("busctl", f"--address={bus}", "get-property", "org.freedesktop.systemd1"),
        *(f"/org/freedesktop/systemd1/unit/{''.join(char if char.isalnum() else f'_{ord(char):02x}' for char in unit)}",),
        *("org.freedesktop.systemd1.Scope", *names),
        stdout=subprocess.PIPE,
    )
    out, _ = await process.communicate()
    return out.decode().splitlines()


async def test_a_scope_has_the_limits_and_the_process_and_vanishes_with_it(bus: str, place: Path, tmp_path: Path) -> None:
    limits = Limits(cpu_percent=50, cpu_weight=20, memory_max_mib=256, io_weight=30, tasks_max=100)
    loop = asyncio.get_running_loop()
    for _ in range(2):  # the second has to wait until systemd has seen the end of the first
        async with systemd(bus) as connection:
            connection.begin()

            def admit(pids: Sequence[int], connection: Systemd = connection) -> None:
                asyncio.run_coroutine_threadsafe(connection.start_scope("qmpd-web.scope", properties("web", limits, pids)), loop).result()

            async with running(tmp_path, admit) as process:
                assert cgroups.directory_of(process.identity.pid) == str(place / "qmpd.slice" / scope_of("web"))
                names = ("CPUQuotaPerSecUSec", "CPUWeight", "MemoryMax", "IOWeight", "TasksMax", "CollectMode", "Slice")
                assert await shown(bus, "qmpd-web.scope", *names[:5]) == ["t 500000", "t 20", "t 268435456", "t 30", "t 100"]


async def test_systemd_says_who_it_is_and_why_it_refuses(bus: str) -> None:
    async with systemd(bus) as connection:
        assert (await connection.version())[0].isdigit()
        with pytest.raises(HostError, match=r"systemd refused StartTransientUnit: Process with ID"):
            await connection.start_scope("qmpd-web.scope", properties("web", Limits(), [2**22 - 1]))
        with pytest.raises(HostError, match="systemd refused StartTransientUnit"):
            await connection.start_scope("qmpd-web.scope", [Property("MemoryMax", "s", "much")])
        with pytest.raises(HostError, match="systemd refused AttachProcessesToUnit"):
            await connection.attach("absent.service", "/web", os.getpid())


async def test_a_name_that_another_unit_has_is_refused_in_the_end(bus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qmpd.systemd.GONE_LIMIT_S", 0.1)
    loop = asyncio.get_running_loop()
    async with systemd(bus) as connection:

        def admit(pids: Sequence[int]) -> None:
            asyncio.run_coroutine_threadsafe(connection.start_scope("qmpd-web.scope", properties("web", Limits(), pids)), loop).result()

        async with running(tmp_path, admit) as first:
            with pytest.raises(HostError, match=r"qmpd-web\.scope was already loaded"):
                async with running(tmp_path, admit):
                    pytest.fail("it runs")
            assert first.exit is None


async def test_a_process_is_put_below_a_unit_that_was_delegated(bus: str, place: Path, tmp_path: Path) -> None:
    async with systemd(bus) as connection:
        holder = await asyncio.create_subprocess_exec(*PROGRAM)
        given = [Property("PIDs", "au", [holder.pid]), Property("Delegate", "b", True)]
        await connection.start_scope("given.scope", given)
        directory = Path(cgroups.directory_of(holder.pid) or "")
        (directory / "web").mkdir()
        loop = asyncio.get_running_loop()

        def admit(pids: Sequence[int]) -> None:
            asyncio.run_coroutine_threadsafe(connection.attach("given.scope", "/web", *pids), loop).result()

        async with running(tmp_path, admit) as process:
            assert cgroups.directory_of(process.identity.pid) == str(directory / "web")
        holder.kill()
        await holder.wait()


async def test_a_bus_that_is_not_there_is_named() -> None:
    async with systemd("unix:path=/absent") as connection:
        connection.begin()
        with pytest.raises(HostError, match=r"the message bus of systemd at unix:path=/absent cannot be used: .*No such file"):
            await connection.version()


LIMITS = Limits(cpu_percent=100, memory_max_mib=512)
LIMITED = MachineSpec(name="web", board="riscv64-virt", accel="tcg", memory_mib=32, limits=LIMITS)


class Known(Confiner):
    """Of a host where limits can be kept by the systemd on a bus."""

    def __init__(self, settings: Settings, bus: str) -> None:
        super().__init__(settings, {})
        self._bus = bus

    async def found(self) -> Confinement:
        return Confinement(way="scope", place=self._bus, controllers=frozenset({"cpu", "memory"}))


def threads_of(pid: int | None) -> set[int]:
    return {int(name) for name in os.listdir(f"/proc/{pid}/task")}  # noqa: PTH208 (names are wanted)


@pytest.mark.qemu
async def test_all_of_qemu_is_in_the_scope_of_its_machine_and_the_next_daemon_knows_it(bus: str, place: Path, settings: Settings) -> None:
    scope = place / "qmpd.slice" / "qmpd-web.scope"
    async with daemon(settings, {}) as service:
        service._worlds.confiner = Known(settings, bus)
        await service.create(LIMITED, start=True)
        view = service.machine("web")
        assert view.cgroup == str(scope)
        assert (scope / "cgroup.procs").read_text() == f"{view.pid}\n"
        async with asyncio.timeout(PATIENCE_S):  # threads of QEMU come and go between two looks
            while {int(line) for line in (scope / "cgroup.threads").read_text().split()} != threads_of(view.pid):
                await asyncio.sleep(0.02)
    async with daemon(settings, {}) as service:
        again = await service.wait("web", frozenset({State.RUNNING}), PATIENCE_S)
        assert (again.pid, again.cgroup) == (view.pid, str(scope))
        await service.kill("web")
        assert service.machine("web").cgroup is None
    async with asyncio.timeout(PATIENCE_S):
        while scope.exists():
            await asyncio.sleep(0.02)


@pytest.mark.qemu
async def test_a_tpm_is_in_the_scope_of_its_machine(bus: str, place: Path, settings: Settings) -> None:
    tool("swtpm", "swtpm")
    scope = place / "qmpd.slice" / "qmpd-web.scope"
    async with daemon(settings, {}) as service:
        service._worlds.confiner = Known(settings, bus)
        await service.create(msgspec.structs.replace(LIMITED, tpm=Tpm()), start=True)
        swtpm = read_record(f"{settings.run_dir}/m/web").tpm
        assert swtpm is not None
        assert {int(line) for line in (scope / "cgroup.procs").read_text().split()} == {service.machine("web").pid, swtpm.pid}
        await service.kill("web")
    async with asyncio.timeout(PATIENCE_S):
        while scope.exists():
            await asyncio.sleep(0.02)


async def test_a_cgroup_takes_more_processes_than_one(confiner: Confiner, place: Path, tmp_path: Path) -> None:
    other = await asyncio.create_subprocess_exec(*PROGRAM)
    async with confiner.admission("web", Limits()) as admit, running(tmp_path, lambda pids: admit([*pids, other.pid])) as process:
        found = {int(line) for line in (place / "web" / "cgroup.procs").read_text().split()}
        assert found == {process.identity.pid, other.pid}
    other.kill()
    await other.wait()


@pytest.mark.qemu
async def test_a_machine_whose_limits_cannot_be_set_does_not_run(settings: Settings) -> None:
    async with daemon(settings, {}) as service:
        service._worlds.confiner = Known(settings, "unix:path=/absent")
        await service.create(LIMITED)
        with pytest.raises(HostError, match="the message bus of systemd"):
            await service.start("web", StartRequest())
        assert service.machine("web").state is State.STOPPED
    assert RECORD_NAME not in os.listdir(f"{settings.run_dir}/m/web")  # noqa: PTH208 (names are wanted)
