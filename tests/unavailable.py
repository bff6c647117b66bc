"""What a test needs and this host has not got: then the test is skipped, but never where all is to be proven."""

from __future__ import annotations

import os
import shutil
from typing import NoReturn

import pytest


def unavailable(reason: object) -> NoReturn:
    """Skips the test, or fails it in CI: what is skipped there is proven nowhere."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"{reason}, and CI must not skip this")
    pytest.skip(str(reason))


def tool(name: str, package: str) -> str:
    """The path of a program, which a package of Debian's has."""
    return shutil.which(name) or unavailable(f"{name} is not installed (Debian: the package {package})")


def need_root(what: str) -> None:
    """Returns only for root, who alone can do `what`."""
    if os.geteuid() != 0:
        unavailable(f"needs root to {what}")
