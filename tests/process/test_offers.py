"""What a daemon offers is what its host has, and one thing that does not work hides nothing else."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from qmpd.daemon import running
from qmpd.errors import Forbidden, Invalid, LaunchFailed, NotFound
from qmpd.lifecycle import State
from qmpd.settings import Settings
from qmpd.spec import BiosFirmware
from qmpd.views import QmpRequest, StartRequest
from tests.process.standin_qemu import BOARD, toy, toy_settings, toys
from tests.process.test_misbehaviour import ADMIN
from tests.unit.standin_emulator import make

HOST = os.uname().machine


@pytest.fixture(autouse=True)
def _only_what_is_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host's own emulators would all be asked."""
    monkeypatch.setenv("PATH", "/nonexistent")


def board(directory: Path, name: str, **changes: str) -> None:
    text = BOARD
    for field, value in changes.items():
        text = "\n".join(f"{field} = {value}" if line.startswith(f"{field} =") else line for line in text.splitlines()) + "\n"
    (directory / "boards" / f"{name}.toml").write_text(text)


async def test_boards_are_listed_with_what_would_run_them(settings: Settings, short_directory: Path) -> None:
    changed = toy_settings(settings, short_directory)
    board(short_directory, "toy-nowhere", emulators='["nowhere"]')
    board(short_directory, "toy-here", arch=f'"mine"\nkvm_hosts = ["{HOST}"]')
    async with running(changed, {}) as service:
        views = {view.id: view for view in await service.boards() if view.id.startswith("toy")}
        assert list(views) == sorted(views)
        toy_view = views["toy"]
        assert (toy_view.runnable, toy_view.accel, toy_view.reason, toy_view.memory_mib) == (True, "tcg", None, 16)
        assert toy_view.emulator == changed.emulators[0]
        nowhere = views["toy-nowhere"]
        assert (nowhere.runnable, nowhere.accel, nowhere.emulator) == (False, None, None)
        assert nowhere.reason == "no emulator: qemu-system-nowhere was not found"
        assert views["toy-here"].accel == "tcg"
        assert views["toy-here"].reason
        assert [view.id for view in await service.boards("mine")] == ["toy-here"]
        assert service.board("toy").board.title == "Toy"
        with pytest.raises(NotFound, match="close to it: toy"):
            service.board("toi")


async def test_an_emulator_that_does_not_work_hides_no_board(settings: Settings, short_directory: Path) -> None:
    changed = toy_settings(settings, short_directory)
    board(short_directory, "toy-here", kernel='"ttyT0"\n[kernel]\nformats = []\n', arch=f'"mine"\nkvm_hosts = ["{HOST}"]')
    make(short_directory / "bin" / "qemu-system-toy", "dies")
    async with running(changed, {}) as service:
        views = {view.id: view for view in await service.boards() if view.id.startswith("toy")}
        assert (views["toy-here"].runnable, views["toy-here"].accel) == (False, None)
        assert "no such luck" in (views["toy-here"].reason or "")
        assert views["toy"].runnable
        (broken,) = [view for view in await service.emulators() if view.path == changed.emulators[0]]
        assert (broken.name, broken.machines, broken.version) == ("qemu-system-toy", 0, "")
        assert "no such luck" in (broken.problem or "")
        with pytest.raises(LaunchFailed, match="no such luck"):
            await service.validate(toy())


async def test_emulators_are_listed_with_what_they_said(settings: Settings, short_directory: Path) -> None:
    async with toys(settings, short_directory) as service:
        (view,) = [view for view in await service.emulators() if view.name == "qemu-system-toy"]
        assert (view.target, view.version, view.machines, view.kvm, view.kvm_reason) == ("toy", "9.8.7", 2, False, "built without KVM")
        assert view.problem is None


async def test_a_definition_is_checked_against_this_host(settings: Settings, short_directory: Path) -> None:
    async with toys(settings, short_directory) as service:
        report = await service.validate(toy())
        assert report.ok
        assert [problem.path for problem in report.warnings] == ["$.machine"]
        wrong = await service.validate(toy(memory_mib=1, rng=True, machine="nothing"))
        assert {problem.path for problem in wrong.problems} == {"$.machine", "$.rng"}
        for spec, path in ((toy(board="toi"), r"\$\.board"), (toy(emulator="nothing"), r"\$\.emulator"), (toy(rng=True), r"\$\.rng")):
            with pytest.raises(Invalid, match=path):
                await service.command(spec)
        await service.create(toy())
        command = await service.machine_command("one")
        assert command.text.startswith(f"{short_directory}/bin/qemu-system-toy \\\n")
        assert (command.accel, command.emulator_version) == ("tcg", "9.8.7")
        with pytest.raises(NotFound):
            await service.machine_command("two")


async def test_a_board_with_no_emulator_here_says_what_to_install(settings: Settings, short_directory: Path) -> None:
    changed = toy_settings(settings, short_directory)
    board(short_directory, "toy-nowhere", emulators='["nowhere", "elsewhere"]')
    async with running(changed, {}) as service:
        with pytest.raises(Invalid, match=r"\$\.board: no qemu-system-nowhere in .*: install"):
            await service.validate(toy(board="toy-nowhere"))


async def test_the_first_emulator_that_is_there_is_taken(settings: Settings, short_directory: Path) -> None:
    changed = toy_settings(settings, short_directory)
    board(short_directory, "toy-either", emulators='["nowhere", "toy"]')
    async with running(changed, {}) as service:
        assert (await service.command(toy(board="toy-either"))).emulator_version == "9.8.7"


async def test_files_outside_the_pools_are_refused_when_a_machine_is_defined(settings: Settings, short_directory: Path) -> None:
    changed = msgspec.structs.replace(toy_settings(settings, short_directory), pools=(f"{short_directory}/pool",), raw_options=False)
    async with running(changed, {}) as service:
        report = await service.validate(toy(firmware=BiosFirmware(path="/etc/passwd"), extra_args=("-s",)))
        assert [(problem.path, "outside the directories" in problem.message) for problem in report.problems] == [
            ("$.firmware.path", True),
            ("$.extra_args", False),
        ]


async def test_metrics_are_what_prometheus_reads(settings: Settings, short_directory: Path) -> None:
    async with toys(settings, short_directory) as service:
        for name in ("one", "two"):
            await service.create(toy(name))
        await service.start("one", StartRequest())
        await service.qmp("one", QmpRequest(execute="system_reset"), ADMIN)
        before = service.bus.last
        families = {family.name: family for family in text_string_to_metric_families((await service.upkeep.metrics()).decode())}
        states = {sample.labels["state"]: sample.value for sample in families["qmpd_machines"].samples}
        assert states == {**dict.fromkeys(map(str, State), 0), "running": 1, "stopped": 1}
        resets = {sample.labels["machine"]: sample.value for sample in families["qmpd_machine_resets"].samples}
        assert set(resets) == {"one", "two"}
        assert before <= families["qmpd_events"].samples[0].value <= service.bus.last
        assert {"qmpd_build_info", "qmpd_machine_console_bytes", "process_resident_memory_bytes"} <= set(families)


async def test_lists_can_be_narrowed(settings: Settings, short_directory: Path) -> None:
    async with toys(settings, short_directory) as service:
        await service.create(toy("one", labels={"role": "web", "tier": "1"}))
        await service.create(toy("two", labels={"role": "web"}), start=True)
        assert [view.name for view in service.machines({"role": "web"}, None).machines] == ["one", "two"]
        assert [view.name for view in service.machines({"role": "web", "tier": "1"}, None).machines] == ["one"]
        assert [view.name for view in service.machines({}, State.RUNNING).machines] == ["two"]
        assert service.machines({"role": "db"}, None).machines == ()
        assert service.version().machines_running == 1


async def test_a_caller_sends_what_he_may(settings: Settings, short_directory: Path) -> None:
    async with toys(settings, short_directory) as service:
        await service.create(toy(), start=True)
        with pytest.raises(Forbidden):
            await service.qmp("one", QmpRequest(execute="x-guest-powers-off"), msgspec.structs.replace(ADMIN, user="eve"))
        with pytest.raises(NotFound):
            await service.qmp("two", QmpRequest(execute="query-status"), ADMIN)
