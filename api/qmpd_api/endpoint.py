"""Where a client finds the daemon unless told otherwise. Imports next to nothing, so that shell completion stays quick."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from qmpd.settings import system_defaults, user_defaults

#: The environment variable that tells every client which socket to use.
SOCKET_VARIABLE: Final = "QMPD_SOCKET"


def default_socket(environ: Mapping[str, str] | None = None, uid: int | None = None) -> str:
    """`QMPD_SOCKET`; without it the socket of the system's daemon for root, and that of the user's own for everybody else."""
    environ = os.environ if environ is None else environ
    uid = os.geteuid() if uid is None else uid
    named = environ.get(SOCKET_VARIABLE)
    if named:
        return named
    if uid == 0:
        return system_defaults().socket
    return user_defaults("", environ.get("HOME") or str(Path.home()), environ).socket
