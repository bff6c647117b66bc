"""Emulators are found, asked once, remembered, and asked again when they change."""

from __future__ import annotations

import asyncio
import logging
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from blockbuster import blockbuster_ctx

from qmpd import factcache
from qmpd.errors import LaunchFailed, NotFound, QemuRefused, QemuSilent
from qmpd.facts import EmulatorFacts
from qmpd.probe import CACHE_FILE, CacheFile, Emulators, ProbeProblem, package_of
from tests.unit.standin_emulator import ANSWERS, make, starts

#: Far above what a stand-in needs to start on a busy host; only tests that want silence wait that long, with SHORT_S.
PATIENCE_S = 60.0
SHORT_S = 2.0


@pytest.fixture(autouse=True)
def _no_blocking_calls() -> Iterator[None]:
    with blockbuster_ctx("qmpd"):
        yield


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory of emulators, nothing else on PATH."""
    return tmp_path / "bin"


def emulators(place: Path, *, deadline_s: float = PATIENCE_S, cache: bool = True) -> Emulators:
    """A new daemon's view of the emulators in `place`."""
    return Emulators(str(place.parent / "cache") if cache else None, (), str(place), deadline_s=deadline_s)


def cache_of(place: Path) -> Path:
    """The cache file of `emulators(place)`."""
    return place.parent / "cache" / CACHE_FILE


async def cached(place: Path) -> CacheFile:
    """What the cache file holds."""
    written = await asyncio.to_thread(factcache.read, cache_of(place), CacheFile)
    assert written is not None
    return written


async def test_an_emulator_says_what_it_is(place: Path) -> None:
    path = make(place / "qemu-system-toy")
    facts = await emulators(place).get("toy")
    assert (facts.path, facts.target, facts.version) == (str(path), "toy", "9.8.7")
    assert [machine.name for machine in facts.machines] == ["board-1.0", "none"]
    board = facts.machine("board")
    assert board is not None
    assert (board.cpu_max, board.default_cpu, board.default_ram_id, board.deprecated) == (4, "toy-cpu", "ram", True)
    assert facts.commands == {"screendump"}
    assert facts.features == {"screendump.format=png"}
    assert facts.options == {"sandbox"}
    assert facts.accelerators == {"tcg"}


async def test_an_emulator_that_cannot_list_its_processors_has_none(place: Path) -> None:
    make(place / "qemu-system-toy")
    assert (await emulators(place).get("toy")).cpus == ()


async def test_processors_are_listed_in_order(place: Path) -> None:
    make(place / "qemu-system-toy", answers={**ANSWERS, "query-cpu-definitions": [{"name": "z80"}, {"name": "a1"}]})
    assert (await emulators(place).get("toy")).cpus == ("a1", "z80")


@pytest.mark.parametrize("name", ["toy", "qemu-system-toy"])
async def test_an_emulator_is_found_by_target_and_by_file_name(place: Path, name: str) -> None:
    path = make(place / "qemu-system-toy")
    found = emulators(place)
    assert found.find(name) is None
    await found.scan()
    assert found.find(name) == path
    assert found.find(str(path)) == path
    assert found.names() == ("qemu-system-toy",)
    assert starts(place) == []


async def test_everybody_who_asks_at_once_shares_one_probe(place: Path) -> None:
    make(place / "qemu-system-toy")
    found = emulators(place)
    answers = await asyncio.gather(*(found.get("toy") for _ in range(8)), found.all())
    assert len(starts(place)) == 1
    assert answers[0] is answers[7]


async def test_a_second_daemon_reads_what_the_first_found_out(place: Path) -> None:
    make(place / "qemu-system-toy")
    first = await emulators(place).get("toy")
    assert await emulators(place).get("toy") == first
    assert len(starts(place)) == 1


async def test_a_replaced_emulator_is_asked_again(place: Path) -> None:
    path = make(place / "qemu-system-toy")
    found = emulators(place)
    await found.get("toy")
    make(path, answers={**ANSWERS, "query-target": {"arch": "other"}})
    assert (await found.get("toy")).target == "other"
    assert (await emulators(place).get("toy")).target == "other"
    assert len(starts(place)) == 2


async def test_a_new_emulator_is_seen_without_a_restart(place: Path) -> None:
    make(place / "qemu-system-toy")
    found = emulators(place)
    assert len(await found.all()) == 1
    make(place / "qemu-system-toy2")
    assert len(await found.all()) == 2
    assert len(starts(place)) == 2


async def test_an_emulator_that_becomes_executable_is_seen_when_it_is_asked_for(place: Path) -> None:
    path = make(place / "qemu-system-toy")
    path.chmod(0o644)
    found = emulators(place)
    assert await found.all() == []
    path.chmod(0o755)
    assert (await found.get("toy")).target == "toy"


DAMAGES = {"empty": b"", "reserved byte": b"\xc1", "cut off": b"\x93\x01", "no map": b"\xff", "a key twice": b"\x82\xa1a\x01\xa1a\x02"}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
async def test_a_damaged_cache_is_ignored_and_rewritten(place: Path, damage: bytes) -> None:
    make(place / "qemu-system-toy")
    await emulators(place).get("toy")
    await asyncio.to_thread(cache_of(place).write_bytes, damage)
    await emulators(place).get("toy")
    assert len(starts(place)) == 2
    assert len((await cached(place)).emulators) == 1


async def test_a_cache_of_another_format_is_ignored(place: Path) -> None:
    make(place / "qemu-system-toy")
    await emulators(place).get("toy")
    written = await cached(place)
    older = CacheFile(format=0, marks=written.marks, emulators=written.emulators)
    await asyncio.to_thread(factcache.write, cache_of(place), older)
    await emulators(place).get("toy")
    assert len(starts(place)) == 2


async def test_an_emulator_that_is_gone_leaves_the_cache(place: Path) -> None:
    old = make(place / "qemu-system-old")
    make(place / "qemu-system-toy")
    found = emulators(place)
    await found.get("old")
    old.unlink()
    await found.get("toy")
    assert [entry.facts.path for entry in (await cached(place)).emulators] == [str(place / "qemu-system-toy")]


async def test_a_cache_that_cannot_be_written_is_no_obstacle(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    make(place / "qemu-system-toy")
    (place.parent / "cache").write_text("a file where the directory should be")
    with caplog.at_level(logging.WARNING):
        assert (await emulators(place).get("toy")).target == "toy"
    assert "cannot be written" in caplog.text


async def test_without_a_cache_the_answer_is_kept_in_memory(place: Path) -> None:
    make(place / "qemu-system-toy")
    found = emulators(place, cache=False)
    assert await found.get("toy") is await found.get("toy")
    assert not (place.parent / "cache").exists()


async def test_an_emulator_that_dies_is_reported_with_what_it_said(place: Path) -> None:
    make(place / "qemu-system-toy", "dies")
    with pytest.raises(LaunchFailed, match="exit code 1") as caught:
        await emulators(place).get("toy")
    assert "no such luck" in caught.value.message
    assert "\x1b" not in caught.value.message


async def test_an_emulator_that_dies_between_questions_is_reported(place: Path) -> None:
    make(place / "qemu-system-toy", "quits")
    with pytest.raises(LaunchFailed, match="exit code 3: it said nothing"):
        await emulators(place).get("toy")


async def test_a_program_that_does_not_speak_qmp_is_reported(place: Path) -> None:
    make(place / "qemu-system-toy", "babbles")
    with pytest.raises(LaunchFailed, match=r"does not speak QMP as expected.*Welcome!"):
        await emulators(place).get("toy")


async def test_a_file_that_is_no_program_is_reported(place: Path) -> None:
    path = make(place / "qemu-system-toy")
    path.write_bytes(b"\x7fELF but not really")
    with pytest.raises(LaunchFailed, match="qemu-system-toy"):
        await emulators(place).get("toy")


async def test_an_emulator_without_a_needed_command_is_reported(place: Path) -> None:
    make(place / "qemu-system-toy", answers={name: answer for name, answer in ANSWERS.items() if name != "query-machines"})
    with pytest.raises(QemuRefused, match="query-machines"):
        await emulators(place).get("toy")


async def test_a_silent_emulator_is_given_up_and_killed(place: Path) -> None:
    make(place / "qemu-system-toy", "mute")
    with pytest.raises(QemuSilent, match="2 s"):
        await emulators(place, deadline_s=SHORT_S).get("toy")
    assert not [pid for pid in starts(place) if psutil.pid_exists(pid)]


async def test_a_listing_remembers_a_failure_and_a_request_tries_again(place: Path) -> None:
    make(place / "qemu-system-bad", "dies")
    make(place / "qemu-system-good")
    found = emulators(place)
    for _ in range(2):
        bad, good = await found.all()
        assert isinstance(bad, ProbeProblem)
        assert "no such luck" in bad.message
        assert isinstance(good, EmulatorFacts)
    assert len(starts(place)) == 2
    with pytest.raises(LaunchFailed):
        await found.get("bad")
    assert len(starts(place)) == 3


async def test_everybody_who_waits_for_a_probe_shares_its_failure(place: Path) -> None:
    make(place / "qemu-system-toy", "dies")
    found = emulators(place)
    outcomes = await asyncio.gather(*(found.get("toy") for _ in range(4)), return_exceptions=True)
    assert all(isinstance(outcome, LaunchFailed) for outcome in outcomes)
    assert len(starts(place)) == 1


async def test_a_mended_emulator_is_listed(place: Path) -> None:
    path = make(place / "qemu-system-toy", "dies")
    found = emulators(place)
    assert isinstance((await found.all())[0], ProbeProblem)
    make(path)
    assert isinstance((await found.all())[0], EmulatorFacts)


async def test_a_cancelled_probe_leaves_no_process_and_the_next_caller_asks_for_itself(place: Path) -> None:
    path = make(place / "qemu-system-toy", "mute")
    found = emulators(place)
    log = place / "starts"
    os.mkfifo(log)
    probing = asyncio.create_task(found.get("toy"), name="probing")
    pid = int(await asyncio.to_thread(log.read_text))  # waits until the stand-in reports its start
    log.unlink()
    probing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await probing
    assert not psutil.pid_exists(pid)
    make(path)
    assert (await found.get("toy")).target == "toy"


async def test_an_unknown_emulator_is_named_with_its_package(place: Path) -> None:
    with pytest.raises(NotFound, match=f"no qemu-system-s390x in .*{place}.* install qemu-system-misc"):
        await emulators(place).get("s390x")


async def test_a_path_outside_the_known_places_is_not_executed(place: Path, tmp_path: Path) -> None:
    elsewhere = make(tmp_path / "elsewhere" / "qemu-system-toy")
    with pytest.raises(NotFound, match="setting `emulators`"):
        await emulators(place).get(str(elsewhere))
    assert starts(elsewhere.parent) == []


@pytest.mark.parametrize(("target", "package"), [("i386", "qemu-system-x86"), ("aarch64", "qemu-system-arm"), ("avr", "qemu-system-misc")])
def test_every_target_has_a_package(target: str, package: str) -> None:
    assert package_of(target) == package


def test_an_emulator_does_not_outlive_a_killed_daemon(place: Path) -> None:
    make(place / "qemu-system-toy", "mute")
    daemon = f"import asyncio; from qmpd.probe import Emulators; asyncio.run(Emulators(None, (), {str(place)!r}).get('toy'))"
    root = Path(__file__).parents[2]
    log = place / "starts"
    os.mkfifo(log)
    with subprocess.Popen([sys.executable, "-c", daemon], cwd=root) as process:
        pid = int(log.read_text())  # waits until the stand-in reports its start
        watched = os.pidfd_open(pid)
        process.send_signal(signal.SIGKILL)
        ended, _, _ = select.select([watched], [], [], PATIENCE_S)
        os.close(watched)
    assert ended
