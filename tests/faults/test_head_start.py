"""A machine that is created and started in one request: its QEMU is on its way to the gate while the definition is being stored.

The daemon dies, or fails, at each step of either: no QEMU runs of a machine that was not stored, and nothing of one is left.
"""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from qmpd.failpoint import CATALOGUE
from tests.faults.witness import FIRST, NAME, Bench, Document, Reply, Witness, document_of, ready, request, serving, swept
from tests.guests.build import Guest

pytestmark = pytest.mark.qemu

#: Every step on both ways. The first commit of a daemon is none of a definition.
STEPS = (
    "creation-mark@1", "run-directory@1", "log-piece@1", "fifo-make@1", "socket-bind@2", "socket-bind@3", "gate-spawn@1", "record-write@1",
    "record-written@1", "record-named@1", "definition-commit@1", "database-commit@2", "database-committed@2", "definition-committed@1",
    "gate-go@1", "gate-gone@1", "creation-unmark@1", "guest-cont@1", "guest-going@1",
)  # fmt: skip


class Hasty(Witness):
    """Creates and starts in one request a machine that has no disks."""

    def definition(self, title: str) -> Document:
        """The machine's definition."""
        return document_of(self.guest, NAME, title=title)

    def disks_of(self, title: str | None) -> set[str]:
        """None."""
        return set()

    async def create(self) -> Reply | None:
        """Asks for a running machine."""
        return await request(self.bench, "POST", "/machines?start=true", self.definition(FIRST))


@pytest.fixture
async def bench(short_directory: Path) -> AsyncIterator[Bench]:
    made = Bench(short_directory)
    yield made
    await swept(made)


@pytest.mark.parametrize("step", STEPS)
async def test_a_daemon_that_is_killed_leaves_a_machine_or_nothing(bench: Bench, guests: dict[str, Guest], step: str) -> None:
    witness = Hasty(bench, guests["x86_64-q35-quiet"])
    name, _, number = step.partition("@")
    async with serving(bench, f"{name}:kill@{number}") as daemon:
        assert await ready(daemon)
        assert await witness.create() is None
        assert await daemon.ended() == -signal.SIGKILL
    witness.worlds = {(None, False), (FIRST, False), (FIRST, True)}
    async with serving(bench) as daemon:
        await daemon.ready()
        assert await witness.look()
        await witness.nothing_else()
        await witness.numbers()
        if (None, False) in witness.worlds:
            again = await witness.create()
            assert again is not None
            assert again.status == 201
            witness.worlds = {(FIRST, True)}
            assert await witness.look()
        await witness.end()
        assert await daemon.stop() == 0
        assert "Traceback" not in daemon.log


@pytest.mark.parametrize("step", [step for step in STEPS if CATALOGUE[step.partition("@")[0]].error is not None])
async def test_a_daemon_that_meets_an_error_leaves_a_machine_or_nothing(bench: Bench, guests: dict[str, Guest], step: str) -> None:
    witness = Hasty(bench, guests["x86_64-q35-quiet"])
    name, _, number = step.partition("@")
    async with serving(bench, f"{name}:error@{number}") as daemon:
        assert await ready(daemon)
        reply = await witness.create()
        assert reply is not None
        assert reply.status in {201, 429, 502, 503, 504, 507}, reply
        witness.worlds = {(FIRST, True)} if reply.good else {(None, False), (FIRST, False)}
        assert await witness.look()
        await witness.numbers()
        await daemon.stop(signal.SIGKILL)
        assert f"failpoint passed failpoint={name}" in daemon.log
        assert "Traceback" not in daemon.log
    async with serving(bench) as daemon:
        await daemon.ready()
        assert await witness.look()
        await witness.nothing_else()
        await witness.end()
        assert await daemon.stop() == 0
