"""Definitions against boards and facts: what is wrong is found, all of it, and what passes can be planned."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qmpd.facts import AcceleratorFacts, FileFacts, MachineType, World
from qmpd.plan import plan
from qmpd.validation import disk_changes, problems, warnings
from tests.unit.anything import BOARDS, GOOD, specs, worlds
from tests.unit.toy import WORLD, board_of, files, spec_of, told
from tests.unit.toy_definitions import GOOD_ONES, IMAGE, WRONG


@pytest.mark.parametrize("name", GOOD_ONES)
def test_a_good_definition_has_no_problems(name: str) -> None:
    spec, board = GOOD_ONES[name]
    assert told(spec, board) == []


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_told_with_its_place(name: str) -> None:
    spec, board, lines = WRONG[name]
    assert told(spec, board) == lines


def test_a_device_that_nests_without_end_is_refused() -> None:
    nested: object = "x"
    for _ in range(5000):
        nested = [nested]
    (line,) = told({"devices": [{"driver": "vga", "a": nested}]})
    assert line.endswith(": nests too deeply")


FILE_PROBLEMS = {
    "refused": (FileFacts(kind="file", refusal="is not for you"), "/f: is not for you"),
    "missing": (FileFacts(kind="missing"), "/f: no such file"),
    "denied": (FileFacts(kind="denied"), "/f: permission denied"),
    "directory": (FileFacts(kind="directory"), "/f: not a regular file but a directory"),
    "special": (FileFacts(kind="special"), "/f: not a regular file but a special file"),
    "unreadable": (FileFacts(kind="file"), "/f: not readable by the daemon"),
    "unwritable": (
        FileFacts(kind="file", readable=True),
        "/f: not writable by the daemon; set read_only = true to attach it read-only",
    ),
}


@pytest.mark.parametrize("name", FILE_PROBLEMS)
def test_a_file_that_qemu_could_not_open_is_told(name: str) -> None:
    facts, message = FILE_PROBLEMS[name]
    assert told({"disks": [IMAGE]}, world=files(f=facts)) == [f"$.disks[0].path: {message}"]


def test_a_file_that_is_only_read_need_not_be_writable() -> None:
    assert told({"disks": [{**IMAGE, "read_only": True}]}, world=files(f=FileFacts(kind="file", readable=True))) == []


def test_two_names_of_one_image_are_one_image() -> None:
    one, other = (msgspec.structs.replace(GOOD, real_path="/same") for _ in range(2))
    assert told({"disks": [IMAGE, {**IMAGE, "path": "/g"}]}, world=files(f=one, g=other)) == [
        "$.disks[1].path: /g is already disks[0]; both must be read_only for that"
    ]


@pytest.mark.parametrize(
    ("world", "line"),
    [
        (
            msgspec.structs.replace(WORLD, emulator=msgspec.structs.replace(WORLD.emulator, accelerators=frozenset({"tcg"}))),
            "/usr/bin/qemu-system-toy was built without KVM",
        ),
        (msgspec.structs.replace(WORLD, kvm=AcceleratorFacts(usable=False, reason="no device")), "KVM cannot be used: no device"),
    ],
)
def test_kvm_that_is_asked_for_is_refused_where_it_cannot_be(world: World, line: str) -> None:
    assert told({"accel": "kvm"}, world=world) == [f"$.accel: {line}"]


def test_further_options_need_the_daemons_consent() -> None:
    assert told({"extra_args": ["-fda", "/f"]}, world=msgspec.structs.replace(WORLD, raw_options=False)) == [
        "$.extra_args: this daemon does not allow extra_args (setting raw_options)"
    ]


def test_further_devices_open_no_files_without_the_daemons_consent() -> None:
    devices = [
        {"driver": "loader", "addr": 1},
        {"driver": "vga", "romfile": "x", "addr": "1.0"},
        {"driver": "vga", "fine": 7, "anything": "/etc/shadow"},
    ]
    mute = msgspec.structs.replace(WORLD, emulator=msgspec.structs.replace(WORLD.emulator, devices=frozenset()))
    assert told({"devices": devices}, world=mute) == []
    found = told({"devices": devices}, world=msgspec.structs.replace(mute, raw_options=False))
    assert [line.partition(":")[0] for line in found] == ["$.devices[0].driver", "$.devices[1].romfile", "$.devices[2].anything"]


@pytest.mark.parametrize(("target", "initrd", "refused"), [("x86_64", "/a,b", True), ("x86_64", "/a b", True), ("toy", "/a,b", False)])
def test_an_initrd_that_qemu_would_split_is_refused_where_it_would(target: str, initrd: str, refused: bool) -> None:
    emulator = msgspec.structs.replace(WORLD.emulator, target=target)
    world = msgspec.structs.replace(WORLD, emulator=emulator, files={"/e": GOOD, "/a,b": GOOD, "/a b": GOOD})
    assert bool(told({"kernel": {"image": "/e", "initrd": initrd}}, world=world)) is refused


@pytest.mark.parametrize(("length", "fits"), [(95, True), (96, False)])
def test_a_machines_sockets_must_fit_into_an_address(length: int, fits: bool) -> None:
    paths = msgspec.structs.replace(WORLD.paths, run="/" + "r" * (length - 1))
    found = told({}, world=msgspec.structs.replace(WORLD, paths=paths))
    assert [line.partition(":")[0] for line in found] == ([] if fits else ["$.name"])


def test_an_emulator_that_cannot_tell_what_it_has_is_believed() -> None:
    mute = msgspec.structs.replace(WORLD, emulator=msgspec.structs.replace(WORLD.emulator, cpus=(), devices=frozenset()))
    assert told({"cpu": {"model": "anything"}, "devices": [{"driver": "anything"}]}, world=mute) == []


def test_a_long_list_of_choices_is_cut() -> None:
    many = {f"bus{index:02}": {"device": "x"} for index in range(20)}
    (line,) = told({"disks": [{**IMAGE, "bus": "zzz"}]}, {"disks": many, "default_disk": "bus00"})
    assert line.endswith("it has " + ", ".join(f"bus{index:02}" for index in range(12)) + " and 8 more")


def test_a_disk_that_was_made_for_a_machine_stays_as_it_is() -> None:
    blank = {"kind": "blank", "size_mib": 8}
    before = spec_of({"disks": [IMAGE, blank, blank]})
    assert disk_changes(before, spec_of({"disks": [blank, {**blank, "serial": "S1"}, blank, blank]})) == []
    for after in ([IMAGE], [IMAGE, IMAGE, {**blank, "format": "raw"}], [IMAGE, {**blank, "size_mib": 9}]):
        found = disk_changes(before, spec_of({"disks": after}))
        assert [problem.path for problem in found] == ["$.disks[1]", "$.disks[2]"]


def test_what_is_odd_is_told_and_nothing_more() -> None:
    old = msgspec.structs.replace(WORLD.emulator, machines=(MachineType(name="toyboard", deprecated=True),))
    world = msgspec.structs.replace(WORLD, emulator=old, kvm=AcceleratorFacts(usable=False, reason="slow", ratio=0.3))
    spec = spec_of({"accel": "kvm", "disks": [{**IMAGE, "path": "/q"}, IMAGE, {"kind": "blank", "size_mib": 1, "format": "raw"}]})
    assert [f"{problem.path}: {problem.message}" for problem in warnings(spec, board_of({}), world)] == [
        "$.machine: machine type toyboard is deprecated in QEMU 7.2.0",
        "$.accel: KVM was asked for, but slow",
        "$.disks[0].format: /q begins like a qcow2 image, but is used as raw as asked",
    ]
    assert warnings(spec_of({}), board_of({}), WORLD) == []


@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large], deadline=None)
@given(st.data())
def test_whatever_decodes_is_refused_with_reasons_or_can_be_planned(data: st.DataObject) -> None:
    named = data.draw(st.sampled_from(BOARDS))
    spec, world = data.draw(specs(named)), data.draw(worlds(named))
    warnings(spec, named, world)
    found = problems(spec, named, world)
    assert all(problem.path.startswith("$.") and problem.message for problem in found)
    if found:
        return
    made = plan(spec, named, world)
    again = plan(spec, named, world)
    descriptors = {name: number for number, name in enumerate(made.listeners(), 3)}
    assert made.argv(descriptors) == again.argv(descriptors)
    assert made.by_hand() == again.by_hand()
    assert all("\0" not in word for word in made.argv(descriptors))
