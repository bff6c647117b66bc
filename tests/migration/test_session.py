"""The QEMU of a machine stays the same one to who drives it, also when the connection to its monitor is lost."""

from __future__ import annotations

import asyncio
import signal
from contextlib import suppress

import pytest

from qmpd.backlog import QmpEvent
from qmpd.errors import MigrationFailed, MonitorUnavailable
from qmpd.migration.addresses import UnixAddress
from qmpd.migration.outgoing import Outgoing, Sending, look
from qmpd.migration.qemu import Qemu
from qmpd.service import Service
from qmpd.session import Session
from tests.guests.build import Guest
from tests.machines import spec_of
from tests.migration.ends import Ends, attempt
from tests.process.emulator import PATIENCE_S

pytestmark = pytest.mark.qemu


@pytest.fixture
async def session(service: Service, guests: dict[str, Guest]) -> Session:
    """That of a running machine."""
    await service.create(spec_of(guests["x86_64-q35-quiet"], "one"), start=True)
    return service._registry.get("one").session


async def reconnected(session: Session) -> None:
    """Loses the connection, and waits until there is another one."""
    session.monitor._session.abort()
    await session.monitor.wait_closed()
    async with asyncio.timeout(PATIENCE_S):
        while True:
            try:
                await session.execute("query-status")
            except MonitorUnavailable:
                await asyncio.sleep(0.05)
            else:
                return


async def test_who_listens_hears_over_every_connection_and_is_told_of_the_gap(session: Session) -> None:
    heard: list[str] = []
    qemu: Qemu = session
    with qemu.hearing(lambda item: heard.append(item.name if isinstance(item, QmpEvent) else "lost")):
        await qemu.execute("stop")
        await reconnected(session)
        await qemu.execute("cont")
        await qemu.execute_oob("query-yank")
    await qemu.execute("stop")
    assert heard == ["STOP", "lost", "RESUME"]
    assert qemu.closed is None


async def test_it_is_closed_when_the_process_has_ended(session: Session) -> None:
    session.process.signal(signal.SIGKILL)
    await session.process.wait()
    assert session.closed is not None
    assert "SIGKILL" in session.closed
    with pytest.raises(MonitorUnavailable):
        await session.execute("query-status")


async def test_a_migration_outlasts_a_lost_connection(session: Session, ends: Ends) -> None:
    """It goes on inside QEMU; what happened meanwhile is asked."""
    before = await look(session)
    destination = UnixAddress(path=str(ends.directory / "nobody"))
    lost = False

    async def lose(step: str) -> None:
        nonlocal lost
        if step == "active" and not lost:
            lost = True
            await reconnected(session)

    callers: list[asyncio.StreamWriter] = []
    async with await asyncio.start_unix_server(lambda _reader, writer: callers.append(writer), destination.path):
        sending = Sending(memory=destination, bytes_per_s=20_000, stall_limit_s=3.0)
        with pytest.raises(MigrationFailed):
            await attempt(Outgoing(session, sending, before), lose)
        for caller in callers:
            caller.close()
            with suppress(ConnectionError):
                await caller.wait_closed()
    assert lost
    assert await look(session) == before
