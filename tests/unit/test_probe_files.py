"""Emulators are looked for on PATH and in configured places."""

from __future__ import annotations

from pathlib import Path

import pytest

from qmpd.emulatorfiles import look, stamp, still_right


def program(path: Path) -> Path:
    """An executable file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


def test_only_executable_files_of_the_right_name_are_found(tmp_path: Path) -> None:
    good = program(tmp_path / "qemu-system-toy")
    program(tmp_path / "qemu-img")
    program(tmp_path / "qemu-system-x86_64-microvm")
    (tmp_path / "qemu-system-text").write_text("")
    (tmp_path / "qemu-system-directory").mkdir()
    (tmp_path / "qemu-system-dangling").symlink_to("nowhere")
    assert look((), str(tmp_path)).by_name == {"qemu-system-toy": str(good)}


def test_a_link_is_another_name_for_the_same_emulator(tmp_path: Path) -> None:
    real = program(tmp_path / "qemu-system-ppc64")
    (tmp_path / "qemu-system-ppc64le").symlink_to("qemu-system-ppc64")
    found = look((), str(tmp_path))
    assert set(found.by_name.values()) == {str(real)}
    assert found.by_path[str(tmp_path / "qemu-system-ppc64le")] == str(real)


def test_a_link_to_a_launcher_is_executed_under_its_own_name(tmp_path: Path) -> None:
    program(tmp_path / "sandbox" / "launcher")
    link = tmp_path / "bin" / "qemu-system-toy"
    link.parent.mkdir()
    link.symlink_to(tmp_path / "sandbox" / "launcher")
    assert look((), str(link.parent)).by_name == {"qemu-system-toy": str(link)}


def test_who_comes_first_has_the_name_and_the_others_keep_their_paths(tmp_path: Path) -> None:
    first, second, third = (program(tmp_path / name / "qemu-system-toy") for name in ("build", "local", "usr"))
    found = look((str(tmp_path / "build"),), f"{tmp_path / 'local'}:{tmp_path / 'usr'}")
    assert found.by_name == {"qemu-system-toy": str(first)}
    assert set(found.by_path) == {str(first), str(second), str(third)}


def test_builds_are_found_in_both_layouts(tmp_path: Path) -> None:
    new = program(tmp_path / "qemu-system-new")
    old = program(tmp_path / "old-softmmu" / "qemu-system-old")
    assert look((str(tmp_path),), "").by_name == {"qemu-system-new": str(new), "qemu-system-old": str(old)}


def test_a_configured_file_may_have_any_name(tmp_path: Path) -> None:
    path = program(tmp_path / "my-emulator")
    assert look((str(path),), "").by_name == {"my-emulator": str(path)}


def test_a_configured_file_wins_over_path(tmp_path: Path) -> None:
    path = program(tmp_path / "own" / "qemu-system-toy")
    program(tmp_path / "bin" / "qemu-system-toy")
    assert look((str(path),), str(tmp_path / "bin")).by_name == {"qemu-system-toy": str(path)}


@pytest.mark.parametrize("search_path", ["", ":", "relative:./here", "/does/not/exist"])
def test_places_that_are_nowhere_hold_nothing(search_path: str) -> None:
    assert look(("/neither/does/this",), search_path).by_name == {}


def test_a_directory_with_two_names_is_searched_once_and_known_by_both(tmp_path: Path) -> None:
    path = program(tmp_path / "usr" / "qemu-system-toy")
    (tmp_path / "bin").symlink_to("usr")
    found = look((), f"{tmp_path / 'usr'}:{tmp_path / 'bin'}")
    assert found.by_path == {str(path): str(path), str(tmp_path / "bin" / "qemu-system-toy"): str(path)}


def test_a_search_stays_right_until_a_place_changes(tmp_path: Path) -> None:
    place, own = tmp_path / "bin", tmp_path / "qemu-system-own"
    program(place / "qemu-system-toy")
    found = look((str(own),), str(place))
    assert still_right(found, (str(own),), str(place))
    program(own)
    assert not still_right(found, (str(own),), str(place))
    found = look((str(own),), str(place))
    program(place / "qemu-system-new")
    assert not still_right(found, (str(own),), str(place))


def test_a_stamp_tells_files_apart_and_nothing_has_none(tmp_path: Path) -> None:
    path = program(tmp_path / "qemu-system-toy")
    before = stamp(path)
    assert before == stamp(path)
    path.write_text("longer than before")
    assert stamp(path) != before
    assert stamp(tmp_path / "none") is None
