"""Port forwards of a QEMU that runs: which are in force, with the ports the system chose, and those of a definition made anew.

QEMU knows them in its human monitor alone: `info usernet` lists them, `hostfwd_add` makes one, and says in words why it does not.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Final, Protocol

import msgspec

from qmpd.errors import QemuRefused
from qmpd.plan.network import forward_rule
from qmpd.spec import Forward, MachineSpec, UserNic
from qmpd.views import ForwardView

#: `Hub -1 (net0):`, in which the hub is not always there.
_NETDEV: Final = re.compile(r"(?:.*\()?(?P<id>[^\s():]+)\)?:")
#: `TCP[HOST_FORWARD]  12       127.0.0.1 45678       10.0.2.15    22     0     0`; the address of all is `*`.
_FORWARD: Final = re.compile(
    r"\s*(?P<protocol>TCP|UDP)\[HOST_FORWARD\]\s+-?\d+\s+(?P<address>\S+)\s+(?P<port>\d+)\s+\S+\s+(?P<guest>\d+)\s+\d+\s+\d+"
)
ANY: Final = "0.0.0.0"  # noqa: S104  what a definition calls all addresses of the host


class Asked(Protocol):
    """A QEMU that answers."""

    async def execute(self, command: str, arguments: Mapping[str, object] | None = None) -> object:
        """As `Monitor.execute`."""


class Remade(msgspec.Struct, frozen=True, kw_only=True):
    """The forwards that are in force now, and a sentence about each that could not be made."""

    forwards: tuple[ForwardView, ...]
    warnings: tuple[str, ...] = ()


def listed(text: str) -> dict[str, list[ForwardView]]:
    """What `info usernet` says, by netdev."""
    found: dict[str, list[ForwardView]] = {}
    netdev = ""
    for line in text.splitlines():
        if forward := _FORWARD.match(line):
            found.setdefault(netdev, []).append(
                ForwardView(
                    protocol=forward["protocol"].lower(),
                    host_address=ANY if forward["address"] == "*" else forward["address"],
                    host_port=int(forward["port"]),
                    guest_port=int(forward["guest"]),
                )
            )
        elif header := _NETDEV.fullmatch(line.strip()):
            netdev = header["id"]
    return found


async def in_force(qemu: Asked, spec: MachineSpec) -> tuple[ForwardView, ...]:
    """The forwards of a machine's NICs. QEMU is asked only if the definition has any."""
    if not any(True for _ in _wanted(spec)):
        return ()
    found = await _found(qemu)
    return tuple(forward for index in range(len(spec.nics)) for forward in found.get(f"net{index}", ()))


async def remake(qemu: Asked, spec: MachineSpec) -> Remade:
    """Makes the forwards of a definition in a QEMU that was launched without them. Those that are there are left; it may be repeated.

    Raises:
        MonitorUnavailable, QemuDied, QemuSilent: QEMU cannot be asked; some may have been made.
    """
    wanted = sorted(_wanted(spec), key=lambda item: item[1].host_port == 0)  # what may be any port must not take the name of a certain one
    if not wanted:
        return Remade(forwards=())
    there = await _found(qemu)
    warnings = []
    for netdev, forward in wanted:
        same = next((one for one in there.get(netdev, ()) if _is(one, forward)), None)
        if same is not None:
            there[netdev].remove(same)
            continue
        said = await _said(qemu, f"hostfwd_add {netdev} {forward_rule(forward)}")
        if said:
            port = f"{forward.host_address}:{forward.host_port}/{forward.protocol}"
            warnings.append(f"port {port} of this host does not lead to port {forward.guest_port} of the guest: {said}")
    return Remade(forwards=await in_force(qemu, spec), warnings=tuple(warnings))


def _wanted(spec: MachineSpec) -> Iterator[tuple[str, Forward]]:
    for index, nic in enumerate(spec.nics):
        if isinstance(nic, UserNic):
            for forward in nic.forwards:
                yield f"net{index}", forward


def _is(there: ForwardView, wanted: Forward) -> bool:
    return (
        there.protocol == wanted.protocol
        and there.host_address == wanted.host_address
        and there.guest_port == wanted.guest_port
        and wanted.host_port in {0, there.host_port}
    )


async def _found(qemu: Asked) -> dict[str, list[ForwardView]]:
    answer = await qemu.execute("human-monitor-command", {"command-line": "info usernet"})
    return listed(str(answer))


async def _said(qemu: Asked, line: str) -> str:
    try:
        return str(await qemu.execute("human-monitor-command", {"command-line": line})).strip()
    except QemuRefused as error:
        return error.message
