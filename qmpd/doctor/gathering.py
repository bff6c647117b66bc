"""What there is to see of one machine's files, and of the directories that all share: each as something to look at."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Final, Literal, TypeVar

import msgspec

from qmpd.doctor.condition import CertificateSeen, DatabaseSeen, FileSeen, LeftOver, Silence, SilentDirectory, VolumeSeen
from qmpd.doctor.limits import limits
from qmpd.doctor.looking import Look
from qmpd.facts import FileFacts, MachinePaths
from qmpd.hostcheck.resources import volume
from qmpd.hostcheck.tree import HostTree
from qmpd.hostprocess import qemus
from qmpd.plan.disks import layers
from qmpd.runlock import is_taken
from qmpd.segments import first
from qmpd.settings import Settings
from qmpd.spec import BlankDisk, ImageDisk, MachineSpec
from qmpd.statefile import DATABASE_NAME
from qmpd.storage import examine, paths_of

T = TypeVar("T")
Purpose = Literal["state", "run", "cache", "pool"]
ROOT: Final = "/"


class Question(msgspec.Struct, frozen=True, kw_only=True):
    """Something to look at, and what becomes of the answer: `seen` makes findings of what the look returned, an error or a silence."""

    look: Look
    seen: Callable[[object], Sequence[object]]


class FullConsole(msgspec.Struct, frozen=True, kw_only=True):
    """A serial port whose log has lost its beginning."""

    machine: str
    port: int


def of_files(spec: MachineSpec, paths: MachinePaths, settings: Settings) -> Iterator[Question]:
    """The files a definition names, and the disks that were made for it; each answer is a FileSeen."""
    written = {disk.path for disk in spec.disks if isinstance(disk, ImageDisk) and not disk.read_only and disk.media == "disk"}
    based = {disk.path for disk in spec.disks if isinstance(disk, ImageDisk) and disk.base is not None}
    based |= {layer.path for disk in spec.disks for _, layer in layers(disk) if layer.base is not None}
    for path in paths_of(spec):
        role = "disk" if any(isinstance(disk, ImageDisk) and disk.path == path for disk in spec.disks) else "file"
        yield _file(spec.name, role, path, settings.pools, written_to=path in written, based=path in based)
    for index, disk in enumerate(spec.disks):
        if isinstance(disk, BlankDisk):
            # Made by this daemon in its own directory: no pool has to allow it.
            yield _file(spec.name, "disk", paths.disk(index, disk.format), (ROOT,), written_to=True)


def _file(machine: str, role: str, path: str, pools: tuple[str, ...], *, written_to: bool, based: bool = False) -> Question:
    def seen(answer: object) -> list[FileSeen]:
        found = answer if isinstance(answer, FileFacts | Silence) else FileFacts(kind="denied")
        if based and isinstance(found, FileFacts) and found.backing is not None:
            found = msgspec.structs.replace(found, refusal=None)
        return [FileSeen(machine=machine, role=role, path=path, written_to=written_to, found=found)]

    return Question(look=Look(path=path, work=lambda: examine([path], pools)[path]), seen=seen)


def of_volumes(settings: Settings) -> Iterator[Question]:
    """The file systems of the daemon's directories; each answer is a VolumeSeen, or a SilentDirectory."""
    places: list[tuple[Purpose, str]] = [("state", settings.state_dir), ("run", settings.run_dir), ("cache", settings.cache_dir)]
    places += [("pool", pool) for pool in settings.pools]
    for purpose, directory in places:
        yield Question(look=Look(path=directory, work=partial(_volume, purpose, directory)), seen=partial(_volume_or_silence, directory))


def _volume(purpose: Purpose, directory: str) -> VolumeSeen:
    found = volume(HostTree(), directory)
    return VolumeSeen(
        purpose=purpose,
        directory=directory,
        device=found.device,
        free_bytes=found.free_bytes,
        total_bytes=found.total_bytes,
        free_inodes=found.free_inodes,
        writable=found.writable,
    )


def _volume_or_silence(directory: str, answer: object) -> list[object]:
    return [SilentDirectory(directory=directory, silence=answer) if isinstance(answer, Silence) else answer]


def of_left_over(settings: Settings, known: Callable[[], frozenset[str]], damaged: frozenset[str]) -> Iterator[Question]:
    """The directories that look like machines' and belong to none; each answer is some LeftOver.

    `known` is asked when the directories have been listed: a machine may be created meanwhile.
    """
    for parent in (f"{settings.state_dir}/machines", f"{settings.run_dir}/m"):

        def seen(answer: object) -> list[LeftOver]:
            return [left for left in answer if Path(left.directory).name not in known()] if isinstance(answer, list) else []

        yield Question(look=Look(path=parent, work=partial(_left_over, parent, known(), damaged)), seen=seen)


def _left_over(parent: str, known: frozenset[str], damaged: frozenset[str]) -> list[LeftOver]:
    return [
        LeftOver(directory=str(path), damaged=path.name in damaged, held=is_taken(str(path)))
        for path in sorted(Path(parent).iterdir())
        if path.is_dir() and path.name not in known
    ]


def of_console(machine: str, paths: MachinePaths, port: int) -> Question:
    """Whether the log of a serial port has lost its beginning: a FullConsole, or nothing."""
    log = paths.log(f"serial{port}")

    def seen(answer: object) -> list[FullConsole]:
        return [FullConsole(machine=machine, port=port)] if isinstance(answer, int) and answer > 0 else []

    return Question(look=Look(path=log, work=partial(first, log)), seen=seen)


def of_database(settings: Settings) -> Question:
    """The database's size; the answer is a DatabaseSeen that says nothing else."""
    path = f"{settings.state_dir}/{DATABASE_NAME}"

    def seen(answer: object) -> list[DatabaseSeen]:
        return [answer if isinstance(answer, DatabaseSeen) else DatabaseSeen(path=path, answers=True)]

    return Question(look=Look(path=path, work=partial(_database, path)), seen=seen)


def _database(path: str) -> DatabaseSeen:
    log = Path(f"{path}-wal")
    return DatabaseSeen(path=path, answers=True, size_bytes=Path(path).stat().st_size, log_bytes=log.stat().st_size if log.exists() else 0)


def of_certificates(settings: Settings) -> Iterator[Question]:
    """What is wrong with the certificates, where some are needed: some CertificateSeen."""
    if settings.listen or settings.peers:

        def seen(answer: object) -> Sequence[object]:
            return answer if isinstance(answer, list) else []

        yield Question(look=Look(path=settings.pki_dir, work=partial(_certificates, settings)), seen=seen)


def _certificates(settings: Settings) -> list[CertificateSeen]:
    from qmpd.pki import own_hosts  # here: a library of cryptography comes with the check
    from qmpd.pki.checking import check, daemon_of

    lines = check(settings.pki_dir, daemon_of(settings, own_hosts()), datetime.now(UTC))
    return [
        CertificateSeen(subject=line.subject, found=line.found, remedy=line.mend or "qmpd pki check", grave=line.verdict == "fail")
        for line in lines
        if line.verdict != "pass"
    ]


def of_host() -> Question:
    """The QEMUs of this host and the kernel's limits: some HostProcess and some LimitSeen."""

    def seen(answer: object) -> Sequence[object]:
        return answer if isinstance(answer, list) else []

    return Question(look=Look(path="/proc", work=lambda: [*qemus(), *limits(HostTree())]), seen=seen)


def only(kind: type[T], answers: list[object]) -> tuple[T, ...]:
    """The answers of one kind."""
    return tuple(answer for answer in answers if isinstance(answer, kind))
