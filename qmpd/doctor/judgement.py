"""What is wrong, and what mends it: a condition in, findings out.

`fail` keeps a machine from running, or endangers what is stored; `warn` will; a `note` is worth knowing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, Literal

from qmpd.doctor.condition import (
    CertificateSeen,
    Condition,
    DatabaseSeen,
    FileSeen,
    ForeignQemu,
    LeftOver,
    LimitSeen,
    MachineSeen,
    PeerSeen,
    Silence,
    SilentDirectory,
    VolumeSeen,
)
from qmpd.facts import FileFacts
from qmpd.lifecycle import AT_REST, State
from qmpd.views import DoctorFinding, DoctorReport

Severity = Literal["fail", "warn", "note"]

MIB: Final = 2**20
GIB: Final = 2**30
#: Below this nothing can be written down any more: a launch record, a definition, an event.
FULL_BYTES: Final = 16 * MIB
#: Less than this part of a file system is what a growing guest fills in a day; where it is much space all the same it is enough.
NEARLY_FULL: Final = 0.05
PLENTY_BYTES: Final = 10 * GIB
FEW_INODES: Final = 1000
#: A machine that crashed so often in an hour does so again.
CRASH_LOOP: Final = 3
#: An hour of a host with a hundred busy machines; a log larger than this was not written back because a reader stands in the way.
LARGE_LOG_BYTES: Final = 64 * MIB
#: Events are a few hundred bytes: with the most that may be kept the database is about this large.
LARGE_DATABASE_BYTES: Final = 4 * GIB
#: So many events wait only while the disk is slow.
MANY_PENDING: Final = 1000
#: Certificates are dated back by ten minutes; a minute is mended in time.
CLOCKS_DIFFER_S: Final = 60.0
#: Long enough to renew without hurry, as in `qmpd pki check`.
DAYS_LEFT: Final = 30.0
NEARLY: Final = 0.8
ALMOST: Final = 0.95
_ORDER: Final = {"fail": 0, "warn": 1, "note": 2}

_SILENT_MEND: Final = "see whether the file system still answers (ls -d PATH, dmesg); a dead network mount goes with umount -l"


def report(condition: Condition) -> DoctorReport:
    """All findings, the gravest first. `ok` says that none is a failure."""
    found = [
        *(finding for machine in condition.machines for finding in _of_machine(machine)),
        *(finding for volume in condition.volumes for finding in _of_volume(volume)),
        *(finding for file in condition.files for finding in _of_file(file)),
        *_of_database(condition.database),
        *(finding for limit in condition.limits for finding in _of_limit(limit)),
        *map(_of_left_over, condition.left_over),
        *map(_of_foreign, condition.foreign),
        *map(_of_silence, condition.silent),
        *map(_of_certificate, condition.certificates),
        *(finding for peer in condition.peers for finding in _of_peer(peer)),
    ]
    found.sort(key=lambda finding: (_ORDER[finding.severity], finding.where, finding.what))
    return DoctorReport(
        ok=all(finding.severity != "fail" for finding in found), machines=len(condition.machines), findings=tuple(dict.fromkeys(found))
    )


def _finding(severity: Severity, where: str, what: str, remedy: str) -> DoctorFinding:
    return DoctorFinding(severity=severity, where=where, what=what, remedy=remedy)


#: What is wrong with a machine that is in this state.
_STATES: Final = {
    State.UNRESPONSIVE: (
        "QEMU is alive and does not answer its monitor",
        "its main loop is blocked, often by storage that hangs; if it stays so: qmpctl kill {name}",
    ),
    State.UNREACHABLE: (
        "QEMU is alive, and there is no connection to its monitor",
        "the daemon goes on trying; if it stays so: qmpctl kill {name}",
    ),
}
#: What is wrong with a machine that QEMU has halted by itself, by its word for it.
_STATUSES: Final = {
    "io-error": ("fail", "a disk failed or is full, and the guest is halted", "make room or mend the storage, then: qmpctl resume {name}"),
    "internal-error": ("fail", "the virtual processor failed, and the guest is halted", "qmpctl reset {name}, or qmpctl kill {name}"),
    "guest-panicked": ("warn", "the guest's kernel panicked", "qmpctl log {name} says why; qmpctl reset {name} starts it again"),
    "watchdog": ("warn", "the guest's watchdog fired, and the guest is halted", "qmpctl reset {name}, or qmpctl resume {name}"),
}
_STRAY: Final = (
    "a QEMU of this machine is alive, and no record says how to reach it",
    "find it by the lock it holds (fuser STATE/machines/{name}/running.lock) and end it by hand; then the machine can be started again",
)


def _of_machine(machine: MachineSeen) -> Iterator[DoctorFinding]:
    where = f"machine {machine.name}"
    if not machine.board_known:
        mend = "put its board file back (QMPD_MACHINES_PATH, /etc/qmpd/machines) and restart the daemon, or replace the definition"
        yield _finding("fail", where, f"its board {machine.board!r} is not in the catalogue: it cannot be started", mend)
    known = _STRAY if machine.stray else _STATES.get(machine.state)
    if known is not None:
        yield _finding("fail", where, known[0], known[1].format(name=machine.name))
    if machine.state not in AT_REST and machine.status in _STATUSES:
        severity, what, mend = _STATUSES[machine.status]
        yield _finding("fail" if severity == "fail" else "warn", where, what, mend.format(name=machine.name))
    yield from _of_endings(machine, where)
    if machine.replaced:
        what = f"its emulator {machine.emulator} was replaced since: it runs the old one, and an upgrade is pending"
        yield _finding("note", where, what, f"qmpctl upgrade-emulator {machine.name}, when it suits")
    for port in machine.full_consoles:
        what = f"the log of serial port {port} is at its limit: the oldest output is no longer kept"
        yield _finding("note", where, what, f"save what is needed (qmpctl log {machine.name}), or raise console_log_mib in the settings")


def _of_endings(machine: MachineSeen, where: str) -> Iterator[DoctorFinding]:
    look = f"qmpctl show {machine.name} has QEMU's last words, qmpctl log {machine.name} the guest's"
    if machine.crashes >= CRASH_LOOP:
        yield _finding("fail", where, f"it crashed {machine.crashes} times within an hour{machine.ending}", look)
    elif machine.state is State.CRASHED:
        given_up = ", and is not started again by its restart policy" if machine.restarts else ""
        yield _finding("warn", where, f"it crashed{given_up}{machine.ending}", look)


def _of_volume(volume: VolumeSeen) -> Iterator[DoctorFinding]:
    own = volume.purpose in ("state", "run")
    where = f"{volume.purpose} directory {volume.directory}"
    if own and not volume.writable:
        yield _finding("fail", where, "the daemon may not write there", "give it to the daemon's user, or mount it writable")
    if not volume.writable or not volume.total_bytes:
        return
    text = f"{volume.free_bytes / GIB:.1f} GiB of {volume.total_bytes / GIB:.1f} GiB free"
    mend = "make room, or use a larger file system: a guest whose disk cannot grow is halted, and definitions cannot be stored"
    if volume.free_bytes < FULL_BYTES:
        yield _finding("fail" if own else "warn", where, f"its file system is full: {volume.free_bytes // 1024} KiB free", mend)
    elif volume.free_bytes < min(NEARLY_FULL * volume.total_bytes, PLENTY_BYTES):
        yield _finding("warn", where, f"its file system is nearly full: {text}", mend)
    if volume.free_inodes is not None and volume.free_inodes < FEW_INODES:
        yield _finding("warn", where, f"its file system has {volume.free_inodes} inodes left", "delete small files")


def _of_file(file: FileSeen) -> Iterator[DoctorFinding]:
    where = f"machine {file.machine}, {file.role} {file.path}"
    found = file.found
    if isinstance(found, Silence):
        if found.behind is None:
            yield _finding("fail", where, "its file system does not answer", _SILENT_MEND.replace("PATH", file.path))
        else:
            yield _finding(
                "warn", where, f"it was not looked at: {found.behind} is on the same file system, which does not answer", "mend that"
            )
        return
    what, mend = _trouble(found, written_to=file.written_to)
    if what:
        yield _finding("fail", where, what, mend)


def _trouble(found: FileFacts, *, written_to: bool) -> tuple[str, str]:
    if found.refusal is not None:
        return f"it cannot be used: {found.refusal}", "use another file, or change the setting that forbids it"
    if found.kind == "missing":
        return "it is not there", "put it back, mount what it is on, or replace the definition"
    if found.kind != "file" or not found.readable:
        return "the daemon may not read it, or it is no regular file", "let the daemon's user read it"
    if written_to and not found.writable:
        return "the daemon may not write to it, and the guest will", "let the daemon's user write to it, or make the disk read_only"
    return "", ""


def _of_database(database: DatabaseSeen) -> Iterator[DoctorFinding]:
    where = f"database {database.path}"
    if not database.answers:
        yield _finding("fail", where, "it does not answer", "see whether the disk of the state directory hangs or fails (dmesg)")
    if database.lost:
        mend = "see that the state directory has room and works; what was lost cannot be had again"
        yield _finding("warn", where, f"{database.lost} events could not be recorded since the daemon began", mend)
    if database.pending > MANY_PENDING:
        yield _finding("warn", where, f"{database.pending} events wait to be written", "put the state directory on a faster disk")
    if database.log_bytes > LARGE_LOG_BYTES:
        what = f"its write-ahead log has grown to {database.log_bytes // MIB} MiB"
        yield _finding("warn", where, what, "end whoever else has the database open, then restart the daemon")
    if database.size_bytes > LARGE_DATABASE_BYTES:
        what = f"it has {database.size_bytes / GIB:.1f} GiB"
        yield _finding("note", where, what, "lower events_kept in the settings if that is too much")


def _of_limit(limit: LimitSeen) -> Iterator[DoctorFinding]:
    part = limit.used / limit.limit if limit.limit else 1.0
    if part >= NEARLY:
        severity: Severity = "fail" if part >= ALMOST else "warn"
        yield _finding(severity, "this host", f"{limit.what}: {limit.used} of {limit.limit} are in use", limit.mend)


def _of_left_over(left: LeftOver) -> DoctorFinding:
    where = left.directory
    if left.damaged:
        mend = "restore the database from a backup; until then the files are left alone, and the name cannot be used"
        return _finding("fail", where, "the definition of this machine is damaged and cannot be read", mend)
    if left.held:
        return _finding("warn", where, "a QEMU runs from this directory, and no machine has it", "find it with fuser, and end it by hand")
    return _finding("note", where, "no machine has this directory", "look into it, and remove it if nothing in it is needed")


def _of_foreign(qemu: ForeignQemu) -> DoctorFinding:
    what = f"{qemu.program} with process id {qemu.pid} uses {qemu.directory}, and was not launched by this daemon"
    return _finding("warn", f"process {qemu.pid}", what, "it is left alone; end it by hand if it should not be there")


def _of_silence(silent: SilentDirectory) -> DoctorFinding:
    if silent.silence.behind is not None:
        what = f"it was not looked at: {silent.silence.behind} is on the same file system, which does not answer"
        return _finding("warn", silent.directory, what, "mend that")
    return _finding("fail", silent.directory, "its file system does not answer", _SILENT_MEND.replace("PATH", silent.directory))


def _of_certificate(seen: CertificateSeen) -> DoctorFinding:
    return _finding("fail" if seen.grave else "warn", f"certificates, {seen.subject}", seen.found, seen.remedy)


def _of_peer(peer: PeerSeen) -> Iterator[DoctorFinding]:
    where = f"peer {peer.name}"
    if peer.problem is not None:
        yield _finding(
            "warn", where, f"it cannot be reached: {peer.problem}", "qmpd pki check on both hosts says more; no machine goes there"
        )
    if peer.clock_ahead_s is not None and abs(peer.clock_ahead_s) > CLOCKS_DIFFER_S:
        what = f"its clock is {peer.clock_ahead_s:+.0f} s off ours: certificates that are new or end are judged differently on both"
        yield _finding("warn", where, what, "set both clocks, and keep them so (chrony, systemd-timesyncd)")
    if peer.days_left is not None and peer.days_left < DAYS_LEFT:
        what = f"its certificate ends in {max(0, int(peer.days_left))} days"
        yield _finding("warn", where, what, "qmpd pki renew where certificates are issued, and copy the files to that host")
