"""Where a client finds the daemon unless told otherwise. Imports next to nothing, so that shell completion stays quick."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from qmpd.settings import Settings, system_defaults, user_defaults

#: The environment variable that tells every client which socket to use.
SOCKET_VARIABLE: Final = "QMPD_SOCKET"


def default_socket(environ: Mapping[str, str] | None = None, uid: int | None = None) -> str:
    """`QMPD_SOCKET`; without it the socket of the system's daemon for root, and that of the user's own for everybody else."""
    environ = os.environ if environ is None else environ
    return environ.get(SOCKET_VARIABLE) or _defaults(environ, uid).socket


def default_pki(environ: Mapping[str, str] | None = None, uid: int | None = None) -> str:
    """Where the certificates of the system's daemon are for root, and of the user's own for everybody else."""
    return _defaults(os.environ if environ is None else environ, uid).pki_dir


def _defaults(environ: Mapping[str, str], uid: int | None) -> Settings:
    if (os.geteuid() if uid is None else uid) == 0:
        return system_defaults()
    return user_defaults("", environ.get("HOME") or str(Path.home()), environ)
