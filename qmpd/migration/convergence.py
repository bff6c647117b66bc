"""Keeping a migration to its goal: samples in, decisions with their reasons out. Pure.

What QEMU does by itself: it goes on sending what changed until what is left fits into `downtime-limit` at the bandwidth it sees, and then
halts the guest for the last of it. So within the goal there is nothing to do but to tell it the limit. Theory for the rest:

* Not getting better is no reason to give up: guests have quiet moments, and links recover. Only the deadline is one, if `then` says so.
* A guest that changes its memory faster than it can be sent is slowed down, in steps, if the goal allows it.
* Whoever waits for the deadline and halts the guest then meets it at any moment, mostly a bad one. So in the last part of the time, if the
  goal is not in sight, the limit rises from the least of the last passes to their most: QEMU halts the guest at the first moment that is
  as good as it gets. Postcopy begins at such a moment too.
* What is being copied for the first time (disks) gets no faster when the guest is halted. The deadline waits for it, and says so; only
  `abort` does not.
* Limits only rise while the goal stays the same, and never above what QEMU takes.
* A QEMU that loses track of what its guest changes (`keeps_track`) may send memory once while the guest runs, and never twice: with a
  `downtime-limit` of 0 it halts the guest after the first pass, for all that was changed meanwhile. Where bitmaps of disks move along,
  which are sent at the very end, it would wait for ever: then the guest is halted for it.
"""

from __future__ import annotations

import math
from typing import Final, Literal, TypeAlias

import msgspec

from qmpd.migration.measuring import Measuring, Sample
from qmpd.migration.progress import NONE
from qmpd.migrationviews import MAX_DOWNTIME_MS, Goal, GoalChanges, MigrationProgress, Tuning

MIB: Final = 1024 * 1024
#: What is set when no bandwidth is asked for. Not 0: what that means has changed between versions of QEMU.
UNLIMITED_BYTES_S: Final = 1 << 40
#: What halting, handing over and going on take besides sending the rest, where nobody has measured it.
OVERHEAD_MS: Final = 50
#: The part of the time until the deadline after which a good moment is taken though it is not within the goal.
LAST_PART: Final = 0.8
#: Passes that bring nothing before the guest is slowed down (further).
PATIENCE_PASSES: Final = 3
#: QEMU can be told of auto-converge before a migration only. From then on it slows the guest at its own judgement: up to here, until we
#: say more.
IDLE_PERCENT: Final = 1
#: How much the guest is slowed, step by step. `auto` leaves it a fifth of its speed: with less it is as good as halted, and that is what
#: `pause` is for.
STEPS_PERCENT: Final = (20, 40, 60, 80)
FULL_PERCENT: Final = 99
#: What QEMU itself begins with and adds.
QEMU_INITIAL_PERCENT: Final = 20
QEMU_INCREMENT_PERCENT: Final = 10
#: A limit that is this much higher is worth a command.
WORTH: Final = 1.05
#: The statuses of QEMU in which it can still be told something.
TUNABLE: Final = frozenset({NONE, "setup", "active"})


#: The first version that looks at stores under TCG again once it has asked what was changed (QEMU's commit 03bfc2188f07). Before, of memory
#: that is changed over and over some is not sent again: measured with 7.2.22, not with 10.0.13.
TRACKING_SINCE: Final = (9, 0, 0)


class Abilities(msgspec.Struct, frozen=True, kw_only=True):
    """What both QEMUs have, and the way between them allows. `tracks`: see `keeps_track`; `bitmaps`: those of disks move along."""

    auto_converge: bool = True
    postcopy: bool = True
    tracks: bool = True
    bitmaps: bool = False


def keeps_track(accelerator: str, version: tuple[int, ...]) -> bool:
    """Whether a QEMU knows of every change of memory while its guest runs, also after it has sent all of it once."""
    return accelerator != "tcg" or version >= TRACKING_SINCE


class Set(msgspec.Struct, frozen=True, kw_only=True, tag="set"):
    """Set these migration parameters of the source."""

    parameters: dict[str, int]
    reason: str


class Pause(msgspec.Struct, frozen=True, kw_only=True, tag="pause"):
    """Halt the guest, so that the rest goes over; it runs at the destination afterwards if it ran here before."""

    reason: str


class Postcopy(msgspec.Struct, frozen=True, kw_only=True, tag="postcopy"):
    """Let the guest run at the destination, its memory following."""

    reason: str


class Abort(msgspec.Struct, frozen=True, kw_only=True, tag="abort"):
    """Give up; the machine stays."""

    reason: str


class Remark(msgspec.Struct, frozen=True, kw_only=True, tag="remark"):
    """Nothing is done, and that is worth a word."""

    reason: str


Decision: TypeAlias = Set | Pause | Postcopy | Abort | Remark
Action: TypeAlias = Literal["set", "pause", "postcopy", "abort", "remark"]
_ACTIONS: Final[dict[type[Decision], Action]] = {Set: "set", Pause: "pause", Postcopy: "postcopy", Abort: "abort", Remark: "remark"}


class Opening(msgspec.Struct, frozen=True, kw_only=True):
    """With what a migration begins: capabilities of the source beyond those every migration has (`postcopy-ram` is needed at both sides),
    and its parameters."""

    capabilities: tuple[str, ...]
    parameters: dict[str, int]


def opening(goal: Goal, abilities: Abilities, overhead_ms: int = OVERHEAD_MS) -> Opening:
    """What to set before `migrate`."""
    slowing = abilities.auto_converge and goal.auto_converge is not False
    postcopy = abilities.postcopy and goal.then == "postcopy"
    parameters = {"downtime-limit": limit_ms(goal, overhead_ms) if abilities.tracks else 0, **_bandwidth(goal)}
    if slowing:
        parameters |= _throttle(goal)
    return Opening(
        capabilities=(("auto-converge",) if slowing else ()) + (("postcopy-ram",) if postcopy else ()),
        parameters=parameters,
    )


def limit_ms(goal: Goal, overhead_ms: int) -> int:
    """QEMU's part of the downtime: what is left of it when halting and handing over are taken off, but at least half."""
    return max(goal.downtime_ms - overhead_ms, (goal.downtime_ms + 1) // 2)


def unattainable(goal: Goal, abilities: Abilities) -> str | None:
    """Why a goal asks for what is not at hand, or None."""
    if goal.then == "postcopy" and not abilities.postcopy:
        return "postcopy is not possible between these two"
    if goal.auto_converge is True and not abilities.auto_converge:
        return "this QEMU cannot slow a guest down (auto-converge)"
    return None


def revised(goal: Goal, changes: GoalChanges) -> Goal:
    """The goal with what was given changed; 0 takes a deadline or a bandwidth away."""
    given = {name: value for name in GoalChanges.__struct_fields__ if (value := getattr(changes, name)) is not None}
    return msgspec.structs.replace(
        goal, **{name: value if value != 0 or isinstance(value, bool) else None for name, value in given.items()}
    )


def _bandwidth(goal: Goal) -> dict[str, int]:
    most = UNLIMITED_BYTES_S if goal.bandwidth_mib_s is None else goal.bandwidth_mib_s * MIB
    return {"max-bandwidth": most, "max-postcopy-bandwidth": most}


def _throttle(goal: Goal) -> dict[str, int]:
    if goal.auto_converge is True:
        return _throttle_at(QEMU_INITIAL_PERCENT, QEMU_INCREMENT_PERCENT, FULL_PERCENT)
    return _throttle_at(IDLE_PERCENT, IDLE_PERCENT, IDLE_PERCENT)


def _throttle_at(initial: int, increment: int, most: int) -> dict[str, int]:
    return {"cpu-throttle-initial": initial, "cpu-throttle-increment": increment, "max-cpu-throttle": most}


class Tuner:
    """Decides for one migration from its first sample to its end. `tuned` is everything it has decided, for the report."""

    def __init__(self, goal: Goal, abilities: Abilities, overhead_ms: int = OVERHEAD_MS) -> None:
        self.goal = goal
        self.tuned: list[Tuning] = []
        self.measured = Measuring()
        self._abilities = abilities
        self._overhead_ms = overhead_ms
        begun = opening(goal, abilities, overhead_ms)
        self._can_slow = "auto-converge" in begun.capabilities
        self._can_postcopy = "postcopy-ram" in begun.capabilities
        self._limit_ms = begun.parameters["downtime-limit"]
        self._slowed_percent = IDLE_PERCENT
        self._waits = False
        self._final: Pause | Postcopy | Abort | None = None

    @property
    def limit_ms(self) -> int:
        """The `downtime-limit` that QEMU was told last."""
        return self._limit_ms

    @property
    def _enough_ms(self) -> float:
        """How long the guest may be halted for the rest, as QEMU sees it."""
        return self._limit_ms if self._abilities.tracks else math.inf

    def decide(self, sample: Sample) -> tuple[Decision, ...]:
        """What to do now. After a pause, postcopy or abort nothing more is decided."""
        self.measured.take(sample)
        if self._final is not None or sample.status not in TUNABLE:
            return ()
        if not self._abilities.tracks and self._abilities.bitmaps and sample.status == "active" and not sample.remaining_bytes:
            return self._halted(sample)
        return self._noted(self._decision(sample), sample.at_s)

    def _halted(self, sample: Sample) -> tuple[Decision, ...]:
        """Memory was sent once; with the guest halted nothing more is lost."""
        pause = self._noted(Pause(reason="memory was sent once, and this QEMU loses track of what is changed afterwards"), sample.at_s)
        self._limit_ms = limit_ms(self.goal, self._overhead_ms)
        rest = Set(parameters={"downtime-limit": self._limit_ms}, reason="the guest is halted for the rest, its bitmaps above all")
        return (*pause, *self._noted(rest, sample.at_s))

    def change(self, goal: Goal, at_s: float) -> tuple[Decision, ...]:
        """Another goal from now on, and what that changes at once. Raises ValueError if it asks for what this migration began without."""
        self._check(goal)
        old, self.goal = self.goal, goal
        parameters: dict[str, int] = {}
        if goal.downtime_ms != old.downtime_ms and self._abilities.tracks:
            self._limit_ms = parameters["downtime-limit"] = limit_ms(goal, self._overhead_ms)
        if goal.bandwidth_mib_s != old.bandwidth_mib_s:
            parameters |= _bandwidth(goal)
        if goal.auto_converge != old.auto_converge and self._can_slow:
            parameters |= _throttle(goal)
            self._slowed_percent = IDLE_PERCENT
        self._waits = False
        return self._noted(Set(parameters=parameters, reason="the goal was changed"), at_s) if parameters else ()

    def _check(self, goal: Goal) -> None:
        if problem := unattainable(goal, self._abilities):
            raise ValueError(problem)
        if goal.then == "postcopy" and not self._can_postcopy:
            raise ValueError("postcopy has to be asked for when a migration begins: both sides get ready for it")
        if goal.auto_converge is True and not self._can_slow:
            raise ValueError("auto_converge cannot be switched on in a migration that began with it switched off")

    def _noted(self, decision: Decision | None, at_s: float) -> tuple[Decision, ...]:
        if decision is None:
            return ()
        parameters = decision.parameters if isinstance(decision, Set) else {}
        self.tuned.append(Tuning(at_s=round(at_s, 3), action=_ACTIONS[type(decision)], parameters=parameters, reason=decision.reason))
        if isinstance(decision, Pause | Postcopy | Abort):
            self._final = decision
        return (decision,)

    def _decision(self, sample: Sample) -> Decision | None:
        deadline = self.goal.deadline_s
        if deadline is not None and sample.at_s >= deadline:
            return self._at_deadline(sample, deadline)
        if deadline is not None and sample.at_s >= deadline * LAST_PART and (near := self._near_deadline(sample, deadline)) is not None:
            return near
        return self._slow_down()

    def _at_deadline(self, sample: Sample, deadline: float) -> Decision | None:
        late = f"{deadline:g} s have passed"
        if self.goal.then == "abort":
            return Abort(reason=f"{late}, and the goal says to give up then: {self._state()}")
        if sample.status != "active" or not sample.disks_ready:
            return self._wait(late, "memory is not being sent yet" if sample.disks_ready else "disks are still being copied")
        if self.goal.then == "pause":
            return Pause(reason=f"{late}, and the goal says to halt the guest then: {self._state()}")
        return Postcopy(reason=f"{late}, and the goal says to go over to postcopy then: {self._state()}")

    def _wait(self, late: str, what: str) -> Remark | None:
        if self._waits:
            return None
        self._waits = True
        return Remark(reason=f"{late}, but {what}, which would get no faster if the guest were halted")

    def _near_deadline(self, sample: Sample, deadline: float) -> Decision | None:
        lowest, highest, height = self.measured.lowest_bytes, self.measured.highest_bytes, self.measured.height_bytes
        if lowest is None or highest is None or height is None or sample.status != "active" or self.goal.then == "abort":
            return None
        eta = self.measured.eta_s(self._enough_ms)
        if eta is not None and sample.at_s + eta <= deadline:
            return None  # it may yet end within the goal, and by itself
        if self.goal.then == "postcopy":
            return Postcopy(reason=f"the deadline is near and this is a quiet moment: {self._state()}") if height <= lowest else None
        if not self._abilities.tracks:
            return None  # it halts the guest after this pass anyway, and no later
        gone = (sample.at_s / deadline - LAST_PART) / (1 - LAST_PART)
        wanted = self.measured.halted_ms(lowest + (highest - lowest) * gone)
        if wanted is None or (limit := min(math.ceil(wanted * WORTH), MAX_DOWNTIME_MS)) <= self._limit_ms * WORTH:
            return None
        self._limit_ms = limit
        return Set(
            parameters={"downtime-limit": limit},
            reason=f"the deadline is near, and the last passes did not come within the goal of {self.goal.downtime_ms} ms: {self._state()}",
        )

    def _slow_down(self) -> Decision | None:
        to_come = [percent for percent in STEPS_PERCENT if percent > self._slowed_percent]
        # A goal that ends in postcopy needs no slower guest.
        needless = self.goal.then == "postcopy" and self.goal.deadline_s is not None
        if not self._can_slow or self.goal.auto_converge != "auto" or needless or not to_come:
            return None
        if self._slowed_percent > IDLE_PERCENT and self.measured.latest.throttle_percent < self._slowed_percent:
            self.measured.begin_counting_anew()  # QEMU takes some passes to do it
            return None
        if self.measured.stalled_passes < PATIENCE_PASSES:
            return None
        self.measured.begin_counting_anew()
        increment, self._slowed_percent = to_come[0] - self._slowed_percent, to_come[0]
        return Set(
            parameters=_throttle_at(to_come[0], increment, to_come[0]),
            reason=f"{PATIENCE_PASSES} passes brought nothing, the guest is slowed by up to {to_come[0]} %: {self._state()}",
        )

    def _state(self) -> str:
        """What is known, in words."""
        measured = self.measured
        speed, halted = measured.bytes_s, measured.halted_ms(measured.height_bytes)
        changes = f"it changes {measured.latest.dirty_bytes_s / MIB:.1f} MiB/s"
        parts = [
            f"{measured.latest.remaining_bytes / MIB:.1f} MiB of memory are left",
            changes if measured.latest.dirty_bytes_s else "",
            f"{speed / MIB:.1f} MiB/s go over" if speed else "nothing goes over",
            f"halting it now would take {halted:.0f} ms" if halted is not None else "",
        ]
        return ", ".join(part for part in parts if part)

    def progress(self, phase: str) -> MigrationProgress:
        """The figures for people, as of the last sample."""
        measured, sample = self.measured, self.measured.latest
        halted = measured.halted_ms(measured.height_bytes)
        speed = measured.disk_bytes_s if sample.status == NONE else measured.bytes_s
        return MigrationProgress(
            phase=phase,
            memory_total_bytes=sample.total_bytes,
            memory_remaining_bytes=sample.remaining_bytes,
            transferred_bytes=sample.transferred_bytes,
            disk_total_bytes=sample.disk_total_bytes,
            disk_remaining_bytes=sample.disk_remaining_bytes,
            bandwidth_mib_s=None if speed is None else speed / MIB,
            dirty_mib_s=sample.dirty_bytes_s / MIB if sample.passes > 1 else None,
            passes=sample.passes,
            throttle_percent=sample.throttle_percent if sample.throttle_percent > IDLE_PERCENT else 0,
            downtime_limit_ms=self._limit_ms,
            expected_downtime_ms=None if halted is None else halted + self._overhead_ms,
            elapsed_s=sample.at_s,
            eta_s=self._eta_s(),
        )

    def _eta_s(self) -> float | None:
        measured, sample = self.measured, self.measured.latest
        if isinstance(self._final, Pause | Postcopy):
            halted = measured.halted_ms(sample.remaining_bytes)
            return None if halted is None else halted / 1000
        eta = measured.eta_s(self._enough_ms)
        deadline, rest = self.goal.deadline_s, measured.halted_ms(measured.lowest_bytes)
        if deadline is None or self.goal.then == "abort" or rest is None:
            return eta
        forced = max(0.0, deadline - sample.at_s) + rest / 1000
        return forced if eta is None else min(eta, forced)
