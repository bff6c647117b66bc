"""Checks on serial ports, entropy, display, further devices and options."""

from __future__ import annotations

import re
from collections.abc import Iterator
from math import isfinite
from typing import Final

from qmpd.argv import parse
from qmpd.errors import Problem
from qmpd.plan.resolution import tpm_model, watchdog_model
from qmpd.spec import VncDisplay
from qmpd.validation.subject import Subject, choices, problem

#: Ids as QEMU's own `id_wellformed` allows them; 7.2 lets others through for JSON `-device` and fails later.
ID_PATTERN: Final = re.compile(r"[A-Za-z][A-Za-z0-9._-]{0,63}\Z")
#: Ids that qmpd gives itself.
RESERVED_ID: Final = re.compile(r"(disk|net|nic|serial|display|rng|pflash|watchdog|tpm)\d+|qmp|rescue|.*-controller")
#: QEMU's JSON parser reads integers as int64 or uint64.
INTEGERS: Final = (-(2**63), 2**64 - 1)
#: The properties of real devices nest three levels deep.
NESTED_AT_MOST: Final = 32
#: Options that would take the process, or its monitor, away from the daemon.
NOT_ALLOWED: Final = frozenset(
    {
        "S", "accel", "action", "add-fd", "async-teardown", "chroot", "daemonize", "help", "h", "incoming", "mon", "monitor", "name",
        "no-shutdown", "pidfile", "preconfig", "qmp", "qmp-pretty", "readconfig", "run-with", "runas", "sandbox", "uuid", "version",
    }
)  # fmt: skip


def serial_ports(subject: Subject) -> Iterator[Problem]:
    """The board's console port must be among the ports."""
    ports, index = subject.spec.serial_ports, subject.board.console.serial_index
    if ports and len(ports) <= index:
        yield problem("serial_ports", f"the console of board {subject.named.id!r} is serial port {index}: list at least {index + 1} ports")


def entropy(subject: Subject) -> Iterator[Problem]:
    """An entropy device needs a board it can be attached to."""
    if subject.spec.rng and subject.board.rng is None:
        yield problem("rng", f"no random number generator can be attached to board {subject.named.id!r}")


def watchdog(subject: Subject) -> Iterator[Problem]:
    """A watchdog must be one the board takes, and the emulator has."""
    if subject.spec.watchdog is None:
        return
    model, offered = watchdog_model(subject.spec, subject.board), subject.board.watchdogs
    if model is None or not offered:
        yield problem("watchdog", f"no watchdog can be attached to board {subject.named.id!r}")
    elif model not in offered:
        yield problem("watchdog.model", f"board {subject.named.id!r} takes no watchdog {model!r}; it takes {choices(offered)}")
    else:
        yield from _driver(subject, model, "watchdog.model")


def tpm(subject: Subject) -> Iterator[Problem]:
    """A TPM must be one the board takes and the emulator has, and needs the program that is behind it."""
    if subject.spec.tpm is None:
        return
    model, offered = tpm_model(subject.spec, subject.board), subject.board.tpms
    if model is None or not offered:
        yield problem("tpm", f"no TPM can be attached to board {subject.named.id!r}")
    elif model not in offered:
        yield problem("tpm.model", f"board {subject.named.id!r} takes no TPM {model!r}; it takes {choices(offered)}")
    else:
        yield from _driver(subject, model, "tpm.model")
    if subject.world.swtpm is None:
        yield problem("tpm", "swtpm, which emulates TPMs, is not installed (package swtpm)")


def display(subject: Subject) -> Iterator[Problem]:
    """VNC needs something to show."""
    chosen, hints = subject.spec.display, subject.board.display
    if not isinstance(chosen, VncDisplay):
        return
    driver = chosen.device or hints.device
    if driver is None and hints.vnc_vga is None and not hints.on_board:
        yield problem("display", f"board {subject.named.id!r} has no display device; name one with display.device")
    elif chosen.device is not None:
        yield from _driver(subject, chosen.device, "display.device")


def _driver(subject: Subject, driver: str, where: str) -> Iterator[Problem]:
    known = subject.world.emulator.devices
    if known and driver not in known:
        yield problem(where, f"{subject.world.emulator.path} has no device {driver!r}; close to it: {choices(known, driver)}")


def further_devices(subject: Subject) -> Iterator[Problem]:
    """Each device needs a driver the emulator has, and an id nobody else has."""
    seen: dict[str, int] = {}
    for index, device in enumerate(subject.spec.devices):
        where = f"devices[{index}]"
        driver, name = device.get("driver"), device.get("id")
        if not isinstance(driver, str):
            yield problem(f"{where}.driver", "a device needs a driver (a string)")
        else:
            yield from _driver(subject, driver, f"{where}.driver")
        yield from _values(device, where, NESTED_AT_MOST)
        if name is None:
            continue
        if not isinstance(name, str) or not ID_PATTERN.match(name):
            yield problem(f"{where}.id", "an id starts with a letter and has letters, digits, '.', '_' and '-' only")
        elif RESERVED_ID.fullmatch(name):
            yield problem(f"{where}.id", f"id {name!r} is one qmpd uses itself")
        elif name in seen:
            yield problem(f"{where}.id", f"id {name!r} is already devices[{seen[name]}]")
        else:
            seen[name] = index


def _values(value: object, where: str, levels: int) -> Iterator[Problem]:
    """What of a device JSON has no word for, or QEMU's parser does not take."""
    if isinstance(value, dict | list | tuple) and levels == 0:
        yield problem(where, "nests too deeply")
    elif isinstance(value, dict):
        for key, item in value.items():
            if isinstance(key, str):
                yield from _values(item, f"{where}.{key}", levels - 1)
            else:
                yield problem(where, f"has the name {key!r}, and only strings are names")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _values(item, f"{where}[{index}]", levels - 1)
    elif (refusal := _refusal(value)) is not None:
        yield problem(where, refusal)


def _refusal(value: object) -> str | None:
    match value:
        case None | bool() | str():
            return None
        case int():
            return None if INTEGERS[0] <= value <= INTEGERS[1] else f"{value} does not fit into 64 bits"
        case float():
            return None if isfinite(value) else f"{value} is not a number QEMU takes"
        case _:
            return f"a {type(value).__name__} cannot be given to QEMU"


def further_options(subject: Subject) -> Iterator[Problem]:
    """Further options must be allowed here, must be options, and must not take QEMU away from the daemon."""
    words = subject.spec.extra_args
    if not words:
        return
    if not subject.world.raw_options:
        yield problem("extra_args", "this daemon does not allow extra_args (setting raw_options)")
    try:
        options = parse(words)
    except ValueError as error:
        yield problem("extra_args", str(error))
        return
    for option in options:
        if option.name in NOT_ALLOWED:
            yield problem("extra_args", f"-{option.name} is set by qmpd and cannot be given")
