"""Verbs that talk to a running machine's QEMU and guest without changing its definition: QMP, screen, keys, shutdown."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import signal
from pathlib import Path
from typing import Final, Literal

from qmpd import power
from qmpd.access import Caller, check_command
from qmpd.errors import NotYet, Problem, QemuDied, QemuRefused, invalid
from qmpd.lifecycle import AT_REST, State
from qmpd.machine import Machine
from qmpd.views import ExitView, QmpAnswer, QmpRequest, SendKeyRequest, ShutdownRequest, StopView

#: Screenshots of different callers at the same time must not share a file.
_numbers: Final = itertools.count(1)


async def pass_through(machine: Machine, request: QmpRequest, caller: Caller) -> QmpAnswer:
    """Sends one QMP command for a caller who may.

    Raises:
        Forbidden: this caller may not send it.
        Invalid: QEMU has no such command, or not with these arguments; or it cannot be sent this way.
        QemuRefused: QEMU's own error.
    """
    check_command(request.execute, caller, oob=request.oob)
    monitor = machine.session.monitor
    send = monitor.execute_oob if request.oob else monitor.execute
    try:
        return QmpAnswer(result=await send(request.execute, request.arguments))
    except QemuRefused as error:
        found = _misuse(error)
        if found is None:
            raise
        raise invalid([found]) from error


def _misuse(error: QemuRefused) -> Problem | None:
    """The caller's mistake, where that is what QEMU's error is about (its QAPI input visitor has no error class of its own)."""
    text = str(error.details.get("desc"))
    if error.details.get("class") == "CommandNotFound":
        return Problem(path="$.execute", message=text)
    if text.startswith(("Parameter '", "Invalid parameter")):
        return Problem(path="$.arguments", message=text)
    return None


async def screenshot(machine: Machine, run_dir: str) -> bytes:
    """What the display shows, as PNG.

    Raises:
        QemuRefused: the machine has no display device.
    """
    target = Path(run_dir) / f"screenshot-{next(_numbers)}.png"
    try:
        await machine.session.monitor.execute("screendump", {"filename": str(target), "format": "png"})
        return await asyncio.to_thread(target.read_bytes)
    finally:
        await asyncio.to_thread(target.unlink, missing_ok=True)


async def send_key(machine: Machine, request: SendKeyRequest) -> None:
    """Presses keys together. An unknown key is QEMU's error, which names it."""
    keys = [{"type": "qcode", "data": key} for key in request.keys]
    await machine.session.monitor.execute("send-key", {"keys": keys, "hold-time": request.hold_ms})


async def shut_down(machine: Machine, request: ShutdownRequest) -> StopView:
    """Asks the guest, waits for it, and then does what the caller said.

    Raises:
        NotYet: the guest did not obey in time, and nothing was to follow; the machine runs on.
    """
    budget = machine.definition.spec.shutdown_timeout_s if request.timeout_s is None else request.timeout_s
    if await _obeyed(machine, budget):
        if _is_off(machine):
            return StopView(machine=machine.view(), method="acpi", clean=True)
        return StopView(machine=machine.view(), method=_rung(machine.exit), clean=machine.exit is not None and machine.exit.clean)
    if request.then == "stop":
        return await power.stop(machine)
    if request.then == "kill":
        return await power.kill(machine)
    raise NotYet(
        f"the guest of machine {machine.name!r} did not power off within {budget:g} s; it was left running", state=str(machine.state)
    )


async def _obeyed(machine: Machine, budget_s: float) -> bool:
    """Presses the button; whether the guest powered off in time. An end that was asked for is no reason to start it again."""
    before, machine.asked_to_end = machine.asked_to_end, True
    try:
        with contextlib.suppress(QemuDied):  # it may obey, or be ended by somebody else, before its answer is sent
            await power.power_down(machine)
        return await machine.when(lambda: machine.state in AT_REST or _is_off(machine), budget_s)
    finally:
        if machine.alive and machine.state is not State.STOPPING:
            machine.asked_to_end = before


def _is_off(machine: Machine) -> bool:
    """Whether the guest is off, and QEMU is there because the definition says so (`actions.shutdown`)."""
    return machine.state is State.PAUSED and machine.status == "shutdown"


def _rung(ended: ExitView | None) -> Literal["acpi", "quit", "sigterm", "sigkill"]:
    """What ended the machine while its guest was asked to: somebody else may have been faster."""
    match (None, None) if ended is None else (ended.signal, ended.reason):
        case (signal.SIGKILL.name, _):
            return "sigkill"
        case (signal.SIGTERM.name, _) | (_, "host-signal"):
            return "sigterm"
        case (_, "host-qmp-quit"):
            return "quit"
        case _:
            return "acpi"
