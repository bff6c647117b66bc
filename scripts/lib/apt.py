"""Distribution packages: installed with apt by root; for anyone else the one command that would do it is named."""

from __future__ import annotations

import os
import shlex
import subprocess
from typing import Final

from scripts.lib.progress import say, step

#: Another apt may be at work (unattended upgrades): longer than one takes, shorter than a CI job's patience.
LOCK_WAIT_S: Final = 300


class SetupError(Exception):
    """What keeps this checkout from being set up, worded for the person who has to mend it."""


def install(names: tuple[str, ...]) -> None:
    """Install `names` without recommended packages. Raises SetupError with the command to run when this is not root, or apt's failure."""
    if os.geteuid() != 0:
        command = shlex.join(["sudo", "apt-get", "install", "--no-install-recommends", *names])
        hint = "install them with (after `sudo apt-get update` if apt does not know them):"
        raise SetupError(f"these packages are missing: {' '.join(names)}\n{hint}\n    {command}")
    with step(f"installing {len(names)} packages: {' '.join(names)}"):
        updated = False
        if not _run("-s", "-qq", "install", "--no-install-recommends", *names, quiet=True):
            _update()
            updated = True
        if _install(names):
            return
        if updated:
            raise SetupError("apt-get could not install them; what it said is above")
        # The lists were old enough to name files the mirror no longer has.
        _update()
        if not _install(names):
            raise SetupError("apt-get could not install them; what it said is above")


def _install(names: tuple[str, ...]) -> bool:
    return _run("install", "-y", "-q", "--no-install-recommends", *names)


def _update() -> None:
    say("    fetching the package lists (apt-get update)")
    # A third party's source that is out of order fails the whole update, though Debian's own lists have arrived: let the installation tell.
    _run("update", "-qq")


def _run(*arguments: str, quiet: bool = False) -> bool:
    command = ["apt-get", "-o", f"DPkg::Lock::Timeout={LOCK_WAIT_S}", "-o", "Dpkg::Use-Pty=0", *arguments]
    output = subprocess.DEVNULL if quiet else 2
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    try:
        return subprocess.run(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment, check=False).returncode == 0
    except FileNotFoundError as error:
        raise SetupError("there is no apt-get here: qmpd's scripts know Debian's packages only") from error
