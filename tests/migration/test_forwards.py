"""The ports of a machine that came are made in a QEMU that was launched without them, once, and what cannot be is said."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from qmpd.forwards import ANY, in_force, remake
from qmpd.monitor import Monitor
from qmpd.spec import Forward, MachineSpec, UserNic
from tests.process.emulator import emulators_in

pytestmark = pytest.mark.qemu

NETDEVS = ("-netdev", '{"type":"user","id":"net0"}', "-netdev", '{"type":"user","id":"net1"}')


def spec_with(*nics: tuple[Forward, ...]) -> MachineSpec:
    return MachineSpec(name="one", board="x86_64-q35", nics=tuple(UserNic(forwards=forwards) for forwards in nics))


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that somebody has."""
    with closing(socket.socket()) as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        yield held.getsockname()[1]


async def leads_somewhere(port: int) -> bool:
    with closing(socket.socket()) as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


async def test_forwards_are_made_once_and_those_that_cannot_be_are_named(directory: Path, taken: int, free_port: int) -> None:
    spec = spec_with(
        (Forward(guest_port=22), Forward(guest_port=22, host_port=free_port), Forward(guest_port=22)),
        (Forward(guest_port=53, protocol="udp", host_address=ANY), Forward(guest_port=80, host_port=taken)),
    )
    async with emulators_in(directory) as emulators:
        started = await emulators.start(*NETDEVS, machine="q35")
        async with started.session() as monitor:
            assert await in_force(monitor, spec) == ()
            made = await remake(monitor, spec)
            (warning,) = made.warnings
            assert f"port 127.0.0.1:{taken}/tcp of this host does not lead to port 80 of the guest: Could not set up" in warning
            guests = sorted((forward.protocol, forward.host_address, forward.guest_port) for forward in made.forwards)
            assert guests == [("tcp", "127.0.0.1", 22)] * 3 + [("udp", ANY, 53)]
            ports = {forward.host_port for forward in made.forwards}
            assert free_port in ports
            assert 0 not in ports
            assert len(ports) == 4
            assert all([await leads_somewhere(forward.host_port) for forward in made.forwards if forward.protocol == "tcp"])
            again = await remake(monitor, spec)
            assert again == made


async def test_a_netdev_that_is_not_there_is_a_warning_and_no_forwards_are_no_question(directory: Path) -> None:
    async with emulators_in(directory) as emulators:
        started = await emulators.start(machine="q35")
        async with started.session() as monitor:
            made = await remake(monitor, spec_with((Forward(guest_port=22),)))
            assert made.forwards == ()
            assert "net0" in made.warnings[0]
            assert (await remake(Nobody(), spec_with(()))).forwards == ()


class Nobody(Monitor):
    """Answers nothing."""

    def __init__(self) -> None:
        pass
