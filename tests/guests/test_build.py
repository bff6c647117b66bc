"""Guests are made once, made again when their parts change, and refused with the names of the packages that are missing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.guests.build import PACKAGES, MissingTools, build_all


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("guests")


def test_every_guest_has_a_file_and_a_banner_of_its_own(out: Path) -> None:
    guests = build_all(out)
    assert len({guest.file for guest in guests.values()}) == len(guests)
    for name, guest in guests.items():
        assert guest.name == name
        assert guest.banner.encode() + b"\r\n\0" in guest.file.read_bytes()


def test_nothing_is_made_twice(out: Path) -> None:
    before = {guest.file: guest.file.stat().st_mtime_ns for guest in build_all(out).values()}
    build_all(out)
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_guest_whose_key_differs_is_made_again_alone(out: Path) -> None:
    guests = build_all(out)
    stale, other = guests["riscv64-virt"].file, guests["riscv64-virt-echo"].file
    for path in (stale, other):
        os.utime(path, (0, 0))
    stale.with_name(f"{stale.name}.key").write_text("made from something else")
    build_all(out)
    assert stale.stat().st_mtime > 0
    assert other.stat().st_mtime == 0


def test_a_missing_assembler_names_every_debian_package(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(MissingTools) as refused:
        build_all(out)
    assert str(refused.value).endswith(f"apt-get install {' '.join(PACKAGES)}")
    assert "mips64el-linux-gnuabi64-as" in str(refused.value)


def test_a_boot_sector_is_one_sector_with_its_signature(out: Path) -> None:
    guests = build_all(out)
    for name in ("x86_64-pc", "x86_64-pc-blocks", "x86_64-q35", "i386-pc"):
        image = guests[name].file.read_bytes()
        assert image[510:512] == b"\x55\xaa"
        assert not any(image[512:])
    assert guests["x86_64-pc"].file.stat().st_size == 1024 * 1024
    assert guests["i386-pc"].file.stat().st_size == 1440 * 1024
    assert guests["x86_64-pc-reset"].file.stat().st_size == 64 * 1024
