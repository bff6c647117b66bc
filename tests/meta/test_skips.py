"""A test that needs what is not installed is skipped for people, and fails where all is to be proven: one place decides that."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.unavailable import need_root, tool, unavailable

TESTS = Path(__file__).parents[1]
#: What other modules may not do by themselves. Another operating system than Debian, and QEMUs that are asked for by name, are exceptions.
ALONE = re.compile(r'environ(?:\.get\(|\[)"CI"|pytest\.skip\([^)]*not installed|skipif\(.*(?:which|exists)\(')
EXCEPTIONS = {("tests/scripts/test_packages.py", "dpkg-query")}


def test_what_is_missing_fails_in_ci_and_is_skipped_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="it is away, and CI must not skip this"):
        unavailable("it is away")
    with pytest.raises(pytest.fail.Exception, match="CI must not skip this"):
        tool("no-such-program", "none")
    monkeypatch.delenv("CI")
    with pytest.raises(pytest.skip.Exception, match=re.escape("no-such-program is not installed (Debian: the package none)")):
        tool("no-such-program", "none")
    assert Path(tool("sh", "dash")).exists()


def test_nobody_who_is_not_root_proves_what_root_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="needs root to fly"):
        need_root("fly")
    monkeypatch.setattr("os.geteuid", lambda: 0)
    need_root("fly")


def test_no_test_skips_by_itself_what_is_not_installed() -> None:
    found = [
        f"{path.relative_to(TESTS.parent)}: {line.strip()}"
        for path in sorted(TESTS.rglob("*.py"))
        if path not in {Path(__file__), TESTS / "unavailable.py"}
        for line in path.read_text(encoding="utf-8").splitlines()
        if ALONE.search(line) and not any(str(path).endswith(name) and word in line for name, word in EXCEPTIONS)
    ]
    assert found == []
