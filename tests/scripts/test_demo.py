"""Which machines the demo chooses, and what it says of them."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from qmpd.board import Board, Memory, NamedBoard, ProvenGuest
from qmpd.catalogue import load
from qmpd.spec import BiosFirmware, Kernel
from scripts.lib.demo_boards import BOARDS
from scripts.lib.demo_boots import Boot, plain
from scripts.lib.demo_guests import INSTALLER_APPEND, Showing, Unusable, chosen, default, installer, newest
from scripts.lib.demo_table import failure, fields, table

ROOT = Path(__file__).resolve().parents[2]


def board(name: str, guest: ProvenGuest | None = None) -> NamedBoard:
    described = Board(title=name, arch="arm", emulators=("arm",), machine="virt", memory=Memory(default_mib=128), guest=guest)
    return NamedBoard(id=name, source=f"{name}.toml", board=described)


def guest(
    *,
    seconds: float | None = 1.0,
    packages: tuple[str, ...] = ("some-package",),
    source: str | None = None,
    bios: str | None = None,
    kernel: str | None = None,
    append: str = "",
) -> ProvenGuest:
    return ProvenGuest(
        summary="a guest",
        expect="=> ",
        packages=packages,
        source=source,
        bios=bios,
        kernel=kernel,
        append=append,
        seconds=seconds,
        memory_mib=96,
        machine_options={"secure": False},
        devices=({"driver": "x"},),
    )


def found(path: str) -> str | None:
    return None if "absent" in path else path.replace("*", "6.1")


def only(board: NamedBoard) -> Showing:
    return chosen([board], [board.id], found)[0]


def test_every_board_of_the_demo_has_a_guest_from_packages() -> None:
    boards = load([ROOT / "machines"]).boards

    shown = default(boards.values(), BOARDS, lambda path: path)

    assert len(shown) == len(BOARDS) + 1
    assert len({each.arch for each in shown}) >= 10
    assert len({each.spec.name for each in shown}) == len(shown)


def test_slow_guests_begin_first_and_those_nobody_has_measured_before_them() -> None:
    boards = [board("quick", guest(seconds=1.0)), board("new", guest(seconds=None)), board("slow", guest(seconds=40.0))]

    assert [each.board for each in chosen(boards, ["quick", "slow", "new"], found)] == ["new", "slow", "quick"]


def test_everything_that_keeps_a_board_from_being_shown_is_named_at_once() -> None:
    boards = [
        board("a", guest(bios="/absent/a")),
        board("b"),
        board("c", guest(source="built by hand")),
        board("d", guest(packages=())),
        board("e", guest()),
    ]

    with pytest.raises(Unusable) as problem:
        chosen(boards, ["a", "b", "c", "d", "e", "nowhere"], found)

    assert str(problem.value).split("; ") == [
        "a needs /absent/a from some-package",
        "no guest is known for b",
        "the guest of c does not come from a package",
        "the guest of d does not come from a package",
        "there is no board nowhere",
    ]


def test_the_guest_becomes_a_definition() -> None:
    spec = only(board("x86_64-x", guest(kernel="/k-*", append="quiet"))).spec

    assert spec.name == "x86-64-x"
    assert spec.kernel == Kernel(image="/k-6.1", append="quiet")
    assert (spec.memory_mib, spec.devices, spec.machine_options) == (96, ({"driver": "x"},), {"secure": False})
    assert only(board("x", guest(bios="/b"))).spec.firmware == BiosFirmware(path="/b")


def test_the_newest_of_several_versions_of_a_file_is_taken(tmp_path: Path) -> None:
    for name in ("vmlinuz-6.1.0-40", "vmlinuz-6.1.0-50"):
        (tmp_path / name).touch()

    assert newest(str(tmp_path / "vmlinuz-*")) == str(tmp_path / "vmlinuz-6.1.0-50")
    assert newest(str(tmp_path / "initrd*")) is None


def test_the_installer_is_the_same_machine_without_the_shell() -> None:
    shell = only(board("x", guest(kernel="/k", append="rdinit=/bin/sh")))

    full = installer(shell)

    assert full.board == shell.board
    assert full.spec.name == "x-installer"
    assert full.spec.kernel == Kernel(image="/k", append=INSTALLER_APPEND)
    assert full.guest.send is None


def test_console_output_is_shown_without_what_would_move_the_cursor() -> None:
    assert plain("\x1b[2J\x1b[01;01H\x1b[=3hU-Boot\x1b[0m 2023\r\n=> \x07") == "U-Boot 2023\n=> "


def test_a_machine_that_failed_says_why_and_shows_its_console() -> None:
    shown = only(board("x", guest()))
    boot = Boot(showing=shown, state="crashed", accel="tcg", began=0.0, seconds=1.5, problem="it ended", tail="a\nlast words")
    page = io.StringIO()
    Console(file=page, width=200).print(table([boot], 2.0))

    assert json.loads(json.dumps(fields(boot))) == {
        "board": "x",
        "arch": "arm",
        "accel": "tcg",
        "milestone": "a guest",
        "reached": False,
        "seconds": 1.5,
        "console_tail": "a\nlast words",
        "problem": "it ended",
    }
    assert "x: it ended" in failure(boot)
    assert "    | last words" in failure(boot)
    assert "it ended" in page.getvalue()


def test_a_narrow_terminal_still_shows_how_far_each_machine_is() -> None:
    boot = Boot(showing=only(board("a-long-name-of-a-board", guest())), state="running", accel="tcg", began=0.0, line="U-Boot 2023.01")
    page = io.StringIO()
    Console(file=page, width=80).print(table([boot], 7.0))

    assert "a-long-name-of-a-board" in page.getvalue()
    assert "running" in page.getvalue()
