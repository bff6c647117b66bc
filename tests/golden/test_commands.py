"""Commands are frozen: a change of any option of any board shows here, one line per option."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.golden.worlds import BOARDS, CASES, CATALOGUE, board_texts, case_texts

TEXTS = {**board_texts(), **case_texts()}


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_the_command_is_the_golden_one(path: Path) -> None:
    assert path.exists(), "write it with: python -m tests.golden.worlds"
    assert TEXTS[path] == path.read_text()


def test_there_is_no_golden_file_too_many() -> None:
    assert {*BOARDS.glob("*.args"), *CASES.glob("*.args")} == set(TEXTS)


def test_every_board_of_the_catalogue_can_be_used() -> None:
    assert CATALOGUE.problems == ()
    assert len(CATALOGUE.boards) >= 30
    refused = {path.stem: text for path, text in board_texts().items() if text.startswith("$")}
    assert not refused


def test_every_option_stands_on_its_own_line() -> None:
    for text in TEXTS.values():
        if not text.startswith("$"):
            assert all(line.startswith(("  -", "/usr/bin/qemu-system-", "/usr/bin/swtpm ")) for line in text.splitlines())
