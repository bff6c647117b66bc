"""What is shown of a migration: how far it is, what became of it, and what was found before it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Final

from qmpctl.quantities import amount, duration

if TYPE_CHECKING:
    from qmpd.migrationviews import CopyReport, DryRunReport, MigrationFinding, MigrationProgress, MigrationReport, Tuning

_MIB: Final = 1024 * 1024
_MS: Final = 1000.0


def progress_text(progress: MigrationProgress) -> str:
    """How far it is, in one line: the most important first, because a narrow terminal cuts the rest."""
    left = progress.memory_remaining_bytes + progress.disk_remaining_bytes
    parts = [
        progress.phase,
        f"{amount(left)} left" if left else "",
        f"{amount(progress.bandwidth_mib_s * _MIB)}/s" if progress.bandwidth_mib_s is not None else "",
        f"{duration(progress.eta_s)} to go" if progress.eta_s is not None else "",
        f"downtime {_downtime(progress)}" if progress.downtime_ms is not None or progress.expected_downtime_ms is not None else "",
        f"{amount(progress.dirty_mib_s * _MIB)}/s changed" if progress.dirty_mib_s else "",
        f"pass {progress.passes}" if progress.passes > 1 else "",
        f"slowed by {progress.throttle_percent} %" if progress.throttle_percent else "",
    ]
    return ", ".join(part for part in parts if part)


def _downtime(progress: MigrationProgress) -> str:
    if progress.downtime_ms is not None:
        return duration(progress.downtime_ms / _MS)
    return f"≈ {duration((progress.expected_downtime_ms or 0) / _MS)}"


def report_lines(report: MigrationReport) -> Iterator[str]:
    """What became of it: who owns the machine first, then the figures, and what was done to get there."""
    if report.owner == "destination":
        yield f"{report.machine}: moved to {report.owner_name}{_figures(report)}"
    elif report.owner == "source":
        yield f"{report.machine}: stays at {report.owner_name}: {report.reason or 'no reason is known'}"
    else:
        yield f"{report.machine}: nobody can say who owns it: {report.reason or 'no reason is known'}"
    for disk in report.disks:
        upon = f" upon {disk.base}" if disk.base is not None else ""
        yield f"  disk {disk.disk}: {disk.how}, {disk.path}{upon}" + (f", {amount(disk.bytes)}" if disk.bytes else "")
    for tuning in report.tuned:
        yield f"  {tuning_line(tuning)}"
    yield from finding_lines(report.findings)


def copy_lines(report: CopyReport) -> Iterator[str]:
    """What was made of it: name and identity first, then the figures."""
    parts = [
        f"guest halted for {duration(report.halted_ms / _MS)}" if report.halted_ms is not None else "",
        f"total {duration(report.total_ms / _MS)}" if report.total_ms is not None else "",
        f"{amount(report.transferred_bytes)} sent",
    ]
    yield f"{report.machine}: copied to {report.peer} as {report.name} ({', '.join(part for part in parts if part)})"
    yield f"  uuid {report.uuid}"
    for disk in report.disks:
        yield f"  disk {disk.disk}: {disk.how}, {disk.path}" + (f", {amount(disk.bytes)}" if disk.bytes else "")
    yield from finding_lines(report.findings)


def _figures(report: MigrationReport) -> str:
    parts = [
        f"downtime {duration(report.downtime_ms / _MS)}" if report.downtime_ms is not None else "",
        f"total {duration(report.total_ms / _MS)}" if report.total_ms is not None else "",
        f"{amount(report.transferred_bytes)} sent" if report.transferred_bytes else "",
        f"{report.passes} passes" if report.passes > 1 else "",
        "postcopy" if report.postcopy else "",
        "through the API" if report.tunnelled else "",
        "" if report.encrypted else "not encrypted",
    ]
    text = ", ".join(part for part in parts if part)
    return f" ({text})" if text else ""


def tuning_line(tuning: Tuning) -> str:
    """Something that was tuned, and why."""
    what = ", ".join(f"{name}={value}" for name, value in sorted(tuning.parameters.items())) or tuning.action
    return f"after {duration(tuning.at_s)}: {what}: {tuning.reason}"


def finding_lines(findings: Iterable[MigrationFinding]) -> Iterator[str]:
    """Findings, each with what would mend it."""
    for finding in findings:
        yield f"  {finding.severity:<7}  {finding.code}{f' ({finding.path})' if finding.path else ''}: {finding.message}"
        if finding.mend:
            yield f"           > {finding.mend}"


def dry_run_lines(report: DryRunReport, verb: str = "moved") -> Iterator[str]:
    """What was found out without moving or copying anything."""
    counts = {kind: sum(finding.severity == kind for finding in report.findings) for kind in ("error", "warning")}
    numbers = ", ".join(f"{count} {kind}{'' if count == 1 else 's'}" for kind, count in counts.items() if count) or "nothing is in the way"
    yield f"{report.machine}: {'can' if report.possible else 'cannot'} be {verb} to {report.peer}: {numbers}"
    yield from finding_lines(report.findings)
    if report.prediction is not None:
        yield f"  {report.prediction.explanation}"
