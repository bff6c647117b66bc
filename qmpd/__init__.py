"""qmpd: launches qemu-system-* directly, drives each one over QMP, and offers an HTTP control API."""

from __future__ import annotations

from typing import Final

__version__: Final = "0.1.0"
