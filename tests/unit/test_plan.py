"""From a definition to a command: what the golden files of the boards do not show."""

from __future__ import annotations

import json
from collections.abc import Mapping

import msgspec
import pytest

from qmpd.facts import AcceleratorFacts, EmulatorFacts, MachineType, World
from qmpd.plan import LaunchPlan, console_port, mac_address, plan, resolve, serial_ports
from qmpd.spec import MachineSpec, SerialConsole, SerialNone
from tests.unit.toy import WORLD, board_of, spec_of


def planned(spec: Mapping[str, object], board: Mapping[str, object] | None = None, world: World = WORLD) -> LaunchPlan:
    return plan(spec_of(spec), board_of(board or {}), world)


def values(made: LaunchPlan, name: str) -> list[str | None]:
    """The values of an option, in order."""
    return [option.value for option in made.options_by_hand() if option.name == name]


def documents(made: LaunchPlan, name: str) -> list[dict[str, object]]:
    return [json.loads(value or "") for value in values(made, name)]


def test_every_kept_port_is_a_pipe_to_the_log() -> None:
    made = planned({"serial_ports": [{"kind": "console"}, {"kind": "none"}, {"kind": "console"}]})
    assert {name: pipe.path for name, pipe in made.serial_pipes().items()} == {"serial0": "/run/m/serial0", "serial2": "/run/m/serial2"}
    assert "pipe,id=serial2,path=/run/m/serial2" in made.argv({"qmp": 10, "rescue": 11})


def test_every_socket_is_bound_by_the_daemon_and_passed() -> None:
    made = planned({})
    assert made.listeners() == {name: f"/run/m/{name}.sock" for name in ("qmp", "rescue")}
    descriptors = {name: number for number, name in enumerate(made.listeners(), 10)}
    words = made.argv(descriptors)
    assert words[0] == WORLD.emulator.path
    for name, number in descriptors.items():
        assert any(word.startswith(f"socket,id={name},fd={number},server=on") for word in words)
    assert not any(word.startswith("socket,") and "path=" in word for word in words)


def test_a_comma_in_a_path_ends_nothing() -> None:
    paths = msgspec.structs.replace(WORLD.paths, run="/run/a,b", state="/var/c,d")
    made = planned({"display": {"kind": "vnc"}}, world=msgspec.structs.replace(WORLD, paths=paths))
    assert values(made, "vnc") == ["unix:/run/a,,b/vnc.sock"]
    assert "socket,id=qmp,path=/run/a,,b/qmp.sock,server=on,wait=off" in values(made, "chardev")
    assert any("logfile=/var/c,,d/serial0.log,logappend=on" in (value or "") for value in values(made, "chardev"))


@pytest.mark.parametrize(
    ("spec", "world", "accel", "reason"),
    [
        ({"accel": "kvm"}, {}, "kvm", "asked for by the definition"),
        ({"accel": "tcg"}, {}, "tcg", "asked for by the definition"),
        ({}, {"host_arch": "riscv64"}, "tcg", "no KVM for this board on a riscv64 host"),
        (
            {},
            {"emulator": msgspec.structs.replace(WORLD.emulator, accelerators=frozenset({"tcg"}))},
            "tcg",
            "/usr/bin/qemu-system-toy was built without KVM",
        ),
        ({}, {"kvm": AcceleratorFacts(usable=False, reason="ten times slower")}, "tcg", "ten times slower"),
        ({}, {}, "kvm", "measured"),
    ],
)
def test_the_accelerator_is_chosen_by_what_was_measured(spec: dict[str, object], world: dict[str, object], accel: str, reason: str) -> None:
    made = planned(spec, world=msgspec.structs.replace(WORLD, **world))
    assert (made.accel, made.accel_reason) == (accel, reason)
    assert values(made, "accel") == [accel]


def test_under_kvm_a_board_may_have_another_cpu() -> None:
    assert values(planned({}, {"kvm_cpu": "toy-host"}), "cpu") == ["toy-host"]
    assert values(planned({"accel": "tcg"}, {"kvm_cpu": "toy-host"}), "cpu") == ["toy-cpu"]
    assert values(planned({"cpu": {"model": "toy-cpu-v2"}}, {"kvm_cpu": "toy-host"}), "cpu") == ["toy-cpu-v2"]
    assert values(planned({}, {"cpu": None}), "cpu") == []


def test_a_machine_type_is_pinned_to_its_version() -> None:
    assert resolve(spec_of({}), board_of({}), WORLD).machine == "toyboard-7.2"
    unknown = msgspec.structs.replace(WORLD, emulator=msgspec.structs.replace(WORLD.emulator, machines=()))
    assert resolve(spec_of({}), board_of({}), unknown).machine == "toyboard"


def test_an_emulator_is_asked_for_what_it_has() -> None:
    bare = planned({})
    assert values(bare, "sandbox") == values(bare, "action") == []
    emulator = msgspec.structs.replace(WORLD.emulator, options=frozenset({"sandbox", "action"}))
    able = planned({}, world=msgspec.structs.replace(WORLD, emulator=emulator))
    assert values(able, "action") == ["panic=pause"]
    assert (values(able, "sandbox")[0] or "").startswith("on,")


def test_only_what_is_not_as_qemu_would_have_it_is_said_of_actions() -> None:
    emulator = msgspec.structs.replace(WORLD.emulator, options=frozenset({"action"}))
    able = msgspec.structs.replace(WORLD, emulator=emulator)
    wanted = {"panic": "exit-failure", "reboot": "shutdown", "shutdown": "poweroff", "watchdog": "pause"}
    assert values(planned({"actions": wanted}, world=able), "action") == ["panic=exit-failure,reboot=shutdown,watchdog=pause"]


def test_a_tpm_is_the_boards_first_or_the_one_that_is_named() -> None:
    made = planned({"tpm": {}})
    assert documents(made, "device") == [{"driver": "isa-debugcon", "id": "tpm0", "tpmdev": "tpm0-backend"}]
    assert values(made, "tpmdev") == ["emulator,id=tpm0-backend,chardev=tpm0-control"]
    assert "socket,id=tpm0-control,path=/run/m/tpm.sock" in values(made, "chardev")
    assert documents(planned({"tpm": {"model": "vga"}}, {"tpms": ["isa-debugcon", "vga"]}), "device")[0]["driver"] == "vga"
    assert planned({}).tpm is None


def test_a_tpm_is_reached_through_a_socket_that_is_passed_also_when_nothing_else_is() -> None:
    made = planned({"tpm": {}}).detached()
    assert made.tpm is not None
    assert made.tpm.line.id == "tpm0-control"
    assert "socket,id=tpm0-control,fd=9" in made.argv({"tpm0-control": 9})
    assert made.tpm.argv(7)[-3:] == ("--ctrl", "type=unixio,clientfd=7", "--terminate")
    assert made.by_hand().startswith("/usr/bin/swtpm socket --tpm2 --tpmstate dir=/var/m/tpm,mode=0600 ")


def test_a_watchdog_is_the_boards_first_or_the_one_that_is_named() -> None:
    board = {"watchdogs": ["i6300esb", "ib700"], "device_bus": "pci.1"}
    assert documents(planned({"watchdog": {}}, board), "device") == [{"driver": "i6300esb", "id": "watchdog0", "bus": "pci.1"}]
    assert documents(planned({"watchdog": {"model": "ib700"}}, board), "device") == [{"driver": "ib700", "id": "watchdog0"}]


@pytest.mark.parametrize(
    ("policy", "told"),
    [
        ("enospc", {}),
        ("stop", {"werror": "stop", "rerror": "stop"}),
        ("report", {"werror": "report", "rerror": "report"}),
        ("ignore", {"werror": "ignore", "rerror": "ignore"}),
    ],
)
def test_what_becomes_of_a_disks_errors_is_said_where_qemu_would_not_do_it(policy: str, told: dict[str, str]) -> None:
    board = {"disks": {"pci": {"device": "virtio-blk-pci"}}}
    (device,) = documents(planned({"disks": [{"kind": "image", "path": "/f", "format": "raw", "on_error": policy}]}, board), "device")
    assert device == {"driver": "virtio-blk-pci", "id": "disk0", "drive": "disk0-image", **told}


@pytest.mark.parametrize(("version", "silent"), [("7.2.22", []), ("8.2.0", []), ("9.0.0", ["none"]), ("11.0.50", ["none"])])
def test_sound_plays_nowhere(version: str, silent: list[str]) -> None:
    emulator = msgspec.structs.replace(WORLD.emulator, version=version)
    assert values(planned({}, world=msgspec.structs.replace(WORLD, emulator=emulator)), "audio") == silent


def test_the_definitions_machine_options_win_over_the_boards() -> None:
    made = planned({"machine_options": {"a": True, "c": "x,y"}}, {"machine_options": {"a": False, "b": 1}})
    assert values(made, "machine") == ["toyboard-7.2,a=on,b=1,c=x,,y"]


def test_the_console_is_put_in_front_of_the_kernels_command_line() -> None:
    board = {"kernel": {"formats": ["ELF"], "append": "quirk=1"}, "console": {"kernel": "ttyT0"}}
    assert values(planned({"kernel": {"image": "/e", "append": "quiet"}}, board), "append") == ["console=ttyT0 quirk=1 quiet"]
    assert values(planned({"kernel": {"image": "/e", "console": False}}, board), "append") == []


def test_a_disk_in_a_slot_of_the_board_is_a_drive() -> None:
    slot = {"kind": "image", "path": "/f", "format": "raw", "bus": "slot"}
    made = planned({"disks": [{**slot, "read_only": True}, {**slot, "media": "cdrom"}]})
    assert values(made, "drive") == [
        "if=ide,index=0,id=disk0,format=raw,read-only=on,file.driver=file,file.filename=/f",
        "if=ide,index=1,id=disk1,media=cdrom,format=raw,read-only=on,file.driver=file,file.filename=/f",
    ]


def test_a_controller_comes_once_before_the_first_of_its_disks() -> None:
    board = {"disks": {"scsi": {"device": "hd", "controller": "hba", "needs_serial": True}}, "default_disk": "scsi", "device_bus": "pci.1"}
    blank = {"kind": "blank", "size_mib": 1, "format": "raw", "discard": False}
    made = planned({"disks": [blank, {**blank, "serial": "S1"}]}, board)
    assert documents(made, "device") == [
        {"driver": "hba", "id": "scsi-controller", "bus": "pci.1"},
        {"driver": "hd", "id": "disk0", "drive": "disk0-image", "bus": "scsi-controller.0", "serial": "disk0"},
        {"driver": "hd", "id": "disk1", "drive": "disk1-image", "bus": "scsi-controller.0", "serial": "S1"},
    ]
    assert [image.path for image in made.blank_images] == ["/var/m/disk0.raw", "/var/m/disk1.raw"]
    assert "discard" not in documents(made, "blockdev")[0]


@pytest.mark.parametrize("base_format", ["raw", "qcow2"])
def test_what_lies_below_an_image_is_named_in_full(base_format: str) -> None:
    board = {"disks": {"hd": {"device": "hd"}, "card": {"drive_interface": "sd"}}, "default_disk": "hd"}
    image = {"kind": "image", "path": "/d", "format": "qcow2", "base": {"path": "/b", "format": base_format}}
    made = planned({"disks": [image, {**image, "bus": "card"}]}, board)
    below = {"driver": base_format, "read-only": True, "file": {"driver": "file", "filename": "/b"}}
    (node,) = documents(made, "blockdev")
    assert node["backing"] == below | ({"backing": None} if base_format == "qcow2" else {})
    card = next(word for word in made.by_hand().split() if "if=sd" in word)
    assert f"backing.driver={base_format},backing.file.driver=file,backing.file.filename=/b,backing.read-only=on" in card


def test_every_layer_below_an_image_is_named_in_full() -> None:
    board = {"disks": {"hd": {"device": "hd"}, "card": {"drive_interface": "sd"}}, "default_disk": "hd"}
    lowest = {"path": "/c", "format": "qcow2"}
    image = {"kind": "image", "path": "/d", "format": "qcow2", "base": {"path": "/b", "format": "qcow2", "base": lowest}}
    made = planned({"disks": [image, {**image, "bus": "card"}]}, board)
    (node,) = documents(made, "blockdev")
    named = {name: {"driver": "qcow2", "read-only": True, "file": {"driver": "file", "filename": name}} for name in ("/b", "/c")}
    assert node["backing"] == named["/b"] | {"backing": named["/c"] | {"backing": None}}
    card = next(word for word in made.by_hand().split() if "if=sd" in word)
    assert "backing.backing.file.filename=/c" in card
    assert "backing.backing.read-only=on" in card


def test_disks_are_spread_over_the_units_of_a_bus() -> None:
    board = {"disks": {"ide": {"device": "hd", "bus": "ide.{index}", "units": 2}}, "default_disk": "ide"}
    made = planned({"disks": [{"kind": "blank", "size_mib": 1}] * 3}, board)
    assert [device["bus"] for device in documents(made, "device")] == ["ide.0", "ide.0", "ide.1"]


def test_the_boot_order_counts_through_all_kinds() -> None:
    spec = {
        "boot_order": ["network", "disk"],
        "disks": [{"kind": "blank", "size_mib": 1}, {"kind": "image", "path": "/f", "format": "raw", "bus": "cd", "media": "cdrom"}] * 2,
        "nics": [{"kind": "none"}, {"kind": "none"}],
    }
    indexes = {str(device["id"]): device.get("bootindex") for device in documents(planned(spec), "device")}
    assert indexes == {"nic0": 0, "nic1": 1, "disk0": 2, "disk1": None, "disk2": 3, "disk3": None}


def test_a_nic_on_the_board_is_connected_and_not_added() -> None:
    made = planned({"nics": [{"kind": "user", "restrict": True, "model": "soldered", "mac": "52:54:00:00:00:01"}]})
    assert values(made, "net") == ["nic,model=eth,netdev=net0,macaddr=52:54:00:00:00:01"]
    assert documents(made, "netdev") == [{"type": "user", "id": "net0", "restrict": True}]


def test_addresses_are_the_same_for_the_same_machine_and_different_otherwise() -> None:
    nics = [{"kind": "none"}, {"kind": "none"}]
    one, other = spec_of({"nics": nics}), spec_of({"nics": nics, "name": "two"})
    assert mac_address(one, 0) == mac_address(spec_of({"nics": nics}), 0)
    assert len({mac_address(spec, index) for spec in (one, other) for index in (0, 1)}) == 4
    assert mac_address(one, 0).startswith("52:54:00:")


def test_what_was_not_validated_is_not_planned() -> None:
    with pytest.raises(ValueError, match="disk 0 has no bus"):
        planned({"disks": [{"kind": "blank", "size_mib": 1, "bus": "nosuch"}]})
    with pytest.raises(ValueError, match=r"NIC 0 \(nosuch\)"):
        planned({"nics": [{"kind": "none", "model": "nosuch"}]})


@pytest.mark.parametrize(
    ("display", "hints", "vga", "drivers"),
    [
        ({"kind": "none"}, {}, [], []),
        ({"kind": "none"}, {"vga": "none"}, ["none"], []),
        ({"kind": "vnc"}, {"device": "vga"}, [], ["vga"]),
        ({"kind": "vnc"}, {"vnc_vga": "std"}, ["std"], []),
        ({"kind": "vnc", "device": "vga-old"}, {"vnc_vga": "std"}, [], ["vga-old"]),
        ({"kind": "vnc"}, {"on_board": True}, [], []),
    ],
)
def test_a_display_is_what_the_board_can_show(
    display: dict[str, object], hints: dict[str, object], vga: list[str], drivers: list[str]
) -> None:
    made = planned({"display": display}, {"display": hints})
    assert values(made, "display") == ["none"]
    assert values(made, "vga") == vga
    assert [device["driver"] for device in documents(made, "device")] == drivers
    assert len(values(made, "vnc")) == (display["kind"] == "vnc")


@pytest.mark.parametrize(
    ("ports", "index", "console"),
    [([], 0, 0), ([], 2, 2), (["console", "console"], 1, 1), (["none", "console"], 0, 1), (["none"], 0, None)],
)
def test_the_console_is_the_boards_port_or_the_first_that_is_kept(ports: list[str], index: int, console: int | None) -> None:
    spec, board = spec_of({"serial_ports": [{"kind": port} for port in ports]}), board_of({"console": {"serial_index": index}}).board
    assert console_port(spec, board) == console
    if not ports:
        assert serial_ports(spec, board) == (*[SerialNone()] * index, SerialConsole())


def test_uefi_variables_are_the_machines_own() -> None:
    made = planned({"firmware": {"kind": "pflash", "code": "/f", "vars": "/g"}})
    assert [(copy.source, copy.target) for copy in made.copies] == [("/g", "/var/m/firmware-vars.fd")]
    assert values(made, "machine") == ["toyboard-7.2,pflash0=pflash0,pflash1=pflash1"]
    assert [(node["node-name"], node["read-only"]) for node in documents(made, "blockdev")] == [("pflash0", True), ("pflash1", False)]


def test_firmware_is_left_to_the_board_unless_somebody_says_something() -> None:
    assert values(planned({}), "bios") == []
    assert values(planned({}, {"firmware": {"default": "none"}}), "bios") == ["none"]
    assert values(planned({"firmware": {"kind": "none"}}), "bios") == ["none"]
    assert values(planned({"firmware": {"kind": "bios", "path": "/f"}}), "bios") == ["/f"]


def test_a_machine_type_is_found_by_name_and_by_alias() -> None:
    emulator = EmulatorFacts(path="", target="", version="", machines=(MachineType(name="a-1", alias="a"), MachineType(name="b")))
    assert [getattr(emulator.machine(name), "name", None) for name in ("a", "a-1", "b", "c")] == ["a-1", "a-1", "b", None]


def test_a_definition_needs_a_name_and_a_board_only() -> None:
    assert msgspec.json.decode(b'{"name": "one", "board": "toy"}', type=MachineSpec) == spec_of({})
    assert planned({}).directories == ("/run/m", "/var/m")
