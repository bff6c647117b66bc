"""What the API says and hears of migrations: what is asked for, how far one is, and what became of it."""

from __future__ import annotations

from typing import Annotated, Final, Literal

from msgspec import Meta

from qmpd.spec import EMULATOR_PATTERN, MAX_DISKS, DiskFormat, Name, Path, Text, Word
from qmpd.viewbase import Request, View

#: What happens at the deadline to a guest that changes its memory faster than it can be sent.
Then = Literal["pause", "postcopy", "abort"]
#: QEMU takes no `downtime-limit` above 2000 s.
MAX_DOWNTIME_MS: Final = 2_000_000
DowntimeMs = Annotated[int, Meta(ge=1, le=MAX_DOWNTIME_MS)]
#: A week: whatever takes longer is watched by nobody.
DeadlineS = Annotated[float, Meta(gt=0, le=604_800)]
#: 1 TiB/s: more than any link.
BandwidthMib = Annotated[int, Meta(ge=1, le=1_048_576)]
Severity = Literal["error", "warning", "info"]
#: Under which QEMU a machine is: on the host it comes from, on the one it goes to, or nobody can say before both have been asked.
Owner = Literal["source", "destination", "unknown"]


class Goal(Request, frozen=True, kw_only=True):
    """What a migration is to keep to. The guest stands still for at most `downtime_ms`, unless `deadline_s` passes first: then it is paused
    to be moved however long the rest takes, or it runs on at the destination while its memory follows (`postcopy`), or it stays.
    `bandwidth_mib_s` is the most that memory and disks take of the network. `auto_converge` slows the processors of a guest that changes
    its memory faster than it can be sent; `auto` does so only when nothing else helps."""

    downtime_ms: DowntimeMs = 300
    deadline_s: DeadlineS | None = None
    then: Then = "pause"
    bandwidth_mib_s: BandwidthMib | None = None
    auto_converge: bool | Literal["auto"] = "auto"


class GoalChanges(Request, frozen=True, kw_only=True):
    """Another goal for a migration that is under way: fields left out stay as they are, and 0 takes a limit away. A deadline counts from
    the beginning of the migration."""

    downtime_ms: DowntimeMs | None = None
    deadline_s: Annotated[float, Meta(ge=0, le=604_800)] | None = None
    then: Then | None = None
    bandwidth_mib_s: Annotated[int, Meta(ge=0, le=1_048_576)] | None = None
    auto_converge: bool | Literal["auto"] | None = None


class DiskChoice(Request, frozen=True, kw_only=True):
    """How disk number `disk` of the definition moves: `shared` is at the same path on both hosts, `copy` is copied while the guest runs,
    to `path` (default: the same) as `format` (default: the same). Of one that lies upon a base, only what is above that is copied if the
    destination has the same file at `base` (default: the same path)."""

    disk: Annotated[int, Meta(ge=0, lt=MAX_DISKS)]
    how: Literal["shared", "copy"]
    path: Path | None = None
    format: DiskFormat | None = None
    base: Path | None = None


class CopyRequest(Request, frozen=True, kw_only=True):
    """The machine stays as it is, and another one of it is made at the peer, stopped: under `name` (default: the same), with a UUID and
    MAC addresses of its own."""

    name: Name | None = None


class MigrateRequest(Request, frozen=True, kw_only=True):
    """Move a machine to the daemon `peer`. `storage` is for the disks that `disks` does not name: `auto` finds out which are shared.
    `channels`: connections for memory (multifd), 0 for QEMU's single one. `tunnel` sends everything through the API's port, for where
    no other is open. `accept`: codes of findings that shall not prevent it, where QEMU or the guest is the judge (the documentation
    lists them). `copy`: the machine is copied, and not moved; of the goal then `bandwidth_mib_s` counts, and `deadline_s` with
    `then` = `abort`."""

    peer: Text
    dry_run: bool = False
    goal: Goal = Goal()
    storage: Literal["auto", "shared", "copy"] = "auto"
    disks: Annotated[tuple[DiskChoice, ...], Meta(max_length=MAX_DISKS)] = ()
    channels: Annotated[int, Meta(ge=0, le=64)] = 0
    tunnel: bool = False
    accept: Annotated[tuple[Word, ...], Meta(max_length=16)] = ()
    copy: CopyRequest | None = None


class MoveDiskRequest(Request, frozen=True, kw_only=True):
    """Move a disk to the file `path` of this host, which must not exist, as `format` (default: the same). `bandwidth_mib_s`: at most."""

    path: Path
    format: DiskFormat | None = None
    bandwidth_mib_s: BandwidthMib | None = None


class DiskMoved(View, frozen=True, kw_only=True):
    """A disk that was moved, which the guest and the definition use there; `bytes` is its size."""

    machine: str
    disk: int
    path: str
    format: DiskFormat
    bytes: int


class UpgradeRequest(Request, frozen=True, kw_only=True):
    """Have another QEMU take the place of a machine's: the one that a start would take now, or `emulator` (a name, or a path). The
    definition stays as it is."""

    emulator: Annotated[str, Meta(pattern=EMULATOR_PATTERN, max_length=4096)] | None = None


class UpgradeReport(View, frozen=True, kw_only=True):
    """Which QEMU took the place of which. `downtime_ms`: how long the guest stood still. `problems`: what the new one lacks."""

    machine: str
    emulator: str
    emulator_version: str
    before: str
    before_version: str
    pid: int
    before_pid: int
    downtime_ms: float
    total_ms: float
    problems: tuple[str, ...] = ()


class ResolveRequest(Request, frozen=True, kw_only=True):
    """Settle a migration of which this daemon cannot find out how it ended, on a person's word that the other side does not run the
    machine: `keep` it here (at its source), `take` it over (at its destination), or `discard` what came of it (at its destination).
    `moved` is the word that the other side has it: what is left of it here (at its source) is removed.
    `confirm` is the machine's name once more."""

    action: Literal["keep", "take", "discard", "moved"]
    confirm: Name


class MigrationFinding(View, frozen=True, kw_only=True):
    """Something that was found before a migration. `error` prevents it, `warning` may make it fail or the guest suffer, `info` is as it is.
    `path` is where in the definition, or `""`; `mend` what would change it."""

    severity: Severity
    code: str
    path: str = ""
    message: str
    mend: str = ""


class Prediction(View, frozen=True, kw_only=True):
    """What a migration will take, from what was measured. `total_s` None: it does not end by itself. `reachable`: the goal is kept without
    what `then` says. `dirty_mib_s` None: it could not be measured. `explanation` is for people. A machine at rest has no memory and no
    downtime: `disk_bytes` is all of it."""

    memory_bytes: int
    disk_bytes: int
    bandwidth_mib_s: float
    dirty_mib_s: float | None = None
    total_s: float | None = None
    downtime_ms: float | None = None
    reachable: bool
    explanation: str


class DryRunReport(View, frozen=True, kw_only=True):
    """What `--dry-run` found. `possible`: there is no error among the findings."""

    machine: str
    peer: str
    possible: bool
    findings: tuple[MigrationFinding, ...] = ()
    prediction: Prediction | None = None


class Tuning(View, frozen=True, kw_only=True):
    """Something that was changed in a running migration to keep to its goal: when (seconds from its beginning), what, and why."""

    at_s: float
    action: Literal["set", "pause", "postcopy", "abort", "remark"]
    parameters: dict[str, int] = {}
    reason: str


class MigrationProgress(View, frozen=True, kw_only=True):
    """How far a migration is. Rates are those of the last seconds. `expected_downtime_ms`: if it were halted now; `eta_s` None: no end
    is in sight. `passes`: how often memory that changed was sent again. `throttle_percent`: how much slower the guest is made.
    `downtime_ms` is the real one, known at the end."""

    phase: str = ""
    memory_total_bytes: int = 0
    memory_remaining_bytes: int = 0
    transferred_bytes: int = 0
    disk_total_bytes: int = 0
    disk_remaining_bytes: int = 0
    bandwidth_mib_s: float | None = None
    dirty_mib_s: float | None = None
    passes: int = 0
    throttle_percent: int = 0
    downtime_limit_ms: int | None = None
    expected_downtime_ms: float | None = None
    downtime_ms: float | None = None
    elapsed_s: float = 0
    eta_s: float | None = None


class MovedDisk(View, frozen=True, kw_only=True):
    """What became of a disk: `copied` with the bytes that went over the network, or `shared` and handed over. `base`: what is below it was
    at the destination, and was not sent."""

    disk: int
    how: Literal["shared", "copied"]
    path: str
    bytes: int = 0
    base: str | None = None


class MigrationReport(View, frozen=True, kw_only=True):
    """What became of a migration, and who owns the machine now: `owner` is a side, `owner_name` that daemon. Figures QEMU did not give are
    None. `reason`: why it stayed, or why nobody can say. `tunnelled`: everything went through
    the API's connection, `tunnelled_bytes` of it."""

    id: str
    machine: str
    peer: str
    owner: Owner
    owner_name: str
    epoch: int = 0
    total_ms: float | None = None
    setup_ms: float | None = None
    downtime_ms: float | None = None
    transferred_bytes: int = 0
    bandwidth_mib_s: float | None = None
    passes: int = 0
    postcopy: bool = False
    encrypted: bool = True
    tunnelled: bool = False
    tunnelled_bytes: int = 0
    tuned: tuple[Tuning, ...] = ()
    findings: tuple[MigrationFinding, ...] = ()
    disks: tuple[MovedDisk, ...] = ()
    reason: str | None = None


class CopyReport(View, frozen=True, kw_only=True):
    """The machine that was made of `machine` at the peer: its name, UUID and MAC addresses, NIC by NIC. `at_rest`: it was copied while it
    did not run; otherwise the disks are those of one moment, for which the guest stood still for `halted_ms`."""

    id: str
    machine: str
    peer: str
    name: str
    uuid: str
    macs: tuple[str, ...] = ()
    at_rest: bool = True
    halted_ms: float | None = None
    total_ms: float | None = None
    transferred_bytes: int = 0
    bandwidth_mib_s: float | None = None
    findings: tuple[MigrationFinding, ...] = ()
    disks: tuple[MovedDisk, ...] = ()


class CopyView(View, frozen=True, kw_only=True):
    """The machine that a copy makes, and the one it is made of."""

    name: str
    uuid: str
    original: str


class MigrationView(View, frozen=True, kw_only=True):
    """A migration as this daemon knows it. `role` is this daemon's; `phase` one of its table; `owner` who owns the machine now. `job`: the
    one that carries it out. `cancellable` False: past the point of no return. `doubt`: why it stands still until somebody resolves it.
    `copy`: nothing moves, and another machine is made."""

    id: str
    machine: str
    role: Literal["source", "destination"]
    peer: str
    phase: str
    owner: Owner
    cancellable: bool = False
    doubt: str | None = None
    job: str | None = None
    began_at: str
    ended_at: str | None = None
    goal: Goal | None = None
    progress: MigrationProgress | None = None
    report: MigrationReport | None = None
    copy: CopyView | None = None


class MigrationList(View, frozen=True, kw_only=True):
    """Migrations, newest first."""

    migrations: tuple[MigrationView, ...]
