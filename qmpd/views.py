"""What qmpd answers: the types behind the API's response bodies, shared by service, API, client and `qmpctl`."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from qmpd.access import Personal, Role
from qmpd.errors import Problem
from qmpd.lifecycle import State
from qmpd.migrationviews import MigrationProgress
from qmpd.processviews import AdoptedView, TroubleView
from qmpd.spec import MAX_LABELS, Label, MachineSpec, Seconds, Word
from qmpd.viewbase import Request, View


class Version(View, frozen=True, kw_only=True):
    """The daemon and what it speaks."""

    version: str
    api: str = "v1"
    pid: int
    started_at: str
    machines_running: int


class BoardView(View, frozen=True, kw_only=True):
    """One row of the catalogue; `runnable` says whether an emulator for it was found, `accel` what `auto` would take."""

    id: str
    title: str
    arch: str
    machine: str
    emulator: str | None
    runnable: bool
    accel: str | None
    reason: str | None = None
    memory_mib: int
    max_cpus: int
    disks: tuple[str, ...] = ()
    nics: tuple[str, ...] = ()
    console: str | None = None
    snapshots: str = "untested"
    migration: str = "untested"
    guest: str | None = None
    source: str = ""


class EmulatorView(View, frozen=True, kw_only=True):
    """One emulator binary found on this host, and the verdict on its accelerators."""

    name: str
    path: str
    target: str
    version: str
    machines: int
    cpus: int
    devices: int
    kvm: bool
    kvm_reason: str
    kvm_ratio: float | None = None
    problem: str | None = None


class CheckLine(View, frozen=True, kw_only=True):
    """One thing `qmpd check` looked at. `mend` is the command or setting that would change the verdict."""

    topic: str
    subject: str
    verdict: Literal["pass", "warn", "fail"]
    found: str
    meaning: str = ""
    mend: str | None = None
    value: float | None = None


class CheckReport(View, frozen=True, kw_only=True):
    """The whole of `qmpd check`; `ok` is false when any line failed."""

    ok: bool
    lines: tuple[CheckLine, ...]


class DoctorFinding(View, frozen=True, kw_only=True):
    """One thing that is wrong: where, what, and what to do. A `fail` keeps a machine from running or endangers what is stored."""

    severity: Literal["fail", "warn", "note"]
    where: str
    what: str
    remedy: str


class DoctorReport(View, frozen=True, kw_only=True):
    """What is wrong with a daemon and its `machines`, the gravest first; `ok` is false when any finding is a failure."""

    ok: bool
    machines: int
    findings: tuple[DoctorFinding, ...] = ()


class ValidationReport(View, frozen=True, kw_only=True):
    """All that is wrong with a definition, and what is merely odd."""

    ok: bool
    problems: tuple[Problem, ...] = ()
    warnings: tuple[Problem, ...] = ()


class CommandView(View, frozen=True, kw_only=True):
    """The exact QEMU command of a definition. `text` can be pasted into a shell; there sockets are paths instead of passed fds."""

    argv: tuple[str, ...]
    text: str
    emulator_version: str
    accel: str
    accel_reason: str


class ExitView(View, frozen=True, kw_only=True):
    """How a QEMU process ended. `reason` is QMP's shutdown reason where there was one; `code` is None when it could not be seen."""

    code: int | None = None
    signal: str | None = None
    reason: str | None = None
    clean: bool = False
    at: str = ""
    stderr_tail: str = ""


class DiskErrorView(View, frozen=True, kw_only=True):
    """Why a machine is halted with the status `io-error`: the disk that failed, by QEMU's name for it and by its place in the definition.

    `nospace`: the host's file system is full, and `resume` works once it is not. `operation` is None where nobody saw which it was.
    """

    device: str
    disk: int | None = None
    operation: Literal["read", "write"] | None = None
    nospace: bool = False
    reason: str = ""
    at: str = ""


class ForwardView(View, frozen=True, kw_only=True):
    """A port forward in force, with the port the system chose."""

    protocol: str
    host_address: str
    host_port: int
    guest_port: int


class MachineView(View, frozen=True, kw_only=True):
    """A machine as its task knows it. `state` is qmpd's word, `status` QEMU's (`query-status`), `revision` the ETag of the definition."""

    name: str
    title: str = ""
    uuid: str
    board: str
    arch: str
    machine: str
    revision: int
    state: State
    status: str | None = None
    since: str
    operation: str | None = None
    accel: str | None = None
    emulator: str | None = None
    emulator_version: str | None = None
    cpus: int
    memory_mib: int
    pid: int | None = None
    cgroup: str | None = None
    started_at: str | None = None
    console_bytes: int = 0
    console_line: str = ""
    resets: int = 0
    exit: ExitView | None = None
    disk_error: DiskErrorView | None = None
    autostart: bool = False
    protected: bool = False
    labels: dict[str, str] = {}
    trouble: TroubleView | None = None
    adopted: AdoptedView | None = None
    tpm_lost: str | None = None


class MachineList(View, frozen=True, kw_only=True):
    """The machines, ordered by name; `event` is the newest event number this snapshot includes."""

    machines: tuple[MachineView, ...]
    event: int


class DefinitionView(View, frozen=True, kw_only=True):
    """The stored definition: what the user said, with UUID, machine type and MAC addresses filled in at creation."""

    spec: MachineSpec
    revision: int
    created_at: str
    changed_at: str


class StopView(View, frozen=True, kw_only=True):
    """How a machine came to its end: the rung of the ladder that worked."""

    machine: MachineView
    method: Literal["already-stopped", "acpi", "quit", "sigterm", "sigkill"]
    clean: bool


class StartRequest(Request, frozen=True, kw_only=True):
    """`paused`: leave the machine halted before its first instruction."""

    paused: bool = False


class ShutdownRequest(Request, frozen=True, kw_only=True):
    """Ask the guest over ACPI and wait `timeout_s` (default: the definition's); `then` says what happens if it does not obey."""

    timeout_s: Seconds | None = None
    then: Literal["nothing", "stop", "kill"] = "nothing"


class HostShutdownRequest(Request, frozen=True, kw_only=True):
    """Ask every guest, and wait `timeout_s` for each (default: its definition's); then `stop` ends QEMU with `quit` and SIGTERM, and
    `kill` also with SIGKILL where that was not enough."""

    timeout_s: Seconds | None = None
    then: Literal["stop", "kill"] = "stop"


class MachineEnd(View, frozen=True, kw_only=True):
    """How one machine ended with its host: by which rung of the ladder, or with what `error` it did not."""

    machine: str
    method: Literal["already-stopped", "acpi", "quit", "sigterm", "sigkill"] | None = None
    clean: bool = False
    error: ErrorBody | None = None


class HostShutdownView(View, frozen=True, kw_only=True):
    """The machines in the order in which they ended; `left` is how many are still there."""

    machines: tuple[MachineEnd, ...] = ()
    left: int = 0


class QmpRequest(Request, frozen=True, kw_only=True):
    """One QMP command as QEMU documents it. `oob` sends it out of band."""

    execute: Annotated[str, Meta(pattern=r"^[a-zA-Z_][a-zA-Z0-9_.-]{0,127}\Z")]
    arguments: dict[str, object] = {}
    oob: bool = False


class QmpAnswer(View, frozen=True, kw_only=True):
    """What QEMU returned."""

    result: object = msgspec.field(name="return")


class SendKeyRequest(Request, frozen=True, kw_only=True):
    """Keys pressed together, as QEMU's qcodes (`ctrl`, `alt`, `delete`), for `hold_ms`."""

    keys: Annotated[tuple[Word, ...], Meta(min_length=1, max_length=16)]
    hold_ms: Annotated[int, Meta(ge=1, le=10_000)] = 100


class ExpectRequest(Request, frozen=True, kw_only=True):
    """Wait until the console prints something that matches `pattern` (RE2 syntax).

    `since` is a console offset (None: where the log stands now, or its start for a `from_start` request); `send` is typed first.
    """

    pattern: Annotated[str, Meta(min_length=1, max_length=4096)]
    send: Annotated[str, Meta(max_length=65_536)] | None = None
    timeout_s: Annotated[float, Meta(ge=0, le=3600)] = 30.0
    since: Annotated[int, Meta(ge=0)] | None = None
    from_start: bool = False
    port: Annotated[int, Meta(ge=0, le=3)] | None = None


class ExpectResult(View, frozen=True, kw_only=True):
    """`reason` is `matched`, `timeout` or `ended` (the machine stopped). `start` and `end` are console offsets of the match."""

    matched: bool
    reason: Literal["matched", "timeout", "ended"]
    text: str = ""
    groups: tuple[str | None, ...] = ()
    start: int | None = None
    end: int | None = None
    tail: str = ""


class Event(View, frozen=True, kw_only=True):
    """Something that happened. Numbers rise by one and are never reused; `data` depends on `kind`."""

    number: int
    at: str
    kind: str
    machine: str | None = None
    data: dict[str, object] = {}


class EventPage(View, frozen=True, kw_only=True):
    """Events after `since`. `gap` is true when older ones that were asked for are no longer kept; `first` is the oldest kept."""

    events: tuple[Event, ...]
    first: int
    last: int
    gap: bool = False


class Progress(View, frozen=True, kw_only=True):
    """How far a job is. `total` None: not known. `rate` is per second, `eta_s` in seconds. `migration`: the figures of one."""

    phase: str = ""
    done: float = 0
    total: float | None = None
    unit: str = ""
    rate: float | None = None
    eta_s: float | None = None
    migration: MigrationProgress | None = None


class JobView(View, frozen=True, kw_only=True):
    """Something that outlasts its request. `result` is set when it succeeded, `error` (code, message, details) when it failed."""

    id: str
    kind: str
    machine: str | None = None
    state: Literal["running", "succeeded", "failed", "cancelled", "interrupted"]
    progress: Progress = Progress()
    created_at: str
    ended_at: str | None = None
    result: dict[str, object] | None = None
    error: dict[str, object] | None = None


class JobList(View, frozen=True, kw_only=True):
    """Jobs, newest first."""

    jobs: tuple[JobView, ...]


class ErrorBody(View, frozen=True, kw_only=True):
    """The one shape of every error."""

    code: str
    message: str
    details: dict[str, object] = {}


class TokenRequest(Request, frozen=True, kw_only=True):
    """A token to be made. `labels`: it is good for machines that carry all of them only. `days`: how long it is valid; null: for ever.

    No token makes anybody a peer: another daemon shows a certificate, whose key does not travel.
    """

    name: Word
    role: Personal
    labels: Annotated[dict[Word, Label], Meta(max_length=MAX_LABELS)] = {}
    days: Annotated[float, Meta(gt=0, le=36_500)] | None = 90.0


class TokenView(View, frozen=True, kw_only=True):
    """A token, without its secret. `last_used_at` is since the daemon was started."""

    id: str
    name: str
    role: Role
    labels: dict[str, str]
    created_at: str
    expires_at: str | None
    expired: bool
    last_used_at: str | None


class NewToken(View, frozen=True, kw_only=True):
    """A token that was made just now. Its text is not kept anywhere: it cannot be read again."""

    token: str
    about: TokenView
