"""Sessions with a real QEMU."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator

import pytest

from qmpd.errors import Invalid, MonitorUnavailable, QemuDied, QemuRefused, QemuSilent
from qmpd.monitor import EventsLost, Monitor, QmpEvent, connected
from qmpd.process import ExitStatus
from tests.process.emulator import PATIENCE_S, Emulator, Emulators, descriptors, quiet

pytestmark = pytest.mark.qemu


async def names(events: AsyncIterator[QmpEvent | EventsLost]) -> list[str]:
    async with asyncio.timeout(PATIENCE_S):
        return [event.name if isinstance(event, QmpEvent) else "lost" async for event in events]


async def test_a_session_knows_qemus_version_and_has_out_of_band_commands(monitor: Monitor) -> None:
    assert monitor.version.startswith(("7.", "8.", "9.", "10.", "11."))
    assert monitor.oob
    assert (monitor.silent, monitor.closed) == (False, None)


async def test_a_command_returns_its_value(monitor: Monitor) -> None:
    assert await monitor.execute("query-uuid") == {"UUID": "00000000-0000-0000-0000-000000000000"}
    assert await monitor.execute("qom-list", {"path": "/"}) != []


async def test_an_out_of_band_command_returns_its_value(monitor: Monitor) -> None:
    instances = await monitor.execute_oob("query-yank", deadline_s=PATIENCE_S)
    assert isinstance(instances, list)
    assert instances[0]["type"] == "chardev"


async def test_a_refusal_carries_qemus_class_and_words(monitor: Monitor) -> None:
    with pytest.raises(QemuRefused, match="has not been found") as caught:
        await monitor.execute("no-such-command")
    assert caught.value.details == {"class": "CommandNotFound", "desc": "The command no-such-command has not been found"}
    with pytest.raises(QemuRefused, match="does not support OOB"):
        await monitor.execute_oob("query-status")
    assert await monitor.execute("query-name") == {}


async def test_many_callers_are_answered_each_with_its_own_value(monitor: Monitor) -> None:
    answers = await asyncio.gather(*(monitor.execute("qom-get", {"path": "/machine", "property": "type"}) for _ in range(20)))
    assert set(map(str, answers)) == {"none-machine"}


async def test_events_arrive_in_order_and_end_with_the_session(qemu: Emulator) -> None:
    async with qemu.session() as monitor:
        await monitor.execute("cont")
        await monitor.execute("stop")
        reader = asyncio.create_task(names(monitor.events()), name="reader")
        with contextlib.suppress(QemuDied):  # QEMU may end before it answers
            await monitor.execute("quit")
        assert await reader == ["RESUME", "STOP", "SHUTDOWN"]
        assert monitor.closed == await monitor.wait_closed()
    assert await qemu.process.wait() == ExitStatus(code=0)


async def test_after_the_end_commands_are_refused_with_the_reason(qemu: Emulator) -> None:
    async with qemu.session() as monitor:
        with contextlib.suppress(QemuDied):  # QEMU may end before it answers
            await monitor.execute("quit")
        reason = await monitor.wait_closed()
        for attempt in (monitor.execute("query-status"), monitor.execute_oob("query-yank", deadline_s=PATIENCE_S), monitor.wait_silent()):
            with pytest.raises(MonitorUnavailable, match=reason.split(":", maxsplit=1)[0]):
                await attempt


async def test_leaving_frees_the_monitor_for_the_next_session_and_leaves_nothing_open(qemu: Emulator) -> None:
    async with qemu.session() as monitor:
        await monitor.execute("query-status")
        within = descriptors()
    assert monitor.closed == "qmpd closed the connection"
    for _ in range(5):
        async with qemu.session() as monitor:
            await monitor.execute("query-status")
            assert descriptors() == within
    await quiet()


async def test_a_second_session_gets_no_greeting_while_the_first_lasts(qemu: Emulator) -> None:
    async with qemu.session():
        with pytest.raises(QemuSilent, match="not ready"):
            async with qemu.session(deadline_s=0.2):
                pytest.fail("QEMU serves one at a time")
    async with qemu.session() as monitor:
        await monitor.execute("query-status")


def clients_until_refused(path: str, owned: contextlib.ExitStack) -> None:
    """Connect until the listener's backlog is full."""
    with contextlib.suppress(BlockingIOError):
        while True:
            sock = owned.enter_context(socket.socket(socket.AF_UNIX))
            sock.setblocking(False)
            sock.connect(path)


async def test_clients_beyond_qemus_backlog_are_turned_away(qemu: Emulator) -> None:
    with contextlib.ExitStack() as owned:
        async with qemu.session():
            clients_until_refused(qemu.qmp, owned)
            with pytest.raises(QemuSilent, match="too many wait"):
                async with qemu.session():
                    pytest.fail("there was no room")


async def test_a_socket_that_another_qemu_owns_is_not_spoken_to(emulators: Emulators) -> None:
    first, second = await emulators.start(), await emulators.start()
    async with first.session(), second.session():
        pass  # both have taken over their sockets
    stolen = connected(second.qmp, name="test", peer_pid=first.process.identity.pid, deadline_s=PATIENCE_S)
    with pytest.raises(MonitorUnavailable, match="belongs to process") as caught:
        async with stolen:
            pytest.fail("spoke to the wrong QEMU")
    assert caught.value.details == {"pid": second.process.identity.pid}
    async with second.session():
        pass  # nobody took its slot


async def test_a_path_that_was_removed_is_no_monitor(qemu: Emulator) -> None:
    os.unlink(qemu.qmp)  # noqa: PTH108
    with pytest.raises(MonitorUnavailable, match="No such file"):
        async with qemu.session():
            pytest.fail("there is no path")
    assert qemu.process.exit is None


async def test_a_path_that_is_too_long_is_no_monitor(qemu: Emulator) -> None:
    with pytest.raises(MonitorUnavailable, match="too long"):
        async with connected("/" + "x" * 200, name="test", peer_pid=None, deadline_s=PATIENCE_S):
            pytest.fail("cannot be")
    assert qemu.process.exit is None


async def test_a_caller_that_is_cancelled_while_connecting_leaves_nothing_open(qemu: Emulator) -> None:
    async with qemu.session():
        before = descriptors()
        task = asyncio.create_task(qemu.session().__aenter__(), name="connecting")
        for _ in range(5):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert descriptors() == before


async def test_an_argument_that_would_cost_the_session_is_refused_and_costs_nothing(monitor: Monitor) -> None:
    waiting = asyncio.create_task(monitor.execute("query-status"), name="bystander")
    for value in (float("nan"), float("inf"), "\ud800", "\uffff", "\U0010ffff", "\ufdd0"):
        with pytest.raises(Invalid):
            await monitor.execute("qom-get", {"path": value, "property": "type"})
    assert await waiting
    assert await monitor.execute("query-status")


@pytest.mark.parametrize("value", ["\0", "\x1b", "\ud7ff\ue000", "😀", -(2**63), 2**64 - 1, 1e308, 5e-324], ids=ascii)
async def test_the_values_at_the_edge_of_what_is_let_through_do_not_harm_qemu(monitor: Monitor, value: object) -> None:
    with pytest.raises(QemuRefused):
        await monitor.execute("qom-get", {"path": "/no/such/path", "property": "x", "more": [value]})
    with pytest.raises(QemuRefused):
        await monitor.execute("qom-get", {"path": f"/{value}", "property": "x"})
    assert await monitor.execute("query-status")


async def test_arguments_as_deep_as_they_may_be_do_not_harm_qemu(monitor: Monitor) -> None:
    value: dict[str, object] = {}
    for _ in range(60):
        value = {"a": value}
    with pytest.raises(QemuRefused):
        await monitor.execute("qom-get", value)
    assert await monitor.execute("query-status")
