from __future__ import annotations

import io
import sys
import tomllib
from datetime import UTC, datetime
from pathlib import Path

import click
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpctl.consoles import unescaped
from qmpctl.documents import absolute, decoded, is_name, read, spec_of, structural_problems, toml_of
from qmpctl.machines import chord_of, qmp_arguments
from qmpctl.tables import ago, plain, printable, size
from qmpctl.terminal import control_key, key_name
from qmpctl.wishes import Wishes, spec_from
from qmpd.errors import Invalid, Problem, QmpdError, Undecodable
from qmpd.spec import BiosFirmware, Forward, ImageDisk, Kernel, MachineSpec, NoFirmware, UserNic, VncDisplay

TOML = """
name = "lab"
board = "riscv64-virt"
[kernel]
image = "boot/Image"
initrd = "/abs/initrd"
[firmware]
kind = "bios"
path = "fw.bin"
[[disks]]
kind = "image"
path = "../disk.img"
format = "raw"
"""


def problems(tree: dict[str, object]) -> dict[str, str]:
    return {problem.path: problem.message for problem in structural_problems(tree)}


def test_relative_paths_of_a_file_begin_where_the_file_is(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "lab.toml").write_text(TOML)
    spec = read(str(tmp_path / "deep" / "lab.toml"))
    root = tmp_path.resolve()
    assert spec.kernel == Kernel(image=f"{root}/deep/boot/Image", initrd="/abs/initrd")
    assert spec.firmware == BiosFirmware(path=f"{root}/deep/fw.bin")
    assert spec.disks == (ImageDisk(path=f"{root}/disk.img", format="raw"),)


def test_a_path_to_a_symbolic_link_is_not_resolved(tmp_path: Path) -> None:
    (tmp_path / "current").symlink_to("v1")
    assert absolute("current", tmp_path.resolve()) == f"{tmp_path.resolve()}/current"
    assert absolute("/a/../b", tmp_path) == "/a/../b"


@pytest.mark.parametrize("suffix", ["toml", "json", "msgpack"])
def test_a_definition_reads_the_same_in_every_format(tmp_path: Path, suffix: str) -> None:
    tree = tomllib.loads(TOML)
    data = {"toml": TOML.encode(), "json": msgspec.json.encode(tree), "msgpack": msgspec.msgpack.encode(tree)}[suffix]
    (tmp_path / f"lab.{suffix}").write_bytes(data)
    assert read(str(tmp_path / f"lab.{suffix}"), name="other") == spec_of(tree, tmp_path.resolve(), name="other")


@pytest.mark.parametrize(
    "data", [b'name="a"\nboard="b"', b' {"name":"a","board":"b"}', msgspec.msgpack.encode({"name": "a", "board": "b"})]
)
def test_the_format_of_stdin_is_told_by_its_first_byte(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    assert read("-") == MachineSpec(name="a", board="b")


@pytest.mark.parametrize(
    ("data", "suffix"),
    [
        (b"name = ", ".toml"),
        (b"\xff\xfe", ".toml"),
        (b"{", ".json"),
        (b"[1]", ".json"),
        (b"\xc1", ".msgpack"),
        (b"x", ".yaml"),
        (b"", ".json"),
    ],
)
def test_what_is_no_document_is_said_with_the_name_of_the_file(data: bytes, suffix: str) -> None:
    with pytest.raises(Undecodable, match=r"^lab\.x: "):
        decoded(data, suffix, "lab.x")


def test_deep_nesting_is_no_document() -> None:
    with pytest.raises(Undecodable):
        decoded(b"[" * 100_000, ".json", "x")


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(QmpdError, match=r"none\.toml: No such file"):
        read(str(tmp_path / "none.toml"))


def test_all_structural_problems_are_found_in_one_go() -> None:
    tree: dict[str, object] = {
        "name": "UPPER",
        "board": "b",
        "memroy_mib": 4,
        "cpu": {"count": "two", "modle": "x"},
        "disks": [{"kind": "image", "path": "/d", "format": "vmdk"}, {"kind": "image", "path": 5, "format": "raw"}],
        "autostart": "yes",
    }
    found = problems(tree)
    assert found.keys() == {
        "$.name", "$.memroy_mib", "$.cpu.count", "$.cpu.modle", "$.disks[0].format", "$.autostart"
    }  # fmt: skip
    assert found["$.memroy_mib"] == "there is no such field"
    assert found["$.autostart"] == "expected `bool`, got `str`"


def test_a_missing_field_is_a_problem_of_its_own_and_a_removed_one_is_not() -> None:
    assert problems({"board": "b"}) == {"$.name": "this field is required"}
    assert problems({"name": 5, "board": "b"}) == {"$.name": "expected `str`, got `int`"}


def test_problems_that_cannot_be_taken_out_end_the_search() -> None:
    assert problems({"name": "a", "board": "b", "boot_order": ["disk", "moon"]}) == {"$.boot_order[1]": "invalid enum value 'moon'"}
    assert len(problems({"name": "a", "board": "b", "labels": {"!": "x", "?": "y"}})) == 1


def test_an_invalid_definition_raises_with_every_problem() -> None:
    with pytest.raises(Invalid) as caught:
        spec_of({"name": "a", "board": "b", "x": 1, "y": 2}, Path("/"))
    assert caught.value.problems == tuple(Problem(path=f"$.{name}", message="there is no such field") for name in "xy")


def test_toml_written_is_read_back_as_the_same_definition() -> None:
    spec = MachineSpec(
        name="lab",
        board="b",
        title='quo"ted',
        machine_options={"a": True, "b": 3, "c": "x"},
        kernel=Kernel(image="/k", append="a=1 b"),
        disks=(ImageDisk(path="/d.img", format="raw", read_only=True), ImageDisk(path="/e", format="qcow2")),
        nics=(UserNic(forwards=(Forward(guest_port=22),)),),
        devices=({"driver": "x", "nested": {"y": [1, 2]}},),
        display=VncDisplay(),
    )
    assert spec_of(tomllib.loads(toml_of(spec)), Path("/")) == spec


def test_a_null_cannot_be_written_as_toml() -> None:
    with pytest.raises(QmpdError, match="--format json"):
        toml_of(MachineSpec(name="a", board="b", devices=({"driver": None},)))


@pytest.mark.parametrize(
    ("text", "name"), [("lab", True), ("lab.toml", False), ("./lab", False), ("-", False), ("LAB", False), ("a-b2", True)]
)
def test_a_file_and_a_machine_are_told_apart_by_their_names(text: str, name: bool) -> None:
    assert is_name(text) is name


def test_options_become_a_definition(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    here = str(tmp_path.resolve())
    wishes = Wishes(
        kernel="Image",
        append="quiet",
        disks=("a,,b.qcow2", "c.bin,format=raw,bus=virtio,ro"),
        cdroms=("cd.iso",),
        memory=512,
        cpus=2,
        cpu="max",
        forwards=("2222:22", "127.0.0.2:53:5353/udp"),
        rng=True,
        vnc=True,
        bios="none",
        devices=('{"driver":"x"}',),
    )
    spec = spec_from("riscv64-virt", wishes, "lab")
    assert spec.kernel == Kernel(image=f"{here}/Image", append="quiet")
    assert spec.disks == (
        ImageDisk(path=f"{here}/a,b.qcow2", format="qcow2"),
        ImageDisk(path=f"{here}/c.bin", format="raw", bus="virtio", read_only=True),
        ImageDisk(path=f"{here}/cd.iso", format="raw", media="cdrom", read_only=True),
    )
    forwards = (
        Forward(guest_port=22, host_port=2222),
        Forward(guest_port=5353, host_port=53, protocol="udp", host_address="127.0.0.2"),
    )
    assert spec.nics == (UserNic(forwards=forwards),)
    assert (spec.memory_mib, spec.cpu.count, spec.cpu.model, spec.rng) == (512, 2, "max", True)
    assert (spec.firmware, spec.display, spec.devices) == (NoFirmware(), VncDisplay(), ({"driver": "x"},))


def test_no_options_leave_everything_to_the_board() -> None:
    assert spec_from("b", Wishes(), "lab") == MachineSpec(name="lab", board="b")


@pytest.mark.parametrize(
    "wishes",
    [
        Wishes(disks=("disk.vmdk",)),
        Wishes(disks=("a.img,speed=fast",)),
        Wishes(disks=("a.img,bus=",)),
        Wishes(forwards=("22",)),
        Wishes(forwards=("1:2",), nic="none"),
        Wishes(append="quiet"),
        Wishes(devices=("{",)),
        Wishes(devices=("[1]",)),
    ],
)
def test_options_that_make_no_sense_are_wrong_usage(wishes: Wishes) -> None:
    with pytest.raises(click.UsageError):
        spec_from("b", wishes, "lab")


def test_options_with_wrong_values_are_an_invalid_definition() -> None:
    with pytest.raises(Invalid) as caught:
        spec_from("b", Wishes(forwards=("99999:22",)), "lab")
    assert [problem.path for problem in caught.value.problems] == ["$.nics[0].forwards[0].host_port"]


def test_qmp_arguments_are_json_or_pairs() -> None:
    assert qmp_arguments(['{"a": {"b": null}}']) == {"a": {"b": None}}
    pairs = ["n=5", "t=true", "word=on", 's="7"', "deep.er.x=[1]", "deep.y=a=b", "big=18446744073709551615"]
    assert qmp_arguments(pairs) == {"n": 5, "t": True, "word": "on", "s": "7", "deep": {"er": {"x": [1]}, "y": "a=b"}, "big": 2**64 - 1}
    assert qmp_arguments([]) == {}


@pytest.mark.parametrize("words", [["{"], ["x"], ["=1"], ["a=1", "a.b=2"]])
def test_qmp_arguments_that_make_no_sense_are_wrong_usage(words: list[str]) -> None:
    with pytest.raises(click.UsageError):
        qmp_arguments(words)


def test_chords_take_the_names_people_use() -> None:
    assert chord_of("Ctrl-Alt-Del") == ("ctrl", "alt", "delete")
    assert chord_of("enter") == ("ret",)
    with pytest.raises(click.UsageError):
        chord_of("ctrl-")


def test_typed_text_understands_backslashes() -> None:
    assert unescaped(r"root\n\x1b[A\\n\q\t") == "root\n\x1b[A\\n\\q\t"


@pytest.mark.parametrize(("text", "key"), [("^]", b"\x1d"), ("^a", b"\x01"), ("^?", b"\x7f"), ("~", b"~"), ("none", None)])
def test_the_escape_key_is_written_as_people_do(text: str, key: bytes | None) -> None:
    assert control_key(text) == key


@pytest.mark.parametrize("text", ["", "ctrl-]", "^é", "^^^", "é"])
def test_other_keys_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a key"):
        control_key(text)


def test_keys_are_called_what_is_on_the_keyboard() -> None:
    assert [key_name(key) for key in (b"\x1d", b"\x7f", b"~")] == ["Ctrl-]", "Delete", "~"]


@given(st.text())
def test_escaped_text_has_nothing_that_steers_a_terminal(text: str) -> None:
    assert printable(text).isprintable()


def test_escaped_text_is_readable() -> None:
    assert printable("\x1b[31mröd\u202e\r\n\U000e0041\ud800") == r"\x1b[31mröd\u202e\r\n\U000e0041\ud800"


def test_a_plain_table_is_aligned_and_complete() -> None:
    assert plain(("A", "B"), [("long-name", "x"), ("n", "\x07")]) == ["A          B", "long-name  x", r"n          \x07"]
    assert plain(("A",), []) == ["A"]


def test_ages_and_sizes_are_for_people() -> None:
    now = datetime(2026, 1, 2, 12, 0, 0, tzinfo=UTC)
    assert [ago(text, now) for text in ("2026-01-02T11:59:58Z", "2026-01-01T10:30:00+00:00", "2026-01-02T11:59:00", "soon", None)] == [
        "2s",
        "1d1h",
        "1m",
        "soon",
        "",
    ]
    assert ago("2030-01-01T00:00:00Z", now) == "0s"
    assert (size(512), size(2048), size(1500)) == ("512 MiB", "2 GiB", "1500 MiB")
