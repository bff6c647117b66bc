"""Failpoints: each in one place of the code, armed by the environment alone, and nothing to those who do not ask for them."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from qmpd import failpoint as failpoints
from qmpd.__main__ import EX_CONFIG, main
from qmpd.failpoint import CATALOGUE, VARIABLE, arm, failpoint, passing
from qmpd.migration.phases import Phase

ROOT = Path(__file__).parents[2]
#: A process ends in well under a second; only a hang may fail.
PATIENCE_S = 60.0


@pytest.fixture(autouse=True)
def disarmed() -> Iterator[None]:
    yield
    arm("")


def places() -> list[str]:
    """The name of every failpoint in the code."""
    code = [path for top in ("qmpd", "api") for path in (ROOT / top).rglob("*.py") if path.name != "failpoint.py"]
    return [name for path in code for name in re.findall(r'\b(?:failpoint|passing)\("([^"]*)"\)', path.read_text(encoding="utf-8"))]


def test_every_failpoint_is_at_one_place_and_every_place_has_one() -> None:
    # The ledger of migrations has two for each phase, at two places; tests/migration stops at every one of them.
    of_phases = {f"migration-{phase}{written}" for phase in Phase for written in ("", "-written")}
    assert sorted(places()) == sorted(CATALOGUE.keys() - of_phases)


def test_every_failpoint_is_explained() -> None:
    text = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")
    lines = {
        f"| `{name}` | {'kill, hang' if point.error is None else 'kill, error, hang'} | {point.before} |"
        for name, point in CATALOGUE.items()
    }
    assert lines <= set(text.splitlines()), "\n".join(sorted(lines - set(text.splitlines())))


def test_who_does_not_ask_passes() -> None:
    for name in CATALOGUE:
        failpoint(name)


def test_an_error_comes_at_every_pass_or_at_the_one_that_was_named() -> None:
    arm("record-write:error, exit-keep:error@2")
    for _ in range(2):
        with pytest.raises(OSError, match="No space left"):
            failpoint("record-write")
    failpoint("exit-keep")
    with pytest.raises(OSError, match="No space left"):
        failpoint("exit-keep")
    failpoint("exit-keep")
    failpoint("record-written")


def test_every_error_can_be_raised() -> None:
    for name, point in CATALOGUE.items():
        if point.error is not None:
            arm(f"{name}:error")
            with pytest.raises(type(point.error())):
                failpoint(name)


async def test_who_hangs_holds_up_nobody_else() -> None:
    arm("guest-cont:hang,record-write:hang")
    task = asyncio.create_task(passing("guest-cont"), name="hangs")
    thread = threading.Thread(target=failpoint, args=("record-write",), daemon=True)
    thread.start()
    await asyncio.sleep(0.01)
    assert not task.done()
    assert thread.is_alive()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


#: Says when it has passed a failpoint, in a thread beside one that counts on.
STOPPING = """
import itertools, threading
from qmpd.failpoint import arm, failpoint
def count():
    for number in itertools.count():
        print("count", number, flush=True)
        threading.Event().wait(0.01)
threading.Thread(target=count, daemon=True).start()
arm("record-write:stop@2")
failpoint("record-write")
print("first", flush=True)
failpoint("record-write")
print("second", flush=True)
"""


def test_who_is_stopped_stands_still_as_a_whole_and_goes_on() -> None:
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", STOPPING], env=environ, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            # Its parent is told when it stops: WUNTRACED.
            pid, status = os.waitpid(process.pid, os.WUNTRACED)
            assert pid == process.pid
            assert os.WIFSTOPPED(status)
            os.set_blocking(process.stdout.fileno(), False)
            before = os.read(process.stdout.fileno(), 1 << 16)
            assert b"first" in before
            assert b"second" not in before
            with pytest.raises(BlockingIOError):
                os.read(process.stdout.fileno(), 1)
            os.set_blocking(process.stdout.fileno(), True)
            process.send_signal(signal.SIGCONT)
            assert "second" in process.stdout.read()
            assert process.wait(PATIENCE_S) == 0
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("record-rite:kill", "there is no failpoint 'record-rite'; there are database-migrate, "),
        ("record-write", "'record-write' must be NAME:kill, NAME:error, NAME:hang or NAME:stop"),
        ("record-write:die", "must be NAME:kill, NAME:error, NAME:hang or NAME:stop"),
        ("record-write:kill@", "must end with the number of a pass, like record-write:kill@2"),
        ("record-write:kill@-1", "must end with the number of a pass"),
        ("record-named:error", "no error can happen at record-named, only kill, hang and stop"),
        ("record-write:kill,", "there is no failpoint ''"),
    ],
)
def test_what_is_no_failpoint_is_refused_at_the_start(
    text: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(VARIABLE, text)
    assert main(["serve"]) == EX_CONFIG
    said = capsys.readouterr().err
    assert said.startswith(f"qmpd: {VARIABLE}: ")
    assert message in said
    assert not failpoints._armed
