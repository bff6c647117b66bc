"""The documentation says what the code does."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest

from qmpd import board, spec
from scripts.lib.reference import pages

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


@pytest.mark.parametrize("path", pages(), ids=lambda path: path.stem)
def test_a_reference_page_is_what_the_code_says(path: Path) -> None:
    assert path.exists(), "write it with: python -m scripts.lib.reference"
    assert path.read_text(encoding="utf-8") == pages()[path]


def documents() -> str:
    return "\n".join(path.read_text(encoding="utf-8") for path in DOCS.glob("*.md"))


def test_every_field_of_a_definition_is_explained() -> None:
    text = (DOCS / "definitions.md").read_text(encoding="utf-8")
    structs = [
        value
        for value in vars(spec).values()
        if isinstance(value, type) and issubclass(value, spec.Document) and value is not spec.Document
    ]
    fields = {field.encode_name for struct in structs for field in msgspec.structs.fields(struct)}
    assert not {field for field in fields if f"`{field}`" not in text}


def test_every_field_of_a_board_file_is_explained() -> None:
    text = (ROOT / "machines" / "README.md").read_text(encoding="utf-8")
    structs = [
        value for value in vars(board).values() if isinstance(value, type) and issubclass(value, board.Part) and value is not board.Part
    ]
    fields = {field.encode_name for struct in structs for field in msgspec.structs.fields(struct)}
    assert not {field for field in fields if f"`{field}`" not in text}


def test_every_kind_of_event_is_explained() -> None:
    published: set[str] = set()
    for path in (ROOT / "qmpd").rglob("*.py"):
        published |= set(re.findall(r'_?publish\(\s*"([a-z.-]+)"', path.read_text(encoding="utf-8")))
    text = (DOCS / "events.md").read_text(encoding="utf-8")
    assert published
    assert not {kind for kind in published if f"`{kind}`" not in text}


def test_links_between_pages_lead_somewhere() -> None:
    broken = []
    for page in [*ROOT.glob("*.md"), *DOCS.rglob("*.md"), ROOT / "machines" / "README.md"]:
        targets = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
        broken += [f"{page.relative_to(ROOT)}: {target}" for target in targets if not (page.parent / target).exists()]
    assert not broken
