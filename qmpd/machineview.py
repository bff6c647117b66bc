"""What is shown of a machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qmpd.processviews import AdoptedView
from qmpd.views import MachineView

if TYPE_CHECKING:
    from qmpd.machine import Machine


def view_of(machine: Machine) -> MachineView:
    """The machine as the API shows it, from memory."""
    spec, board = machine.definition.spec, machine.board
    console = machine.consoles.get(machine.console_port) if machine.console_port is not None else None
    live = machine.launch if machine.alive else None
    default_memory = board.memory.default_mib if board else 0
    return MachineView(
        name=spec.name,
        title=spec.title,
        uuid=machine.definition.uuid,
        board=spec.board,
        arch=board.arch if board else "unknown",
        machine=(live.machine if live else spec.machine) or (board.machine if board else "unknown"),
        revision=machine.revision,
        state=machine.state,
        status=machine.status,
        since=machine.since,
        operation=machine.operation,
        accel=live.accel if live else None,
        emulator=live.emulator if live else spec.emulator,
        emulator_version=live.emulator_version if live else None,
        cpus=spec.cpu.count or (board.min_cpus if board else 1),
        memory_mib=spec.memory_mib or default_memory,
        pid=live.identity.pid if live else None,
        cgroup=machine.cgroup if live else None,
        started_at=live.started_at if live else None,
        console_bytes=console.end if console else 0,
        console_line=console.last_line() if console else "",
        resets=machine.resets,
        exit=machine.exit,
        disk_error=machine.disk_error,
        autostart=spec.autostart,
        protected=spec.protected,
        labels=dict(spec.labels),
        trouble=machine.trouble,
        adopted=_adopted(machine),
        tpm_lost=machine.session.process.forsaken if machine.has_process else None,
    )


def _adopted(machine: Machine) -> AdoptedView | None:
    """What is said of an adopted QEMU, until the machine runs in one that qmpd launched."""
    adoption = machine.definition.adoption
    ours = machine.alive and machine.launch is not None and machine.launch.uuid is None
    return None if adoption is None or ours else adoption.view()
