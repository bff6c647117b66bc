"""What the scripts install is read from where it is used."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from scripts.lib.packages import EMULATORS, guest_packages, missing, needed
from tests.guests.build import PACKAGES

ROOT = Path(__file__).resolve().parents[2]


def test_the_tests_get_the_assemblers_of_their_guests() -> None:
    assert {*PACKAGES, *EMULATORS} <= set(needed("test", ROOT))
    assert not set(PACKAGES) & set(needed("run", ROOT))


def test_the_slow_proofs_get_more_than_the_quick_ones() -> None:
    assert set(needed("slow", ROOT)) - set(needed("test", ROOT)) == {"e2fsprogs", "mmdebstrap"}


def test_the_demo_gets_the_packages_of_its_guests_and_the_tests_those_of_all() -> None:
    demo, test = set(needed("demo", ROOT)), set(needed("test", ROOT))

    assert "debian-installer-12-netboot-arm64" in demo
    assert demo <= test


def test_a_board_without_a_guest_needs_no_package(tmp_path: Path) -> None:
    boards = {"a": '[guest]\npackages = ["kernel-of-a"]\n', "b": 'title = "no guest"\n', "c": "[guest]\n"}
    for name, text in boards.items():
        (tmp_path / f"{name}.toml").write_text(text, encoding="utf-8")

    assert guest_packages(tmp_path.glob("*.toml")) == {"kernel-of-a"}


@pytest.mark.skipif(shutil.which("dpkg-query") is None, reason="this system has no dpkg")
def test_only_what_is_not_installed_is_missing() -> None:
    assert missing(("dpkg", "no-such-package-of-ours")) == ("no-such-package-of-ours",)
    assert missing(()) == ()
