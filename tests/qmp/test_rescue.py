"""A machine is started over its other monitor when the first is of no use: QEMU 7.2 may garble, or never hear, what it is told first."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path

import pytest

from qmpd import session as sessions
from qmpd.errors import LaunchFailed, QemuDied
from qmpd.lifecycle import Happening
from qmpd.monitor import Monitor, QmpEvent
from qmpd.process import ExitStatus
from qmpd.session import Session
from tests.process.emulator import PATIENCE_S, Emulator
from tests.qmp.peer import GREETING, Peer, line

pytestmark = pytest.mark.qemu

#: What a first monitor of no use says.
USELESS = {
    "garbled": line(GREETING) + line({"error": {"class": "GenericError", "desc": "JSON parse error"}}),
    "deaf": line(GREETING) + b" ",
}


class Unconcerned:
    """An owner that minds nothing."""

    def happen(self, happening: Happening) -> None: ...

    def set_status(self, status: str) -> None: ...

    def take_blocks(self, blocks: object) -> None: ...

    def take_event(self, event: QmpEvent) -> None: ...

    def set_trouble(self, reason: str) -> None: ...


async def not_told(status: ExitStatus) -> None:
    """It ends before anybody wants to know how."""


async def ends(monitor: Monitor) -> None:
    with suppress(QemuDied):  # QEMU may end before it answers
        await monitor.execute("quit")


def session_of(qemu: Emulator, first: str, other: str) -> Session:
    return Session(Unconcerned(), "test", qemu.process, {"qmp": first, "rescue": other}, qemu.stderr, "")


@pytest.mark.parametrize("said", USELESS.values(), ids=USELESS)
async def test_a_first_monitor_of_no_use_does_not_fail_a_start(
    qemu: Emulator, directory: Path, said: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "FIRST_ANSWER_S", 0.5)
    ready: list[bool] = []
    async with Peer.listening(str(directory / "first"), greeting=said) as first, asyncio.timeout(PATIENCE_S):
        await session_of(qemu, first.path, qemu.qmp).launch(ends, lambda: ready.append(True), not_told)
    assert (ready, qemu.process.exit) == ([True], ExitStatus(code=0))


async def test_a_start_without_a_monitor_of_use_fails_with_what_was_said(qemu: Emulator, directory: Path) -> None:
    said = USELESS["garbled"]
    async with (
        Peer.listening(str(directory / "first"), greeting=said) as first,
        Peer.listening(str(directory / "other"), greeting=said) as other,
    ):
        with pytest.raises(LaunchFailed, match=r"does not consent.*JSON parse error"):
            await session_of(qemu, first.path, other.path).launch(ends, lambda: pytest.fail("not ready"), not_told)
    assert qemu.process.exit is not None
