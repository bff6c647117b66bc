"""The daemon dies, or fails, at every durable write and every effect outside its process; what it acknowledged stays true."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from qmpd.failpoint import CATALOGUE
from tests.faults.witness import Bench, Witness, ready, request, serving, swept
from tests.guests.build import Guest
from tests.process.test_serve import PATIENCE_S

pytestmark = pytest.mark.qemu

#: Passes of a life at which something else is under way than at the first one.
FURTHER = {
    "database-commit": (2, 3, 5, 8),
    "database-committed": (2, 3, 5, 8),
    "event-write": (4,),
    "definition-commit": (2, 3),
    "definition-committed": (2, 3),
    "creation-mark": (2, 3),
    "creation-unmark": (2,),
    "image-make": (2,),
    "image-made": (2,),
    "image-named": (2,),
    "files-remove": (2,),
    "files-removed": (2,),
    "record-remove": (2,),
}
#: These are passed when a machine comes from another host, or gets another QEMU, and killed at in tests/migration; when a machine
#: has a TPM, and killed at in tests/qemu/test_tpm; when a daemon was killed at a certain instant, and waited at in test_adoption_faults.
ELSEWHERE = ("adopted-", "migration-", "ownership-", "peer-", "still-", "succession-", "tpm-")
#: What hangs for ever, and what is answered meanwhile: without its database the daemon still knows its machines.
MEMORY = ("/machines", "/version")
HANGS = {
    "image-made:hang": (*MEMORY, "/events", "/jobs"),
    "record-written:hang": (*MEMORY, "/events", "/jobs"),
    "gate-go:hang": (*MEMORY, "/events", "/jobs"),
    "guest-cont:hang": (*MEMORY, "/events", "/jobs"),
    "definition-committed:hang@2": (*MEMORY, "/events", "/jobs"),
    "database-commit:hang@3": MEMORY,
    "exit-keep:hang": (*MEMORY, "/events", "/jobs"),
    "files-remove:hang": (*MEMORY, "/events", "/jobs"),
}
#: A machine that does not quit is sent SIGTERM; the others are killed.
LADDER = "quit-send:error,"


def cases(what: str) -> list[str]:
    """Every failpoint, at each pass that matters."""
    return [f"{name}:{what}@{number}" for name in CATALOGUE if not name.startswith(ELSEWHERE) for number in (1, *FURTHER.get(name, ()))]


@pytest.fixture
async def bench(short_directory: Path, request: pytest.FixtureRequest) -> AsyncIterator[Bench]:
    probing = "cache-write" in str(getattr(request.node, "callspec", None) and request.node.callspec.params)
    made = Bench(short_directory, *((short_directory / "c",) if probing else ()))
    yield made
    await swept(made)


@pytest.mark.parametrize("case", [*cases("kill"), f"{LADDER}signal-send:kill"])
async def test_a_daemon_that_is_killed_leaves_nothing_half_done(bench: Bench, guests: dict[str, Guest], case: str) -> None:
    witness = Witness(bench, guests["x86_64-q35-quiet"])
    async with serving(bench, case) as daemon:
        step = await witness.live() if await ready(daemon) else "begin"
        assert await daemon.ended() == -signal.SIGKILL, f"{case} was not passed in a whole life"
    async with serving(bench) as daemon:
        await daemon.ready()
        assert await witness.look()
        await witness.nothing_else()
        await witness.numbers()
        if step == "create":
            again = await witness.create()
            assert again is not None
            assert again.status in {201, 409}
            witness.worlds = {("first", False)}
            assert await witness.look()
        await witness.end()
        await witness.numbers()
        assert await daemon.stop() == 0
        assert "Traceback" not in daemon.log


@pytest.mark.parametrize("case", [case for case in cases("error") if CATALOGUE[case.partition(":")[0]].error is not None])
async def test_a_daemon_that_meets_an_error_says_so_and_goes_on(bench: Bench, guests: dict[str, Guest], case: str) -> None:
    witness = Witness(bench, guests["x86_64-q35-quiet"])
    async with serving(bench, case) as daemon:
        if await ready(daemon):
            assert await witness.live() is None
            await witness.numbers()
            await daemon.stop(signal.SIGKILL)
        else:
            assert await daemon.ended() == 1
        assert f"failpoint passed failpoint={case.partition(':')[0]}" in daemon.log
        assert "Traceback" not in daemon.log
    async with serving(bench) as daemon:
        await daemon.ready()
        assert await witness.look()
        await witness.nothing_else()
        await witness.numbers()
        assert await daemon.stop() == 0


@pytest.mark.parametrize(("case", "lists"), HANGS.items())
async def test_a_daemon_in_which_something_hangs_answers_everybody_else(
    bench: Bench, guests: dict[str, Guest], case: str, lists: tuple[str, ...]
) -> None:
    witness = Witness(bench, guests["x86_64-q35-quiet"])
    async with serving(bench, case) as daemon:
        await daemon.ready()
        living = asyncio.create_task(witness.live(), name="living")
        async with asyncio.timeout(PATIENCE_S):
            while f"failpoint={case.partition(':')[0]}" not in daemon.log:
                assert daemon.process.stderr is not None
                daemon.log += (await daemon.process.stderr.readline()).decode()
        for path in lists:
            assert (await request(bench, "GET", path)) is not None
        assert await daemon.stop(signal.SIGKILL) == -signal.SIGKILL
        await living
    async with serving(bench) as daemon:
        await daemon.ready()
        assert await witness.look()
        await witness.nothing_else()
        await witness.numbers()
        await witness.end()
        assert await daemon.stop() == 0
