"""From a definition, a board and facts to the exact QEMU command: pure, deterministic, built of small fragments.

Each module holds the fragments of one kind of resource; `command` puts them together. The order of the fragments is the order
of the options, which golden files freeze.
"""

from __future__ import annotations

from qmpd.plan.command import plan
from qmpd.plan.launch import BlankImage, Copy, LaunchPlan, Listening, SerialPipe, TpmEmulator, TpmLine
from qmpd.plan.network import without_forwards
from qmpd.plan.resolution import Resolved, console_port, mac_address, resolve, serial_ports

__all__ = [
    "BlankImage",
    "Copy",
    "LaunchPlan",
    "Listening",
    "Resolved",
    "SerialPipe",
    "TpmEmulator",
    "TpmLine",
    "console_port",
    "mac_address",
    "plan",
    "resolve",
    "serial_ports",
    "without_forwards",
]
