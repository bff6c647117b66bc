"""Commands in flight: order, deadlines, silence, and callers that go away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine

import pytest

from qmpd.calls import OOB_LIMIT, QUEUE_LIMIT
from qmpd.errors import Busy, MonitorUnavailable, QemuDied, QemuRefused, QemuSilent
from qmpd.monitor import Monitor, connected
from tests.process.emulator import PATIENCE_S
from tests.qmp.peer import GREETING, Peer, line

#: Passes at once: QEMU will not answer.
SHORT_S = 0.01


@pytest.fixture
async def callers() -> AsyncIterator[Callers]:
    started = Callers()
    yield started
    await started.leave()


class Callers:
    """Tasks that call, and end with the test."""

    def __init__(self) -> None:
        self._tasks: list[asyncio.Task[object]] = []

    def call(self, call: Coroutine[object, object, object]) -> asyncio.Task[object]:
        task = asyncio.create_task(call, name=f"caller {len(self._tasks)}")
        self._tasks.append(task)
        return task

    async def leave(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


async def received(peer: Peer) -> dict[str, object]:
    async with asyncio.timeout(PATIENCE_S):
        return await peer.received.get()


async def test_one_command_is_in_flight_and_the_others_follow_in_order(peer: Peer, fooled: Monitor, callers: Callers) -> None:
    calls = [callers.call(fooled.execute(f"c{number}")) for number in range(4)]
    for number, call in enumerate(calls):
        command = await received(peer)
        assert command["execute"] == f"c{number}"
        assert peer.received.empty()
        await peer.reply(command["id"], number)
        assert await call == number


async def test_out_of_band_commands_pass_the_queue(peer: Peer, fooled: Monitor, callers: Callers) -> None:
    blocked = [callers.call(fooled.execute("blocked")) for _ in range(20)]
    await received(peer)
    urgent = callers.call(fooled.execute_oob("yank", {"instances": []}))
    command = await received(peer)
    assert (command["exec-oob"], command["arguments"]) == ("yank", {"instances": []})
    await peer.reply(command["id"], "done")
    assert await urgent == "done"
    assert not any(call.done() for call in blocked)


async def test_an_overdue_command_makes_the_monitor_silent_until_its_late_answer(peer: Peer, fooled: Monitor) -> None:
    with pytest.raises(QemuSilent, match="no answer to stop in"):
        await fooled.execute("stop", deadline_s=SHORT_S)
    assert fooled.silent
    await fooled.wait_silent()
    await peer.reply((await received(peer))["id"])
    async with asyncio.timeout(PATIENCE_S):
        await fooled.wait_silent(False)
    assert not fooled.silent


async def test_a_late_answer_is_not_taken_for_the_next_commands(peer: Peer, fooled: Monitor, callers: Callers) -> None:
    with pytest.raises(QemuSilent):
        await fooled.execute("first", deadline_s=SHORT_S)
    second = callers.call(fooled.execute("second"))
    first = await received(peer)
    assert peer.received.empty()
    await peer.reply(first["id"], "late")
    await peer.reply((await received(peer))["id"], "in time")
    assert await second == "in time"


async def test_while_qemu_is_silent_a_caller_waits_for_its_own_deadline_only(peer: Peer, fooled: Monitor) -> None:
    with pytest.raises(QemuSilent):
        await fooled.execute("stop", deadline_s=SHORT_S)
    with pytest.raises(QemuSilent, match=r"cont was not sent in .* s, QEMU has not answered stop"):
        await fooled.execute("cont", deadline_s=SHORT_S)
    await received(peer)
    assert peer.received.empty()


async def test_an_event_or_an_out_of_band_answer_is_no_sign_of_life_of_the_main_loop(peer: Peer, fooled: Monitor, callers: Callers) -> None:
    with pytest.raises(QemuSilent):
        await fooled.execute("stop", deadline_s=SHORT_S)
    await received(peer)
    await peer.event("RESET")
    await anext(fooled.events())
    urgent = callers.call(fooled.execute_oob("query-yank"))
    await peer.reply((await received(peer))["id"])
    await urgent
    assert fooled.silent


async def test_an_overdue_out_of_band_command_makes_nothing_silent_and_its_late_answer_is_dropped(peer: Peer, fooled: Monitor) -> None:
    with pytest.raises(QemuSilent, match="query-yank"):
        await fooled.execute_oob("query-yank", deadline_s=SHORT_S)
    assert not fooled.silent
    await peer.reply((await received(peer))["id"])
    await peer.event("RESET")
    await anext(fooled.events())
    assert fooled.closed is None


async def test_a_caller_that_goes_away_does_not_lose_its_place_in_the_order(peer: Peer, fooled: Monitor, callers: Callers) -> None:
    gone, second = callers.call(fooled.execute("gone")), callers.call(fooled.execute("second"))
    command = await received(peer)
    gone.cancel()
    with pytest.raises(asyncio.CancelledError):
        await gone
    assert peer.received.empty()
    await peer.reply(command["id"], "for nobody")
    await peer.reply((await received(peer))["id"], "for the second")
    assert await second == "for the second"


async def test_a_caller_that_goes_away_while_queueing_is_never_sent(peer: Peer, fooled: Monitor, callers: Callers) -> None:
    first, gone, last = (callers.call(fooled.execute(name)) for name in ("first", "gone", "last"))
    command = await received(peer)
    gone.cancel()
    with pytest.raises(asyncio.CancelledError):
        await gone
    await peer.reply(command["id"])
    assert (await received(peer))["execute"] == "last"
    await first
    assert not last.done()


async def test_a_command_whose_caller_went_away_is_overdue_like_any_other(peer: Peer, fooled: Monitor, callers: Callers) -> None:
    gone = callers.call(fooled.execute("gone", deadline_s=SHORT_S))
    await received(peer)
    gone.cancel()
    async with asyncio.timeout(PATIENCE_S):
        await fooled.wait_silent()


async def test_three_hundred_callers_that_go_away_leave_nothing(peer: Peer, fooled: Monitor, callers: Callers) -> None:
    for _ in range(300):
        call = callers.call(fooled.execute("query-status"))
        command = await received(peer)
        call.cancel()
        await peer.reply(command["id"])
    answered = callers.call(fooled.execute("query-status"))
    await peer.reply((await received(peer))["id"], "still there")
    assert await answered == "still there"
    assert not fooled._calls._in_band


async def test_the_end_of_the_session_ends_every_call_and_says_that_nothing_is_known(peer: Peer, fooled: Monitor, callers: Callers) -> None:
    in_flight, queued = callers.call(fooled.execute("stop")), [callers.call(fooled.execute("cont")) for _ in range(3)]
    urgent = callers.call(fooled.execute_oob("query-yank"))
    await received(peer)
    await received(peer)
    silent = callers.call(fooled.wait_silent())
    await asyncio.sleep(0)
    peer.hang_up()
    with pytest.raises(QemuDied, match="before stop was answered: whether it took effect is unknown"):
        await in_flight
    with pytest.raises(QemuDied, match="before query-yank was answered"):
        await urgent
    for call in queued:
        with pytest.raises(QemuDied, match="before cont was sent"):
            await call
    with pytest.raises(MonitorUnavailable):
        await silent


async def test_the_queue_is_bounded(fooled: Monitor, callers: Callers) -> None:
    for _ in range(QUEUE_LIMIT + 1):
        callers.call(fooled.execute("query-status"))
    await asyncio.sleep(0)
    with pytest.raises(Busy, match="64 commands wait"):
        await fooled.execute("query-status")


async def test_out_of_band_commands_in_flight_are_bounded(fooled: Monitor, callers: Callers) -> None:
    for _ in range(OOB_LIMIT):
        callers.call(fooled.execute_oob("query-yank"))
    await asyncio.sleep(0)
    with pytest.raises(Busy, match="8 out-of-band"):
        await fooled.execute_oob("query-yank")


@pytest.mark.parametrize(
    "reply", [{}, {"error": "text"}, {"error": {}}, {"error": {"class": 1, "desc": 2}}], ids=["empty", "text", "no members", "numbers"]
)
async def test_an_answer_that_is_neither_value_nor_error_fails_that_call_only(
    peer: Peer, fooled: Monitor, callers: Callers, reply: dict[str, object]
) -> None:
    call = callers.call(fooled.execute("query-status"))
    await peer.send(line({**reply, "id": (await received(peer))["id"]}))
    with pytest.raises(QemuDied, match="neither a value nor an error"):
        await call
    assert fooled.closed is None


async def test_a_long_refusal_is_cut(peer: Peer, fooled: Monitor, callers: Callers) -> None:
    call = callers.call(fooled.execute("x"))
    error = {"class": "C" * 10_000, "desc": "d" * 10_000}
    await peer.send(line({"error": error, "id": (await received(peer))["id"]}))
    with pytest.raises(QemuRefused) as caught:
        await call
    assert sum(len(str(value)) for value in caught.value.details.values()) + len(caught.value.message) < 2000


async def test_a_qemu_without_out_of_band_commands_is_not_sent_any(directory: str) -> None:
    plain = {"QMP": {**GREETING["QMP"], "capabilities": []}}
    async with (
        Peer.listening(f"{directory}/plain", greeting=line(plain) + line({"return": {}})) as old,
        connected(old.path, name="test", peer_pid=None, deadline_s=PATIENCE_S) as monitor,
    ):
        assert not monitor.oob
        with pytest.raises(MonitorUnavailable, match="no out-of-band"):
            await monitor.execute_oob("query-yank")
