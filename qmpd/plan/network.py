"""Fragments for NICs and what they are connected to."""

from __future__ import annotations

import msgspec

from qmpd.argv import Option, document, pairs
from qmpd.plan.disks import boot_index
from qmpd.plan.resolution import Resolved, mac_address, nic_model, on_bus
from qmpd.spec import Forward, MachineSpec, Nic, UserNic


def without_forwards(spec: MachineSpec) -> MachineSpec:
    """A definition for the QEMU of a machine that comes from another host: its ports are forwarded once it is here.

    QEMU takes ports of the host as it starts, and ends where one is taken. The guest knows nothing of them.
    """
    bare = tuple(msgspec.structs.replace(nic, forwards=()) if isinstance(nic, UserNic) else nic for nic in spec.nics)
    return msgspec.structs.replace(spec, nics=bare)


def nics(machine: Resolved) -> list[Option]:
    """All NICs in their order, each with its netdev in front."""
    options: list[Option] = []
    for index, nic in enumerate(machine.spec.nics):
        name, model = nic_model(nic, machine.board)
        if model is None:
            raise ValueError(f"NIC {index} ({name}) does not fit this board: the definition was not validated")
        options.append(_netdev(index, nic))
        mac = mac_address(machine.spec, index)
        if model.on_board is not None:
            options.append(pairs("net", "nic", {"model": model.on_board, "netdev": f"net{index}", "macaddr": mac}))
            continue
        device: dict[str, object] = {"driver": model.device, "id": f"nic{index}", "netdev": f"net{index}", "mac": mac}
        device |= on_bus(machine.board)
        boot = boot_index(machine, "network", index)
        if boot is not None:
            device["bootindex"] = boot
        options.append(document("device", device))
    return options


def _netdev(index: int, nic: Nic) -> Option:
    if not isinstance(nic, UserNic):
        # A hub with a single port: a cable that leads nowhere, without QEMU's warning about a NIC that has no peer.
        return document("netdev", {"type": "hubport", "id": f"net{index}", "hubid": index})
    backend: dict[str, object] = {"type": "user", "id": f"net{index}"}
    if nic.restrict:
        backend["restrict"] = True
    if nic.forwards:
        backend["hostfwd"] = [{"str": forward_rule(forward)} for forward in nic.forwards]
    return document("netdev", backend)


def forward_rule(forward: Forward) -> str:
    """A port forward in the words of QEMU's `hostfwd`."""
    return f"{forward.protocol}:{forward.host_address}:{forward.host_port}-:{forward.guest_port}"
