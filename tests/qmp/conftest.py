"""Fixtures of the QMP tests: real emulators, and peers that speak what no QEMU would."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, suppress
from pathlib import Path

import pytest

from qmpd import commands
from qmpd.errors import QemuSilent
from qmpd.monitor import Monitor, connected
from tests.process.emulator import PATIENCE_S, Emulator, Emulators, emulators_in
from tests.qmp.peer import Peer

#: A QEMU that has not answered by then never will, or the host is very busy: another one may.
FIRST_ANSWER_S = 10.0
STARTS = 3


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory whose name leaves room for socket paths, which tmp_path does not."""
    path = Path(tempfile.mkdtemp(prefix="q"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands that are to be answered may take as long as a busy host needs."""
    monkeypatch.setattr(commands, "QUERY_DEADLINE_S", PATIENCE_S)


@pytest.fixture
async def emulators(directory: Path, patient: None) -> AsyncIterator[Emulators]:
    """Starts QEMUs; kills them at the end."""
    async with emulators_in(directory) as started:
        yield started


@pytest.fixture
async def qemu(emulators: Emulators) -> Emulator:
    """A QEMU without a machine, halted, that answers.

    QEMU 7.2 loses what its very first client says, about once in some hundred starts, when that client waits already while the monitor
    is being moved to its own thread (GLib complains that a source has a context already). These tests are not about that.
    """
    for _ in range(STARTS - 1):
        started = await emulators.start()
        with suppress(QemuSilent):
            async with started.session(deadline_s=FIRST_ANSWER_S):
                return started
    return await emulators.start()


@pytest.fixture
async def monitor(qemu: Emulator) -> AsyncIterator[Monitor]:
    """A session with that QEMU."""
    async with qemu.session() as session:
        yield session


@pytest.fixture
async def peer(directory: Path) -> AsyncIterator[Peer]:
    """Something that listens where a QEMU would."""
    async with Peer.listening(str(directory / "peer")) as listening:
        yield listening


@pytest.fixture
async def fooled(peer: Peer, patient: None) -> AsyncIterator[Monitor]:
    """A session with the peer, which has behaved so far."""
    async with AsyncExitStack() as owned:
        yield await owned.enter_async_context(connected(peer.path, name="test", peer_pid=None, deadline_s=PATIENCE_S))
