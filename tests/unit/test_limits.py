"""Limits of machines: what is asked of systemd and of the kernel, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import msgspec
import pytest

from qmpd import cgroups
from qmpd.confinement import properties
from qmpd.errors import HostError
from qmpd.facts import Confinement
from qmpd.hostcheck import limits as hostlimits
from qmpd.hostcheck.limits import Caller, caller, found, version_line, way_line
from qmpd.hostcheck.tree import HostTree
from qmpd.spec import Limits
from tests.unit import hosttree
from tests.unit.toy import WORLD, told

Host = Callable[..., HostTree]

ALL = frozenset({"cpu", "io", "memory", "pids"})
EVERYTHING = Limits(cpu_percent=150, cpu_weight=20, memory_max_mib=2048, io_weight=500, tasks_max=300)
SYSTEM = {"/sys/fs/cgroup/cgroup.controllers": "cpuset cpu io memory pids", "/run/systemd/system/x": "", "/run/dbus/system_bus_socket": ""}
OWN = "/sys/fs/cgroup/user.slice/user-7.slice/user@7.service/cgroup.controllers"
USER = {**SYSTEM, "/run/user/7/systemd/private": "", "/run/user/7/bus": "", OWN: "cpu memory pids"}
GIVEN = {"/given/cgroup.controllers": "cpu memory", "/given/cgroup.subtree_control": ""}
ROOT = Caller(uid=0)
SOMEBODY = Caller(uid=7, runtime_dir="/run/user/7")


@pytest.fixture
def host(tmp_path: Path) -> Host:
    """Makes a host of the files given by path."""
    return partial(hosttree.host, tmp_path / "host")


@pytest.mark.parametrize(
    ("files", "who", "way", "place", "controllers"),
    [
        (SYSTEM, ROOT, "scope", "unix:path=/run/dbus/system_bus_socket", {"cpuset", *ALL}),
        (USER, SOMEBODY, "scope", "unix:path=/run/user/7/bus", {"cpu", "memory", "pids"}),
        (USER, msgspec.structs.replace(SOMEBODY, bus="unix:path=/b"), "scope", "unix:path=/b", {"cpu", "memory", "pids"}),
        (GIVEN, Caller(uid=7, machines_cgroup="/given"), "cgroup", "/given", {"cpu", "memory"}),
    ],
    ids=["root", "user", "user's own bus", "given"],
)
def test_the_way_follows_from_what_there_is(
    host: Host, files: dict[str, str], who: Caller, way: str, place: str, controllers: set[str]
) -> None:
    assert found(host(files), who) == Confinement(way=way, place=place, controllers=frozenset(controllers))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("files", "who", "obstacle"),
    [
        ({}, ROOT, "cgroup version 2 is not in use on this host"),
        ({"/sys/fs/cgroup/cgroup.controllers": "cpu"}, ROOT, "systemd does not run this host"),
        ({name: text for name, text in SYSTEM.items() if "bus" not in name}, ROOT, "the system's message bus is not there to ask systemd"),
        (SYSTEM, SOMEBODY, "this user has no service manager of systemd"),
        (SYSTEM, Caller(uid=7), "this user has no service manager of systemd"),
        ({**SYSTEM, "/run/user/7/systemd/private": ""}, SOMEBODY, "this user has no message bus to ask systemd"),
        (SYSTEM, Caller(uid=0, machines_cgroup="/given"), "/given (machines_cgroup) is no directory of cgroup version 2"),
        (
            {"/given/cgroup.controllers": "cpu memory"},
            Caller(uid=0, machines_cgroup="/given"),
            "/given (machines_cgroup) may not be written to by this user",
        ),
    ],
)
def test_where_there_is_no_way_it_is_said_why_and_what_mends_it(host: Host, files: dict[str, str], who: Caller, obstacle: str) -> None:
    seen = found(host(files), who)
    assert (seen.way, seen.obstacle) == (None, obstacle)
    line = way_line(seen, None)
    assert (line.verdict, line.found, line.mend) == ("warn", obstacle, seen.mend)
    assert seen.mend


def test_the_caller_is_described_by_its_environment() -> None:
    environ = {"XDG_RUNTIME_DIR": "/run/user/7", "DBUS_SESSION_BUS_ADDRESS": "unix:path=/b"}
    assert caller(7, None, environ) == Caller(uid=7, runtime_dir="/run/user/7", bus="unix:path=/b")


def test_a_check_names_the_way_and_the_controllers_that_are_missing() -> None:
    scope = Confinement(way="scope", place="unix:path=/b", controllers=ALL)
    assert (way_line(scope, "252").verdict, way_line(scope, "252").found) == ("pass", "scopes of systemd 252")
    assert way_line(scope, None).found == "systemd does not answer on unix:path=/b"
    less = way_line(msgspec.structs.replace(scope, controllers=ALL - {"io"}), "252")
    assert (less.verdict, less.found) == ("warn", "scopes of systemd 252, without io")
    given = Confinement(way="cgroup", place="/given", controllers=ALL - {"io", "pids"})
    assert (way_line(given, None).found, way_line(given, None).mend) == ("cgroups below /given, without io, pids", hostlimits.DELEGATE)


@pytest.mark.parametrize(
    ("files", "verdict", "finding"),
    [
        ({}, "warn", "version 2 is not in use"),
        ({"/sys/fs/cgroup/cgroup.controllers": "cpu memory pids"}, "warn", "version 2, without io"),
        (SYSTEM, "pass", "version 2, with cpu, io, memory, pids"),
    ],
)
def test_a_check_says_which_cgroups_the_kernel_has(host: Host, files: dict[str, str], verdict: str, finding: str) -> None:
    line = version_line(host(files))
    assert (line.verdict, line.found) == (verdict, finding)


def test_systemd_is_asked_in_its_own_names_and_units() -> None:
    asked = {item.name: (item.signature, item.value) for item in properties("web", EVERYTHING, [42, 43])}
    assert asked == {
        "Description": ("s", "qmpd machine web"),
        "Slice": ("s", "qmpd.slice"),
        "PIDs": ("au", [42, 43]),
        "CollectMode": ("s", "inactive-or-failed"),
        "Before": ("as", ["qmpd-guests-shutdown.service"]),
        "CPUQuotaPerSecUSec": ("t", 1_500_000),
        "CPUWeight": ("t", 20),
        "MemoryMax": ("t", 2 * 2**30),
        "IOWeight": ("t", 500),
        "TasksMax": ("t", 300),
    }
    assert len(properties("web", Limits(), [42])) == 5


def directory(path: Path, enabled: str) -> Path:
    """What looks like a cgroup; the kernel would make the files in those below."""
    path.mkdir()
    (path / "cgroup.subtree_control").write_text(enabled)
    return path


def test_the_kernel_is_told_in_its_own_words(tmp_path: Path) -> None:
    place = cgroups.make(str(directory(tmp_path / "machines", "cpu io memory pids\n")), "web", EVERYTHING)
    assert place == tmp_path / "machines" / "web"
    assert {path.name: path.read_text() for path in place.iterdir()} == {
        "cpu.max": "150000 100000",
        "cpu.weight": "20",
        "memory.max": "2147483648",
        "io.weight": "default 500",
        "pids.max": "300",
    }


def test_controllers_that_are_needed_are_enabled_and_no_others(tmp_path: Path) -> None:
    parent = directory(tmp_path / "machines", "cpu\n")
    cgroups.make(str(parent), "web", Limits(cpu_percent=100, memory_max_mib=64, tasks_max=64))
    assert (parent / "cgroup.subtree_control").read_text() == "+memory +pids"


def test_a_place_that_is_still_used_is_not_taken(tmp_path: Path) -> None:
    parent = directory(tmp_path / "machines", "cpu\n")
    (parent / "web" / "inner").mkdir(parents=True)
    with pytest.raises(HostError, match="limits cannot be set below"):
        cgroups.make(str(parent), "web", Limits(cpu_percent=100))
    assert (parent / "web" / "inner").exists()


def test_what_is_no_cgroup_is_refused(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="No such file or directory"):
        cgroups.make(str(tmp_path), "web", Limits(cpu_percent=100))
    assert list(tmp_path.iterdir()) == []


def test_only_empty_places_are_swept_away(tmp_path: Path) -> None:
    parent = directory(tmp_path / "machines", "")
    for name in ("left", "used/inner", "gone.scope"):
        (parent / name).mkdir(parents=True)
    cgroups.leave(str(parent / "gone.scope"))
    assert (parent / "gone.scope").exists(), "scopes are systemd's"
    cgroups.leave(str(parent / "used"))
    cgroups.sweep(str(parent))
    assert sorted(path.name for path in parent.iterdir()) == ["cgroup.subtree_control", "used"]
    cgroups.sweep(str(tmp_path / "absent"))


def told_with(limits: dict[str, int], confinement: Confinement, memory_mib: int | None = None) -> list[str]:
    memory = {} if memory_mib is None else {"memory_mib": memory_mib}
    return told({"limits": limits, **memory}, world=msgspec.structs.replace(WORLD, confinement=confinement))


def test_a_definition_without_limits_needs_no_way_to_keep_them() -> None:
    assert told_with({}, Confinement(obstacle="none", mend="none")) == []


def test_limits_that_cannot_be_kept_are_refused_with_the_reason_and_what_mends_it() -> None:
    nothing = Confinement(obstacle="systemd does not run this host", mend="set machines_cgroup")
    assert told_with({"cpu_weight": 10}, nothing) == ["$.limits: systemd does not run this host; set machines_cgroup"]
    less = Confinement(way="scope", controllers=frozenset({"memory"}))
    lines = told_with(msgspec.to_builtins(EVERYTHING), less)
    assert [line.split(": ")[0] for line in lines] == [
        "$.limits." + name for name in ("cpu_percent", "cpu_weight", "io_weight", "tasks_max")
    ]
    assert lines[2] == "$.limits.io_weight: needs the cgroup controller 'io', which is not there; `qmpd check` says more"


@pytest.mark.parametrize(("memory_mib", "least"), [(128, 256), (None, 192)])
def test_a_limit_of_memory_leaves_room_for_qemu_itself(memory_mib: int | None, least: int) -> None:
    way = Confinement(way="scope", controllers=ALL)
    assert told_with({"memory_max_mib": least}, way, memory_mib) == []
    assert told_with({"memory_max_mib": least - 1}, way, memory_mib) == [
        f"$.limits.memory_max_mib: {least - 1} MiB is too little for {least - 128} MiB of RAM and QEMU itself: it must be {least} at least"
    ]
