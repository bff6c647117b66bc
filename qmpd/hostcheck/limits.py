"""How machines can be held to limits here: through systemd, or through a cgroup that was given to the daemon."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import msgspec

from qmpd.facts import Confinement
from qmpd.hostcheck.line import Topic
from qmpd.hostcheck.tree import HostTree
from qmpd.views import CheckLine

TOPIC: Final = Topic("Limits of machines")
CGROUPS: Final = "/sys/fs/cgroup"
SYSTEM_BUS: Final = "/run/dbus/system_bus_socket"
#: The controllers that can hold a machine within bounds.
CONTROLLERS: Final = ("cpu", "io", "memory", "pids")
MEANING: Final = "A definition with limits is refused; machines without run as ever."
BOOT: Final = "boot the kernel with systemd.unified_cgroup_hierarchy=1"
DELEGATE: Final = "set machines_cgroup to a directory of cgroup v2 that belongs to the daemon's user (docs/systemd.md)"


class Caller(msgspec.Struct, frozen=True, kw_only=True):
    """For whom it is looked: the user, what the settings say, and where the user's own service manager would be."""

    uid: int
    machines_cgroup: str | None = None
    runtime_dir: str | None = None
    bus: str | None = None


def caller(uid: int, machines_cgroup: str | None, environ: Mapping[str, str]) -> Caller:
    """The user with this environment."""
    return Caller(
        uid=uid,
        machines_cgroup=machines_cgroup,
        runtime_dir=environ.get("XDG_RUNTIME_DIR"),
        bus=environ.get("DBUS_SESSION_BUS_ADDRESS"),
    )


def found(tree: HostTree, who: Caller) -> Confinement:
    """The way to hold a machine to limits, by what there is. Nobody is asked. Blocks."""
    if who.machines_cgroup is not None:
        return _given(tree, who.machines_cgroup)
    if not tree.exists(f"{CGROUPS}/cgroup.controllers"):
        return Confinement(obstacle="cgroup version 2 is not in use on this host", mend=BOOT)
    if not tree.exists("/run/systemd/system"):
        return Confinement(obstacle="systemd does not run this host", mend=DELEGATE)
    if who.uid == 0:
        return _of_system(tree)
    return _of_user(tree, who)


def _given(tree: HostTree, directory: str) -> Confinement:
    if not tree.exists(f"{directory}/cgroup.controllers"):
        mend = "start qmpd-machines.service, or make it and give it to the daemon's user"
        return Confinement(obstacle=f"{directory} (machines_cgroup) is no directory of cgroup version 2", mend=mend)
    if not (tree.permits(directory) and tree.permits(f"{directory}/cgroup.subtree_control")):
        mend = "give the directory, its cgroup.procs and its cgroup.subtree_control to the daemon's user"
        return Confinement(obstacle=f"{directory} (machines_cgroup) may not be written to by this user", mend=mend)
    return Confinement(way="cgroup", place=directory, controllers=_controllers(tree, directory))


def _of_system(tree: HostTree) -> Confinement:
    if not tree.exists(SYSTEM_BUS):
        return Confinement(obstacle="the system's message bus is not there to ask systemd", mend="install and start dbus")
    return Confinement(way="scope", place=f"unix:path={SYSTEM_BUS}", controllers=_controllers(tree, CGROUPS))


def _of_user(tree: HostTree, who: Caller) -> Confinement:
    if not who.runtime_dir or not tree.exists(f"{who.runtime_dir}/systemd/private"):
        mend = f"log in with systemd's PAM module, or loginctl enable-linger; a user of services: {DELEGATE}"
        return Confinement(obstacle="this user has no service manager of systemd", mend=mend)
    if who.bus is None and not tree.exists(f"{who.runtime_dir}/bus"):
        return Confinement(obstacle="this user has no message bus to ask systemd", mend="install dbus-user-session, and log in again")
    own = f"{CGROUPS}/user.slice/user-{who.uid}.slice/user@{who.uid}.service"
    return Confinement(way="scope", place=who.bus or f"unix:path={who.runtime_dir}/bus", controllers=_controllers(tree, own))


def _controllers(tree: HostTree, directory: str) -> frozenset[str]:
    return frozenset(tree.text(f"{directory}/cgroup.controllers").split())


def version_line(tree: HostTree) -> CheckLine:
    """Whether the kernel's cgroups are those that can be given away."""
    offered = tree.text(f"{CGROUPS}/cgroup.controllers").split()
    if not tree.exists(f"{CGROUPS}/cgroup.controllers"):
        return TOPIC.warned("cgroups", "version 2 is not in use", MEANING, BOOT)
    missing = [name for name in CONTROLLERS if name not in offered]
    if missing:
        mend = "boot the kernel without cgroup_disable=, or with these controllers"
        return TOPIC.warned("cgroups", f"version 2, without {', '.join(missing)}", "Limits that need these are refused.", mend)
    return TOPIC.passed("cgroups", f"version 2, with {', '.join(CONTROLLERS)}")


def way_line(found: Confinement, answer: str | None) -> CheckLine:
    """Whether a daemon of this user can set limits; `answer` is what the manager of systemd says of its version, if it answers."""
    if found.way is None:
        return TOPIC.warned("way", found.obstacle, MEANING, found.mend)
    if found.way == "scope" and answer is None:
        return TOPIC.warned("way", f"systemd does not answer on {found.place}", MEANING, "see whether its message bus runs")
    name = f"scopes of systemd {answer}" if found.way == "scope" else f"cgroups below {found.place}"
    missing = [name for name in CONTROLLERS if name not in found.controllers]
    if missing:
        mend = f"systemctl edit user@.service, with Delegate={' '.join(CONTROLLERS)}" if found.way == "scope" else DELEGATE
        return TOPIC.warned("way", f"{name}, without {', '.join(missing)}", "Limits that need these are refused.", mend)
    return TOPIC.passed("way", name)
