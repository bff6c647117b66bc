"""What a move of a machine that does not run would take, and what is in its way, is found out before; and nothing is left of that."""

from __future__ import annotations

import socket
from pathlib import Path

import msgspec
import pytest

from qmpd.lifecycle import State
from qmpd.migration import delivery
from qmpd.migrationviews import DryRunReport, MigrateRequest
from qmpd.spec import Forward, UserNic
from tests.api.lab import Daemon
from tests.guests.build import Guest
from tests.migration.test_moves import ended, known, moved, pair
from tests.migration.test_moving_at_rest import MIB, arriving, choice_of, counting, made, refused

__all__ = ["counting"]

pytestmark = pytest.mark.qemu


async def tried(source: Daemon, **request: object) -> DryRunReport:
    """What a dry run of the machine found; nothing of it may be left, and nothing be in anybody's way."""
    wanted = msgspec.convert({"peer": "b", "dry_run": True, **request}, MigrateRequest)
    before = [migration.id for migration in source.service.migration.list().migrations]
    job = await ended(source, await source.service.migration.migrate("rest", wanted))
    assert job.state == "succeeded", job.error
    view = source.service.machine("rest")
    assert (view.state, view.operation) == (State.STOPPED, None)
    assert [migration.id for migration in source.service.migration.list().migrations] == before
    return msgspec.convert(job.result, DryRunReport)


def found_in(report: DryRunReport, severity: str = "error") -> list[tuple[str, str]]:
    return [(finding.code, finding.path) for finding in report.findings if finding.severity == severity]


async def test_a_dry_run_says_what_would_be_sent_and_for_how_long(short_directory: Path, counting: Guest) -> None:
    async with pair(short_directory) as (a, b):
        await made(a, short_directory, counting)
        target = short_directory / "there.raw"
        report = await tried(a, disks=[choice_of(target)])
        assert (report.possible, report.findings) == (True, ())
        prediction = report.prediction
        assert prediction is not None
        assert (prediction.memory_bytes, prediction.dirty_mib_s, prediction.downtime_ms) == (0, None, None)
        assert 2 * MIB < prediction.disk_bytes < 16 * MIB  # of 64 MiB and more most are holes
        assert prediction.total_s is not None
        assert "MiB are to be sent" in prediction.explanation
        shared = (await tried(a)).prediction
        assert shared is not None
        assert shared.disk_bytes < prediction.disk_bytes
        late = await tried(a, goal={"bandwidth_mib_s": 1, "deadline_s": 1, "then": "abort"}, disks=[choice_of(target)])
        assert late.prediction is not None
        assert not late.prediction.reachable
        assert "the machine would stay" in late.prediction.explanation
        assert not target.exists()
        assert arriving(short_directory) == []
        assert known(b, "rest") is None
        assert list((short_directory / "b/s/machines").glob("*")) == []
        assert b.service.migration.list().migrations == ()
        await moved(a, "rest", "b", disks=[choice_of(target)])


async def test_a_dry_run_finds_what_a_move_would_be_refused_for(
    short_directory: Path, counting: Guest, monkeypatch: pytest.MonkeyPatch, free_port: int
) -> None:
    monkeypatch.setattr(delivery, "OFFER_DEADLINE_S", 0.0)
    async with pair(short_directory) as (a, b):
        image, own = await made(a, short_directory, counting, nics=(UserNic(forwards=(Forward(guest_port=22, host_port=free_port),)),))
        assert image
        assert own
        taken = short_directory / "taken.raw"
        taken.write_bytes(b"somebody's")
        nowhere = short_directory / "nowhere" / "x.raw"
        for request, expected in (
            ({"disks": [choice_of(taken)]}, [("disk-target-exists", "$.disks[0]")]),
            ({"disks": [choice_of(nowhere)]}, [("disk-refused", "$.disks[0]")]),
            ({"storage": "copy"}, [("disk-is-shared", "$.disks[0]")]),
        ):
            report = await tried(a, **request)
            assert (report.possible, found_in(report)) == (False, expected)
            await refused(a, **request)
        wrong = msgspec.convert({"peer": "b", "dry_run": True, "disks": [choice_of(taken) | {"format": "qcow2"}]}, MigrateRequest)
        job = await ended(a, await a.service.migration.migrate("rest", wrong))
        assert job.error is not None
        assert (job.error["code"], "format" in str(job.error["message"])) == ("cannot_move", True)
        assert not nowhere.parent.exists()
        with socket.create_server(("127.0.0.1", free_port)):
            report = await tried(a)
            assert (report.possible, found_in(report, "warning")) == (True, [("port-taken", "$.nics")])
            done = await moved(a, "rest", "b")
            assert ("warning", "port-taken") in [(finding.severity, finding.code) for finding in done.findings]
        assert b.service.machine("rest").state is State.STOPPED
