"""What a copy has of its own: a name, a UUID, MAC addresses; and what is said of the rest."""

from __future__ import annotations

import msgspec

from qmpd.migration.discrepancy import found
from qmpd.migration.identity import copy_findings, mended_for_copy, renewed
from qmpd.spec import DisconnectedNic, Forward, MachineSpec, Tpm, UserNic

UUIDS = ("00000000-0000-4000-8000-000000000001", "00000000-0000-4000-8000-000000000002")
MACS = ("52:54:00:00:00:01", "52:54:00:00:00:02")
ORIGINAL = MachineSpec(
    name="web",
    board="x86_64-q35",
    uuid="00000000-0000-4000-8000-00000000000f",
    nics=(UserNic(mac=MACS[0], forwards=(Forward(guest_port=22, host_port=2222),)), DisconnectedNic(mac=MACS[1])),
    devices=({"driver": "e1000e", "mac": "52:54:00:00:00:03"}, {"driver": "edu"}),
    extra_args=("-device", "e1000,mac=52:54:00:00:00:04", "-no-hpet"),
    labels={"tier": "web"},
    tpm=Tpm(),
    autostart=True,
    protected=True,
)


def test_a_copy_has_another_identity_and_all_else_of_its_original() -> None:
    copy = renewed(ORIGINAL, "web2", UUIDS[0])
    macs = [nic.mac for nic in copy.nics]
    assert (copy.name, copy.uuid, copy.autostart) == ("web2", UUIDS[0], False)
    assert len(set(macs)) == 2
    assert not set(macs) & set(MACS)
    assert macs != [nic.mac for nic in renewed(ORIGINAL, "web2", UUIDS[1]).nics]
    assert copy.nics[0].forwards == ORIGINAL.nics[0].forwards  # type: ignore[union-attr]
    same = msgspec.structs.replace(copy, name="web", uuid=ORIGINAL.uuid, nics=ORIGINAL.nics, autostart=True)
    assert same == ORIGINAL


def test_what_is_otherwise_and_what_is_not_is_said() -> None:
    copy = renewed(ORIGINAL, "web2", UUIDS[0])
    assert [(one.severity, one.code, one.path) for one in copy_findings(ORIGINAL, copy)] == [
        ("info", "mac-new", "$.nics[0]"),
        ("info", "mac-new", "$.nics[1]"),
        ("warning", "mac-kept", "$.devices[0]"),
        ("warning", "mac-kept", "$.extra_args[1]"),
        ("info", "tpm-kept", "$.tpm"),
        ("info", "autostart-off", "$.autostart"),
    ]


def test_the_ways_out_are_those_of_a_copy() -> None:
    mended = mended_for_copy(
        (found("error", "name-taken", "it is", mend="rename one"), found("error", "no-space", "none", mend="make room"))
    )
    assert [one.mend for one in mended] == ["give the copy another name (--as NAME)", "make room"]
