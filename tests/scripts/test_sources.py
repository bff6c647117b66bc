"""The mirror is found in apt's source files, whichever format they are in."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.lib.sources import archives

DEB822 = """\
# the archive
Types: deb deb-src
URIs: http://mirror.example/debian
# a comment in between
Suites: bookworm bookworm-updates
Components: main contrib
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

Types: deb
URIs: http://mirror.example/debian-security
Suites: bookworm-security
Components: main
"""


def sources(directory: Path, **files: str) -> Path:
    (directory / "sources.list.d").mkdir()
    for name, text in files.items():
        (directory / "sources.list.d" / name.replace("_", ".")).write_text(text, encoding="utf-8")
    return directory


def test_a_deb822_file_names_the_archive_of_the_release_and_not_that_of_its_security_updates(tmp_path: Path) -> None:
    assert archives("bookworm", sources(tmp_path, debian_sources=DEB822)) == ("http://mirror.example/debian",)


@pytest.mark.parametrize(
    "line",
    [
        "deb http://mirror.example/debian bookworm main",
        "deb [signed-by=/a.gpg arch=amd64] http://mirror.example/debian bookworm contrib main # ours",
        "deb\thttp://mirror.example/debian\tbookworm\tmain",
    ],
)
def test_a_one_line_entry_names_the_archive_too(tmp_path: Path, line: str) -> None:
    (tmp_path / "sources.list").write_text(f"# deb http://old.example/ bookworm main\n{line}\n", encoding="utf-8")

    assert archives("bookworm", tmp_path) == ("http://mirror.example/debian",)


def test_every_archive_that_publishes_under_the_name_of_the_release_is_a_candidate(tmp_path: Path) -> None:
    third = "deb https://third.example/apt bookworm main\n"

    assert archives("bookworm", sources(tmp_path, debian_sources=DEB822, third_list=third)) == (
        "http://mirror.example/debian",
        "https://third.example/apt",
    )


@pytest.mark.parametrize(
    "text",
    [
        DEB822.replace("Types: deb deb-src", "Types: deb-src"),
        DEB822.replace("Types: deb deb-src", "Enabled: no\nTypes: deb"),
        DEB822.replace("main contrib", "contrib"),
        DEB822.replace("http://mirror.example/debian\n", "cdrom:[Debian]/\n"),
        "",
    ],
)
def test_what_cannot_serve_packages_is_not_a_candidate(tmp_path: Path, text: str) -> None:
    assert archives("bookworm", sources(tmp_path, debian_sources=text)) == ()
