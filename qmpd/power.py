"""Verbs that halt, resume, reset and end a machine: each asks QEMU for something, and then waits for the state that proves it.

Who calls them holds the machine; `kill` asks nobody, and `stop` may replace a polite shutdown.
"""

from __future__ import annotations

import logging
import signal
from typing import Final, Literal

from qmpd.errors import QemuDied, QemuSilent, QmpdError
from qmpd.failpoint import passing
from qmpd.lifecycle import ANSWERING, AT_REST, Happening, State
from qmpd.machine import Machine
from qmpd.session import Session
from qmpd.views import StopView

#: QEMU emits STOP and RESUME before it answers; a state that is this late was lost.
EFFECT_DEADLINE_S: Final = 10.0
#: QEMU only notes that the button was pressed. One that does not even do that must not use up the time in which it could be ended.
BUTTON_DEADLINE_S: Final = 5.0
#: `quit` flushes every disk before the process ends.
QUIT_DEADLINE_S: Final = 30.0
#: The same for SIGTERM, which QEMU handles in its main loop.
TERM_DEADLINE_S: Final = 10.0
#: The kernel ends a killed process at once, unless it waits for a disk that hangs.
KILL_DEADLINE_S: Final = 30.0
#: A machine that is being launched has a process as soon as its images are made.
PROCESS_DEADLINE_S: Final = 30.0

_log = logging.getLogger(__name__)


async def pause(machine: Machine) -> None:
    """Halts the guest's CPUs."""
    machine.require(frozenset({State.RUNNING}), "pause")
    await _command(machine, "stop", State.PAUSED)


async def resume(machine: Machine) -> None:
    """Lets the guest's CPUs run."""
    machine.require(frozenset({State.PAUSED}), "resume")
    await _command(machine, "cont", State.RUNNING)


async def reset(machine: Machine) -> None:
    """Presses the reset button."""
    machine.require(ANSWERING, "reset")
    await machine.session.monitor.execute("system_reset")


async def power_down(machine: Machine) -> None:
    """Presses the power button; what the guest makes of it is its own affair."""
    machine.require(frozenset({State.RUNNING}), "shut down")
    await machine.session.monitor.execute("system_powerdown", deadline_s=BUTTON_DEADLINE_S)


async def stop(machine: Machine) -> StopView:
    """Ends QEMU so that everything is flushed: `quit`, then SIGTERM. Never SIGKILL.

    Raises:
        QemuSilent: the process is still there; only `kill` is left.
    """
    session = await _asked_to_end(machine)
    if session is None:
        return StopView(machine=machine.view(), method="already-stopped", clean=True)
    machine.happen(Happening.QUIT)
    answered = True
    try:
        await passing("quit-send")
        await session.monitor.execute("quit", deadline_s=QUIT_DEADLINE_S)
    except QmpdError as error:
        _log.info("quit was not answered", extra={"machine": machine.name, "error": error.code})
        answered = isinstance(error, QemuDied)  # it may end before its answer is sent
    if answered and await machine.until(AT_REST, QUIT_DEADLINE_S):
        return _stopped(machine, "quit")
    session.process.signal(signal.SIGTERM)
    if await machine.until(AT_REST, TERM_DEADLINE_S):
        return _stopped(machine, "sigterm")
    raise QemuSilent(f"machine {machine.name!r} is still there after quit and SIGTERM; only kill is left", state=str(machine.state))


async def kill(machine: Machine) -> StopView:
    """Ends the process at once. What the guest wrote and did not flush is lost."""
    session = await _asked_to_end(machine)
    if session is None:
        return StopView(machine=machine.view(), method="already-stopped", clean=True)
    session.process.signal(signal.SIGKILL)  # before anybody is told that it ends: where it cannot be sent, nothing has happened
    if machine.state is not State.STOPPING:
        machine.happen(Happening.QUIT)
    if not await machine.until(AT_REST, KILL_DEADLINE_S):
        raise QemuSilent(
            f"the QEMU of machine {machine.name!r} does not end: the kernel is waiting for something", state=str(machine.state)
        )
    return _stopped(machine, "sigkill")


async def power_off(machine: Machine) -> StopView:
    """Ends the process with SIGTERM, which flushes every disk and asks neither the guest nor the monitor.

    Raises:
        NotProven: the process is not proven to be the machine's.
        QemuSilent: the process is still there; only `kill` is left.
    """
    session = await _asked_to_end(machine)
    if session is None:
        return StopView(machine=machine.view(), method="already-stopped", clean=True)
    machine.happen(Happening.QUIT)
    session.process.signal(signal.SIGTERM)
    if await machine.until(AT_REST, TERM_DEADLINE_S):
        return _stopped(machine, "sigterm")
    raise QemuSilent(f"machine {machine.name!r} is still there after SIGTERM; only kill is left", state=str(machine.state))


def _stopped(machine: Machine, method: Literal["quit", "sigterm", "sigkill"]) -> StopView:
    """What became of it: somebody else may have been quicker, and with other means."""
    killed = machine.exit is not None and machine.exit.signal == "SIGKILL"
    clean = machine.exit is not None and machine.exit.clean
    return StopView(machine=machine.view(), method="sigkill" if killed else method, clean=clean)


async def _asked_to_end(machine: Machine) -> Session | None:
    """The session to end, of a machine that is being launched as soon as it has a process; None for a machine at rest."""
    machine.asked_to_end = True
    await machine.when(lambda: machine.state is not State.STARTING or machine.has_process, PROCESS_DEADLINE_S)
    if machine.state in AT_REST:
        return None
    machine.asked_to_end = machine.has_process
    session = machine.session
    if session.disowned is not None:
        machine.asked_to_end = False
        raise session.disowned
    return session


async def _command(machine: Machine, command: str, wanted: State) -> None:
    await machine.session.monitor.execute(command)
    if not await machine.until(frozenset({wanted}), EFFECT_DEADLINE_S):
        raise QemuSilent(f"{command} was accepted, but machine {machine.name!r} is {machine.state}", state=str(machine.state))
