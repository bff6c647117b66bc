"""The virtual environment in `.venv`: the project (editable) with what its tests need."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from scripts.lib.apt import SetupError
from scripts.lib.progress import say, step

#: What is imported to see that the installation works; all three live in different directories of the checkout.
IMPORTS: Final = ("qmpd", "qmpd_api", "qmpctl")
REQUIREMENT: Final = ".[test]"
#: What has more: the charts of `scripts/bench` are drawn with a large library that nothing else uses.
EXTRA_REQUIREMENTS: Final = {"bench": ".[test,bench]"}
STAMP: Final = "qmpd-setup"


def venv_packages() -> tuple[str, ...]:
    """What this interpreter lacks to make a virtual environment. Debian splits `ensurepip` off its own Python."""
    return () if importlib.util.find_spec("ensurepip") else ("python3-venv",)


@contextmanager
def alone(root: Path) -> Iterator[None]:
    """Hold the checkout against a second setup, which waits here."""
    with (root / "pyproject.toml").open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("waiting for another setup of this checkout")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def ready(root: Path, purpose: str = "run") -> bool:
    """Whether `.venv` was made from this pyproject.toml, by this Python, with what `purpose` needs, and its interpreter is still there."""
    return (root / ".venv/bin/python").exists() and _digest(root, _requirement(purpose)) in _stamps(root)


def make(root: Path, purpose: str = "run") -> None:
    """Create `.venv` where there is none that works, and install the project into it. Raises SetupError.

    What was installed for another purpose stays.
    """
    venv = root / ".venv"
    requirement = _requirement(purpose)
    if not _works(venv):
        with step(f"making {venv} with Python {sys.version.split()[0]}"):
            shutil.rmtree(venv, ignore_errors=True)
            _run([_base_python(), "-m", "venv", str(venv)], root)
    python = str(venv / "bin/python")
    with step(f"installing the project with pip: {requirement}"):
        _run([python, "-m", "pip", "install", "-qq", "--disable-pip-version-check", "--editable", requirement], root)
        _run([python, "-c", f"import {', '.join(IMPORTS)}"], Path("/"))
    valid = {_digest(root, each) for each in (REQUIREMENT, *EXTRA_REQUIREMENTS.values())}
    stamps = (_stamps(root) & valid) | {_digest(root, REQUIREMENT), _digest(root, requirement)}
    (venv / STAMP).write_text("".join(f"{stamp}\n" for stamp in sorted(stamps)), encoding="utf-8")


def _requirement(purpose: str) -> str:
    return EXTRA_REQUIREMENTS.get(purpose, REQUIREMENT)


def _stamps(root: Path) -> set[str]:
    """What `.venv` was made of: a line for each requirement that is installed."""
    stamp = root / ".venv" / STAMP
    return set(stamp.read_text(encoding="utf-8").split()) if stamp.exists() else set()


def _works(venv: Path) -> bool:
    python = venv / "bin/python"
    if not python.exists():
        return False
    version = "import sys, pip; print(*sys.version_info[:2])"
    answer = subprocess.run([str(python), "-c", version], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    return answer.stdout.split() == [str(part) for part in sys.version_info[:2]]


def _base_python() -> str:
    """The interpreter behind this one: setup may itself have been started by the environment it is about to replace."""
    return str(Path(sys.base_prefix, "bin", "python{}.{}".format(*sys.version_info[:2])))


def _digest(root: Path, requirement: str) -> str:
    parts = (sys.version, str(root), requirement, (root / "pyproject.toml").read_text(encoding="utf-8"))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _run(command: list[str], cwd: Path) -> None:
    if subprocess.run(command, cwd=cwd, stdin=subprocess.DEVNULL, stdout=2, check=False).returncode != 0:
        raise SetupError(f"this failed; what it said is above: {' '.join(command)}")
