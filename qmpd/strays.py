"""QEMUs of our machines that have no launch record any more: found again through the lock that each of them holds.

The lock lies in a directory that only we can write to, and is inherited by one process alone. That process, started with the
machine's UUID, is the machine's; its monitor is asked for the UUID all the same.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Final

from qmpd.commandline import fields, options
from qmpd.facts import MachinePaths
from qmpd.hostprocess import HostProcess, holders, working_in
from qmpd.journal import timestamp
from qmpd.process import Identity
from qmpd.record import RECORD_NAME, Definition, LaunchRecord
from qmpd.runlock import lock_paths

#: What the shell is called that waits to become QEMU (`qmpd.process`).
_GATE: Final = "qmpd-gate"
#: What a record that could not be read is kept as.
DAMAGED_NAME: Final = f"{RECORD_NAME}.damaged"

_log = logging.getLogger(__name__)


class Unidentified(Exception):
    """Whose process holds the lock cannot be said."""


def record_of_holder(definition: Definition, paths: MachinePaths) -> LaunchRecord:
    """The launch record of the process that holds a machine's lock, as far as the process itself tells. Blocks.

    Raises:
        Unidentified: nobody whom this daemon may see holds it, or somebody who is no QEMU of this machine.
    """
    found = [one for path in lock_paths(paths.state) for one in holders(path)]
    ours = [one for one in found if _is_of(definition, one)]
    if len(ours) == 1:
        return _record(ours[0], definition, paths)
    if not found:
        raise Unidentified("a process holds its lock, but none that this daemon may see")
    names = ", ".join(f"{one.identity.pid} ({Path(one.program).name})" for one in found)
    raise Unidentified(f"its lock is held by process {names}, which is not known to be its QEMU")


def set_aside_damaged(run_dir: str) -> None:
    """Keeps a record that could not be read beside the one that takes its place. Blocks."""
    try:
        (Path(run_dir) / RECORD_NAME).replace(Path(run_dir) / DAMAGED_NAME)
    except FileNotFoundError:
        return
    except OSError as error:
        _log.warning("damaged launch record was not kept", extra={"directory": run_dir, "error": str(error)})


def _is_of(definition: Definition, found: HostProcess) -> bool:
    return _GATE not in found.argv and ("uuid", definition.uuid) in options(found.argv)


def _record(found: HostProcess, definition: Definition, paths: MachinePaths) -> LaunchRecord:
    given = dict(options(found.argv))
    run_dir = paths.run if _has_socket(paths.run) else found.directory or paths.run
    pipes = [name for name in ("serial0", "serial1", "serial2", "serial3") if Path(f"{run_dir}/{name}.in").exists()]
    return LaunchRecord(
        identity=found.identity,
        definition=definition,
        argv=found.argv,
        sockets={name: f"{run_dir}/{name}.sock" for name in ("qmp", "rescue")},
        pipes={name: f"{run_dir}/{name}" for name in pipes},
        accel="kvm" if given.get("accel", "").startswith("kvm") else "tcg",
        accel_reason="found again without its launch record",
        emulator=found.argv[0],
        emulator_version="unknown",
        machine=fields(given.get("machine", ""))[0] or definition.spec.machine or "unknown",
        started_at=timestamp(found.started_at),
        run_dir=run_dir,
        paused=True,  # whether it was meant to run is not known, and a halted guest can be resumed
        tpm=_tpm_of(definition, paths),
    )


def _tpm_of(definition: Definition, paths: MachinePaths) -> Identity | None:
    """Who is known by where it works: nobody else has a directory of a machine for its own."""
    found = [] if definition.spec.tpm is None else working_in(paths.tpm, "swtpm")
    return found[0].identity if len(found) == 1 else None


def _has_socket(run_dir: str) -> bool:
    return Path(run_dir, "qmp.sock").is_socket()
