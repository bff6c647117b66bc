"""What a doctor makes of what was found out: each trouble is named, with a remedy, and health is not."""

from __future__ import annotations

import msgspec
import pytest

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
from qmpd.doctor.judgement import CRASH_LOOP, FULL_BYTES, GIB, LARGE_DATABASE_BYTES, LARGE_LOG_BYTES, MANY_PENDING, report
from qmpd.facts import FileFacts
from qmpd.lifecycle import State

FINE = FileFacts(kind="file", readable=True, writable=True)


def condition(**parts: object) -> Condition:
    return Condition(**{"database": DatabaseSeen(path="/s/qmpd.db", answers=True), **parts})  # type: ignore[arg-type]  # as a test says


def found(**parts: object) -> list[tuple[str, str]]:
    """Severity and text of what is found."""
    return [(finding.severity, f"{finding.where}: {finding.what} > {finding.remedy}") for finding in report(condition(**parts)).findings]


def only(**parts: object) -> tuple[str, str]:
    (finding,) = found(**parts)
    return finding


def machine(**changes: object) -> MachineSeen:
    return MachineSeen(**{"name": "one", "board": "b", "board_known": True, "state": State.RUNNING, **changes})  # type: ignore[arg-type]


def volume(**changes: object) -> VolumeSeen:
    health = {"purpose": "state", "directory": "/s", "device": 1, "free_bytes": 50 * GIB, "total_bytes": 100 * GIB, "free_inodes": 10**6}
    return VolumeSeen(**{**health, "writable": True, **changes})  # type: ignore[arg-type]


def file(result: FileFacts | Silence, *, written_to: bool = True) -> FileSeen:
    return FileSeen(machine="one", role="disk", path="/d", written_to=written_to, found=result)


def test_health_is_not_mentioned() -> None:
    healthy = condition(
        machines=(
            machine(),
            machine(name="two", state=State.STOPPED, replaced=False),
            machine(name="three", state=State.PAUSED, status="paused"),
        ),
        volumes=(volume(), volume(purpose="pool", directory="/p", free_bytes=0, writable=False), volume(free_inodes=None)),
        files=(file(FINE), file(FileFacts(kind="file", readable=True), written_to=False)),
        limits=(LimitSeen(what="files", used=79, limit=100, mend="more"),),
    )
    judged = report(healthy)
    assert (judged.ok, judged.machines, judged.findings) == (True, 3, ())


@pytest.mark.parametrize(
    ("changes", "severity", "words"),
    [
        ({"state": State.UNRESPONSIVE}, "fail", "does not answer its monitor"),
        ({"state": State.UNREACHABLE}, "fail", "no connection to its monitor"),
        ({"state": State.UNREACHABLE, "stray": True}, "fail", "no record says how to reach it"),
        ({"board_known": False}, "fail", "its board 'b' is not in the catalogue"),
        ({"state": State.PAUSED, "status": "io-error"}, "fail", "qmpctl resume one"),
        ({"state": State.PAUSED, "status": "internal-error"}, "fail", "virtual processor failed"),
        ({"state": State.PAUSED, "status": "guest-panicked"}, "warn", "kernel panicked"),
        ({"state": State.PAUSED, "status": "watchdog"}, "warn", "watchdog fired"),
        ({"state": State.CRASHED, "ending": " (SIGKILL)"}, "warn", "it crashed (SIGKILL) > qmpctl show one"),
        ({"state": State.CRASHED, "restarts": True}, "warn", "is not started again by its restart policy"),
        ({"crashes": CRASH_LOOP}, "fail", f"it crashed {CRASH_LOOP} times within an hour"),
        ({"replaced": True, "emulator": "/q"}, "note", "its emulator /q was replaced since"),
        ({"full_consoles": (1,)}, "note", "the log of serial port 1 is at its limit"),
    ],
)
def test_a_machine_in_trouble_is_named(changes: dict[str, object], severity: str, words: str) -> None:
    judged, text = only(machines=(machine(**changes),))
    assert judged == severity
    assert text.startswith("machine one: ")
    assert words in text


def test_an_old_status_of_a_machine_at_rest_is_no_trouble() -> None:
    assert found(machines=(machine(state=State.STOPPED, status="io-error", crashes=CRASH_LOOP - 1),)) == []


@pytest.mark.parametrize(
    ("changes", "severity", "words"),
    [
        ({"free_bytes": FULL_BYTES - 1}, "fail", "is full"),
        ({"free_bytes": FULL_BYTES - 1, "purpose": "pool"}, "warn", "is full"),
        ({"free_bytes": 4 * GIB}, "warn", "nearly full: 4.0 GiB of 100.0 GiB free"),
        ({"free_bytes": 9 * GIB, "total_bytes": 1000 * GIB}, "warn", "nearly full"),
        ({"free_inodes": 10}, "warn", "10 inodes left"),
        ({"writable": False}, "fail", "may not write there"),
        ({"writable": False, "purpose": "run"}, "fail", "may not write there"),
    ],
)
def test_a_file_system_in_trouble_is_named(changes: dict[str, object], severity: str, words: str) -> None:
    judged, text = only(volumes=(volume(**changes),))
    assert judged == severity
    assert " directory /s: " in text
    assert words in text


@pytest.mark.parametrize("changes", [{"free_bytes": 11 * GIB, "total_bytes": 1000 * GIB}, {"free_bytes": 0, "total_bytes": 0}], ids=str)
def test_a_file_system_with_much_room_or_of_no_size_is_fine(changes: dict[str, object]) -> None:
    assert found(volumes=(volume(**changes),)) == []


@pytest.mark.parametrize(
    ("result", "severity", "words"),
    [
        (Silence(), "fail", "its file system does not answer"),
        (Silence(behind="/d0"), "warn", "/d0 is on the same file system"),
        (FileFacts(kind="missing"), "fail", "it is not there"),
        (FileFacts(kind="denied"), "fail", "may not read it"),
        (FileFacts(kind="directory"), "fail", "no regular file"),
        (FileFacts(kind="denied", refusal="outside"), "fail", "it cannot be used: outside"),
        (FileFacts(kind="file", readable=True), "fail", "may not write to it"),
    ],
)
def test_a_file_in_trouble_is_named(result: FileFacts | Silence, severity: str, words: str) -> None:
    judged, text = only(files=(file(result),))
    assert judged == severity
    assert text.startswith("machine one, disk /d: ")
    assert words in text


@pytest.mark.parametrize(
    ("changes", "severity", "words"),
    [
        ({"answers": False}, "fail", "does not answer"),
        ({"lost": 2}, "warn", "2 events could not be recorded"),
        ({"pending": MANY_PENDING + 1}, "warn", "wait to be written"),
        ({"log_bytes": LARGE_LOG_BYTES + 1}, "warn", "write-ahead log"),
        ({"size_bytes": LARGE_DATABASE_BYTES + 1}, "note", "events_kept"),
    ],
)
def test_a_database_in_trouble_is_named(changes: dict[str, object], severity: str, words: str) -> None:
    health = DatabaseSeen(**{"path": "/s/qmpd.db", "answers": True, **changes})  # type: ignore[arg-type]  # as the table says
    judged, text = only(database=health)
    assert judged == severity
    assert text.startswith("database /s/qmpd.db: ")
    assert words in text


@pytest.mark.parametrize(("used", "limit", "severity"), [(80, 100, "warn"), (95, 100, "fail"), (0, 0, "fail")])
def test_a_limit_that_is_nearly_reached_is_named(used: int, limit: int, severity: str) -> None:
    judged, text = only(limits=(LimitSeen(what="open files", used=used, limit=limit, mend="raise it"),))
    assert (judged, text) == (severity, f"this host: open files: {used} of {limit} are in use > raise it")


def test_what_belongs_to_nobody_is_named_and_left_alone() -> None:
    assert only(left_over=(LeftOver(directory="/s/machines/x"),))[0] == "note"
    severity, text = only(left_over=(LeftOver(directory="/s/machines/x", held=True),))
    assert (severity, "a QEMU runs from this directory" in text) == ("warn", True)
    severity, text = only(left_over=(LeftOver(directory="/s/machines/x", damaged=True, held=True),))
    assert (severity, "damaged" in text) == ("fail", True)
    severity, text = only(foreign=(ForeignQemu(pid=7, program="qemu-system-x86_64", directory="/s"),))
    assert (severity, text.startswith("process 7: qemu-system-x86_64 with process id 7 uses /s")) == ("warn", True)


def test_a_directory_that_does_not_answer_is_named() -> None:
    severity, text = only(silent=(SilentDirectory(directory="/p", silence=Silence()),))
    assert (severity, "ls -d /p" in text) == ("fail", True)
    severity, text = only(silent=(SilentDirectory(directory="/p", silence=Silence(behind="/p/0")),))
    assert (severity, "/p/0 is on the same file system" in text) == ("warn", True)


def test_certificates_and_peers_in_trouble_are_named() -> None:
    seen = CertificateSeen(subject="server-key.pem", found="is open to others", remedy="chmod 600", grave=True)
    assert only(certificates=(seen,)) == ("fail", "certificates, server-key.pem: is open to others > chmod 600")
    assert only(certificates=(msgspec.structs.replace(seen, grave=False),))[0] == "warn"
    assert found(peers=(PeerSeen(name="b", clock_ahead_s=-59.0, days_left=31.0), PeerSeen(name="c"))) == []
    severity, text = only(peers=(PeerSeen(name="b", problem="cannot connect"),))
    assert (severity, text.startswith("peer b: it cannot be reached: cannot connect")) == ("warn", True)
    severity, text = only(peers=(PeerSeen(name="b", clock_ahead_s=-61.0),))
    assert (severity, "-61 s off ours" in text) == ("warn", True)
    severity, text = only(peers=(PeerSeen(name="b", days_left=2.9),))
    assert (severity, "ends in 2 days" in text) == ("warn", True)


def test_the_gravest_comes_first_and_a_warning_is_no_failure() -> None:
    several = condition(
        machines=(machine(replaced=True, emulator="/q"), machine(name="two", state=State.CRASHED), machine(name="a", board_known=False))
    )
    judged = report(several)
    assert [finding.severity for finding in judged.findings] == ["fail", "warn", "note"]
    assert not judged.ok
    assert report(condition(machines=(machine(state=State.CRASHED),))).ok
