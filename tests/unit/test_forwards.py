"""Port forwards are read as QEMU lists them."""

from __future__ import annotations

from qmpd.forwards import ANY, listed
from qmpd.plan import without_forwards
from qmpd.spec import DisconnectedNic, Forward, MachineSpec, UserNic
from qmpd.views import ForwardView

#: As QEMU 7.2 says it; the second NIC as one says it that knows no hubs.
USERNET = """\
Hub -1 (net0):\r
  Protocol[State]    FD  Source Address  Port   Dest. Address  Port RecvQ SendQ\r
  TCP[HOST_FORWARD]   9       127.0.0.1 33971       10.0.2.15    22     0     0\r
  UDP[HOST_FORWARD]   8       127.0.0.1 56926       10.0.2.15    53     0     0\r
net1:\r
  Protocol[State]    FD  Source Address  Port   Dest. Address  Port RecvQ SendQ\r
  TCP[SYN_SENT]      17       127.0.0.1 18099       10.0.2.15    80     0     0\r
  TCP[HOST_FORWARD]  15               * 18299       10.0.2.15    81     0     0\r
  ICMP[4 sec]        20       10.0.2.15     1       127.0.0.1    -     0     0\r
"""


def test_forwards_are_found_among_the_connections() -> None:
    assert listed(USERNET) == {
        "net0": [
            ForwardView(protocol="tcp", host_address="127.0.0.1", host_port=33971, guest_port=22),
            ForwardView(protocol="udp", host_address="127.0.0.1", host_port=56926, guest_port=53),
        ],
        "net1": [ForwardView(protocol="tcp", host_address=ANY, host_port=18299, guest_port=81)],
    }
    assert listed("") == listed("nonsense\n") == {}


def test_a_machine_that_comes_takes_no_ports() -> None:
    cut, plain = UserNic(restrict=True, forwards=(Forward(guest_port=22),)), DisconnectedNic()
    spec = MachineSpec(name="one", board="x", nics=(cut, plain))
    assert without_forwards(spec) == MachineSpec(name="one", board="x", nics=(UserNic(restrict=True), plain))
