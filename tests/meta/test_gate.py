"""The gate: style, types and structure are tests like any other."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CODE = ("qmpd", "api", "tests", "scripts")
#: A module that has grown past this has two jobs.
MODULE_LINES = 400
#: `ruff` and `mypy` need seconds; on a shared machine minutes.
TOOL_DEADLINE_S = 280
NOT_A_NOUN = {"utils", "helpers", "common", "base", "manager", "misc"}

GATES = {
    "ruff check": ("-m", "ruff", "check", *CODE),
    "ruff format": ("-m", "ruff", "format", "--check", *CODE),
    "mypy": ("-m", "mypy", "qmpd", "api/qmpd_api", "api/qmpctl", "tests", "scripts"),
    "import contracts": ("-c", "import sys; from importlinter.cli import lint_imports_command as lint; sys.exit(lint())"),
}


@pytest.mark.parametrize("gate", GATES)
def test_the_code_passes(gate: str) -> None:
    environ = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'api'}"}
    done = subprocess.run([sys.executable, *GATES[gate]], cwd=ROOT, env=environ, capture_output=True, text=True, timeout=TOOL_DEADLINE_S)
    assert done.returncode == 0, f"{gate}:\n{done.stdout[-8000:]}{done.stderr[-2000:]}"


def modules() -> list[Path]:
    return sorted(path for top in ("qmpd", "api", "tests", "scripts") for path in (ROOT / top).rglob("*.py"))


def test_no_module_has_grown_two_jobs() -> None:
    long = {str(path.relative_to(ROOT)): count for path in modules() if (count := len(path.read_text().splitlines())) > MODULE_LINES}
    assert not long


def test_modules_are_named_after_what_they_are_about() -> None:
    assert not [path for path in modules() if path.stem in NOT_A_NOUN]


#: Imports each module named on its command line in a child of its own, which has seen no other module of ours.
IMPORT_ALONE = """
import importlib, os, sys
import aiohttp.web, click, msgspec, prometheus_client, rich.live
for name in sys.argv[1:]:
    child = os.fork()
    if not child:
        try:
            importlib.import_module(name)
        except BaseException as error:
            print(name, repr(error), flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


def test_every_module_can_be_imported_alone() -> None:
    found = [path.relative_to(ROOT) for path in sorted((ROOT / "qmpd").rglob("*.py"))]
    found += [path.relative_to(ROOT / "api") for path in sorted((ROOT / "api").rglob("*.py"))]
    names = [".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in found if path.stem != "__main__"]
    environ = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'api'}"}
    command = [sys.executable, "-c", IMPORT_ALONE, *names]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=TOOL_DEADLINE_S)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


def test_nothing_is_mocked() -> None:
    assert not [path for path in modules() if "unittest" + ".mock" in path.read_text()]
