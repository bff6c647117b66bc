"""The systemd units: systemd accepts them, they agree with the daemon's defaults, and machines outlive what they do."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import msgspec
import pytest

from qmpd.lifecycle import State
from qmpd.service import Service
from qmpd.settings import Settings, SettingsFile, merged, system_defaults
from qmpd.spec import MachineSpec
from qmpd_api.application import create
from qmpd_api.server import serve
from tests.unavailable import tool

ROOT = Path(__file__).parents[2]
UNITS = ROOT / "systemd"
SYSTEM = sorted(path.name for suffix in ("service", "socket", "slice") for path in UNITS.glob(f"*.{suffix}"))
DAEMONS = ("qmpd.service", "user/qmpd.service")
HOST = system_defaults()
#: Of machines with limits: the cgroup that systemd makes for this unit.
PLACE = "/sys/fs/cgroup/qmpd.slice/qmpd-machines.service"
#: systemd's tools need a second; on a shared machine more.
TOOL_DEADLINE_S = 60

#: What would end machines with the daemon, or keep a new daemon from those of the last one.
KEPT_OUT = {
    "MemoryDenyWriteExecute": "TCG writes the code it runs",
    "DynamicUser": "the next daemon could be another user",
    "RemoveIPC": "the memory of machines would go with the daemon",
    "PrivateTmp": "the next daemon would have another /tmp",
    "PrivateDevices": "there would be no /dev/kvm",
    "PrivateNetwork": "ports of machines would be in another network",
    "PrivateUsers": "the next daemon could not reach the machines of the last",
    "PrivateMounts": "disks that are mounted later would not be seen",
    "PrivateIPC": "the next daemon would be in another IPC namespace",
    "RootDirectory": "paths would mean something else",
    "ProtectProc": "a machine that is hidden would pass for gone, and be started twice",
    "ProcSubset": "the boot id and the memory of the host would be hidden",
    "MemoryMax": "one machine too many would be the end of all; the slice is for that",
}


def settings_of(unit: str) -> dict[str, list[str]]:
    """Every value of every key, in order; systemd's sections have no key in common that matters here."""
    found: dict[str, list[str]] = {}
    for line in (UNITS / unit).read_text(encoding="utf-8").splitlines():
        key, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            found.setdefault(key, []).append(value)
    return found


def one(unit: str, key: str) -> str:
    (value,) = settings_of(unit)[key]
    return value


def words(unit: str, key: str) -> list[str]:
    return " ".join(settings_of(unit).get(key, [])).split()


def run(*command: str, **environ: str) -> str:
    """What a tool prints, which must not fail."""
    done = subprocess.run(
        command,
        env={**os.environ, **environ},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TOOL_DEADLINE_S,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A copy of the units whose programs exist."""
    for unit in (*SYSTEM, "user/qmpd.service"):
        path = tmp_path / unit
        path.parent.mkdir(exist_ok=True)
        text = (UNITS / unit).read_text(encoding="utf-8")
        path.write_text(re.sub(r"^ExecStart=\S*qmpd ", "ExecStart=/bin/true ", text, flags=re.MULTILINE), encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("unit", SYSTEM)
def test_systemd_finds_nothing_wrong_with_a_unit(unit: str, installed: Path) -> None:
    assert run(tool("systemd-analyze", "systemd"), "verify", "--man=no", str(installed / unit), SYSTEMD_UNIT_PATH=f"{installed}:") == ""


def test_systemd_finds_nothing_wrong_with_the_unit_of_a_user(installed: Path) -> None:
    unit = installed / "user" / "qmpd.service"
    assert run(tool("systemd-analyze", "systemd"), "--user", "verify", "--man=no", str(unit), XDG_RUNTIME_DIR=str(installed)) == ""


def test_the_daemon_is_no_more_exposed_than_the_documentation_says(installed: Path) -> None:
    unit = installed / "qmpd.service"
    measured = re.search(
        r"Overall exposure level for qmpd.service: (\d+\.\d)",
        run(tool("systemd-analyze", "systemd"), "security", "--offline=yes", str(unit)),
    )
    documented = re.search(r"exposure of (\d+\.\d)", (ROOT / "docs" / "systemd.md").read_text(encoding="utf-8"))

    assert measured is not None
    assert documented is not None
    assert float(measured[1]) <= float(documented[1])


def test_the_user_and_the_group_can_be_made() -> None:
    assert "ignoring" not in run(tool("systemd-sysusers", "systemd"), "--dry-run", str(UNITS / "sysusers.d" / "qmpd.conf"))


def test_every_part_means_the_same_user() -> None:
    name = one("qmpd.service", "User")
    users = (UNITS / "sysusers.d" / "qmpd.conf").read_text(encoding="utf-8").splitlines()

    assert [line.split()[:2] for line in users if line.startswith("u")] == [["u", name]]
    assert {line.split()[2] for line in users if line.startswith("m")} == set(words("qmpd.service", "SupplementaryGroups"))
    assert one("qmpd.service", "Group") == one("qmpd.socket", "SocketGroup") == name
    assert {tuple(owners) for _, _, *owners in directories().values()} == {(name, name)}


def directories() -> dict[str, list[str]]:
    """The lines of tmpfiles.d, by path: type, mode, user, group."""
    lines = (UNITS / "tmpfiles.d" / "qmpd.conf").read_text(encoding="utf-8").splitlines()
    return {path: [kind, *rest] for kind, path, *rest, _age in (line.split() for line in lines if not line.startswith("#"))}


def test_the_directories_are_those_of_the_daemon() -> None:
    service = "qmpd.service"
    states = [f"/var/lib/{name}" for name in words(service, "StateDirectory")]

    assert f"/run/{one(service, 'RuntimeDirectory')}" == HOST.run_dir
    assert f"/var/cache/{one(service, 'CacheDirectory')}" == HOST.cache_dir
    assert states[0] == HOST.state_dir
    assert states[1:] == [pool for pool in HOST.pools if Path(pool).is_relative_to(HOST.state_dir)]
    assert one(service, "StateDirectoryMode") == "0700"  # the daemon refuses one that is open to others
    assert {path: fields[:2] for path, fields in directories().items()} == {
        HOST.run_dir: ["d", one(service, "RuntimeDirectoryMode")],
        **{path: ["d", "0700"] for path in states},
        HOST.cache_dir: ["d", one(service, "CacheDirectoryMode")],
        HOST.pki_dir: ["d", "0700"],  # so that certificates which root puts there belong to the daemon
    }
    assert f"-{HOST.pki_dir}" in words(service, "ReadWritePaths")


def test_the_socket_is_where_clients_look_for_it_and_the_group_may_use_it() -> None:
    assert one("qmpd.socket", "ListenStream") == HOST.socket
    assert one("qmpd.socket", "SocketMode") == "0660"
    assert int(one("qmpd.service", "RuntimeDirectoryMode"), 8) & 0o070 == 0o050


def test_the_settings_that_are_installed_are_the_defaults_of_a_host() -> None:
    assert one("qmpd.service", "ExecStart").endswith("serve --system --config /etc/qmpd/qmpd.toml")
    read = msgspec.convert(tomllib.loads((UNITS / "qmpd.toml").read_text(encoding="utf-8")), SettingsFile)

    effective = merged(system_defaults(), read)
    assert effective == msgspec.structs.replace(HOST, socket_group=one("qmpd.socket", "SocketGroup"), machines_cgroup=PLACE)


def test_pools_that_are_written_to_can_be() -> None:
    """The other pools of a host hold what the distribution put there."""
    writable = {*words("qmpd.service", "ReadWritePaths"), *(f"/var/lib/{name}" for name in words("qmpd.service", "StateDirectory"))}
    assert {pool for pool in HOST.pools if pool in writable or f"-{pool}" in writable} == {"/var/lib/qmpd/images", "/srv"}
    assert not {pool for pool in HOST.pools if Path(pool).is_relative_to("/home")} or one("qmpd.service", "ProtectHome") != "yes"


@pytest.mark.parametrize("unit", DAEMONS)
def test_machines_outlive_the_daemon(unit: str) -> None:
    assert one(unit, "KillMode") == "process"
    assert one(unit, "RuntimeDirectoryPreserve") == "yes"
    assert one(unit, "OOMPolicy") == "continue"
    assert one(unit, "Restart") == "on-failure"
    assert not {key: reason for key, reason in KEPT_OUT.items() if key in settings_of(unit)}


def test_machines_with_limits_are_in_a_cgroup_that_belongs_to_the_daemons_user_and_not_to_the_daemon() -> None:
    unit, daemon = "qmpd-machines.service", "qmpd.service"

    assert f"/sys/fs/cgroup/{one(unit, 'Slice')}/{unit}" == PLACE
    assert f"cd {PLACE} && " in one(unit, "ExecStart")
    assert f"-{PLACE}" in words(daemon, "ReadWritePaths"), "the daemon may write there, and to no other cgroup"
    assert one(daemon, "ProtectControlGroups") == "yes"
    assert one(unit, "User") == one(daemon, "User")
    assert {"cpu", "io", "memory", "pids"} == set(words(unit, "Delegate"))
    assert "Delegate" not in settings_of(daemon), "a daemon that is started again could not enter a cgroup with controllers"


def test_the_place_of_machines_is_there_before_the_daemon_and_after_the_guests() -> None:
    unit = "qmpd-machines.service"

    assert unit in words("qmpd.service", "Wants")
    assert unit in words("qmpd.service", "After")
    assert {"qmpd.service", "qmpd-guests-shutdown.service"} <= set(words(unit, "Before"))
    assert one(unit, "KillMode") == "process"
    assert one(unit, "SendSIGKILL") == "no"
    assert one(unit, "RefuseManualStop") == "yes"


def test_machines_may_open_no_more_devices_for_having_limits() -> None:
    for key in ("DevicePolicy", "DeviceAllow"):
        assert settings_of("qmpd-machines.service")[key] == settings_of("qmpd.service")[key]


@pytest.mark.parametrize("unit", DAEMONS)
def test_a_daemon_says_when_it_is_ready_and_that_it_lives(unit: str) -> None:
    assert one(unit, "Type") == "notify"
    assert int(one(unit, "WatchdogSec")) > 0


@pytest.mark.parametrize("unit", DAEMONS)
def test_a_wrong_configuration_is_not_tried_again(unit: str) -> None:
    assert one(unit, "RestartPreventExitStatus") == str(os.EX_CONFIG)


def test_qemu_may_lock_itself_in() -> None:
    assert "seccomp" in words("qmpd.service", "SystemCallFilter")


def test_machines_are_ended_before_the_daemon_and_only_with_the_host() -> None:
    unit = "qmpd-guests-shutdown.service"

    assert {"qmpd.service", "qmpd.socket"} <= set(words(unit, "After"))
    assert not {"Requires", "Requisite", "BindsTo", "PartOf", "StopPropagatedFrom"} & set(settings_of(unit))
    assert one(unit, "RemainAfterExit") == "yes"


@pytest.mark.qemu
async def test_the_end_of_the_host_ends_every_machine(service: Service, settings: Settings, short_directory: Path) -> None:
    """`listens` stands for a guest that does not obey, `halted` for one that cannot, `done` for one that was stopped before."""
    for name in ("listens", "halted", "done"):
        await service.create(MachineSpec(name=name, board="riscv64-virt", accel="tcg", memory_mib=64, shutdown_timeout_s=0.5), start=True)
    await service.pause("halted")
    await service.stop("done")

    async with serve(create(service), settings.socket):
        for command in settings_of("qmpd-guests-shutdown.service")["ExecStop"]:
            await run_as_systemd_does(command, settings.socket, short_directory)

    ends = {view.name: (view.state, view.exit.clean if view.exit else None) for view in service.machines({}, None).machines}
    assert ends == dict.fromkeys(("listens", "halted", "done"), (State.STOPPED, True))


async def test_the_end_of_a_host_without_machines_is_no_error(service: Service, settings: Settings, short_directory: Path) -> None:
    async with serve(create(service), settings.socket):
        for command in settings_of("qmpd-guests-shutdown.service")["ExecStop"]:
            await run_as_systemd_does(command, settings.socket, short_directory)


async def run_as_systemd_does(command: str, socket: str, directory: Path) -> None:
    """Runs a command line of the form `-/bin/sh -c "…"`, with a qmpctl on PATH that talks to this socket."""
    found = re.fullmatch(r'-/bin/sh -c "([^"\\]*)"', command)
    assert found is not None
    program = directory / "qmpctl"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m qmpctl "$@"\n', encoding="utf-8")
    program.chmod(0o700)
    environ = {
        "PATH": f"{directory}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'api'}",
        "QMPD_SOCKET": socket,
    }
    process = await asyncio.create_subprocess_exec("/bin/sh", "-c", found[1].replace("$$", "$"), env=environ)
    async with asyncio.timeout(TOOL_DEADLINE_S):
        assert await process.wait() == 0
