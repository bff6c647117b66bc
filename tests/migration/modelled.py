"""A small model of a QEMU that migrates: a guest with a working set, a link, and QEMU's own rules for passes, throttling and the end."""

from __future__ import annotations

from collections.abc import Callable

from qmpd.migration.convergence import Abort, Decision, Pause, Postcopy, Remark, Set, Tuner
from qmpd.migration.measuring import sample_of
from qmpd.migration.progress import DiskProgress, Progress, read_progress

MIB = 1024 * 1024
PAGE = 4096
STEP_S = 0.05
SAMPLE_EVERY_STEPS = 10
#: What halting, handing over and going on take in the model, besides sending.
OVERHEAD_MS = 40.0
#: QEMU looks at how much was changed at most this often before it slows the guest.
THROTTLE_PERIOD_S = 1.0

Curve = Callable[[float], float]


def steady(value: float) -> Curve:
    return lambda _at: value


class ModelQemu:
    """Rates are in MiB/s, as functions of time. `outcome` is None while it goes on."""

    def __init__(self, *, memory_mib: float, working_set_mib: float, dirty_mib_s: Curve, link_mib_s: Curve, disk_mib: float = 0) -> None:
        self.now = 0.0
        self.outcome: str | None = None
        self.downtime_ms: float | None = None
        self.paused_at: float | None = None
        self.parameters: dict[str, int] = {"cpu-throttle-initial": 20, "cpu-throttle-increment": 10, "max-cpu-throttle": 99}
        self.capabilities: tuple[str, ...] = ()
        self.throttle = 0
        self.passes = 1
        self.disk = disk_mib * MIB
        self._disk_total = self.disk
        self._memory = memory_mib * MIB
        self._working_set = working_set_mib * MIB
        self._dirty_mib_s = dirty_mib_s
        self._link_mib_s = link_mib_s
        self._remaining = self._memory
        self._transferred = 0.0
        self._dirty = 0.0
        self._pass_began = 0.0
        self._dirty_rate = 0.0
        self._height = 0.0
        self._period = (0.0, 0.0)
        self._too_much = 0

    def speed(self) -> float:
        return min(self._link_mib_s(self.now) * MIB, self.parameters["max-bandwidth"])

    def step(self) -> None:
        self.now += STEP_S
        sent = self.speed() * STEP_S
        if self.disk > 0:
            self.disk = max(0.0, self.disk - sent)
            self._pass_began = self.now
            return
        if self.paused_at is None:
            changed = self._dirty_mib_s(self.now) * MIB * STEP_S * (1 - self.throttle / 100)
            self._dirty = min(self._working_set, self._dirty + changed)
        self._transferred += min(sent, self._remaining)
        self._remaining = max(0.0, self._remaining - sent)
        enough = self.speed() * self.parameters["downtime-limit"] / 1000
        if self._remaining <= enough:
            self._end_pass(enough)

    def _end_pass(self, enough: float) -> None:
        took = max(self.now - self._pass_began, STEP_S)
        self._dirty_rate = self._dirty / took
        self._throttle_if_needed()
        # What changed again had not all been sent: after the first pass both are parts of the working set.
        self._remaining = self._height = min(self._remaining + self._dirty, max(self._remaining, self._working_set))
        self._dirty, self._pass_began = 0.0, self.now
        self.passes += 1
        if self._remaining <= enough:
            self._complete(self._remaining / self.speed() * 1000 if self.speed() else 0)

    def _throttle_if_needed(self) -> None:
        began, transferred = self._period
        if "auto-converge" not in self.capabilities or self.now - began < THROTTLE_PERIOD_S:
            return
        self._period = (self.now, self._transferred)
        self._too_much = self._too_much + 1 if self._dirty > 0.5 * (self._transferred - transferred) else 0
        if self._too_much >= 2:
            wanted = self.throttle + self.parameters["cpu-throttle-increment"] if self.throttle else self.parameters["cpu-throttle-initial"]
            self.throttle, self._too_much = min(wanted, self.parameters["max-cpu-throttle"]), 0

    def _complete(self, halted_ms: float) -> None:
        self.outcome = self.outcome or "completed"
        since_pause = 0.0 if self.paused_at is None else (self.now - self.paused_at) * 1000
        self.downtime_ms = since_pause + halted_ms + OVERHEAD_MS

    def progress(self) -> Progress:
        """What QEMU and the copy of the disk say."""
        if self.disk > 0:
            done = int(self._disk_total - self.disk)
            return Progress(disks=(DiskProgress(node="disk0", done_bytes=done, total_bytes=int(self._disk_total), ready=False),))
        speed = self.speed()
        ram = {
            "total": int(self._memory),
            "remaining": int(self._remaining),
            "transferred": int(self._transferred),
            "dirty-sync-count": self.passes,
            "dirty-pages-rate": int(self._dirty_rate / PAGE),
            "page-size": PAGE,
            "mbps": speed * 8 / 1e6,
        }
        return read_progress(
            {
                "status": "active",
                "total-time": int(self.now * 1000),
                "expected-downtime": int(self._height / speed * 1000) if self._height and speed else self.parameters["downtime-limit"],
                "cpu-throttle-percentage": self.throttle,
                "ram": ram,
            }
        )

    def obey(self, decision: Decision) -> None:
        match decision:
            case Set():
                self.parameters |= decision.parameters
            case Pause():
                self.paused_at = self.now
            case Postcopy():
                self.outcome = "postcopy"
                self._complete(0)
            case Abort():
                self.outcome = "aborted"
            case Remark():
                pass


class Run:
    """A migration of the model under a tuner, until it ends or model time is up."""

    def __init__(self, qemu: ModelQemu, tuner: Tuner, *, capabilities: tuple[str, ...], parameters: dict[str, int]) -> None:
        self.qemu = qemu
        self.tuner = tuner
        self.decisions: list[tuple[float, Decision]] = []
        self.limits: list[int] = [parameters["downtime-limit"]]
        qemu.capabilities = capabilities
        qemu.parameters |= parameters

    def until(self, end_s: float) -> Run:
        """Goes on until the end of the migration, or `end_s`."""
        steps = 0
        while self.qemu.outcome is None and self.qemu.now < end_s:
            self.qemu.step()
            steps += 1
            if steps % SAMPLE_EVERY_STEPS == 0 and self.qemu.outcome is None:
                self._sample()
        return self

    def _sample(self) -> None:
        for decision in self.tuner.decide(sample_of(self.qemu.progress(), self.qemu.now)):
            self.decisions.append((self.qemu.now, decision))
            self.qemu.obey(decision)
        self.limits.append(self.qemu.parameters["downtime-limit"])

    def kinds(self) -> list[str]:
        return [type(decision).__name__ for _, decision in self.decisions]
